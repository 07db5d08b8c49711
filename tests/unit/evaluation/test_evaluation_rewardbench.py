"""RewardBench 1 against worked examples."""

import math

import numpy as np
import pyarrow as pa
import pytest

from batch_scorer.evaluation.result import Estimate, Evaluation
from batch_scorer.evaluation.rewardbench import (
    PRIOR_SETS,
    PUBLISHED_ROWS,
    SECTIONS,
    columns_of,
    evaluate,
    section_scores,
    subset_weights,
)

RIGHT = {
    "alpacaeval-easy": 50, "alpacaeval-length": 56, "alpacaeval-hard": 67,
    "mt-bench-easy": 16, "mt-bench-med": 29, "mt-bench-hard": 20,
    "llmbar-natural": 52, "llmbar-adver-neighbor": 58, "llmbar-adver-GPTInst": 36,
    "llmbar-adver-GPTOut": 22, "llmbar-adver-manual": 17,
    "refusals-dangerous": 97, "refusals-offensive": 100, "xstest-should-refuse": 154,
    "xstest-should-respond": 71, "donotanswer": 112,
    "math-prm": 132, "hep-cpp": 103, "hep-go": 104, "hep-java": 116, "hep-js": 109,
    "hep-python": 90, "hep-rust": 106,
}  # fmt: skip
"""Right pairs by subset of beaver-7b-v1.0-cost, as the README of allenai/reward-bench shows it."""

SEED_TABLE = {
    "Skywork-Reward-Gemma-2-27B": (95.8, 91.4, 92.0, 96.1, 93.8),
    "SFR-LLaMa-3.1-70B-Judge-r": (96.9, 84.8, 92.2, 97.6, 92.8),
    "Skywork-Reward-Llama-3.1-8B": (95.8, 87.3, 90.6, 96.2, 92.5),
    "Nemotron-4-340B-Reward": (95.8, 87.1, 92.2, 93.6, 92.2),
    "ArmoRM-Llama3-8B-v0.1": (96.9, 76.8, 92.2, 97.3, 90.8),
    "SFR-nemo-12B-Judge-r": (97.2, 82.2, 87.5, 95.1, 90.5),
    "internlm2-20b-reward": (98.9, 76.5, 89.9, 95.8, 90.3),
}
"""Chat, Chat Hard, Safety, Reasoning, Score: the table of Skywork-Reward's model card."""


def pairs(right: dict[str, int], rows: dict[str, int] | None = None) -> pa.Table:
    """Scored pairs, `right` of each subset's rows with chosen higher, in a shuffled order."""
    rows = rows or dict(PUBLISHED_ROWS)
    subsets = np.repeat(list(right), [rows[name] for name in right])
    wins = np.concatenate([np.arange(rows[name]) < count for name, count in right.items()])
    order = np.random.default_rng(1).permutation(len(wins))
    return pa.table(
        {
            "subset": pa.array(subsets[order].tolist(), pa.large_string()),
            "score_chosen": pa.array(np.where(wins, 1.0, -1.0)[order], pa.float32()),
            "score_rejected": pa.array(np.zeros(len(wins)), pa.float32()),
        }
    )


def values(result: Evaluation) -> dict[str, float | None]:
    return {name: None if found is None else found.value for name, found in result.columns.items()}


def estimate(value: float) -> Estimate:
    return Estimate(value, value, value)


def test_the_subsets_are_the_2985_rows_of_the_filtered_split() -> None:
    assert sum(map(sum, (rows.values() for rows in SECTIONS.values()))) == 2985
    assert [sum(rows.values()) for rows in SECTIONS.values()] == [358, 456, 740, 1431]
    weights = subset_weights()
    assert sum(weights[name] for name in SECTIONS["Reasoning"]) == 1968


def test_t_rb_1_the_worked_example() -> None:
    assert values(evaluate(pairs(RIGHT))) == pytest.approx(
        {
            "Score": 0.5617196,
            "Chat": 0.6089385,
            "Chat Hard": 0.4495614,
            "Safety": 0.7216216,
            "Reasoning": 0.4667567,
        },
        abs=5e-8,
    )


def test_t_rb_1_with_the_legacy_xstest_weights() -> None:
    result = evaluate(pairs(RIGHT), legacy_xstest_weights=True)
    found = values(result)
    assert (found["Safety"], found["Score"]) == pytest.approx((0.8145081, 0.5849412), abs=5e-8)
    assert "xstest" in result.notes[0]


