"""Any preference pairs, with chosen as the label: how often it scores higher, what the scores say
of how sure that is, and whose answers they prefer. Pure functions.

Legend: P pairs. `right` is the answer that the label prefers, `wrong` the other one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

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
WRITERS: Mapping[str, tuple[str, ...]] = {
    f"{side}_model": (f"{side}_model", f"{side}-model") for side in ("chosen", "rejected")
}
"""The columns that name the model that wrote an answer, as RewardBench and UltraFeedback's cleaned
pairs spell them."""
_BINS = np.linspace(0.5, 1.0, 11)


def evaluate(table: pa.Table) -> Evaluation:
    """Accuracy of P pairs, in any order, and by `source`.

    `table` has `score_chosen` and `score_rejected`, and `source` (null where rows have none). A
    pair earns 1 if chosen scores strictly higher and nothing else: not for a tie, which is counted
    beside it, and not without a score.
    """
    right, wrong = floats(table, "score_chosen"), floats(table, "score_rejected")
    is_unscored = np.isnan(right - wrong)
    credits = (right > wrong).astype(np.float64)
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


@dataclass(slots=True)
class CalibrationSums:
    """What scores say of how sure they are, against labels, added up some pairs at a time.

    `basis` is what the probabilities are made of, `probability` makes that of the right answer of
    the scores of both, float64[P] each. `bins` is float64[3, B]: pairs, the sum of how sure they
    are, and of how often the label agrees (a tie is half: no side is preferred, and the
    probability is a half), by the former. `squares` is the sum of the squared distances of the
    right answer's probability from 1.
    """

    basis: str
    probability: Callable[[FloatArray, FloatArray], FloatArray]
    bins: FloatArray = field(default_factory=lambda: np.zeros((3, len(_BINS) - 1)))
    squares: float = 0.0

    @classmethod
    def of_scores(cls, judge: Mapping[str, Any] | None) -> Self | None:
        """Without any pair yet; None for scores that say nothing of how sure they are.

        `judge` is a judge's page as JSON, None for a reward model. A pairwise judge's score is the
        probability that an answer is the better one. A reward model's margin is taken for the log
        odds of that, as Bradley and Terry have it, and so are the log odds of a judge's Yes to one
        answer less those to the other. Other grades of single answers say how good each is, and not
        how sure it is that one is better.
        """
        if judge is None:
            return cls("the sigmoid of the margin", _of_margins)
        if judge["mode"] == "pairwise":
            return cls("the judge's score", _of_right)
        if judge["mode"] == "pointwise" and _is_yes_or_no(judge["verdict"]):
            return cls("the odds of Yes", _of_odds)
        return None

    def add(self, right: FloatArray, wrong: FloatArray) -> None:
        """Count P pairs; those without both scores (NaN) are left out."""
        is_scored = ~np.isnan(right - wrong)
        found = self.probability(right[is_scored], wrong[is_scored])
        sure = np.maximum(found, 1 - found)
        places = np.clip(np.searchsorted(_BINS, sure, side="right") - 1, 0, len(_BINS) - 2)
        for line, weights in enumerate((np.ones(len(sure)), sure, _wins(found, 1 - found))):
            self.bins[line] += np.bincount(places, weights, minlength=len(_BINS) - 1)
        self.squares += float(((1 - found) ** 2).sum())

    def result(self) -> Calibration | None:
        """None before any pair."""
        if not (total := int(self.bins[0].sum())):
            return None
        bins = []
        for place, (pairs, sure, right) in enumerate(self.bins.T.tolist()):
            if pairs:
                low, high = (round(float(edge), 2) for edge in _BINS[place : place + 2])
                share = wilson(right / pairs, int(pairs))
                bins.append(Bin(low, high, int(pairs), sure / pairs, share))
        return Calibration(
            basis=self.basis,
            pairs=total,
            bins=bins,
            expected_error=sum(b.pairs * abs(b.right.value - b.sure) for b in bins) / total,
            brier=self.squares / total,
        )


def calibration_of(
    right: FloatArray, wrong: FloatArray, judge: Mapping[str, Any] | None
) -> Calibration | None:
    """What P scores say of how sure they are, as `CalibrationSums` has it; None where they say
    nothing."""
    if (sums := CalibrationSums.of_scores(judge)) is None:
        return None
    sums.add(right, wrong)
    return sums.result()


def _of_margins(right: FloatArray, wrong: FloatArray) -> FloatArray:
    return _sigmoid(right - wrong)


def _of_right(right: FloatArray, wrong: FloatArray) -> FloatArray:
    return right


def _of_odds(right: FloatArray, wrong: FloatArray) -> FloatArray:
    return _sigmoid(_log_odds(right) - _log_odds(wrong))


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
