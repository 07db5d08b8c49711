"""JudgeBench: which of two responses is right, by a label.

Source: ScalerLab/JudgeBench (README, run_judge.py, utils/metrics.py). A reward model scores each
response once, so the order of the two makes no difference; a judge's scores are of both orders.
"""

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from batch_scorer.errors import InputError
from batch_scorer.evaluation import Benchmark
from batch_scorer.evaluation.result import (
    NULL,
    Evaluation,
    FloatArray,
    floats,
    mean_of,
    notes_on,
    subsets_of,
    texts,
)

CATEGORIES: Mapping[str, str] = {
    "Knowledge": "mmlu-pro",
    "Reasoning": "livebench-reasoning",
    "Math": "livebench-math",
    "Coding": "livecodebench",
}
"""Category → what its sources begin with."""

A_WINS, B_WINS = "A>B", "B>A"


def category_of(source: str) -> str:
    """The category of a row's `source`, "" for none."""
    return next((c for c, prefix in CATEGORIES.items() if source.startswith(prefix)), "")


def right_and_wrong(table: pa.Table) -> tuple[FloatArray, FloatArray]:
    """float64[P] twice, the scores of the responses that the labels prefer, and of the others.
    Raises InputError for a label that is none."""
    labels = texts(table, "label")
    if strange := sorted(set(labels.tolist()) - {A_WINS, B_WINS}):
        raise InputError(f"label {strange[0]!r} is neither {A_WINS} nor {B_WINS}")
    a, b = floats(table, "score_a"), floats(table, "score_b")
    return np.where(labels == A_WINS, a, b), np.where(labels == A_WINS, b, a)


def evaluate(table: pa.Table) -> Evaluation:
    """JudgeBench of P pairs, in any order.

    `table` has `source`, `label`, `score_a` and `score_b`, and may have `response_model`. The
    response that the label prefers must score strictly higher: a tie is wrong, and so is a pair
    that lacks a score. Score is the accuracy over the pairs of all categories.
    Raises InputError for another label.
    """
    sources = texts(table, "source")
    right, wrong = right_and_wrong(table)
    lead = right - wrong
    credits = (lead > 0).astype(np.float64)
    categories = np.array([category_of(source) for source in sources.tolist()])
    of_category = {c: mean_of(credits[categories == c]) for c in CATEGORIES}
    is_complete = all(of_category.values())
    score = mean_of(credits[categories != ""]) if is_complete else None
    present = np.unique(sources).tolist()
    subsets = subsets_of(
        sources,
        credits,
        is_tie=lead == 0,
        is_unscored=np.isnan(lead),
        sections={s: category_of(s) for c in CATEGORIES for s in present if category_of(s) == c},
        published={},
    )
    notes, details = notes_on(subsets.values()), {}
    models = texts(table, "response_model") if "response_model" in table.column_names else None
    if models is not None and set(models.tolist()) != {NULL}:
        of_model = {m: mean_of(credits[models == m]) for m in np.unique(models).tolist()}
        details = {"by_response_model": {m: asdict(e) for m, e in of_model.items() if e}}
        if len(of_model) > 1:
            each = ", ".join(f"{m} {100 * e.value:.1f}" for m, e in of_model.items() if e)
            notes.append(f"several response models are pooled, published apart: {each}")
    return Evaluation(
        benchmark=Benchmark.JUDGEBENCH,
        columns={"Score": score, **of_category},
        subsets=list(subsets.values()),
        missing=[category for category, found in of_category.items() if found is None],
        notes=notes,
        details=details,
    )
