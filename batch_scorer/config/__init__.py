"""What is asked for: every setting is in `settings.py`, on one page."""

from batch_scorer.config.engines import ENGINES, EngineFacts
from batch_scorer.config.reading import completed, expanded, load_config, load_partial_config
from batch_scorer.config.rewards import PARAMETERS, RewardSettings
from batch_scorer.config.settings import (
    IMPLICIT_REWARD,
    NO_REFERENCE,
    Config,
    Device,
    OverLength,
    PartialConfig,
)

__all__ = [
    "ENGINES",
    "IMPLICIT_REWARD",
    "NO_REFERENCE",
    "PARAMETERS",
    "Config",
    "Device",
    "EngineFacts",
    "OverLength",
    "PartialConfig",
    "RewardSettings",
    "completed",
    "expanded",
    "load_config",
    "load_partial_config",
]
