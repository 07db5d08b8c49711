"""The shipped reward functions that need no library."""

from typing import Any

import pytest

from batch_scorer.rewards import exact_match, final_answer, length, repetition
from batch_scorer.rewards import format as form


def test_a_penalty_for_length_has_a_soft_edge() -> None:
    texts = ["a" * size for size in (0, 60, 61, 80, 100, 101, 1000)]
    found = length.reward(texts, limit=100, soft=40)
    assert found == [0.0, 0.0, -1 / 40, -0.5, -1.0, -1.0, -1.0]


def test_a_length_can_be_in_words() -> None:
    assert length.reward(["one two  three\nfour"], limit=4, soft=2, unit="words") == [-1.0]
    assert length.reward(["onetwothreefour"], limit=4, soft=2, unit="words") == [0.0]


@pytest.mark.parametrize("wrong", [{"soft": 0}, {"soft": 11}, {"soft": 5, "unit": "tokens"}])
def test_a_wrong_length_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        length.reward(["a"], **{"limit": 10, **wrong})


@pytest.mark.parametrize(
    ("text", "n", "unit", "repeated"),
    [
        ("", 3, "words", 0.0),
        ("one two", 3, "words", 0.0),
        ("one two three four", 3, "words", 0.0),
        ("no No no no no", 1, "words", 4 / 5),
        ("a b a b a b", 2, "words", 3 / 5),  # ab ba ab ba ab
        ("好好好好", 2, "words", 0.0),
        ("好好 好好", 2, "characters", 2 / 3),
    ],
)
def test_a_penalty_for_repetition(text: str, n: int, unit: Any, repeated: float) -> None:
    assert repetition.reward([text], n=n, unit=unit) == [pytest.approx(-repeated)]


def test_an_exact_match() -> None:
    responses = ["Paris", " paris\n", "Paris.", "42", "x", "two  words"]
    answers = ["Paris", "Paris", "Paris", 42, None, "two words"]
    none = (None, "no answer in the row")
    assert exact_match.reward(responses, answers) == [1.0, 0.0, 0.0, 1.0, none, 1.0]
    assert exact_match.reward(responses[1:2], answers[1:2], ignore_case=True) == [1.0]


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("<think>why</think> <answer>so</answer>", 1.0),
        ("\n<think></think>\n<answer>a\nb</answer>\n", 1.0),
        ("<answer>so</answer><think>why</think>", 0.0),
        ("<think>why</think><answer>so", 0.0),
        ("Well. <think>why</think><answer>so</answer>", 0.0),
        ("<think>why</think> then <answer>so</answer>", 0.0),
        ("<think>why</think><answer>so</answer> bye", 0.0),
        ("<think>a<think>b</think><answer>so</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_parts_that_follow_each_other(text: str, fits: float) -> None:
    assert form.reward([text], tags=["think", "answer"]) == [fits]


def test_a_pattern_matches_the_whole_response() -> None:
    texts = ["Answer: 12", "Answer: 12.", " Answer: 12", "Answer: 1\n"]
    assert form.reward(texts, pattern=r"Answer: \d+") == [1.0, 0.0, 0.0, 0.0]
    assert form.reward(["a\nb"], pattern="a.b|x") == [0.0]
    assert form.reward(["a\nb", "x"], pattern="(?s)a.b|x") == [1.0, 1.0]


@pytest.mark.parametrize("given", [{}, {"pattern": "a", "tags": ["b"]}, {"pattern": "("}])
def test_a_wrong_form_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        form.reward(["a"], **given)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So \boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{a} and then \boxed{b", "a"),
        (r"\boxed {x\}y}", r"x\}y"),
        ("2 + 2 = 4\n#### 4\nthat is it", "4"),
        (r"#### 4 is \fbox{5}", "5"),
        ("the answer is 4", None),
        ("", None),
    ],
)
def test_where_the_final_answer_stands(solution: str, answer: str | None) -> None:
    assert final_answer.final_answer(solution) == answer


def test_spellings_that_look_alike() -> None:
    alike = [r"\left( \dfrac{1}{2}, 3\,\right)", r"(\frac{1}{2},3)", r"$(\tfrac{1}{2},\ 3)$."]
    assert len({final_answer.normal(each) for each in alike}) == 1


@pytest.mark.parametrize(
    ("answer", "found"), [("yes", True), ("No solution.", True), ("x", False), ("ab2", False)]
)
def test_words_are_no_mathematics(answer: str, found: bool) -> None:
    assert final_answer.is_words(answer) is found


@pytest.mark.parametrize(
    ("answer", "bare"),
    [("50%", ("50", True)), (r"$50\%$", ("50", True)), ("50", ("50", False))],
)
def test_a_percent_sign_is_taken_off(answer: str, bare: tuple[str, bool]) -> None:
    assert final_answer.without_percent(answer) == bare
