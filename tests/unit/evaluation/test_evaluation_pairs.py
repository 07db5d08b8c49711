"""Any pairs: accuracy, what scores say of how sure they are, and whose answers they prefer."""

import math
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.evaluation import pairs
from batch_scorer.evaluation.result import Calibration, FloatArray, wilson
from batch_scorer.judges.page import load_page
from batch_scorer.outputs.by_source import MAX_SOURCES

PAIRWISE = load_page("pairwise").model_dump(mode="json")


Scored = tuple[float | None, float | None]
"""The scores of chosen and rejected."""


def table(rows: list[Scored], **columns: list[str | None]) -> pa.Table:
    chosen, rejected = zip(*rows, strict=True)
    return pa.table(
        {
            "source": pa.nulls(len(rows), pa.string()),
            "score_chosen": pa.array(chosen, pa.float32()),
            "score_rejected": pa.array(rejected, pa.float32()),
        }
        | columns
    )


def calibration(probabilities: list[float]) -> Calibration:
    """Of a pairwise judge that gave the right answers these."""
    right = np.array(probabilities)
    found = pairs.calibration_of(right, 1 - right, PAIRWISE)
    assert found is not None
    return found


def test_a_tie_and_a_missing_score_are_misses() -> None:
    rows: list[Scored] = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (None, 0.0), (2.0, 1.0)]
    found = pairs.evaluate(table(rows))
    assert found.columns["Accuracy"] == wilson(2 / 5, 5)
    assert found.columns["Without a score"] == wilson(1 / 5, 5)
    (subset,) = found.subsets
    assert (subset.name, subset.rows, subset.ties, subset.unscored) == ("all", 5, 1, 1)
    assert found.notes == ["1 of 5 rows lack a score and count as wrong"]


def test_sources_are_told_apart() -> None:
    rows: list[Scored] = [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0)]
    found = pairs.evaluate(table(rows, source=["web", "web", None]))
    shares = {each.name: each.accuracy and each.accuracy.value for each in found.subsets}
    assert shares == {"(null)": 1.0, "web": 0.5}
    many = [f"source {number}" for number in range(MAX_SOURCES + 1)]
    found = pairs.evaluate(table([(1.0, 0.0)] * len(many), source=[*many]))
    assert [each.name for each in found.subsets] == ["all"]


def test_a_worked_example() -> None:
    """Sure of 0.9 twice, right once; of 0.6 twice, right twice; and a tie."""
    found = calibration([0.9, 0.1, 0.6, 0.6, 0.5])
    assert [(b.low, b.high, b.pairs) for b in found.bins] == [
        (0.5, 0.55, 1), (0.6, 0.65, 2), (0.9, 0.95, 2)
    ]  # fmt: skip
    assert [b.sure for b in found.bins] == pytest.approx([0.5, 0.6, 0.9])
    assert [b.right for b in found.bins] == [wilson(0.5, 1), wilson(1.0, 2), wilson(0.5, 2)]
    assert found.expected_error == pytest.approx((1 * 0 + 2 * 0.4 + 2 * 0.4) / 5)
    assert found.brier == pytest.approx((0.01 + 0.81 + 0.16 + 0.16 + 0.25) / 5)
    assert found.pairs == 5 and found.basis == "the judge's score"


def test_the_surest_is_in_the_last_bin() -> None:
    (only,) = calibration([1.0, 0.0]).bins
    assert (only.low, only.high, only.pairs, only.right.value) == (0.95, 1.0, 2, 0.5)


PROBABILITIES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@given(PROBABILITIES)
def test_the_bins_hold_all_pairs_and_the_figures_are_bounded(values: list[float]) -> None:
    found = calibration(values)
    assert sum(b.pairs for b in found.bins) == found.pairs == len(values)
    for b in found.bins:
        assert b.low <= b.sure + 1e-9 and b.sure <= b.high + 1e-9
    assert 0 <= found.expected_error <= 1 and 0 <= found.brier <= 1
    right = sum(b.pairs * b.right.value for b in found.bins)
    assert right == pytest.approx(sum(v > 0.5 for v in values) + 0.5 * values.count(0.5))


