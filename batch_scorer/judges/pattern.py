"""Regular expressions over what a judge wrote, in time that grows with its length and no faster.

Python's `re` tries one way after the other, and there are texts for which a harmless looking
pattern tries without end. RE2, which comes with Arrow, goes all ways at once. Its price: a pattern
has no look-around and no back reference, and one that has is refused when the page is loaded.
Syntax: https://github.com/google/re2/wiki/Syntax.
"""

import pyarrow as pa
import pyarrow.compute as pc

_GROUP, _WHOLE, _END = "\0\1\2"
_MARKED = rf"{_GROUP}\1{_WHOLE}\0{_END}"
"""What each match is replaced by: its first group, then all of it."""
_NO_MARKS = dict.fromkeys(map(ord, (_GROUP, _WHOLE, _END)), " ")
_DASHES = "-\N{EN DASH}\N{MINUS SIGN}"


def pattern_problem(pattern: str) -> str | None:
    """Why this is no pattern with a group; None: it is one."""
    try:
        pc.match_substring_regex(pa.scalar(""), pattern)
    except (pa.ArrowInvalid, UnicodeEncodeError) as error:
        return str(error).removeprefix("Invalid regular expression: ")
    try:
        _marked(pattern, "")
    except pa.ArrowInvalid:
        return "needs a group, which holds the verdict"
    return None


def last_group(pattern: str, text: str, behind: int = 0) -> str | None:
    """What the first group of the pattern's last match holds, None without a match. One that does
    not reach beyond the first `behind` characters is none.

    Words and numbers are taken whole: where the group is at an edge of the match, and the word or
    number goes on beyond it, so does what is returned. `Grade: (\\d)` finds 10 in "Grade: 10", and
    `Verdict: (A|B)` finds Both in "Verdict: Both".
    """
    text = text.encode(errors="replace").decode().translate(_NO_MARKS)
    _, mark, last = _marked(pattern, text).rpartition(_GROUP)
    if not mark:
        return None
    group, _, rest = last.partition(_WHOLE)
    whole, _, after = rest.partition(_END)
    stop = len(text) - len(after)
    start = stop - len(whole)
    if stop <= behind:
        return None
    left, right = start, stop
    if group and whole.startswith(group):
        while left > 0 and _goes_on(text, left):
            left -= 1
    if group and whole.endswith(group):
        while right < len(text) and _goes_on(text, right):
            right += 1
    return text[left:start] + group + text[stop:right]


def _marked(pattern: str, text: str) -> str:
    marked: str = pc.replace_substring_regex(pa.scalar(text), pattern, _MARKED).as_py()
    return marked


def _goes_on(text: str, at: int) -> bool:
    """Whether a word or a number goes on from the character before `at` to the one there: 4.5, -1,
    4/5, A+, 80%, A/B."""
    before, left, right, after = (
        text[place] if 0 <= place < len(text) else " " for place in range(at - 2, at + 2)
    )
    if _in_word(left) and _in_word(right):
        return True
    if _in_word(left):
        joins_words = right in f"/{_DASHES}" and _in_word(after)
        joins_digits = right in ".," and left.isdigit() and after.isdigit()
        return joins_words or joins_digits or right in "+%"
    if _in_word(right):
        joins_words = left in f"/{_DASHES}" and _in_word(before)
        joins_digits = left in ".," and before.isdigit() and right.isdigit()
        begins_number = left in f"+.{_DASHES}" and right.isdigit()
        return joins_words or joins_digits or begins_number
    return False


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"
