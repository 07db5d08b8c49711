"""A run, from settings to totals: check the model, plan, subtract what is done, score, publish."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from batch_scorer import logs
from batch_scorer.backends.registry import BackendFactory
from batch_scorer.config import Config
from batch_scorer.errors import LeaseLostError, ShardReason, StorageError
from batch_scorer.inputs.plan import Plan
from batch_scorer.inputs.tables import ShardTable
from batch_scorer.job import AnyJob, Members
from batch_scorer.outputs.claim import claim_output, refuse_nights
from batch_scorer.outputs.lease import Lease, SeenLease, see_lease
from batch_scorer.outputs.ledger import Ledger
from batch_scorer.outputs.manifest import (
    REPORT_KEY,
    SUCCESS_KEY,
    Published,
    conclude,
    publish,
    published,
    read_engine,
    record_plan,
)
from batch_scorer.outputs.reuse import Earlier
from batch_scorer.parity import Sample, Samples, choose_sample
from batch_scorer.pipeline.loop import run_here
from batch_scorer.pipeline.ray_data import run_on_ray
from batch_scorer.pipeline.session import Pool, RaySession, worker_pool
from batch_scorer.records import Receipt, Shard
from batch_scorer.runs.derive import (
    as_begun,
    look_at_models,
    open_output,
    plan_for,
    require_answers,
    require_columns,
    require_template,
    settle,
)
from batch_scorer.runs.metrics import Metrics, Run, record_run, run_name
from batch_scorer.runs.remaining import Work, clear, make_room, remaining, remove_strays
from batch_scorer.runs.telemetry import Telemetry
from batch_scorer.storage import Store, open_store

log = logging.getLogger("batch_scorer")


class Listener(Protocol):
    """What follows a run."""

    def planned(self, work: Work) -> None: ...

    def finished(self, receipt: Receipt) -> None: ...


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended. `totals` as in `_SUCCESS`; `elapsed_s` and what follows are this run's own.

    `elapsed_s` is with starting up, `metrics` are of the shards that this run scored. `parity` is
    one worker's report (`parity.ParityReport`), of several models that of each under `models`; None
    where nothing was checked. `template` names what the chat template does to the rows without a
    word (`TemplateFacts.changes`).
    """

    output: str
    totals: dict[str, Any]
    receipts: list[Receipt]
    elapsed_s: float
    run: Run
    metrics: Metrics
    parity: dict[str, Any] | None = None
    template: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether no shard failed; shards left by `max_shards` do not count."""
        return bool(self.totals["shards_failed"] == 0)


def score(config: Config, *listeners: Listener, make: BackendFactory | None = None) -> Summary:
    """Score all inputs into the output; run it again to finish what was interrupted.

    `make` builds an engine of the caller's own in place of the one that the settings name; the
    fingerprint does not know it. Raises ConfigError, InputError, ModelError or OutputError before
    any work is done, and LeaseLostError if another run takes the output over. Failed shards do not
    raise: see `Summary.totals["shards_failed"]`.
    """
    members = look_at_models(config)
    seen = _lease_before(config)
    plan = plan_for(config, members)
    refuse_nights(open_output(config))
    with RaySession(config) as session:
        return score_plan(config, members, plan, session, listeners, seen=seen, make=make)


def score_plan(
    config: Config,
    members: Members,
    plan: Plan,
    session: RaySession,
    listeners: Sequence[Listener] = (),
    *,
    seen: SeenLease | None = None,
    max_shards: int | None = None,
    donors: Sequence[Earlier] = (),
    make: BackendFactory | None = None,
) -> Summary:
    """Score what the output lacks of a plan. Ray is started only if that is anything.

    `seen` is the lease from before the plan was made. Shards beyond the first `max_shards` are
    left, and `donors` are scored objects of other outputs whose rows may come back here. Raises as
    `score` does.
    """
    output = open_output(config)
    begun = as_begun(config, members, output)
    job = begun or settle(config, members, plan, session)
    for member in job.members.values():
        require_template(member, plan)
        require_answers(member, plan)
    require_columns(job.rewards, plan)
    claim_output(output, job.fingerprint, config.with_role("layout"), job.provenance)
    plan_digest = plan.digest(
        job.fingerprint.digest, config.column_prefix, retried=config.retry_marked
    )
    with (
        Lease(output, plan_digest, config.lease_s, seen) as lease,
        logs.fields(run=run_name(config.output, lease.epoch)),
    ):
        work = remaining(plan, job, output, epoch=lease.epoch, max_shards=max_shards)
        if begun and work.todo:
            job = settle(config, members, plan, session)
            claim_output(output, job.fingerprint, config.with_role("layout"), job.provenance)
        found = published(output)
        lease.confirm()  # after the look: whoever publishes from now on takes the lease first
        if work.todo or work.left or work.failed:
            # While there is work to do the output is not complete, and its page is of other rows.
            output.delete(SUCCESS_KEY)
            output.delete(REPORT_KEY)
            found = replace(found, success=None)
        work = make_room(work, job, output, donors)
        if plan.known is not None:
            plan.known.keep(plan.files, plan.aside.values())
        record_plan(output, len(plan.shards), plan.num_rows, plan.estimated_tokens)
        run = _set_out(job, lease.epoch, work)
        if work.todo:
            record_run(output, run, None)
        with ExitStack() as stack:
            if work.todo and config.use_ray:
                telemetry = Telemetry(run_name(config.output, lease.epoch), run)
                listeners = (*listeners, stack.enter_context(telemetry))
            for listener in listeners:
                listener.planned(work)
            return _run(job, run, work, output, lease, found, listeners, make)


def _lease_before(config: Config) -> SeenLease:
    """The lease before anything is planned; that of nobody also where there is no output yet."""
    try:
        return see_lease(open_store(config.output, config.store_options))
    except StorageError:
        return SeenLease(None)


def _set_out(job: AnyJob, epoch: int, work: Work) -> Run:
    pool = worker_pool(job) if work.todo else Pool(0, 0, 0)
    workers = pool.most * len(job.stages)
    costs = {
        name: member.model.cost if member.engine.runs_model else None
        for name, member in job.members.items()
    }
    return Run(
        epoch=epoch,
        shards=len(work.todo),
        rows=work.todo.total("num_rows"),
        estimated_tokens=work.todo.total("estimated_tokens"),
        workers=workers,
        devices=workers * job.config.devices_per_worker,
        cost=costs.pop("", None),
        costs=costs,
        token_prices={str(name): price for name, price in job.config.token_prices.items()},
        is_elastic=pool.is_elastic,
    )


def _run(
    job: AnyJob,
    run: Run,
    work: Work,
    output: Store,
    lease: Lease,
    found: Published,
    listeners: Sequence[Listener],
    make: BackendFactory | None,
) -> Summary:
    started = time.perf_counter()
    ledger = Ledger(output, lease.epoch, lease.holder_id)
    receipts = [*work.done, *work.gone, *work.left, *work.failed, *work.plan.not_asked]
    fresh: list[Receipt] = []
    metrics = Metrics()
    samples = _sampled(job, work.todo)
    try:
        for receipt in _attempt_all(job, lease.epoch, work.todo, samples, make):
            lease.check()
            if receipt.reason is ShardReason.SUPERSEDED:
                raise LeaseLostError(f"{output.root}: a newer run works here; this one stops")
            fresh.append(receipt.compact())
            metrics.add(receipt)
            ledger.add(receipt)
            for listener in listeners:
                listener.finished(receipt)
    finally:
        ledger.flush()
    lease.check()
    if work.todo:
        record_run(output, run, metrics.to_json(run))
    totals = publish(output, lease.epoch, job.fingerprint.digest, receipts + fresh, found)
    lease.close()
    remove_strays(lease.epoch, output, receipts + fresh)
    conclude(output, totals, found)
    clear(work, output, receipts + fresh)
    ours = [receipt for receipt in fresh if receipt.commit]
    engine = read_engine(output, ours[0].engine) if ours else {}
    return Summary(
        output=output.root,
        totals=totals,
        receipts=receipts + fresh,
        elapsed_s=time.perf_counter() - started,
        run=run,
        metrics=metrics,
        parity=_parity(engine),
        template=tuple(dict.fromkeys(_changes(job, samples.result()))),
    )


def _parity(engine: Mapping[str, Any]) -> dict[str, Any] | None:
    """What one worker found, by the record of what scored a shard; see `Summary.parity`."""
    if "models" not in engine:
        return engine.get("parity")
    found = {name: own["parity"] for name, own in engine["models"].items() if "parity" in own}
    return {"models": found} if found else None


def _changes(job: AnyJob, samples: Samples) -> Iterator[str]:
    """What the models' chat templates do to the sampled rows without a word."""
    for name, sample in samples.items():
        member = job.members[name]
        if facts := member.template_facts:
            said = f"{name}: " if name else ""
            for change in facts.changes(sample.covered, member.config.reasoning):
                yield f"{said}{change}"