def test_t_rb_1_math_weighted_by_its_rows_would_be_another_number() -> None:
    accuracies = {name: estimate(n / PUBLISHED_ROWS[name]) for name, n in RIGHT.items()}
    by_rows = section_scores(accuracies, {**subset_weights(), "math-prm": 447})["Reasoning"]
    assert by_rows is not None
    assert by_rows.value == pytest.approx(0.5310971, abs=5e-8)


def test_t_rb_2_equal_scores_are_wrong() -> None:
    table = pa.table({"subset": ["hep-go"] * 3, "score_chosen": [1.0, 1.0, 2.0]})
    result = evaluate(table.append_column("score_rejected", pa.array([1.0, 1.0, 1.0])))
    (subset,) = result.subsets
    assert subset.accuracy is not None
    assert subset.accuracy.value == pytest.approx(1 / 3)
    assert (subset.ties, subset.unscored) == (2, 0)


def test_t_rb_3_a_missing_subset_is_named_and_does_not_dilute_its_section() -> None:
    without = {name: n for name, n in RIGHT.items() if name != "hep-cpp"}
    result = evaluate(pairs(without))
    assert result.missing == ["hep-cpp"]
    expected = (984 * 132 / 447 + 104 + 116 + 109 + 90 + 106) / (984 + 5 * 164)
    assert values(result)["Reasoning"] == pytest.approx(expected)


def test_t_rb_3_a_missing_section_is_missing_and_so_is_the_score() -> None:
    without = {name: n for name, n in RIGHT.items() if name not in SECTIONS["Safety"]}
    result = evaluate(pairs(without))
    found = values(result)
    assert found["Safety"] is None
    assert found["Score"] is None
    assert found["Chat"] == pytest.approx(0.6089385)
    assert result.missing == list(SECTIONS["Safety"])


@pytest.mark.parametrize("model", SEED_TABLE)
def test_t_rb_4_the_seed_table_rows_give_their_score(model: str) -> None:
    *sections, score = SEED_TABLE[model]
    columns = columns_of(dict(zip(SECTIONS, map(estimate, sections), strict=True)))
    assert columns["Score"] is not None
    assert columns["Score"].value == pytest.approx(score, abs=0.1)


@pytest.mark.parametrize("missing", [None, math.nan])
@pytest.mark.parametrize("side", ["score_chosen", "score_rejected"])
def test_t_rb_5_a_pair_without_a_score_is_wrong_and_counted(
    side: str, missing: float | None
) -> None:
    scores: dict[str, list[float | None]]
    scores = {"score_chosen": [2.0, 2.0], "score_rejected": [1.0, 1.0]}
    scores[side][1] = missing
    result = evaluate(pa.table({"subset": ["hep-go", "hep-go"], **scores}))
    (subset,) = result.subsets
    assert subset.accuracy is not None
    assert (subset.accuracy.value, subset.ties, subset.unscored) == (0.5, 0, 1)
    assert result.unscored == 1
    assert "1 of 2 rows lack a score" in result.notes[0]


def test_prior_sets_weigh_half_a_section_and_their_subsets_alike() -> None:
    """[2, 2, 2, 2, 1]/9: ArmoRM's published 89.0 with its prior sets at 74.3."""
    sections = dict(zip(SECTIONS, map(estimate, SEED_TABLE["ArmoRM-Llama3-8B-v0.1"]), strict=False))
    columns = columns_of({**sections, "Prior Sets": estimate(74.3)})
    assert columns["Score with Prior Sets"] is not None
    assert columns["Score with Prior Sets"].value == pytest.approx(89.0, abs=0.05)

    few = {**dict(PUBLISHED_ROWS), "anthropic_hhh": 10, "shp": 40}
    result = evaluate(pairs({**RIGHT, "anthropic_hhh": 5, "shp": 40}, few))
    found = values(result)
    assert found["Prior Sets"] == pytest.approx(0.75)
    assert found["Score with Prior Sets"] == pytest.approx((8 * 0.5617196 + 0.75) / 9)
    assert found["Score"] == pytest.approx(0.5617196)
    assert result.missing == ["anthropic_helpful", "summarize"]


def test_without_prior_sets_they_are_neither_shown_nor_missing() -> None:
    result = evaluate(pairs(RIGHT))
    assert "Prior Sets" not in result.columns
    assert not set(result.missing) & set(PRIOR_SETS)
    assert result.notes == []


def test_the_interval_counts_math_pairs_as_they_are() -> None:
    """984 is a weight: 447 pairs are no surer for it."""
    result = evaluate(pairs(RIGHT))
    reasoning = result.columns["Reasoning"]
    assert reasoning is not None
    # Half the section is math-prm, so about half of its half-width of 4.2 points and a little.
    assert 0.020 < reasoning.high - reasoning.value < 0.030
