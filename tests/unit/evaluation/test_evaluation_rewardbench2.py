"""RewardBench 2 against worked examples."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batch_scorer.errors import InputError
from batch_scorer.evaluation.rewardbench2 import SUBSETS, Prompt, evaluate, ties

Lists = tuple[list[float], list[float]]


def prompts(scores: Mapping[str, Lists]) -> dict[str, Prompt]:
    return {number: prompt(*lists) for number, lists in scores.items()}


def prompt(correct: list[float], incorrect: list[float]) -> Prompt:
    return Prompt(np.array(correct, dtype=float), np.array(incorrect, dtype=float))


def table(rows: list[tuple[str, str, Any, Any]]) -> pa.Table:
    ids, subsets, chosen, rejected = zip(*rows, strict=True)
    return pa.table(
        {
            "id": list(ids),
            "subset": list(subsets),
            "scores_chosen": pa.array(chosen, pa.list_(pa.float32())),
            "scores_rejected": pa.array(rejected, pa.list_(pa.float32())),
        }
    )


A_REF = {"1": ([3.0], [1.0, 0.0]), "2": ([1.0], [2.0])}
A_TIED = {"1": ([4.0, 3.5], [1.0, 0.0]), "2": ([2.0, 2.0], [1.0])}


def test_the_subsets_are_the_1865_rows() -> None:
    assert sum(SUBSETS.values()) == 1865


def test_t_rb2_1_worked_example_a() -> None:
    found = ties(prompts(A_REF), prompts(A_TIED))
    assert found is not None
    assert (found.ref, found.tied, found.apart, found.both_apart) == (0.5, 1.0, 1.0, 0.5)
    assert found.margin == pytest.approx(-0.0024726, abs=5e-8)
    assert found.score == pytest.approx(0.7499753, abs=5e-8)


def test_t_rb2_1_worked_example_b_has_0_divided_by_0() -> None:
    found = ties(prompts({"1": ([3.0], [1.0])}), prompts({"1": ([2.0, 2.0], [2.0])}))
    assert found is not None
    assert (found.ref, found.tied, found.apart, found.both_apart) == (1.0, 0.0, 0.0, 0.0)
    assert found.margin == 0
    assert found.score == pytest.approx(0.3)


@pytest.mark.parametrize(("wrong", "margin"), [(1.0, 1.0), (3.0, -1.0)])
def test_t_rb2_1_a_spread_of_0_makes_the_margin_1_by_the_sign_of_the_gap(
    wrong: float, margin: float
) -> None:
    found = ties(prompts({"1": ([3.0], [0.0])}), prompts({"1": ([2.0, 2.0], [wrong])}))
    assert found is not None
    assert found.margin == margin


def test_a_tied_prompt_with_a_single_right_answer_has_spread_0() -> None:
    found = ties(prompts({"1": ([3.0], [0.0])}), prompts({"1": ([2.0], [1.0, 0.5])}))
    assert found is not None
    assert found.score == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01)


@pytest.mark.parametrize(
    ("correct", "incorrect", "credit"),
    [
        ([1.0], [0.0, 0.5, -1.0], 1.0),
        ([1.0], [1.0, 0.0, 0.0], 0.5),  # T-RB2-2
        ([1.0], [1.0, 1.0, 1.0], 0.25),
        ([1.0], [2.0, 2.0, 0.0], 0.0),  # T-RB2-2
        ([1.0, 2.0], [2.0, 0.0], 0.5),
        ([1.0], [float("nan"), 0.0, 0.0], 0.0),
        ([float("nan")], [0.0, 0.0, 0.0], 0.0),
        ([], [], 0.0),
    ],
)
def test_t_rb2_2_the_credit_is_shared_among_those_at_the_top(
    correct: list[float], incorrect: list[float], credit: float
) -> None:
    assert prompt(correct, incorrect).credit == credit


ROWS = [
    ("1", "Factuality", [1.0], [0.0, 0.5, -1.0]),
    ("2", "Factuality", [1.0], [1.0, 0.0, 0.0]),
    ("3", "precise if", [1.0], [2.0, 0.0, 0.0]),
    ("4", "Math", [1.0], [0.0, 0.0, 0.0]),
    ("5", "Safety", [1.0], [0.0, 0.0, 0.0]),
    ("6", "Focus", [1.0], [None, 0.0, 0.0]),
    ("7", "Focus", None, None),
    ("8", "Focus", [1.0], [0.0, 0.0, 0.0]),
    *[(f"ref:{n}", "ties", *lists) for n, lists in A_REF.items()],
    *[(f"tied:{n}", "Ties", *lists) for n, lists in A_TIED.items()],
]
EXPECTED = {
    "Factuality": 0.75, "Precise IF": 0, "Math": 1, "Safety": 1, "Focus": 1 / 3, "Ties": 0.7499753,
}  # fmt: skip


def test_t_rb2_4_ties_rows_have_any_number_of_answers_and_the_score_is_the_plain_mean() -> None:
    result = evaluate(table(ROWS))
    found = {name: e and e.value for name, e in result.columns.items()}
    assert found == pytest.approx({"Score": np.mean([*EXPECTED.values()]), **EXPECTED}, abs=5e-8)
    subsets = {s.name: s for s in result.subsets}
    assert (subsets["Focus"].rows, subsets["Focus"].unscored) == (3, 2)
    assert (subsets["Factuality"].ties, subsets["Ties"].rows) == (1, 4)
    assert subsets["Ties"].accuracy == result.columns["Ties"]
    assert result.details["ties"]["apart"] == 1.0
    assert result.missing == []


def test_t_rb2_3_the_order_of_the_rows_makes_no_difference() -> None:
    columns = evaluate(table(ROWS)).columns
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(ROWS))
        assert evaluate(table(ROWS).take(order)).columns == columns


def test_published_subsets_give_the_published_mean() -> None:
    """INF-ORM: six columns and their mean, to the tenth."""
    assert np.mean([74.1, 41.9, 69.9, 96.4, 90.3, 86.2]) == pytest.approx(76.5, abs=0.05)
    assert (67 / SUBSETS["Precise IF"], 129 / SUBSETS["Math"]) == pytest.approx(
        (0.419, 0.705), abs=5e-4
    )


def test_a_missing_subset_leaves_no_score() -> None:
    result = evaluate(table([row for row in ROWS if row[1] != "Math"]))
    assert result.columns["Score"] is None
    assert result.missing == ["Math"]


def test_prompts_of_ties_without_their_other_form_are_told() -> None:
    result = evaluate(table([row for row in ROWS if row[0] != "ref:2"]))
    assert "1 prompts of Ties have only one of their two forms" in result.notes
    alone = evaluate(table([row for row in ROWS if not row[0].startswith("ref")]))
    assert alone.columns["Ties"] is None
    assert alone.columns["Score"] is None


def test_a_ties_prompt_without_all_scores_fails_and_is_counted() -> None:
    rows = [("ref:1", "Ties", [3.0], [1.0]), ("tied:1", "Ties", [2.0, None], [1.0])]
    result = evaluate(table(rows))
    assert result.details["ties"] == {
        "ref": 1.0, "tied": 0.0, "apart": 0.0, "both_apart": 0.0, "margin": 0.0,
    }  # fmt: skip
    assert result.unscored == 1


@pytest.mark.parametrize(
    ("ids", "message"), [(["7"], "neither ref:<n>"), (["ref:1", "ref:1"], "appears twice")]
)
def test_a_strange_ties_id_is_refused(ids: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(table([(name, "Ties", [1.0], [0.0]) for name in ids]))
