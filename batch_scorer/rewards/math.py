"""Whether the final answer of a solution is equal to the reference, as text or as mathematics.

Texts are compared first; only then math-verify, which has its own mind about some: to it 50% is 0.5
and 50, two boxes are a set, and words are products of letters.
"""

from importlib.util import find_spec
from typing import Any

from batch_scorer.errors import MissingExtraError
from batch_scorer.rewards.final_answer import final_answer, is_words, normal, without_percent

if find_spec("math_verify") is None:
    raise MissingExtraError("math needs math-verify: pip install 'batch-scorer[math]'")

VERSIONS_OF = ("math-verify", "latex2sympy2_extended", "sympy")
"""What the values depend on, too."""

Value = float | tuple[None, str]


def reward(responses: list[str], answer: list[Any], *, seconds: int = 5) -> list[Value]:
    """1 where the final answer of a response is equal to that of the column `answer`, else 0.

    A final answer stands in the last `\\boxed{}`, or behind the last `####`; the text of an
    `answer` without either is the answer, a response without either is searched by math-verify.
    A row without an answer has no value, nor has one that takes longer than `seconds` to read or to
    compare.
    """
    return [_equal(*pair, seconds) for pair in zip(responses, answer, strict=True)]


def _equal(response: str, answer: Any, seconds: int) -> Value:
    if answer is None:
        return None, "no answer in the row"
    given = str(answer)
    wanted, found = final_answer(given) or given, final_answer(response)
    if normal(wanted) == normal(response if found is None else found):
        return 1.0
    if is_words(wanted) or (found is not None and is_words(found)):
        return 0.0
    from math_verify.errors import TimeoutException

    try:
        return float(
            _is_equal(wanted, response if found is None else found, found is None, seconds)
        )
    except TimeoutException:  # no Exception
        return None, f"not compared in {seconds} s"


def _is_equal(wanted: str, found: str, is_solution: bool, seconds: int) -> bool:
    from math_verify import parse, verify

    if not is_solution:
        (wanted, of_hundred), (found, is_percent) = map(without_percent, (wanted, found))
        if of_hundred != is_percent:
            wanted = f"\\frac{{{wanted}}}{{100}}" if of_hundred else wanted
            found = f"\\frac{{{found}}}{{100}}" if is_percent else found
        found = f"\\boxed{{{found}}}"
    wanted = f"\\boxed{{{wanted}}}"
    # In this order always: the comparison is not symmetric.
    here = parse(wanted, parsing_timeout=seconds, raise_on_error=True)
    there = parse(found, parsing_timeout=seconds, raise_on_error=True)
    return bool(verify(here, there, timeout_seconds=seconds, raise_on_error=True))
