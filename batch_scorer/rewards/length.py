"""A penalty for answers that are too long, with a soft edge."""

from typing import Literal

Unit = Literal["characters", "words"]


def reward(
    responses: list[str], *, limit: int, soft: int, unit: Unit = "characters"
) -> list[float]:
    """0 up to `limit - soft`, from there in a straight line down to -1 at `limit`, and -1 beyond:
    the soft overlong punishment of DAPO (arXiv 2503.14476), which counts tokens.

    `limit` and `soft` are in characters, or in words, which blanks separate. Raises ValueError for
    an edge that is wider than the limit.
    """
    if not 0 < soft <= limit:
        raise ValueError("soft: more than 0 and at most limit")
    return [_penalty(size_of(response, unit), limit, soft) for response in responses]


def size_of(text: str, unit: Unit) -> int:
    """How long a text is."""
    if unit not in ("characters", "words"):
        raise ValueError(f"unit: characters or words, got {unit!r}")
    return len(text) if unit == "characters" else len(text.split())


def _penalty(size: int, limit: int, soft: int) -> float:
    return max(-1.0, min(0.0, (limit - soft - size) / soft))
