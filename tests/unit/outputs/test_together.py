"""What several models' scores are together, against plain Python over one row at a time."""

from itertools import combinations
from statistics import fmean, pstdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.outputs.together import Together, together

NAN = float("nan")

scores = st.sampled_from([NAN, -2.0, -0.5, 0.0, 0.25, 3.0])
rows_of_models = st.integers(1, 4).flatmap(
    lambda models: st.lists(
        st.lists(st.lists(scores, min_size=models, max_size=models), max_size=5), max_size=6
    )
)
"""The answers of each row, each with the score of every model."""


def found(rows: list[list[list[float]]]) -> Together:
    answers = [answer for row in rows for answer in row]
    models = len(answers[0]) if answers else 1
    values = np.array(answers, np.float32).reshape(-1, models).T
    return together(values, np.cumsum([0, *map(len, rows)]))


def z_of(row: list[list[float]], place: int) -> float:
    """The mean over the models of the normalised score of one answer."""
    complete = [answer for answer in row if not np.isnan(answer).any()]
    if row[place] not in complete or len(complete) < 2:
        return NAN
    normalised = []
    for model in range(len(row[place])):
        own = [answer[model] for answer in complete]
        if len(set(own)) == 1:
            return NAN
        normalised.append((row[place][model] - fmean(own)) / pstdev(own))
    return fmean(normalised)


def disagreement_of(row: list[list[float]]) -> float:
    complete = [answer for answer in row if not np.isnan(answer).any()]
    if len(complete) < 2 or len(complete[0]) < 2:
        return NAN
    apart = []
    for one, other in combinations(complete, 2):
        orders = [(x > y) - (x < y) for x, y in zip(one, other, strict=True)]
        apart += [abs(a - b) / 2 for a, b in combinations(orders, 2)]
    return fmean(apart)


@given(rows_of_models)
def test_every_figure_is_that_of_plain_python(rows: list[list[list[float]]]) -> None:
    figures = found(rows)
    answers = [answer for row in rows for answer in row]
    for name, plain in (("mean", fmean), ("min", min), ("std", pstdev)):
        expected = [NAN if np.isnan(answer).any() else plain(answer) for answer in answers]
        np.testing.assert_allclose(getattr(figures, name), expected, rtol=1e-6, atol=1e-6)
    z = [z_of(row, place) for row in rows for place in range(len(row))]
    np.testing.assert_allclose(figures.z, z, rtol=1e-5, atol=1e-6)
    disagreement = [disagreement_of(row) for row in rows]
    np.testing.assert_allclose(figures.disagreement, disagreement, rtol=1e-6)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([[1, 5], [2, 6]], 0.0),  # the same order
        ([[1, 6], [2, 5]], 1.0),
        ([[1, 5], [2, 5]], 0.5),  # one of them has a tie
        ([[1, 5], [1, 5]], 0.0),  # both have
        ([[1, 1, 2], [2, 2, 1]], 2 / 3),  # two of three pairs of models
        ([[1, 6], [2, 5], [3, 7]], 1 / 3),  # one of three pairs of answers
        ([[1, 6], [2, NAN], [3, 7]], 0.0),  # an answer that not all have scored is left out
        ([[1, 6]], NAN),
        ([], NAN),
    ],
)
def test_disagreement_counts_pairs_of_models_and_answers(
    row: list[list[float]], expected: float
) -> None:
    (value,) = found([row]).disagreement
    assert value == pytest.approx(expected, nan_ok=True)


def test_many_answers_of_one_row_are_compared_in_parts() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((300, 3)).tolist() for _ in range(40)]
    figures = found(rows)
    assert [figures.disagreement[row] for row in (0, 39)] == pytest.approx(
        [disagreement_of(rows[row]) for row in (0, 39)], rel=1e-6
    )
