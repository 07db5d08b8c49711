"""The equality of mathematical answers."""

import pytest

pytest.importorskip("math_verify")

from batch_scorer.rewards.math import reward


@pytest.mark.parametrize(
    ("response", "answer", "value"),
    [
        (r"It is \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"It is \boxed{\dfrac12}", r"\frac{1}{2}", 1.0),
        (r"First \boxed{3}, or rather \boxed{4}.", "4", 1.0),
        (r"First \boxed{3}, or rather \boxed{4}.", "3", 0.0),
        ("2 + 2 = 4\n#### 4", "2 and 2\n#### 4", 1.0),
        ("The answer is 4.", "4", 1.0),
        (r"\boxed{50\%}", "50%", 1.0),
        (r"\boxed{50\%}", "0.5", 1.0),
        (r"\boxed{50\%}", "50", 0.0),
        (r"\boxed{50}", r"50\%", 0.0),
        (r"\boxed{yes}", "yes", 1.0),
        (r"\boxed{on}", "no", 0.0),
        (r"\boxed{x+1}", "1+x", 1.0),
        (r"\boxed{1,000}", "1000", 1.0),
        (r"\boxed{\{1, 2\}}", r"\{2, 1\}", 1.0),
        (r"\boxed{(1, 2)}", "(2, 1)", 0.0),
        ("I do not know", "4", 0.0),
        ("", "4", 0.0),
    ],
)
def test_an_answer_is_compared(response: str, answer: str, value: float) -> None:
    assert reward([response], [answer]) == [value]


def test_a_row_without_an_answer_has_no_value() -> None:
    assert reward(["4"], [None]) == [(None, "no answer in the row")]
    assert reward(["4"], [4]) == [1.0]


def test_what_takes_too_long_to_compare_has_no_value() -> None:
    towers = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{3}"]
    assert reward(towers, ["3", "3"], seconds=1) == [(None, "not compared in 1 s"), 1.0]
