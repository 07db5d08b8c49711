"""What a judge wrote → what its verdicts are worth, or why there is none. Never a guess.

A reply is foreign text: it may hold anything, and as much of it as the judge could write.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

from batch_scorer.errors import RowReason
from batch_scorer.formats.bounded import fault_of
from batch_scorer.judges.page import Page, VerdictRule
from batch_scorer.judges.pattern import last_group
from batch_scorer.records import ReadBounds, Reply, RowError

Json: TypeAlias = str | bool | list[Any] | dict[str, Any] | None
"""Numbers are kept as they are spelled."""

_BOUNDS = ReadBounds(max_row_bytes=1 << 20, max_nesting=64, max_keys=1000)
_MOST_BROKEN = 100
"""Beginnings of objects that are tried in vain before a reply is given up: each can take a look at
all that follows it."""
_SHOWN = 60
"""Characters of a reply that an error repeats."""

_EMPHASIS = "*_`"
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_BRACE = re.compile(r"[{}]")
_BEGINS_OBJECT = re.compile(r"""\{\s*["']""")
_SEPARATOR = re.compile(r"\s*[,>]\s*|\s+")
_FENCE = "```"
_JSON_FENCES = (f"{_FENCE}json", f"{_FENCE}JSON")


class _Unread(Exception):
    """There is no verdict to be read; the text says why."""

    def __init__(self, detail: str, reason: RowReason = RowReason.NO_VERDICT) -> None:
        self.error = RowError(reason, detail)
        super().__init__(detail)


def read_verdicts(reply: Reply, page: Page, count: int) -> list[float] | RowError:
    """What the `count` verdicts of a reply are worth, in order.

    They are those about the answers in the order that they were shown (listwise), those about the
    criteria 1 to `count` (a rubric whose criteria are asked together), or one. Without exactly
    these, an error: ENGINE_ERROR, CUT_OFF (what stands before a cut is not looked at: the judge may
    have gone on to change its mind), VERDICT_OUT_OF_RANGE for a number beyond the page's range,
    otherwise NO_VERDICT. What a page puts into the reply is no verdict, and where it has a
    `closing`, nothing before it is one. Raises ValueError for a page whose judge writes no reply.
    """
    if not page.generates:
        raise ValueError(f"page {page.name!r}: by probability there is no reply to read")
    if reply.ended == "error":
        return RowError(RowReason.ENGINE_ERROR, reply.detail)
    if reply.ended == "length":
        return RowError(RowReason.CUT_OFF, f"the reply was cut at {reply.generated_tokens} tokens")
    if not reply.text.strip():
        empty = "the think block has no end" if reply.reasoning else "the reply is empty"
        return RowError(RowReason.NO_VERDICT, empty)
    rule = page.verdict
    text, given = _last_part(reply.text, page)
    try:
        if rule.pattern is not None:
            found = last_group(rule.pattern, text, behind=len(given))
            return _in_group(found, rule, count if page.asks_for_several else None)
        spelled = _by_json(text, page, count)
        return _worth_of_places(spelled) if rule.ranks else [_worth(text, rule) for text in spelled]
    except _Unread as unread:
        return unread.error


def _last_part(text: str, page: Page) -> tuple[str, str]:
    """The part of a reply that the verdict is read from, and what of its beginning the page put
    there."""
    closing, begins = page.generation.closing, page.begins
    if closing and (start := text.rfind(closing)) >= 0:
        return text[start:], closing
    return text, begins if text.startswith(begins) else ""


def _in_group(found: str | None, rule: VerdictRule, count: int | None) -> list[float]:
    """The worth of what a pattern found: `count` items of a list; None: one verdict."""
    if found is None:
        raise _Unread("the pattern does not match")
    if count is None:
        return [_worth(found, rule)]
    best_first = rule.ranks and ">" in found
    parts = found.split(">") if best_first else _SEPARATOR.split(found.strip())
    items = [part.strip(" \t\r\n[]") for part in parts]
    if len(items) != count:
        raise _Unread(f"{len(items)} verdicts, and {count} were asked for: {_short(found)}")
    if not rule.ranks:
        return [_worth(item, rule) for item in items]
    return _worth_of_order(items) if best_first else _worth_of_places(items)


# What one verdict is worth


def _worth(text: str, rule: VerdictRule) -> float:
    """Of a choice or a grade as it is spelled."""
    bare = _bare(text)
    for spelling in (text, text.strip(), bare):
        if spelling in rule.choices:
            return rule.choices[spelling]
    if rule.low is None or rule.high is None:
        raise _Unread(f"{_short(text)} is none of the choices")
    grade = _grade(bare, rule.high)
    if grade is None:
        raise _Unread(f"{_short(text)} is neither a choice nor a grade")
    if not rule.low <= grade <= rule.high:
        detail = f"{_short(text)} is not from {rule.low:g} to {rule.high:g}"
        raise _Unread(detail, RowReason.VERDICT_OUT_OF_RANGE)
    return grade


def _grade(text: str, high: float) -> float | None:
    """The number that a text is; 4/5 is 4 where 5 is the highest grade, and none elsewhere."""
    number, slash, highest = (part.strip() for part in text.partition("/"))
    if slash and not (_NUMBER.fullmatch(highest) and float(highest) == high):
        return None
    return float(number) if _NUMBER.fullmatch(number) else None


def _worth_of_places(items: list[str]) -> list[float]:
    """Of answers whose places are these: 1 for the first place, 0 for the last."""
    steps = max(len(items) - 1, 1)
    return [1 - (place - 1) / steps for place in _permutation(items)]


def _worth_of_order(items: list[str]) -> list[float]:
    """Of answers whose numbers are these, from the best one to the worst one."""
    worth = [0.0] * len(items)
    for place, answer in enumerate(_permutation(items)):
        worth[answer - 1] = 1 - place / max(len(items) - 1, 1)
    return worth


def _permutation(items: list[str]) -> list[int]:
    """The numbers that these are, each from 1 on once."""
    bare = [_bare(item) for item in items]
    numbers = {str(number): number for number in range(1, len(items) + 1)}
    if set(bare) != set(numbers):
        shown = _short(", ".join(bare))
        raise _Unread(f"not each place from 1 to {len(items)} once: {shown}")
    return [numbers[item] for item in bare]


def _bare(text: str) -> str:
    """Without blanks and Markdown's emphasis around it."""
    return text.strip().strip(_EMPHASIS).strip()


# JSON


def _by_json(text: str, page: Page, count: int) -> list[str]:
    """The verdicts in a reply's object, as they are spelled."""
    held = _object(text)
    key = page.verdict.key
    if key not in held:
        raise _Unread(f"the object has no key {key!r}")
    value = held[key]
    if page.mode == "listwise":
        if not isinstance(value, list) or len(value) != count:
            raise _Unread(f"{key!r} is no list of {count}: {_short_json(value)}")
        return [_spelled(item) for item in value]
    if not page.asks_for_several:
        return [_spelled(value)]
    verdicts = _by_criterion(value)
    names = [str(number) for number in range(1, count + 1)]
    if missing := sorted(set(names) - set(verdicts), key=int):
        raise _Unread(f"no verdict about criterion {', '.join(missing[:10])}")
    if extra := sorted(set(verdicts) - set(names)):
        raise _Unread(f"there is no criterion {_short(', '.join(extra))}")
    return [_spelled(verdicts[name]) for name in names]


def _by_criterion(value: Json) -> dict[str, Json]:
    """Verdicts by what names their criterion: an object, or a list of objects with `criterion` and
    `verdict`."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, list):
        raise _Unread(f"neither an object nor a list of criteria: {_short_json(value)}")
    named = []
    for item in value:
        if not isinstance(item, dict) or not {"criterion", "verdict"} <= item.keys():
            raise _Unread(f"not a criterion and its verdict: {_short_json(item)}")
        named.append((_spelled(item["criterion"]), item["verdict"]))
    return _without_doubles(named)


def _spelled(value: Json) -> str:
    if not isinstance(value, str):
        raise _Unread(f"{_short_json(value)} is neither a choice nor a number")
    return value


def _object(text: str) -> dict[str, Any]:
    """The object that a reply is, or that its last JSON fence holds, or its last one."""
    text = text.strip()
    try:
        held, end = _decoded(text, 0)
    except _Unread:
        end = 0
    if end == len(text):
        return held
    fence = max(text.rfind(opening) for opening in _JSON_FENCES)
    if fence < 0:
        return _last_object(text)
    start = fence + len(_JSON_FENCES[0])
    start += len(text[start:]) - len(text[start:].lstrip())
    held, end = _decoded(text, start)
    rest = text[end:].lstrip()
    if rest and not rest.startswith(_FENCE):  # a stop text may have cut the closing fence off
        raise _Unread("the fence holds more than an object")
    return held


def _last_object(text: str) -> dict[str, Any]:
    """The last object that lies in no other braces. Braces that begin like an object and are none
    count as well: what stands before them is not what the judge ended with."""
    last: dict[str, Any] | _Unread = _Unread("there is no object")
    broken = at = 0
    while (at := text.find("{", at)) >= 0:
        if not _BEGINS_OBJECT.match(text, at):  # a formula, a set
            at = _closing(text, at)
            continue
        try:
            last, at = _decoded(text, at)
        except _Unread as unread:
            last, at = unread, _closing(text, at)
            broken += 1
            if broken > _MOST_BROKEN:
                raise _Unread("too much in braces that is no object") from None
    if isinstance(last, _Unread):
        raise last
    return last


def _closing(text: str, at: int) -> int:
    """Behind the brace that closes the one at this place, whether in a string or not; the end of
    the text without one."""
    depth = 0
    for brace in _BRACE.finditer(text, at):
        depth += 1 if brace.group() == "{" else -1
        if not depth:
            return brace.end()
    return len(text)


def _decoded(text: str, at: int) -> tuple[dict[str, Any], int]:
    """The object that begins at this place, and where it ends."""
    if not text.startswith("{", at):
        raise _Unread("there is no object")
    try:
        held, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise _Unread(f"no JSON object: {error.msg}") from None
    except RecursionError:
        raise _Unread("no JSON object: lists and objects lie too deep in each other") from None
    if fault := fault_of(text[at:end].encode(errors="replace"), _BOUNDS):
        raise _Unread(fault.detail)
    return held, end


def _without_doubles(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in items:
        if key in made:
            raise _Unread(f"{_short(key)} is there twice")
        made[key] = value
    return made


def _not_a_number(name: str) -> Any:
    raise _Unread(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_doubles,
    parse_int=str,
    parse_float=str,
    parse_constant=_not_a_number,
)


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def _short_json(value: Json) -> str:
    return _short(json.dumps(value))
