"""A run, from settings to totals: check the model, plan, subtract what is done, score, publish."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from batch_scorer import __version__, logs
from batch_scorer.backends.device import cpu_has_bfloat16
from batch_scorer.columns import SCALAR, Outputs
from batch_scorer.commits import Receipt, Shard
from batch_scorer.config import Config, Device
from batch_scorer.errors import (
    ConfigError,
    IncompleteError,
    InputError,
    LeaseLostError,
    ModelError,
    OutputError,
    ShardReason,
    StorageError,
)
from batch_scorer.estimate import Estimate, estimate
from batch_scorer.fingerprint import Fingerprint, score_fingerprint
from batch_scorer.lease import ANY, Lease, lease_version
from batch_scorer.manifest import (
    SUCCESS_KEY,
    Ledger,
    Published,
    claim_output,
    claimed,
    claimed_fingerprint,
    conclude,
    publish,
    published,
    read_engine,
    record_plan,
    record_run,
    refuse_nights,
)
from batch_scorer.metrics import Metrics, Run, run_name
from batch_scorer.models.directory import ModelFacts, find_model, inspect_model
from batch_scorer.models.embedding import embedding_of
from batch_scorer.models.registry import adapter_named
from batch_scorer.parity import ParityReport, Sample, check_engine, choose_sample
from batch_scorer.pipeline import run_here, run_on_ray
from batch_scorer.plan import Plan, make_plan
from batch_scorer.records import Embedding, Format, TokenizedRows
from batch_scorer.render import Probe
from batch_scorer.reuse import Earlier
from batch_scorer.session import RaySession, has_gpus, num_workers, on_worker, ray_session
from batch_scorer.shard import Job, renderer_of
from batch_scorer.storage import Store, Version, open_store
from batch_scorer.telemetry import Telemetry
from batch_scorer.trial import is_raced, supported_engines, tokens_per_second, trial_rows
from batch_scorer.work import Work, clear, make_room, remaining, remove_strays

log = logging.getLogger("batch_scorer")


class Listener(Protocol):
    """Who is told how a run goes."""

    def planned(self, work: Work) -> None: ...

    def finished(self, receipt: Receipt) -> None: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job whose model and settings have been checked, before any input is read.

    `engines` are those that can run it, the first one does; `trial` their tokens per second
    where that decided.
    """

    config: Config
    model: ModelFacts
    engines: tuple[str, ...]
    embedding: Embedding | None
    device: Device
    dtype: str
    max_tokens: int
    probe: Probe | None
    fingerprint: Fingerprint
    trial: dict[str, float] | None = None

    @property
    def provenance(self) -> dict[str, Any]:
        """What did the work, for the record; none of it enters the fingerprint."""
        return {
            "batch_scorer": __version__,
            "model": self.config.model,
            "architecture": self.model.architecture,
            "adapter": self.model.adapter,
            "backend": self.engines[0],
            "trial_tokens_per_s": self.trial,
            "trust_remote_code": self.config.trust_remote_code,
            "device": self.device,
            "rendered_probe": list(self.probe.texts) if self.probe else None,
        }

    def job(self, epoch: int) -> Job:
        return Job(
            config=self.config,
            model_dir=self.model.path,
            adapter=self.model.adapter,
            prompt=adapter_named(self.model.adapter).prompt,
            backend=self.engines[0],
            outputs=outputs_of(self.config, self.model),
            embedding=self.embedding,
            device=self.device,
            dtype=self.dtype,
            max_tokens=self.max_tokens,
            fingerprint=self.fingerprint.digest,
            epoch=epoch,
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended. `totals` as in `_SUCCESS`; `elapsed_s` and what follows are this run's own.

    `elapsed_s` is with starting up, `metrics` are of the shards that this run scored. `parity` is
    one worker's report (`parity.ParityReport`), None where nothing was checked.
    """

    output: str
    totals: dict[str, Any]
    receipts: list[Receipt]
    elapsed_s: float
    run: Run
    metrics: Metrics
    parity: dict[str, Any] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all was done that the run was to do; what it was told to leave is not."""
        return bool(self.totals["shards_failed"] == 0)


def score(config: Config, *listeners: Listener) -> Summary:
    """Score all inputs into the output; run it again to finish what was interrupted.

    Raises ConfigError, InputError, ModelError or OutputError before any work is done, and
    LeaseLostError if another run takes the output over. Failed shards do not raise: see
    `Summary.totals["shards_failed"]`.
    """
    if config.also:
        raise ConfigError("also: `score` takes one model; `nightly` scores with several")
    model = look_at_model(config)
    seen = _lease_before(config)
    plan = make_plan(config, outputs_of(config, model))
    refuse_nights(open_output(config))
    with RaySession(config) as session:
        return score_plan(config, model, plan, session, listeners, seen=seen)


def score_plan(
    config: Config,
    model: ModelFacts,
    plan: Plan,
    session: RaySession,
    listeners: Sequence[Listener] = (),
    *,
    seen: Version | None = ANY,
    max_shards: int | None = None,
    donors: Sequence[Earlier] = (),
) -> Summary:
    """Score what the output lacks of a plan. Ray is started only if that is anything.

    `seen` is the lease from before the plan was made. Shards beyond the first `max_shards` are
    left, and `donors` are scored objects of other outputs whose rows may come back here. Raises as
    `score` does.
    """
    output = open_output(config)
    begun = as_begun(config, model, output)
    prepared = begun or settle(config, model, plan, session)
    _require_template(prepared, plan)
    claim_output(output, prepared.fingerprint, config.with_role("layout"), prepared.provenance)
    plan_digest = plan.digest(prepared.fingerprint.digest, config.column_prefix)
    with (
        Lease(output, plan_digest, config.lease_s, seen) as lease,
        logs.fields(run=run_name(config.output, lease.epoch)),
    ):
        work = remaining(plan, prepared.job(lease.epoch), output, max_shards)
        if begun and work.todo:
            prepared = settle(config, model, plan, session)
            layout = config.with_role("layout")
            claim_output(output, prepared.fingerprint, layout, prepared.provenance)
        job = prepared.job(lease.epoch)
        found = published(output)
        lease.confirm()  # after the look: whoever publishes from now on takes the lease first
        if work.todo or work.left or plan.failed:
            output.delete(SUCCESS_KEY)  # while there is work to do the output is not complete
            found = replace(found, success=None)
        work = make_room(work, job, output, donors)
        record_plan(output, len(plan.shards), plan.num_rows, plan.estimated_tokens)
        run = _set_out(job, prepared, work)
        if work.todo:
            record_run(output, run, None)
        with ExitStack() as stack:
            if work.todo and config.use_ray:
                telemetry = Telemetry(run_name(config.output, lease.epoch), run)
                listeners = (*listeners, stack.enter_context(telemetry))
            for listener in listeners:
                listener.planned(work)
            return _run(job, run, work, output, lease, found, listeners)


@dataclass(frozen=True, slots=True)
class Checked:
    """What `check` found: the settings it derived, the sample, and the comparison."""

    prepared: Prepared
    sample: Sample
    report: ParityReport


def check(config: Config) -> Checked:
    """Hold an engine against plain Hugging Face on a sample of the inputs.

    Under `backend: auto` that is the first engine that supports the model; nothing is raced.
    Writes nothing. Raises what `score` raises before its first shard, but not for scores that
    differ: see `Checked.report`.
    """
    model = look_at_model(config)
    plan = make_plan(config, outputs_of(config, model))
    with ray_session(config):
        prepared = prepare(config, model)
        _require_template(prepared, plan)
        job = prepared.job(epoch=0)
        sample = choose_sample(job, plan.shards)
        if sample is None:
            raise InputError(f"{', '.join(config.inputs)}: none of the first rows can be scored")
        return Checked(prepared, sample, on_worker(job, partial(check_engine, job, sample)))


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a run would do. Without an `estimate`, `unknown` says why; None: no model is named."""

    plan: Plan
    estimate: Estimate | None = None
    unknown: str | None = None


def look_ahead(config: Config, *, with_model: bool) -> Outlook:
    """Plan a run and, where the model is at hand, estimate what it takes from a sample of rows.

    Writes nothing, starts no Ray, fetches no model. Raises ConfigError and InputError.
    """
    if not with_model:
        return Outlook(make_plan(config))
    try:
        model = look_at_model(config, with_weights=False)
        plan = make_plan(config, outputs_of(config, model))
        job = Job(
            config=config,
            model_dir=model.path,
            adapter=model.adapter,
            prompt=adapter_named(model.adapter).prompt,
            backend=config.backend,
            outputs=outputs_of(config, model),
            embedding=None,
            device=Device.CPU,
            dtype="float32",
            max_tokens=_max_tokens(config, model),
            fingerprint="",
            epoch=0,
        )
        estimated = estimate(job, model, plan.shards)
    except ModelError as error:
        return Outlook(make_plan(config), unknown=str(error))
    unknown = None if estimated else "none of the sampled rows can be scored"
    return Outlook(plan, estimated, unknown)


def look_at_model(config: Config, *, with_weights: bool = True) -> ModelFacts:
    """Find the model and check that it can score, or embed.

    Without `with_weights` nothing is fetched, and the digest is left out. Raises ModelError, and
    ConfigError for a setting that this model has no use for.
    """
    model = inspect_model(
        find_model(config.model, with_code=config.trust_remote_code, fetch=with_weights),
        config.model,
        config.adapter,
        embeds=config.task == "embed",
        trust_remote_code=config.trust_remote_code,
        with_digest=with_weights,
    )
    if config.step_aggregation is not None and not model.has_steps:
        raise ConfigError(
            f"step_aggregation: {model.adapter} models give no step scores; leave it out"
        )
    return model


def outputs_of(config: Config, model: ModelFacts) -> Outputs:
    """What the job adds to a sequence."""
    if config.task == "embed":
        return Outputs(embedding_size=model.hidden_size)
    if config.backend == "fake":
        return SCALAR
    return Outputs(attributes=model.attributes, steps=model.has_steps)


def as_begun(config: Config, model: ModelFacts, output: Store) -> Prepared | None:
    """The job as it was when the output was begun, where the settings leave device, dtype or
    engine open; None if it is not begun, or was with other settings.

    Needs no Ray: what devices there are matters only to those who have something to score.
    """
    claim = claimed(output)
    if not claim:
        return None
    parts = claim["fingerprint"]
    then = config.model_copy(
        update={
            "device": config.device or Device(claim["provenance"]["device"]),
            "dtype": config.dtype or parts["dtype"],
        }
    )
    prepared = prepare(then, model, parts["backend"] if config.backend == "auto" else None)
    return prepared if prepared.fingerprint.digest == Fingerprint(parts).digest else None


def settle(config: Config, model: ModelFacts, plan: Plan, session: RaySession) -> Prepared:
    """Derive what the settings leave open from the devices there are, and from what the output was
    begun with."""
    session.start()
    return _with_engine(prepare(config, model), plan, open_output(config))


def prepare(config: Config, model: ModelFacts, engine: str | None = None) -> Prepared:
    """Derive what the settings leave open; `engine` overrules the setting `backend`.

    Raises ModelError for a tokenizer that fails or does not fit the model.
    """
    device = config.device or (Device.CUDA if has_gpus(config) else Device.CPU)
    has_bfloat16 = device is Device.CUDA or cpu_has_bfloat16()
    dtype = config.dtype or ("bfloat16" if has_bfloat16 else "float32")
    embedding = None
    if config.task == "embed":
        embedding = embedding_of(model.path, config.embedding_pooling, config.normalize)
    engines = supported_engines(config, model)
    settings = Prepared(
        config=config,
        model=model,
        engines=(engine,) if engine else tuple(engines),
        embedding=embedding,
        device=device,
        dtype=dtype,
        max_tokens=_max_tokens(config, model),
        probe=None,
        fingerprint=Fingerprint({}),
    )
    renderer = renderer_of(settings.job(epoch=0))
    if renderer.vocab_size > model.vocab_size:
        raise ModelError(
            f"{model.path}: the tokenizer knows {renderer.vocab_size} tokens, the model "
            f"{model.vocab_size}: they do not belong together"
        )
    probe = renderer.probe() if renderer.renders else None
    fingerprint = score_fingerprint(
        config,
        model_digest=model.digest,
        adapter=model.adapter,
        backend=settings.engines[0],
        embedding=(embedding.pooling, embedding.normalize) if embedding else None,
        dtype=dtype,
        max_tokens=settings.max_tokens,
        probe_digest=probe.digest if probe else None,
    )
    return replace(settings, probe=probe, fingerprint=fingerprint)


def _max_tokens(config: Config, model: ModelFacts) -> int:
    return min(config.max_tokens or model.max_tokens, model.max_tokens)


def _with_engine(prepared: Prepared, plan: Plan, output: Store) -> Prepared:
    """Settle `backend: auto`: as the output was begun, else by support, else by a race."""
    if len(prepared.engines) == 1:
        return prepared
    config, model = prepared.config, prepared.model
    begun_with = claimed_fingerprint(output).get("backend")
    if begun_with in prepared.engines:
        return prepare(config, model, begun_with)
    if not is_raced(prepared.engines, prepared.device, plan.estimated_tokens):
        return prepared
    rows = trial_rows(prepared.job(epoch=0), plan.shards)
    if rows is None:
        return prepared
    racing = {name: prepare(config, model, name) for name in prepared.engines}
    jobs = {name: candidate.job(epoch=0) for name, candidate in racing.items()}
    speeds = {name: _speed(job, rows) for name, job in jobs.items()}
    fastest = max(speeds, key=lambda name: speeds[name])
    log.info("tokens per second on the job's own rows: %s", speeds)
    return replace(racing[fastest], trial=speeds)


def _speed(job: Job, rows: TokenizedRows) -> float:
    """Tokens per second of the job's engine on a worker; 0 if it takes its process down."""
    try:
        return on_worker(job, partial(tokens_per_second, job, rows))
    except IncompleteError as error:
        log.warning("%s: %s", job.backend, error)
        return 0.0


def open_output(config: Config) -> Store:
    """The output store, made if it is a local folder. Raises OutputError."""
    try:
        return open_store(config.output, config.store_options, create=True)
    except StorageError as error:
        raise OutputError(str(error)) from error


def _lease_before(config: Config) -> Version | None:
    """The lease before anything is planned; None also where there is no output yet."""
    try:
        return lease_version(open_store(config.output, config.store_options))
    except StorageError:
        return None


def _set_out(job: Job, prepared: Prepared, work: Work) -> Run:
    workers = num_workers(job) if work.todo else 0
    return Run(
        epoch=job.epoch,
        shards=len(work.todo),
        rows=sum(shard.num_rows for shard in work.todo),
        estimated_tokens=sum(shard.estimated_tokens for shard in work.todo),
        workers=workers,
        devices=workers * job.config.tensor_parallel,
        cost=None if job.backend == "fake" else prepared.model.cost,
    )


def _run(
    job: Job,
    run: Run,
    work: Work,
    output: Store,
    lease: Lease,
    found: Published,
    listeners: Sequence[Listener],
) -> Summary:
    started = time.perf_counter()
    ledger = Ledger(output, lease.epoch, lease.holder_id)
    receipts = [*work.done, *work.gone, *work.left, *work.plan.failed]
    fresh: list[Receipt] = []
    metrics = Metrics()
    try:
        for receipt in _attempt_all(job, work.todo, _sample(job, work.todo)):
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
    totals = publish(output, lease.epoch, job.fingerprint, receipts + fresh, found)
    lease.close()
    remove_strays(job, output, receipts + fresh)
    conclude(output, totals, found)
    clear(work, output, receipts + fresh)
    ours = [receipt for receipt in fresh if receipt.commit]
    return Summary(
        output=output.root,
        totals=totals,
        receipts=receipts + fresh,
        elapsed_s=time.perf_counter() - started,
        run=run,
        metrics=metrics,
        parity=read_engine(output, ours[0].engine).get("parity") if ours else None,
    )


def _sample(job: Job, todo: list[Shard]) -> Sample | None:
    """The rows on which every worker has to agree with plain Hugging Face."""
    if job.config.parity_check == "off" or job.backend == "fake" or not todo:
        return None
    sample = choose_sample(job, todo)
    if sample is None:
        log.warning("none of the first rows can be scored: there is nothing to check them by")
    return sample


def _attempt_all(job: Job, todo: list[Shard], sample: Sample | None) -> Iterator[Receipt]:
    """The final receipt of every shard; what the store refused is tried again after the rest."""
    run_all = run_on_ray if job.config.use_ray else run_here
    for attempt in range(1, job.config.attempts + 1):
        again: set[str] = set()
        # Longest first, so that the last shards to finish are short ones.
        todo = sorted(todo, key=lambda shard: (-shard.estimated_tokens, shard.output_key))
        for receipt in run_all(job, todo, sample, attempt):
            if receipt.reason and receipt.reason.may_pass and attempt < job.config.attempts:
                with logs.fields(shard=receipt.output_key, attempt=receipt.retries + 1):
                    log.warning("%s: %s; will be tried again", receipt.input, receipt.detail)
                again.add(receipt.output_key)
            else:
                yield receipt
        todo = [shard for shard in todo if shard.output_key in again]


def _require_template(prepared: Prepared, plan: Plan) -> None:
    needs_none = {Format.TEXT, Format.TOKEN_IDS}
    if prepared.probe is None and any(f.layout.format not in needs_none for f in plan.files):
        renderer_of(prepared.job(epoch=0)).probe()  # raises: it says what is missing
