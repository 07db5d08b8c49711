"""Rows become questions: which answers each one shows, and what of a row it says."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.errors import RowReason
from batch_scorer.judges.page import Page
from batch_scorer.records import ParsedRows, Questions, RowError
from batch_scorer.render.questions import ask, criteria_of

PAGES: dict[str, dict[str, Any]] = {
    "pointwise": {"content": "{{ fence }}\n{{ prompt }}|{{ response }}\n{{ fence }}"},
    "pairwise": {
        "content": "{{ fence }}\n{{ prompt }}|{{ response_a }}|{{ response_b }}\n{{ fence }}"
    },
    "listwise": {
        "content": "{{ fence }}\n{{ prompt }}|{{ responses | join('|') }}\n{{ fence }}",
        "verdict": {"by": "json", "low": 0, "high": 1},
    },
    "rubric": {"content": "{{ fence }}\n{{ prompt }}|{{ response }}|{{ criterion }}\n{{ fence }}"},
}


def page(mode: str, **more: Any) -> Page:
    values = {"verdict": {"by": "probability", "choices": {"Y": 1, "N": 0}}, **PAGES[mode], **more}
    message = {"role": "user", "content": values.pop("content")}
    return Page(about="a test", mode=mode, messages=(message,), **values)  # type: ignore[arg-type]


def parsed(*rows: list[str | RowError], **fields: list[Any]) -> ParsedRows:
    """Rows of answers to one question each."""
    sequences: list[Any] = []
    for number, answers in enumerate(rows):
        ask = {"role": "user", "content": f"question {number}"}
        for text in answers:
            answer = {"role": "assistant", "content": text}
            sequences.append(text if isinstance(text, RowError) else [ask, answer])
    offsets = np.cumsum([0, *map(len, rows)])
    return ParsedRows(sequences, offsets, fields=fields)


def texts(found: ParsedRows) -> list[str]:
    """What stands in each question, without its fences."""
    return [talk[0]["content"].split("\n", 1)[1].rpartition("\n")[0] for talk in found.sequences]  # type: ignore[index, union-attr]


def shown(questions: Questions) -> list[list[int]]:
    return [part.tolist() for part in np.split(questions.shown, questions.shown_offsets[1:-1])]


def test_a_pair_is_asked_about_in_both_orders() -> None:
    found, questions = ask(parsed(["a", "b"], ["c", "d"]), page("pairwise"), "template")
    assert texts(found) == [
        "question 0|a|b", "question 0|b|a", "question 1|c|d", "question 1|d|c"
    ]  # fmt: skip
    assert shown(questions) == [[0, 1], [1, 0], [2, 3], [3, 2]]
    assert found.row_offsets.tolist() == [0, 2, 4]


def test_one_order_is_half_as_many_questions() -> None:
    found, questions = ask(parsed(["a", "b"]), page("pairwise", orders="one"), "template")
    assert texts(found) == ["question 0|a|b"] and shown(questions) == [[0, 1]]


def test_of_a_group_each_is_compared_with_each() -> None:
    _, questions = ask(parsed(["a", "b", "c"]), page("pairwise"), "template")
    assert sorted(map(tuple, shown(questions))) == sorted(permutations(range(3), 2))


def test_a_list_is_one_question_with_a_verdict_for_each() -> None:
    found, questions = ask(parsed(["a", "b", "c"]), page("listwise"), "template")
    assert texts(found) == ["question 0|a|b|c"]
    assert questions.verdicts.tolist() == [3] and shown(questions) == [[0, 1, 2]]


def test_a_rubric_asks_about_each_criterion_and_its_text_comes_last() -> None:
    rubric = [["short", {"criterion": "true", "weight": 3}]]
    found, questions = ask(parsed(["a", "b"], rubric=rubric), page("rubric"), "template")
    assert texts(found) == [
        "question 0|a|short", "question 0|a|true", "question 0|b|short", "question 0|b|true"
    ]  # fmt: skip
    assert questions.criteria.tolist() == [0, 1, 0, 1]
    assert questions.weights == {0: (1.0, 3.0)}


def test_every_question_is_asked_as_often_as_there_are_votes() -> None:
    asked = page(
        "pairwise",
        votes=3,
        generation={"temperature": 1.0},
        verdict={"by": "pattern", "pattern": "(A|B)", "choices": {"A": 1, "B": 0}},
    )
    found, questions = ask(parsed(["a", "b"]), asked, "template")
    assert texts(found) == ["question 0|a|b"] * 3 + ["question 0|b|a"] * 3
    assert questions.votes.tolist() == [0, 1, 2, 0, 1, 2]
    assert shown(questions) == [[0, 1]] * 3 + [[1, 0]] * 3
    assert found.row_offsets.tolist() == [0, 6]


def test_what_cannot_be_read_costs_only_what_it_is_needed_for() -> None:
    broken = RowError(RowReason.EMPTY, "empty")
    rows = parsed([broken, "b"], ["c", "d"])
    _, questions = ask(rows, page("pointwise"), "template")
    assert questions.response_errors == {0: broken} and shown(questions) == [[1], [2], [3]]
    _, questions = ask(rows, page("pairwise"), "template")
    assert questions.response_errors == {0: broken, 1: broken}
    assert shown(questions) == [[2, 3], [3, 2]]


@pytest.mark.parametrize("place", [0, 1])
def test_a_pair_with_one_answer_has_the_reason_of_the_other_one(place: int) -> None:
    """A regression: where the second answer was null, the row's reason was that of the first."""
    null = RowError(RowReason.NULL_VALUE, "null")
    answers: list[str | RowError] = ["a", null] if place else [null, "b"]
    _, questions = ask(parsed(answers), page("pairwise"), "template")
    assert questions.response_errors == {0: null, 1: null} and not len(questions.shown)


