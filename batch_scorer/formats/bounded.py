"""What a row may take, looked at before anything parses it: exactly, in one pass over its bytes.

A parser goes a level deeper for each list or object, and may end its process where there are too
many; it may take time or memory without end for other rows that no error is raised for. So a row
is first held to `ReadBounds`. Only marks outside of strings count: brackets and colons in a text
are text.
"""

import re
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from batch_scorer.errors import RowReason
from batch_scorer.records import ReadBounds, RowError

IntArray: TypeAlias = npt.NDArray[np.int64]
ByteArray: TypeAlias = npt.NDArray[np.uint8]

_BLOCK_BYTES = 1 << 18  # what is made of a block fits a processor's cache
_OPENS, _CLOSES, _OBJECT, _COLON, _COMMA = b"{}{:,"
_QUOTE, _BACKSLASH = b'"\\'
_CASE = 0x20  # by this bit `[` is a `{`, and `]` a `}`
_STEPS = np.zeros(256, np.int64)
_STEPS[list(b"{[")], _STEPS[list(b"}]")] = 1, -1
_IS_MARK = np.zeros(256, np.bool_)
_IS_MARK[list(b"{}[]:,")] = True


BOUND_REASONS = frozenset({RowReason.ROW_TOO_LARGE, RowReason.TOO_NESTED, RowReason.TOO_MANY_KEYS})


def fault_of(line: bytes, bounds: ReadBounds) -> RowError | None:
    """Why a line, or another text of JSON, is not to be parsed; None for one that is."""
    if len(line) > bounds.max_row_bytes:
        return too_large(len(line), bounds)
    opened = line.count(b"{") + line.count(b"[")
    if opened > bounds.max_nesting and _deepest(line) > bounds.max_nesting:
        return too_nested(bounds)
    if line.count(b":") > bounds.max_keys and _most_keys(line) > bounds.max_keys:
        return too_many_keys(bounds)
    return None


def too_large(num_bytes: int, bounds: ReadBounds) -> RowError:
    detail = f"{num_bytes:,} bytes, and max_row_bytes is {bounds.max_row_bytes:,}"
    return RowError(RowReason.ROW_TOO_LARGE, detail)


def too_nested(bounds: ReadBounds) -> RowError:
    detail = f"lists and objects lie deeper in each other than max_nesting, {bounds.max_nesting}"
    return RowError(RowReason.TOO_NESTED, detail)


def too_many_keys(bounds: ReadBounds) -> RowError:
    detail = f"an object has more keys than max_keys, {bounds.max_keys}"
    return RowError(RowReason.TOO_MANY_KEYS, detail)


def are_within(data: bytes, ends: IntArray, bounds: ReadBounds) -> bool:
    """Whether `fault_of` finds nothing in any of the lines that end at these places of `data`.

    Few lines are looked at one by one: those with more brackets than may lie in each other, or
    that are long enough for too many keys.
    """
    letters = np.frombuffer(data, np.uint8)
    opened = [np.zeros(0, np.int64)]
    for start in range(0, len(letters), _BLOCK_BYTES):
        block = letters[start : start + _BLOCK_BYTES]
        opened.append(np.flatnonzero((block | _CASE) == _OPENS) + start)
    sizes = np.diff(ends, prepend=0)
    brackets = np.diff(np.searchsorted(np.concatenate(opened), ends), prepend=0)
    # A key takes four bytes at least: two quotes, a colon, and a comma or bracket.
    is_suspect = (brackets > bounds.max_nesting) | (sizes > 4 * bounds.max_keys)
    is_suspect |= sizes > bounds.max_row_bytes
    return all(
        fault_of(data[ends[i] - sizes[i] : ends[i]].removesuffix(b"\n"), bounds) is None
        for i in np.flatnonzero(is_suspect)
    )


def elements_of(array: bytes) -> list[tuple[int, int]] | None:
    """Where the elements of a JSON array are, each [start, stop); None where the brackets or the
    commas are not those of one array. What the elements are is not looked at."""
    edges: list[IntArray] = []
    first = last = -1
    depth = 0
    for places, kinds, depths in _structure(array):
        if not len(places):
            continue
        if first < 0:
            first = int(places[0])
        if last >= 0 or (depths < 0).any() or (depths[:-1] == 0).any():
            return None  # something follows the end
        if depths[-1] == 0:
            last = int(places[-1])
        edges.append(places[(kinds == _COMMA) & (depths == 1)])
        depth = int(depths[-1])
    if first < 0 or last < 0 or depth or array[:first].strip() or array[last + 1 :].strip():
        return None
    commas = np.concatenate(edges).tolist()
    starts, stops = [first + 1, *(comma + 1 for comma in commas)], [*commas, last]
    spans = list(zip(starts, stops, strict=True))
    is_blank = [array[start:stop].isspace() or start == stop for start, stop in spans]
    if len(spans) == 1 and is_blank[0]:
        return []
    return None if any(is_blank) else spans