def test_a_judge_that_says_what_is_so_has_no_error() -> None:
    """Of 20,000 pairs that are right as often as it says."""
    random = np.random.default_rng(0)
    sure = random.uniform(0.5, 1, 20_000)
    right = np.where(random.uniform(size=20_000) < sure, sure, 1 - sure)
    assert calibration(right.tolist()).expected_error < 0.02
    boasting = np.where(right > 0.5, 0.99, 0.01)
    assert calibration(boasting.tolist()).expected_error > 0.2


def test_a_reward_model_s_margin_is_the_log_odds() -> None:
    def array(*values: float) -> FloatArray:
        return np.array(values)

    found = pairs.calibration_of(array(1.0, -2.0, 1e4, math.nan), array(0.0, 1.0, -1e4, 0.0), None)
    assert found is not None and found.basis == "the sigmoid of the margin"
    odds = [1 / (1 + math.exp(-margin)) for margin in (1.0, -3.0)]
    assert found.pairs == 3
    assert found.brier == pytest.approx(sum((1 - p) ** 2 for p in odds) / 3)


@pytest.mark.parametrize("name", ["helpful", "safety"])
def test_a_judge_s_yes_and_no_are_odds(name: str) -> None:
    judge = load_page(name).model_dump(mode="json")
    right, wrong = np.array([0.9, 0.2, 1.0, 1.0]), np.array([0.8, 0.5, 1.0, 0.0])
    found = pairs.calibration_of(right, wrong, judge)
    assert found is not None and found.basis == "the odds of Yes"
    # Odds of 9 to 4, of 1 to 4, equal ones, and as sure as float32 can be.
    probable = [9 / 13, 1 / 5, 1 / 2, 1.0]
    assert found.brier == pytest.approx(sum((1 - p) ** 2 for p in probable) / 4)


@pytest.mark.parametrize("name", ["grade", "ratings", "rubric", "rubric_together"])
def test_other_grades_of_single_answers_say_nothing_of_how_sure_they_are(name: str) -> None:
    judge = load_page(name).model_dump(mode="json")
    assert pairs.calibration_of(np.array([5.0]), np.array([1.0]), judge) is None


def test_without_any_score_there_is_nothing_to_calibrate() -> None:
    nothing = np.array([math.nan])
    assert pairs.calibration_of(nothing, nothing, PAIRWISE) is None


def test_writers_win_by_label_and_by_score() -> None:
    rows: list[tuple[float | None, float | None, str | None, str | None]] = [
        (1.0, 0.0, "a", "b"),
        (0.0, 1.0, "b", "a"),  # the label is for b, the score for a
        (0.5, 0.5, "b", "c"),
        (1.0, 0.0, "a", "a"),
        (1.0, 0.0, "a", None),
        (None, 0.0, "a", "b"),
    ]
    chosen, rejected, of_right, of_wrong = map(list, zip(*rows, strict=True))
    right, wrong = (np.array(side, float) for side in (chosen, rejected))
    named = pa.table({"chosen_model": of_right, "rejected_model": of_wrong})
    found = [asdict(writer) for writer in pairs.writers_of(named, right, wrong)]
    assert [(f["name"], f["pairs"], f["won_by_label"]) for f in found] == [
        ("b", 3, 2 / 3), ("a", 2, 1 / 2), ("c", 1, 0.0)
    ]  # fmt: skip
    assert [f["won_by_score"]["value"] for f in found] == [0.5 / 3, 1.0, 0.5]


def test_without_two_models_there_are_no_writers() -> None:
    named = pa.table({"chosen_model": pa.nulls(1, pa.string()), "rejected_model": ["a"]})
    assert pairs.writers_of(named, np.ones(1), np.zeros(1)) == []


def test_calibration_adds_up_some_pairs_at_a_time() -> None:
    random = np.random.default_rng(4)
    right, wrong = random.normal(size=(2, 1_000))
    right[::7] = wrong[::7]
    right[3] = math.nan
    whole = pairs.calibration_of(right, wrong, None)
    sums = pairs.CalibrationSums.of_scores(None)
    assert whole is not None and sums is not None and sums.result() is None
    for first in range(0, 1_000, 130):
        sums.add(right[first : first + 130], wrong[first : first + 130])
    found = sums.result()
    assert found is not None
    assert [(b.pairs, b.right) for b in found.bins] == [(b.pairs, b.right) for b in whole.bins]
    assert (found.expected_error, found.brier) == pytest.approx((whole.expected_error, whole.brier))
