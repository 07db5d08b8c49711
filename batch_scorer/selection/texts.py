"""The texts of a row by which it is grouped and told from others: its prompt and its response."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.selection.flat import FlatPart
from batch_scorer.selection.message_texts import MessageColumn, shared, shared_counts, text_of

_HH_ANSWER = "\n\nAssistant:"


class NoColumn(Exception):
    """A column that a selection needs is not there, or is of a type that it cannot use."""


@dataclass(frozen=True, slots=True)
class Texts:
    """string[n] made of these columns of a table."""

    columns: tuple[str, ...]
    texts: Callable[[pa.Table], pa.Array]


def prompts_of(part: FlatPart, *, is_needed: bool) -> Texts:
    """The prompt of each row. One message of a user is the same prompt as its text; of others
    the text says roles and contents, and a null key is an absent one.

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
            return Texts(names, lambda table: _shared_prompts(*(table[n] for n in names)))
    whole = part.column_of("messages") or part.column_of("response")
    if whole and _is_nested(part, whole):
        return Texts((whole,), lambda table: _before_last(table[whole]))
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
    if (messages := MessageColumn.of(column)) is not None:
        return messages.texts(messages.lengths)
    if pa.types.is_nested(column.type):
        return _mapped(lambda value: value, column)
    return column.cast(pa.string()).combine_chunks()


def joined_texts(keys: list[pa.Array]) -> pa.Array:
    """string[n], the same for rows of one group only: null is another key than any text."""
    if len(keys) == 1:
        return keys[0]
    rows = zip(*(key.to_pylist() for key in keys), strict=True)
    return pa.array([json.dumps(row) for row in rows], pa.string())


def _is_nested(part: FlatPart, name: str) -> bool:
    return bool(pa.types.is_nested(part.schema.field(name).type))


def _mapped(make: Callable[..., Any], *columns: pa.ChunkedArray) -> pa.Array:
    rows = zip(*(column.to_pylist() for column in columns), strict=True)
    return pa.array([text_of(make(*row)) for row in rows], pa.string())


def _shared_prompts(chosen: pa.ChunkedArray, rejected: pa.ChunkedArray) -> pa.Array:
    """The messages that both sides begin with."""
    sides = MessageColumn.of(chosen), MessageColumn.of(rejected)
    if sides[0] is None or sides[1] is None:
        return _mapped(shared, chosen, rejected)
    texts = sides[0].texts(shared_counts(sides[0], sides[1]))
    return pc.fill_null(texts, "[]")  # where chosen is null, both begin with nothing


def _before_last(messages: pa.ChunkedArray) -> pa.Array:
    if (found := MessageColumn.of(messages)) is not None:
        return found.texts(np.maximum(found.lengths - 1, 0))
    return _mapped(lambda each: each[:-1] if isinstance(each, list) else None, messages)


def _before_answer(dialogue: str | None) -> str | None:
    return None if dialogue is None else dialogue.rpartition(_HH_ANSWER)[0]
