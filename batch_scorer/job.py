"""A run's settings with everything derived filled in."""

from dataclasses import dataclass
from pathlib import Path

from batch_scorer.config import Config, Device
from batch_scorer.models.adapter import Prompt
from batch_scorer.records import Embedding, Outputs


@dataclass(frozen=True, slots=True)
class Job:
    """A run's settings with everything derived filled in; the same on every worker."""

    config: Config
    model_dir: Path
    adapter: str
    prompt: Prompt
    backend: str
    outputs: Outputs
    embedding: Embedding | None
    device: Device
    dtype: str
    max_tokens: int
    fingerprint: str
    epoch: int
