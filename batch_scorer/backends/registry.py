"""The engines by name."""

from collections.abc import Callable
from typing import Any, TypeAlias

from batch_scorer.backends.base import Backend
from batch_scorer.job import Job
from batch_scorer.models.registry import adapter_named

BackendFactory: TypeAlias = Callable[[Job], Backend]
"""What builds the engine in each worker; tests and dry runs bring their own."""


def make_backend(job: Job) -> Backend:
    """The engine of this run. Raises ModelError, or MissingExtraError for what is not installed."""
    if job.backend == "fake":
        from batch_scorer.backends.fake import FakeBackend

        return FakeBackend()
    config = job.config
    shared: dict[str, Any] = {
        "adapter": adapter_named(job.adapter),
        "dtype": job.dtype,
        "device": job.device,
        "step_aggregation": config.step_aggregation,
        "embedding": job.embedding,
        "token_budget": config.token_budget,
        "compile": config.compile,
        "trust_remote_code": config.trust_remote_code,
    }
    if job.backend == "vllm":
        from batch_scorer.backends.vllm import VLLMBackend

        return VLLMBackend(
            job.model_dir,
            max_tokens=job.max_tokens,
            quantization=config.quantization,
            tensor_parallel=config.tensor_parallel,
            **shared,
        )
    from batch_scorer.backends.hf import HFBackend

    return HFBackend(job.model_dir, attention=config.attention, **shared)
