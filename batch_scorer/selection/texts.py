"""The texts of a row by which it is grouped and told from others: its prompt and its response."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.selection.flat import FlatPart

_HH_ANSWER = "\n\nAssistant:"


class NoColumn(Exception):
    """A column that a selection needs is not there, or is of a type that it cannot use."""


@dataclass(frozen=True, slots=True)
class Texts:
    """string[n] made of these columns of a table."""

    columns: tuple[str, ...]
    texts: Callable[[pa.Table], pa.Array]


def prompts_of(part: FlatPart, *, is_needed: bool) -> Texts:
    """The prompt of each row. One message of a user is the same prompt as its text; other messages
    are JSON, in which a null key is an absent one.

    Raises NoColumn where it is needed and the rows do not show it.
    """
    if name := part.column_of("prompt"):
        return Texts((name,), lambda table: texts_of(table[name]))
    sides = [part.column_of(side) for side in ("chosen", "rejected")]
    if all(sides):
        names = tuple(map(str, sides))
        if part.is_hh:
            return Texts(names[:1], lambda table: _mapped(_before_answer, table[names[0]]))
        if _is_nested(part, names[0]):
            return Texts(names, lambda table: _mapped(_shared, *(table[n] for n in names)))
    whole = part.column_of("messages") or part.column_of("response")
    if whole and _is_nested(part, whole):
        return Texts((whole,), lambda table: _mapped(_before_last, table[whole]))
    if is_needed:
        raise NoColumn(f"no column holds the prompt; there are {', '.join(part.schema.names)}")
    return Texts((), lambda table: pa.nulls(table.num_rows, pa.string()))


def responses_of(part: FlatPart) -> Texts:
    """What was scored beside the prompt; of a pair both texts."""
    fields = ("response", "messages", "text", "chosen", "rejected", "steps", "token_ids")
    names = tuple(name for field in fields if (name := part.column_of(field)))
    names = tuple(dict.fromkeys(name for name in names if name in part.schema.names))

    def texts(table: pa.Table) -> pa.Array:
        filled = [pc.fill_null(texts_of(table[name]), "") for name in names]
        if not filled:
            return pa.nulls(table.num_rows, pa.string())
        return filled[0] if len(filled) == 1 else pc.binary_join_element_wise(*filled, "\x1f")

    return Texts(names, texts)


def texts_of(column: pa.ChunkedArray) -> pa.Array:
    """string[n], null where the value is null."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_nested(column.type):
        return _mapped(lambda value: value, column)
    return column.cast(pa.string()).combine_chunks()


def _is_nested(part: FlatPart, name: str) -> bool:
    return bool(pa.types.is_nested(part.schema.field(name).type))


def _mapped(make: Callable[..., Any], *columns: pa.ChunkedArray) -> pa.Array:
    rows = zip(*(column.to_pylist() for column in columns), strict=True)
    return pa.array([_text(make(*row)) for row in rows], pa.string())


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    match value := _without_nulls(value):
        case [{"role": "user", "content": str(text)} as message] if len(message) == 2:
            return text
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _without_nulls(value: Any) -> Any:
    match value:
        case dict():
            return {k: _without_nulls(v) for k, v in value.items() if v is not None}
        case list():
            return [_without_nulls(each) for each in value]
    return value


def _shared(chosen: Any, rejected: Any) -> list[Any]:
    """The messages that both begin with."""
    shared = []
    for ours, theirs in zip(chosen or [], rejected or [], strict=False):
        if ours != theirs:
            break
        shared.append(ours)
    return shared


def _before_last(messages: Any) -> Any:
    return messages[:-1] if isinstance(messages, list) else None


def _before_answer(dialogue: str | None) -> str | None:
    return None if dialogue is None else dialogue.rpartition(_HH_ANSWER)[0]