def _sampled(job: AnyJob, todo: Sequence[Shard]) -> Future[Samples]:
    """`_samples`, in a thread, while workers start. A run that is stopped does not wait for it."""
    chosen: Future[Samples] = Future()

    def choose() -> None:
        try:
            chosen.set_result(_samples(job, todo))
        except BaseException as error:  # raised again where the samples are asked for
            chosen.set_exception(error)

    threading.Thread(target=copy_context().run, args=[choose], name="sample", daemon=True).start()
    return chosen


def _samples(job: AnyJob, todo: Sequence[Shard]) -> Samples:
    """The rows on which every worker has to agree with plain Hugging Face, by model."""
    samples: dict[str, Sample] = {}
    for name, member in job.members.items():
        if job.config.parity_check == "off" or not member.engine.runs_model or not todo:
            continue
        sample = choose_sample(member, todo)
        if sample is None:
            log.warning("none of the first rows can be scored: there is nothing to check them by")
        else:
            samples[name] = sample
    return samples


def _attempt_all(
    job: AnyJob,
    epoch: int,
    todo: ShardTable,
    samples: Future[Samples],
    make: BackendFactory | None,
) -> Iterator[Receipt]:
    """The final receipt of every shard; what the store refused is tried again after the rest."""
    run_all = run_on_ray if job.config.use_ray else run_here
    for attempt in range(1, job.config.attempts + 1):
        again: set[str] = set()
        todo = todo.in_scoring_order()
        for receipt in run_all(job, epoch, todo, samples, attempt, make):
            if receipt.reason and receipt.reason.may_pass and attempt < job.config.attempts:
                with logs.fields(shard=receipt.output_key, attempt=receipt.spent.retries + 1):
                    log.warning("%s: %s; will be tried again", receipt.input, receipt.detail)
                again.add(receipt.output_key)
            else:
                yield receipt
        places = [place for place, key in enumerate(todo.output_keys) if key in again]
        todo = todo.take(np.array(places, np.intp))
