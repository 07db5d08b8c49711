"""Where the final answer stands in a solution, and whether two answers are the same text.

Pure functions, for answers as mathematical data sets write them.
"""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MARK = "####"
"""What stands before the answer in GSM8K."""
_BLANKS = re.compile(r"\\[,;:! ]|\\qquad|\\quad|~|\s+")
_SAME = (
    ("\\left", ""),
    ("\\right", ""),
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\%", "%"),
    ("\\$", ""),
    ("$", ""),
)
"""Spellings of LaTeX that look alike → one of them."""
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s'-]+[^\W\d_]+)*\.?")


def final_answer(solution: str) -> str | None:
    """What the last box of a solution holds, or else stands behind its last `####`, on that line;
    None without either. A box that is not closed is none."""
    for start in reversed([found.end() for found in _BOX.finditer(solution)]):
        if (stop := _closing(solution, start)) is not None:
            return solution[start:stop].strip()
    _, mark, rest = solution.rpartition(_MARK)
    return rest.strip().partition("\n")[0].strip() if mark else None


def _closing(text: str, start: int) -> int | None:
    """The place of the brace that closes the one before `start`."""
    depth = 1
    for place in range(start, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if not depth:
                return place
    return None


def normal(answer: str) -> str:
    """The answer in one of the spellings that look alike, without blanks and a full stop."""
    for given, same in _SAME:
        answer = answer.replace(given, same)
    return _BLANKS.sub("", answer).removesuffix(".")


def is_words(answer: str) -> bool:
    """Whether an answer is words, which are not the product of their letters."""
    return _WORDS.fullmatch(answer.strip()) is not None


def without_percent(answer: str) -> tuple[str, bool]:
    """The answer without a percent sign at its end, and whether there was one."""
    bare = answer.strip().removesuffix("$").strip()
    for sign in ("\\%", "%"):
        if bare.endswith(sign):
            return bare.removesuffix(sign).removeprefix("$").strip(), True
    return answer, False
