"""A run, from settings to totals: check the model, plan, subtract what is done, score, publish."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from batch_scorer import __version__
from batch_scorer.backends.device import cpu_has_bfloat16
from batch_scorer.config import Config, Device
from batch_scorer.errors import LeaseLostError, OutputError, ShardReason, StorageError
from batch_scorer.fingerprint import Fingerprint, score_fingerprint
from batch_scorer.lease import Lease
from batch_scorer.manifest import (
    SUCCESS_KEY,
    Ledger,
    Receipt,
    Shard,
    Status,
    claim_output,
    committed,
    is_record,
    known_receipts,
    publish,
    record_plan,
)
from batch_scorer.models.directory import ModelFacts, find_model, inspect_model
from batch_scorer.pipeline import has_gpus, num_workers, ray_session, run_here, run_on_ray
from batch_scorer.plan import Plan, make_plan
from batch_scorer.records import Format
from batch_scorer.render import Probe
from batch_scorer.shard import Job, renderer_of
from batch_scorer.storage import Store, open_store

log = logging.getLogger("batch_scorer")


class Listener(Protocol):
    """Who is told how a run goes."""

    def planned(self, work: "Work") -> None: ...

    def finished(self, receipt: Receipt) -> None: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job whose model and settings have been checked, before any input is read."""

    config: Config
    model: ModelFacts
    device: Device
    dtype: str
    max_tokens: int
    probe: Probe | None
    fingerprint: Fingerprint

    @property
    def provenance(self) -> dict[str, Any]:
        """What did the work, for the record; none of it enters the fingerprint."""
        return {
            "batch_scorer": __version__,
            "model": self.config.model,
            "architecture": self.model.architecture,
            "device": self.device,
            "rendered_probe": list(self.probe.texts) if self.probe else None,
        }

    def job(self, epoch: int) -> Job:
        return Job(
            config=self.config,
            model_dir=self.model.path,
            device=self.device,
            dtype=self.dtype,
            max_tokens=self.max_tokens,
            fingerprint=self.fingerprint.digest,
            epoch=epoch,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """What is left to do: a plan minus what is committed. `gone` are shards without an input."""

    plan: Plan
    todo: list[Shard]
    done: list[Receipt]
    gone: list[Receipt]


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended. `totals` as in `_SUCCESS`; `elapsed_s` and what follows are this run's own.

    `score_s` is time inside the backend, summed over workers; `scored_tokens` were committed by
    this run, `computed_tokens` went through the model for it.
    """

    output: str
    totals: dict[str, Any]
    receipts: list[Receipt]
    elapsed_s: float
    workers: int
    score_s: float = 0.0
    scored_tokens: int = 0
    computed_tokens: int = 0

    @property
    def is_complete(self) -> bool:
        return bool(self.totals["shards_failed"] == 0)


class _Silent:
    def planned(self, work: Work) -> None: ...

    def finished(self, receipt: Receipt) -> None: ...


def score(config: Config, listener: Listener | None = None) -> Summary:
    """Score all inputs into the output; run it again to finish what was interrupted.

    Raises ConfigError, InputError, ModelError or OutputError before any work is done, and
    LeaseLostError if another run takes the output over. Failed shards do not raise: see
    `Summary.totals["shards_failed"]`.
    """
    listener = listener or _Silent()
    model = inspect_model(find_model(config.model))
    plan = make_plan(config)
    output = open_output(config)
    with ray_session(config):
        prepared = prepare(config, model)
        _require_template(prepared, plan)
        claim_output(output, prepared.fingerprint, config.with_role("layout"), prepared.provenance)
        plan_digest = plan.digest(prepared.fingerprint.digest, config.column_prefix)
        with Lease(output, plan_digest, config.lease_s) as lease:
            job = prepared.job(lease.epoch)
            work = remaining(plan, job, output)
            if work.todo or plan.failed:
                output.delete(SUCCESS_KEY)  # while there is work to do the output is not complete
            record_plan(output, len(plan.shards), plan.num_rows, plan.estimated_tokens)
            listener.planned(work)
            return _run(job, work, output, lease, listener)


def prepare(config: Config, model: ModelFacts) -> Prepared:
    """Derive what the settings leave open. Raises ModelError for a tokenizer that fails."""
    device = config.device or (Device.CUDA if has_gpus(config) else Device.CPU)
    has_bfloat16 = device is Device.CUDA or cpu_has_bfloat16()
    dtype = config.dtype or ("bfloat16" if has_bfloat16 else "float32")
    max_tokens = min(config.max_tokens or model.max_tokens, model.max_tokens)
    settings = Prepared(config, model, device, dtype, max_tokens, None, Fingerprint({}))
    renderer = renderer_of(settings.job(epoch=0))
    probe = renderer.probe() if renderer.has_template else None
    fingerprint = score_fingerprint(
        config,
        model_digest=model.digest,
        dtype=dtype,
        max_tokens=max_tokens,
        probe_digest=probe.digest if probe else None,
    )
    return replace(settings, probe=probe, fingerprint=fingerprint)


def open_output(config: Config) -> Store:
    """The output store, made if it is a local folder. Raises OutputError."""
    try:
        return open_store(config.output, config.store_options, create=True)
    except StorageError as error:
        raise OutputError(str(error)) from error


def remaining(plan: Plan, job: Job, output: Store) -> Work:
    """Subtract what is committed under the same identity. Raises OutputError for foreign files."""
    wanted = {shard.output_key: shard for shard in plan.shards}
    inputs = {shard.source.key for shard in plan.shards}
    unusable = {receipt.input for receipt in plan.failed}
    objects = [info for info in output.list() if not is_record(info.key)]
    done: list[Receipt] = []
    gone: list[Receipt] = []
    stale: dict[str, Shard] = {}
    for info, receipt in committed(output, objects, known_receipts(output)):
        shard = wanted.get(info.key)
        if receipt is None or receipt.commit is None:
            if shard is not None:
                raise OutputError(
                    f"{output.url(info.key)} is in the way: it was not written by this program"
                )
            log.warning("%s is not ours; left alone", output.url(info.key))
        elif shard is None:
            # Cut differently than before: the rows come back under other names.
            if receipt.commit.input in inputs:
                output.delete(info.key)
            elif receipt.commit.input not in unusable:
                gone.append(replace(receipt, status=Status.INPUT_GONE))
        elif receipt.commit.identity == shard.identity(job.fingerprint, job.config.column_prefix):
            root = shard.source.root
            done.append(replace(receipt, status=Status.COMMITTED, input_root=root))
        else:
            stale[info.key] = replace(shard, replaces=info.version)
    finished = {receipt.output_key for receipt in done}
    todo = [stale.get(key, shard) for key, shard in wanted.items() if key not in finished]
    return Work(plan, todo, done, gone)


def _run(job: Job, work: Work, output: Store, lease: Lease, listener: Listener) -> Summary:
    started = time.perf_counter()
    ledger = Ledger(output, lease.epoch, lease.holder_id)
    receipts = [*work.done, *work.gone, *work.plan.failed]
    fresh: list[Receipt] = []
    try:
        for receipt in _attempt_all(job, work.todo):
            lease.check()
            if receipt.reason is ShardReason.SUPERSEDED:
                raise LeaseLostError(f"{output.root}: a newer run works here; this one stops")
            fresh.append(receipt)
            ledger.add(receipt)
            listener.finished(receipt)
    finally:
        ledger.flush()
    lease.check()
    totals = publish(output, lease.epoch, job.fingerprint, receipts + fresh)
    ours = [receipt for receipt in fresh if receipt.commit]
    return Summary(
        output=output.root,
        totals=totals,
        receipts=receipts + fresh,
        elapsed_s=time.perf_counter() - started,
        workers=num_workers(job),
        score_s=sum(receipt.score_s for receipt in ours),
        scored_tokens=sum(receipt.commit.tokens for receipt in ours if receipt.commit),
        computed_tokens=sum(receipt.computed_tokens for receipt in ours),
    )


def _attempt_all(job: Job, todo: list[Shard]) -> Iterator[Receipt]:
    """The final receipt of every shard; what the store refused is tried again after the rest."""
    run_all = run_on_ray if job.config.use_ray else run_here
    for attempt in range(1, job.config.attempts + 1):
        again: set[str] = set()
        # Longest first, so that the last shards to finish are short ones.
        todo = sorted(todo, key=lambda shard: (-shard.estimated_tokens, shard.output_key))
        for receipt in run_all(job, todo):
            if receipt.reason and receipt.reason.may_pass and attempt < job.config.attempts:
                log.warning("%s: %s; will be tried again", receipt.input, receipt.detail)
                again.add(receipt.output_key)
            else:
                yield receipt
        todo = [shard for shard in todo if shard.output_key in again]


def _require_template(prepared: Prepared, plan: Plan) -> None:
    rendered = {Format.TEXT, Format.TOKEN_IDS}
    if prepared.probe is None and any(f.layout.format not in rendered for f in plan.files):
        renderer_of(prepared.job(epoch=0)).probe()  # raises: it says what is missing
