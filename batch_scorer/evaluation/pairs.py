"""Any preference pairs, with chosen as the label: how often it scores higher, what the scores say
of how sure that is, and whose answers they prefer. Pure functions.

Legend: P pairs. `right` is the answer that the label prefers, `wrong` the other one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_scorer.evaluation import Benchmark
from batch_scorer.evaluation.result import (
    NULL,
    Bin,
    Calibration,
    Estimate,
    Evaluation,
    FloatArray,
    Writer,
    floats,
    mean_of,
    notes_on,
    subsets_of,
    texts,
    wilson,
)
from batch_scorer.outputs.by_source import ALL_SOURCES, MAX_SOURCES

ACCURACY = "Accuracy"
UNSCORED = "Without a score"
_BINS = np.linspace(0.5, 1.0, 11)


def evaluate(table: pa.Table) -> Evaluation:
    """Accuracy of P pairs, in any order, and by `source`.

    `table` has `score_chosen` and `score_rejected`, and `source` (null where rows have none). A
    pair earns 1 if chosen scores higher, half for a tie, and nothing if it lacks a score.
    """
    right, wrong = floats(table, "score_chosen"), floats(table, "score_rejected")
    is_unscored = np.isnan(right - wrong)
    credits = _wins(right, wrong)
    subsets = subsets_of(
        sources := _sources(table),
        credits,
        is_tie=right == wrong,
        is_unscored=is_unscored,
        sections=dict.fromkeys(np.unique(sources).tolist(), ACCURACY),
        published={},
    )
    columns: dict[str, Estimate | None] = {
        ACCURACY: mean_of(credits),
        UNSCORED: mean_of(is_unscored.astype(np.float64)),
    }
    return Evaluation(
        benchmark=Benchmark.PAIRS,
        columns=columns,
        subsets=list(subsets.values()),
        missing=[],
        notes=notes_on(subsets.values()),
    )


def _wins(right: FloatArray, wrong: FloatArray) -> FloatArray:
    """float64[P]: 1 where right scores higher, half for a tie, 0 elsewhere."""
    return np.where(right == wrong, 0.5, right > wrong)


def _sources(table: pa.Table) -> npt.NDArray[np.str_]:
    """str[P], as the counts of a run have them: "all" where rows have no source, or too many."""
    found = texts(table, "source")
    distinct = set(found.tolist())
    if distinct <= {NULL} or len(distinct) > MAX_SOURCES:
        return np.full(len(found), ALL_SOURCES)
    return found


# How sure, and how often right


def calibration_of(
    right: FloatArray, wrong: FloatArray, judge: Mapping[str, Any] | None
) -> Calibration | None:
    """What P scores say of how sure they are, against the labels; None where they say nothing.

    `judge` is a judge's page as JSON, None for a reward model. A pairwise judge's score is the
    probability that an answer is the better one. A reward model's margin is taken for the log odds
    of that, as Bradley and Terry have it, and so are the log odds of a judge's Yes to one answer
    less those to the other. Other grades of single answers say how good each is, and not how sure
    it is that one is better.
    """
    is_scored = ~np.isnan(right - wrong)
    right, wrong = right[is_scored], wrong[is_scored]
    if not len(right):
        return None
    if judge is None:
        basis, found = "the sigmoid of the margin", _sigmoid(right - wrong)
    elif judge["mode"] == "pairwise":
        basis, found = "the judge's score", right
    elif judge["mode"] == "pointwise" and _is_yes_or_no(judge["verdict"]):
        basis, found = "the odds of Yes", _sigmoid(_log_odds(right) - _log_odds(wrong))
    else:
        return None
    sure = np.maximum(found, 1 - found)
    is_right = _wins(found, 1 - found)
    places = np.clip(np.searchsorted(_BINS, sure, side="right") - 1, 0, len(_BINS) - 2)
    bins = []
    for place in np.unique(places).tolist():
        here = places == place
        share = wilson(float(is_right[here].mean()), int(here.sum()))
        low, high = (round(float(edge), 2) for edge in _BINS[place : place + 2])
        bins.append(Bin(low, high, int(here.sum()), float(sure[here].mean()), share))
    return Calibration(
        basis=basis,
        pairs=len(found),
        bins=bins,
        expected_error=sum(b.pairs * abs(b.right.value - b.sure) for b in bins) / len(found),
        brier=float(((1 - found) ** 2).mean()),
    )


def _is_yes_or_no(rule: Mapping[str, Any]) -> bool:
    """Whether a verdict is the probability of one choice against another one."""
    return rule["by"] == "probability" and sorted(rule["choices"].values()) == [0.0, 1.0]


def _sigmoid(margins: FloatArray) -> FloatArray:
    return np.exp(-np.logaddexp(0.0, -margins))


def _log_odds(probabilities: FloatArray) -> FloatArray:
    """Of float32 values, in which what is next to 0 or 1 may be rounded to it."""
    least = float(np.finfo(np.float32).epsneg)
    held = np.clip(probabilities, least, 1 - least)
    return np.log(held / (1 - held))


# Whose answers


def writers_of(table: pa.Table, right: FloatArray, wrong: FloatArray) -> list[Writer]:
    """How often the answers of each model win, by score and by label, most pairs first.

    `table` has `chosen_model` and `rejected_model`, the models that wrote the answers, which are
    right and wrong. Pairs count where both models are named and differ, and both answers have a
    score.
    """
    of_right, of_wrong = texts(table, "chosen_model"), texts(table, "rejected_model")
    counts = (of_right != NULL) & (of_wrong != NULL) & (of_right != of_wrong)
    counts &= ~np.isnan(right - wrong)
    of_right, of_wrong = of_right[counts], of_wrong[counts]
    wins = _wins(right, wrong)[counts]
    writers = []
    for name in np.unique([*of_right, *of_wrong]).tolist():
        is_right, is_wrong = of_right == name, of_wrong == name
        own = np.concatenate([wins[is_right], 1 - wins[is_wrong]])
        share = wilson(float(own.mean()), len(own))
        writers.append(Writer(name, len(own), float(is_right.sum() / len(own)), share))
    return sorted(writers, key=lambda writer: (-writer.pairs, writer.name))
