"""RM-Bench and JudgeBench against examples worked by hand."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from batch_scorer.errors import InputError
from batch_scorer.evaluation import judgebench, rm_bench
from batch_scorer.evaluation.result import Evaluation


def values(result: Evaluation) -> dict[str, float | None]:
    return {name: None if found is None else found.value for name, found in result.columns.items()}


def rm_table(rows: Sequence[tuple[str, Any, Any]]) -> pa.Table:
    domains, chosen, rejected = zip(*rows, strict=True)
    return pa.table(
        {
            "domain": list(domains),
            "scores_chosen": pa.array(chosen, pa.list_(pa.float32())),
            "scores_rejected": pa.array(rejected, pa.list_(pa.float32())),
        }
    )


STYLED = ([0.0, 1.0, 2.0], [0.5, 0.5, 0.5])
"""Concise right answers lose to all, the others beat all: hard 1/3, normal 2/3, easy 3/3."""
ALL = ([9.0, 9.0, 9.0], [0.0, 0.0, 0.0])
FANCY_WINS = ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])
"""The fancier answer always wins: hard 0, normal 0 (ties), easy 1."""


def test_rm_bench_hard_is_the_plainer_right_answer_against_the_fancier_wrong_one() -> None:
    rows = [
        ("chat", *STYLED),
        ("math", *ALL),
        ("code", *FANCY_WINS),
        ("safety-refuse", *ALL),
        ("safety-response", *FANCY_WINS),
        ("safety-response", *FANCY_WINS),
    ]
    result = rm_bench.evaluate(rm_table(rows))
    safety = {"Hard": 1 / 3, "Normal": 1 / 3, "Easy": 1.0}
    expected = {
        "Chat": (1 / 3 + 2 / 3 + 1) / 3,
        "Math": 1.0,
        "Code": 1 / 3,
        "Safety": sum(safety.values()) / 3,
        "Hard": (1 / 3 + 1 + 0 + safety["Hard"]) / 4,
        "Normal": (2 / 3 + 1 + 0 + safety["Normal"]) / 4,
        "Easy": 1.0,
    }
    found = values(result)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    domains = ("Chat", "Math", "Code", "Safety")
    assert found["Score"] == pytest.approx(sum(expected[d] for d in domains) / 4)
    levels = ("Hard", "Normal", "Easy")
    assert found["Score"] == pytest.approx(sum(expected[level] for level in levels) / 3)
    assert result.details["matrix"]["code"] == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert [s.name for s in result.subsets if s.section == "Safety"] == [
        "safety-refuse",
        "safety-response",
    ]


def test_rm_bench_row_without_a_score_loses_only_what_it_cannot_win() -> None:
    rows = [("chat", [9.0, None, 9.0], [0.0, 0.0, 0.0]), ("chat", None, None)]
    result = rm_bench.evaluate(rm_table(rows))
    assert values(result)["Chat"] == pytest.approx((6 / 9 + 0) / 2)
    assert result.unscored == 2
    assert result.missing == ["math", "code", "safety"]
    assert values(result)["Score"] is None
    assert values(result)["Hard"] is None


def test_rm_bench_needs_three_styles() -> None:
    with pytest.raises(InputError, match="holds 2 scores in a row"):
        rm_bench.evaluate(rm_table([("chat", [1.0, 2.0], [1.0, 2.0, 3.0])]))


SOURCES = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")


def judge_table(rows: Sequence[tuple[str, str, Any, Any]], **more: Any) -> pa.Table:
    sources, labels, a, b = zip(*rows, strict=True)
    scores = {"score_a": pa.array(a, pa.float32()), "score_b": pa.array(b, pa.float32())}
    return pa.table({"source": list(sources), "label": list(labels), **scores, **more})


def test_judgebench_label_says_which_response_must_win() -> None:
    rows = [
        (SOURCES[0], "A>B", 2.0, 1.0),
        (SOURCES[0], "B>A", 2.0, 1.0),
        ("mmlu-pro-physics", "B>A", 1.0, 2.0),
        (SOURCES[1], "A>B", 1.0, 1.0),
        (SOURCES[2], "B>A", None, 1.0),
        (SOURCES[3], "A>B", 1.0, 0.0),
    ]
    result = judgebench.evaluate(judge_table(rows))
    assert values(result) == pytest.approx(
        {"Score": 3 / 6, "Knowledge": 2 / 3, "Reasoning": 0, "Math": 0, "Coding": 1}
    )
    by_name = {s.name: s for s in result.subsets}
    assert (by_name[SOURCES[1]].ties, by_name[SOURCES[2]].unscored) == (1, 1)


def test_judgebench_tells_that_splits_are_pooled() -> None:
    rows = [(source, "A>B", 1.0, 0.0) for source in SOURCES]
    models = ["gpt-4o", "gpt-4o", "claude", "claude"]
    result = judgebench.evaluate(judge_table(rows, response_model=models))
    assert result.details["by_response_model"]["claude"]["value"] == 1.0
    assert "pooled" in result.notes[0]


def test_judgebench_without_a_category_has_no_score() -> None:
    result = judgebench.evaluate(judge_table([(SOURCES[0], "A>B", 1.0, 0.0)]))
    assert values(result)["Score"] is None
    assert result.missing == ["Reasoning", "Math", "Coding"]


def test_judgebench_refuses_another_label() -> None:
    with pytest.raises(InputError, match="'A=B' is neither"):
        judgebench.evaluate(judge_table([(SOURCES[0], "A=B", 1.0, 0.0)]))
