"""Whether an answer has the form that was asked for."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc


def reward(
    responses: list[str], *, pattern: str | None = None, tags: Sequence[str] = ()
) -> list[float]:
    """1 where a response has the form, else 0.

    `pattern` is a regular expression that the whole response matches, in RE2's syntax, where `.` is
    any character but a line feed unless `(?s)` stands first. `tags` are names of parts that follow
    each other, each once: `["think", "answer"]` is
    `<think>…</think>` and then `<answer>…</answer>`, with nothing but blanks around them. Raises
    ValueError for neither or both of them, and for what is no pattern.
    """
    if (pattern is None) == (not tags):
        raise ValueError("give a pattern or tags")
    if pattern is None:
        return [float(_has_parts(response, tags)) for response in responses]
    # RE2, because its time grows with the text and no faster, whatever the pattern.
    found = pc.match_substring_regex(pa.array(responses, pa.string()), rf"\A(?:{pattern})\z")
    return [float(each) for each in found.to_pylist()]


def _has_parts(response: str, tags: Sequence[str]) -> bool:
    place = 0
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    for number, mark in enumerate(marks):
        found = response.find(mark, place)
        is_between = number % 2 == 0  # before a part, or behind the last one
        if found < 0 or (is_between and response[place:found].strip()):
            return False
        place = found + len(mark)
    return not response[place:].strip() and all(response.count(mark) == 1 for mark in marks)