def _structure(data: bytes) -> Iterator[tuple[IntArray, ByteArray, IntArray]]:
    """The marks `{}[],:` outside of strings, block by block: the place of each, which one it is,
    and how many lists and objects are open after it."""
    data = data.replace(b"\\\\", b"  ")  # a backslash before a quote now is one that keeps it
    depth, is_text, before = 0, 0, 0
    for start in range(0, len(data), _BLOCK_BYTES):
        size = min(_BLOCK_BYTES, len(data) - start)
        letters = np.frombuffer(data, np.uint8, size, start)
        is_quote = letters == _QUOTE
        is_quote[1:] &= letters[:-1] != _BACKSLASH
        is_quote[0] &= before != _BACKSLASH
        before = letters[-1]
        places = np.flatnonzero(is_quote | _IS_MARK[letters])
        kinds = letters[places]
        quotes = kinds == _QUOTE
        inside = (np.cumsum(quotes) + is_text) % 2
        is_text = int(inside[-1]) if len(inside) else is_text
        outside = (inside == 0) & ~quotes
        places, kinds = places[outside], kinds[outside]
        depths = depth + np.cumsum(_STEPS[kinds])
        depth = int(depths[-1]) if len(depths) else depth
        yield places + start, kinds, depths


def _deepest(data: bytes) -> int:
    """How many lists and objects lie in each other where most do."""
    return max((int(depths.max(initial=0)) for _, _, depths in _structure(data)), default=0)


def _most_keys(data: bytes) -> int:
    """Keys of the object that has most."""
    most = 0
    keys: list[int] = []  # of each list and object that is open
    for _, kinds, _ in _structure(data):
        for kind in kinds[kinds != _COMMA].tolist():
            if kind == _COLON:
                if keys:
                    keys[-1] += 1
                    most = max(most, keys[-1])
            elif kind | _CASE == _OPENS:
                keys.append(0)
            elif keys:
                keys.pop()
    return most


# Python's spelling

NEITHER = "text that is neither JSON nor Python's spelling"
_BODIES = "|".join(
    rf"{q}{q}{q}(?:[^{q}\\]++|\\.|{q}(?!{q}{q}))*+{q}{q}{q}|{q}(?!{q}{q})(?:[^{q}\\\n]++|\\.)*+{q}"
    for q in "'\""
)
_STRING = rf"[bBrRuU]{{0,2}}(?:{_BODIES})"
_NUMBER = r"[\d.][\d._]*(?:[eE][-+]?\d+)?[jJ]?"
_TOKEN = re.compile(
    rf"""\s*+(?:(?P<string>{_STRING})|(?P<word>None|True|False|[-+]?{_NUMBER}(?:[-+]{_NUMBER})?)"""
    r"""|(?P<open>[\[({])|(?P<close>[\])}])|(?P<colon>:)|(?P<comma>,))\s*+""",
    re.DOTALL,
)


def fault_of_literal(text: str, bounds: ReadBounds) -> RowError | None:
    """Why Python is not to be asked what a text spells; None where it is made of strings, numbers,
    None, True, False, and lists, tuples, sets and dicts of these, within the bounds.

    Nothing else is let through: operators, calls and the like go a level deeper without a bracket.
    """
    keys: list[int] = []
    before, at = "", 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        kind = token.lastgroup if token else None
        is_value = kind in ("string", "word", "open")
        is_whole = before in ("string", "word", "close")
        if token is None or (is_value and is_whole and not kind == before == "string"):
            return RowError(RowReason.MALFORMED_JSON, NEITHER)
        if kind == "open":
            keys.append(0)
            if len(keys) > bounds.max_nesting:
                return too_nested(bounds)
        elif kind == "close" and keys:
            keys.pop()
        elif kind == "colon" and keys:
            keys[-1] += 1
            if keys[-1] > bounds.max_keys:
                return too_many_keys(bounds)
        before, at = kind or "", token.end()
    return None
