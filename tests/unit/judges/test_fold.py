"""From verdicts to scores, compared with a computation of the test's own."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.errors import RowReason
from batch_scorer.judges.fold import Folded, Verdicts, fold
from batch_scorer.judges.page import Page
from batch_scorer.records import Questions, RowError

LOST = RowError(RowReason.NO_VERDICT, "none")
WORTH = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


def page(mode: str, **more: Any) -> Page:
    verdict = {"by": "pattern", "pattern": "(.)", "choices": {"Y": 1, "N": 0}}
    return Page(
        about="a test", mode=mode, messages=({"role": "user", "content": "?"},),  # type: ignore[arg-type]
        **{"verdict": verdict, "generation": {"temperature": 1.0}, **more},
    )  # fmt: skip


def folded(
    asked: list[tuple[tuple[int, ...], int, Verdicts]],
    asked_by: Page,
    weights: tuple[float, ...] = (),
) -> Folded:
    """Of one row: the answers that each question shows, its criterion, and its verdicts."""
    count = 1 + max((place for places, _, _ in asked for place in places), default=-1)
    questions = Questions(
        response_offsets=np.array([0, count]),
        response_errors={},
        characters=np.ones(count, np.int64),
        shown=np.array([place for places, _, _ in asked for place in places], np.int64),
        shown_offsets=np.cumsum([0, *(len(places) for places, _, _ in asked)]),
        criteria=np.array([criterion for _, criterion, _ in asked], np.int64),
        votes=np.zeros(len(asked), np.int64),
        verdicts=np.ones(len(asked), np.int64),
        weights={0: weights},
    )
    verdicts = [found for _, _, found in asked]
    return fold(verdicts, questions, np.array([0, len(asked)]), asked_by)


@given(WORTH, WORTH)
def test_both_orders_of_a_pair(first: float, second: float) -> None:
    """`first` is what the one shown first got, in each order."""
    asked: list[tuple[tuple[int, ...], int, Verdicts]] = [
        ((0, 1), -1, [first]), ((1, 0), -1, [second])
    ]  # fmt: skip
    agrees = np.sign(first - 0.5) == np.sign(0.5 - second)
    mean = (first + 1 - second) / 2
    for inconsistent in ("mean", "tie", "null"):
        found = folded(asked, page("pairwise", inconsistent=inconsistent))
        assert found.consistency.tolist() == [float(agrees)]
        assert (found.comparisons, found.disagree) == (1, int(not agrees))
        if agrees or inconsistent == "mean":
            assert found.scores.tolist() == pytest.approx([mean, 1 - mean])
        elif inconsistent == "tie":
            assert found.scores.tolist() == [0.5, 0.5]
        else:
            assert np.isnan(found.scores).all()
            reasons = {error.reason for error in found.errors.values()}
            assert reasons == {RowReason.INCONSISTENT_VERDICTS} and set(found.errors) == {0, 1}


@given(st.lists(WORTH | st.just(None), min_size=6, max_size=6))
def test_a_group_s_score_is_the_mean_of_its_comparisons(worths: list[float | None]) -> None:
    orders = [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]
    found = folded(
        [
            (pair, -1, LOST if worth is None else [worth])
            for pair, worth in zip(orders, worths, strict=True)
        ],
        page("pairwise"),
    )
    both = [pair for pair in zip(worths[::2], worths[1::2], strict=True) if None not in pair]
    assert found.comparisons == len(both)
    for response in range(3):
        own = [
            None if worth is None else worth if pair[0] == response else 1 - worth
            for pair, worth in zip(orders, worths, strict=True)
            if response in pair
        ]
        if any(worth is None for worth in own):
            assert np.isnan(found.scores[response]) and found.errors[response] == LOST
        else:
            mean = sum(worth for worth in own if worth is not None) / len(own)
            assert found.scores[response] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("combine", "votes", "wanted"),
    [
        ("mean", [[1.0], [0.0], [1.0]], 2 / 3),
        ("majority", [[1.0], [0.0], [1.0]], 1.0),
        ("majority", [[1.0], [0.0]], 0.5),
        ("mean", [[1.0], LOST, [0.0]], 0.5),
        ("mean", [[1.0], LOST, LOST], None),
        ("mean", [[1.0], LOST], None),
    ],
)
def test_more_than_half_of_the_votes_are_needed(
    combine: str, votes: list[Verdicts], wanted: float | None
) -> None:
    asked: list[tuple[tuple[int, ...], int, Verdicts]] = [((0,), -1, vote) for vote in votes]
    found = folded(asked, page("pointwise", votes=len(votes), combine=combine))
    if wanted is None:
        assert found.errors == {0: LOST} and np.isnan(found.scores[0])
    else:
        assert found.scores[0] == pytest.approx(wanted) and not found.errors


def test_a_list_gives_each_answer_its_own() -> None:
    asked: list[tuple[tuple[int, ...], int, Verdicts]] = [((0, 1, 2), -1, [3.0, 1.0, 2.0])]
    verdict = {"by": "json", "low": 0, "high": 5}
    found = folded(asked, page("listwise", verdict=verdict, generation={}))
    assert found.scores.tolist() == [3.0, 1.0, 2.0]


WEIGHT = st.floats(-5, 5).filter(lambda weight: abs(weight) > 0.01)


@given(
    st.lists(st.tuples(WORTH, WEIGHT), min_size=1, max_size=5).filter(
        lambda pairs: any(weight > 0 for _, weight in pairs)
    )
)
def test_a_rubric_s_score_is_the_share_of_its_points(pairs: list[tuple[float, float]]) -> None:
    weights = tuple(weight for _, weight in pairs)
    most = sum(weight for weight in weights if weight > 0)
    wanted = sum(worth * weight for worth, weight in pairs) / most
    each = folded(
        [((0,), i, [worth]) for i, (worth, _) in enumerate(pairs)], page("rubric"), weights
    )
    verdict = {"by": "json", "choices": {"Y": 1, "N": 0}}
    together = folded(
        [((0,), -1, [worth for worth, _ in pairs])],
        page("rubric", criteria="together", verdict=verdict),
        weights,
    )
    assert each.scores[0] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert together.scores[0] == each.scores[0]


def test_weights_that_make_no_score_of_float32_are_a_bad_rubric() -> None:
    found = folded([((0,), 0, [1.0]), ((0,), 1, [1.0])], page("rubric"), (1e-300, -5.0))
    assert found.errors[0].reason is RowReason.BAD_RUBRIC and np.isnan(found.scores[0])


def test_a_criterion_without_a_verdict_costs_its_answer_alone() -> None:
    asked: list[tuple[tuple[int, ...], int, Verdicts]] = [
        ((0,), 0, [1.0]), ((0,), 1, LOST), ((1,), 0, [1.0]), ((1,), 1, [0.0])
    ]  # fmt: skip
    found = folded(asked, page("rubric"), (1.0, 1.0))
    assert found.errors == {0: LOST} and found.scores[1] == 0.5