def test_an_answer_alone_in_its_row_is_no_pair() -> None:
    _, questions = ask(parsed(["a"]), page("pairwise"), "template")
    assert questions.response_errors[0].reason is RowReason.NOT_A_PAIR


@pytest.mark.parametrize("votes", [1, 2])
def test_answers_are_as_long_as_their_text_in_the_question(votes: int) -> None:
    more: dict[str, Any] = {}
    if votes > 1:
        verdict = {"by": "pattern", "pattern": "(A|B)", "choices": {"A": 1, "B": 0}}
        more = {"votes": votes, "generation": {"temperature": 1.0}, "verdict": verdict}
    broken = RowError(RowReason.EMPTY, "empty")
    rows = parsed(["<think>hm</think>\u00fc", "four"], [broken, "b"])
    _, questions = ask(rows, page("pairwise", **more), "drop")
    assert questions.characters.tolist() == [1, 4, 0, 0]


def test_a_row_error_stays_the_row_s() -> None:
    rows = parsed([], ["c", "d"])
    rows.row_errors[0] = RowError(RowReason.NULL_VALUE, "null")
    found, _ = ask(rows, page("pairwise"), "template")
    assert found.row_errors == rows.row_errors and found.row_offsets.tolist() == [0, 0, 2]


@given(st.lists(st.text(alphabet="`a\n{}%", min_size=1, max_size=40), min_size=2, max_size=2))
def test_no_text_of_a_row_ends_its_fence_or_becomes_a_template(answers: list[str]) -> None:
    found, _ = ask(parsed(list(answers)), page("pairwise"), "template")
    for talk in found.sequences:
        content = talk[0]["content"]  # type: ignore[index, call-overload]
        fence, _, rest = content.partition("\n")
        inside, _, last = rest.rpartition("\n")
        assert set(fence) == {"`"} and last == fence and fence not in inside
    first = found.sequences[0][0]["content"]  # type: ignore[index, call-overload]
    assert f"|{answers[0]}|{answers[1]}\n" in first


@pytest.mark.parametrize("mode", ["pointwise", "pairwise"])
def test_a_marker_in_a_text_marks_its_row(mode: str) -> None:
    rows = parsed(["a", "b [END]"], ["c", "d"])
    found, _ = ask(rows, page(mode, markers=("[END]",)), "template")
    assert found.row_errors[0].reason is RowReason.MARKER_IN_TEXT and 1 not in found.row_errors


def test_columns_come_in_by_their_names() -> None:
    asked = page("pointwise", content="{{ fence }}\n{{ key }}\n{{ fence }}", columns=("key",))
    rows = parsed(["a"], ["b"], ["c"], key=["x", None, {"n": 1}])
    found, _ = ask(rows, asked, "template")
    assert texts(found) == ["x", '{"n": 1}']
    assert found.row_errors[1].reason is RowReason.NULL_VALUE


@pytest.mark.parametrize(
    ("reasoning", "wanted"),
    [("template", "<think>hm</think>yes"), ("keep", "<think>hm</think>yes"), ("drop", "yes")],
)
def test_reasoning_is_shown_as_the_setting_says(reasoning: str, wanted: str) -> None:
    found, _ = ask(parsed(["<think>hm</think>yes"]), page("pointwise"), reasoning)
    assert texts(found) == [f"question 0|{wanted}"]


@pytest.mark.parametrize(
    "value",
    [None, [], "", "no JSON", {"a": 1}, [1], [{"weight": 1}], [{"criterion": "x", "weight": "2"}],
     [{"criterion": "x", "weight": -1}], [{"criterion": "x", "weight": float("nan")}], [" "]],
)  # fmt: skip
def test_what_is_no_rubric(value: Any) -> None:
    found = criteria_of(value, "rubric")
    assert isinstance(found, RowError) and found.reason is RowReason.BAD_RUBRIC


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (["x", "y"], [("x", 1.0), ("y", 1.0)]),
        ('["x"]', [("x", 1.0)]),
        ([{"description": "x", "title": "t", "weight": 5}], [("x", 5.0)]),
        ([{"criterion": "x", "points": -2}, {"criterion": "y", "points": 7}],
         [("x", -2.0), ("y", 7.0)]),
    ],
)  # fmt: skip
def test_rubrics_as_they_are_published(value: Any, wanted: list[tuple[str, float]]) -> None:
    found = criteria_of(value, "rubric")
    assert not isinstance(found, RowError)
    assert [(each.text, each.weight) for each in found] == wanted
