"""From settings to a job: device, dtype, engine, fingerprint."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from batch_scorer.backends.device import cpu_has_bfloat16
from batch_scorer.config import Config, Device
from batch_scorer.errors import ConfigError, IncompleteError, ModelError, OutputError, StorageError
from batch_scorer.fingerprint import Fingerprint, score_fingerprint
from batch_scorer.inputs.plan import Plan
from batch_scorer.job import Job
from batch_scorer.models.directory import ModelFacts, find_model, inspect_model
from batch_scorer.models.embedding import embedding_of
from batch_scorer.models.registry import adapter_named
from batch_scorer.outputs.claim import claimed, claimed_fingerprint
from batch_scorer.pipeline.session import RaySession, has_gpus, on_worker
from batch_scorer.records import SCALAR, Embedding, Format, Outputs, TokenizedRows
from batch_scorer.render import Probe, renderer_of
from batch_scorer.runs.engine_choice import (
    is_raced,
    supported_engines,
    tokens_per_second,
    trial_rows,
)
from batch_scorer.storage import Store, open_store
from batch_scorer.version import __version__

log = logging.getLogger("batch_scorer")


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
        max_tokens=max_tokens_of(config, model),
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


def max_tokens_of(config: Config, model: ModelFacts) -> int:
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


def require_template(prepared: Prepared, plan: Plan) -> None:
    needs_none = {Format.TEXT, Format.TOKEN_IDS}
    if prepared.probe is None and any(f.layout.format not in needs_none for f in plan.files):
        renderer_of(prepared.job(epoch=0)).probe()  # raises: it says what is missing
