"""An engine by its name, which is also the name of its file; where it lets a judge write, of the
file `<name>_generation`."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias

from batch_scorer.backends.base import Backend, EngineSettings, ImplicitReward, MakeBackend
from batch_scorer.config import ENGINES, Config
from batch_scorer.job import Job
from batch_scorer.models.files import reading
from batch_scorer.models.registry import adapter_named

if TYPE_CHECKING:
    from batch_scorer.backends.endpoint_client import EndpointSettings

BackendFactory: TypeAlias = Callable[[Job], Backend]
"""What builds the engine in each worker; tests and dry runs bring their own."""


def settings_of(job: Job) -> EngineSettings:
    """What the engine of this run is started with."""
    # Looking the family up loads torch, which takes seconds.
    adapter = adapter_named(job.adapter) if ENGINES[job.backend].runs_model else None
    settings = EngineSettings(
        model_dir=job.model_dir,
        lora_dir=job.model.lora_dir,
        dtype=job.dtype,
        device=job.device,
        adapter=adapter,
        max_tokens=job.max_tokens,
        step_aggregation=job.config.step_aggregation,
        token_scores=job.config.token_scores,
        output_names=job.config.output_names,
        output_weights=job.config.output_weights,
        embedding=job.embedding,
        attention=job.attention,
        quantization=job.config.quantization,
        precision=job.config.precision,
        tensor_parallel=job.config.tensor_parallel,
        pipeline_parallel=job.config.pipeline_parallel,
        placement_group=job.placement_group,
        token_budget=job.config.token_budget,
        compile=job.config.compile,
        invariant=job.config.invariant,
        trust_remote_code=job.config.trust_remote_code,
        judge=job.model.judge,
        verdict_ids=job.model.verdict_ids,
        tokenizer_dir=job.model.tokenizer_path,
        endpoint=endpoint_of(job.config) if job.engine.is_served else None,
    )
    if adapter is None or not adapter.log_probs:
        return settings
    reference = None
    if (facts := job.model.reference) is not None:
        reference = replace(settings, model_dir=facts.path, lora_dir=facts.lora_dir)
    config = job.config
    return replace(
        settings, implicit=ImplicitReward(config.beta, config.length_normalize, reference)
    )


def import_engine(job: Job) -> MakeBackend:
    """The engine's class; torch and others are imported with it, which takes seconds. Raises
    MissingExtraError for what is not installed."""
    suffix = "_generation" if job.writes and job.engine.runs_model else ""
    make: MakeBackend = import_module(f"batch_scorer.backends.{job.backend}{suffix}").BACKEND
    return make


def make_backend(job: Job) -> Backend:
    """The engine of this run. Raises ModelError, or MissingExtraError for what is not installed."""
    make = import_engine(job)
    with reading(job.model_dir):
        return make(settings_of(job))


def endpoint_of(config: Config) -> "EndpointSettings":
    """Where a served judge is, and how hard it may be asked. Raises ConfigError."""
    # It loads aiohttp, which takes a tenth of a second, and most runs ask no server.
    from batch_scorer.backends.endpoint_client import EndpointSettings

    assert config.endpoint is not None
    return EndpointSettings(
        base_url=config.endpoint,
        model=config.one_model,
        api_key_env=config.api_key_env,
        api_key_file=config.api_key_file,
        concurrency=config.requests_in_flight,
        requests_per_minute=config.requests_per_minute,
        tokens_per_minute=config.tokens_per_minute,
        timeout_s=config.request_timeout_s,
        attempts=config.request_attempts,
    )
