"""Score preference pairs and rollouts with a reward model: shards in, scored shards out.

from batch_scorer import load_config, score, verify

summary = score(load_config(model="my-model", inputs="pairs/", output="scored/"))
assert verify("scored/").exit_code == 0
"""

from typing import TYPE_CHECKING, Any

from batch_scorer.version import __version__ as __version__

if TYPE_CHECKING:
    from batch_scorer.api import score, score_rows
    from batch_scorer.config import Config, load_config
    from batch_scorer.decontamination.decontaminate import decontaminate
    from batch_scorer.evaluation.evaluate import evaluate
    from batch_scorer.inputs.plan import make_plan
    from batch_scorer.normalization.normalize import normalize
    from batch_scorer.normalization.recipe import Normalization
    from batch_scorer.outputs.verify import Verdict, verify
    from batch_scorer.runs.run import Summary
    from batch_scorer.runs.status import read_status
    from batch_scorer.selection.recipe import Selection
    from batch_scorer.selection.select import select

_HOMES = {
    "Config": "config",
    "Normalization": "normalization.recipe",
    "Selection": "selection.recipe",
    "Summary": "runs.run",
    "Verdict": "outputs.verify",
    "decontaminate": "decontamination.decontaminate",
    "evaluate": "evaluation.evaluate",
    "load_config": "config",
    "make_plan": "inputs.plan",
    "normalize": "normalization.normalize",
    "read_status": "runs.status",
    "select": "selection.select",
    "score": "api",
    "score_rows": "api",
    "verify": "outputs.verify",
}

__all__ = [
    "Config",
    "Normalization",
    "Selection",
    "Summary",
    "Verdict",
    "decontaminate",
    "evaluate",
    "load_config",
    "make_plan",
    "normalize",
    "read_status",
    "score",
    "score_rows",
    "select",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Looked up on first use: importing the package must not load Arrow and the rest.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
