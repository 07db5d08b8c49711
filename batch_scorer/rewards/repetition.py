"""A penalty for answers that repeat themselves."""

from typing import Literal


def reward(
    responses: list[str], *, n: int = 3, unit: Literal["words", "characters"] = "words"
) -> list[float]:
    """Minus the share of an answer's n-grams that stood in it before: 0 where all are different,
    near -1 where one is repeated all the time. 0 for an answer of fewer than n units.

    Words are separated by blanks and compared in lower case; for scripts without blanks take
    characters.
    """
    if n < 1:
        raise ValueError("n: at least 1")
    if unit not in ("words", "characters"):
        raise ValueError(f"unit: words or characters, got {unit!r}")
    return [-_repeated(_units(response.lower(), unit), n) for response in responses]


def _units(text: str, unit: str) -> list[str]:
    words = text.split()
    return words if unit == "words" else [*"".join(words)]


def _repeated(units: list[str], n: int) -> float:
    """Share of the n-grams that are not the first of their kind."""
    grams = [tuple(units[place : place + n]) for place in range(len(units) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
