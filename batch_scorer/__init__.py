"""Score preference pairs and rollouts with a reward model: shards in, scored shards out.

from batch_scorer import load_config, score, verify

summary = score(load_config(model="my-model", inputs="pairs/", output="scored/"))
assert verify("scored/").exit_code == 0
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from batch_scorer.config import Config, load_config
    from batch_scorer.evaluation.evaluate import evaluate
    from batch_scorer.plan import make_plan
    from batch_scorer.reports.status import read_status
    from batch_scorer.run import Summary, score
    from batch_scorer.verify import Verdict, verify

_HOMES = {
    "Config": "config",
    "Summary": "run",
    "Verdict": "verify",
    "evaluate": "evaluation.evaluate",
    "load_config": "config",
    "make_plan": "plan",
    "read_status": "reports.status",
    "score": "run",
    "verify": "verify",
}

__all__ = [
    "Config",
    "Summary",
    "Verdict",
    "evaluate",
    "load_config",
    "make_plan",
    "read_status",
    "score",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Looked up on first use: importing the package must not load Arrow and the rest.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
