"""Whether an answer is the reference, character by character."""

from typing import Any

Value = float | tuple[None, str]


def reward(responses: list[str], answer: list[Any], *, ignore_case: bool = False) -> list[Value]:
    """1 where the response is the text in the column `answer`, else 0; blanks at both ends, and how
    long those between words are, do not count. A row without an answer has no value."""
    return [_match(*pair, ignore_case) for pair in zip(responses, answer, strict=True)]


def _match(response: str, answer: Any, ignore_case: bool) -> Value:
    if answer is None:
        return None, "no answer in the row"
    here, there = plain(response), plain(str(answer))
    if ignore_case:
        here, there = here.casefold(), there.casefold()
    return float(here == there)


def plain(text: str) -> str:
    """Without blanks at both ends, and with one between words."""
    return " ".join(text.split())
