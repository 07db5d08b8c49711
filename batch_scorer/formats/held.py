"""What the columns of a file hold, by their Arrow types and by the values of some rows.

A type says it for all rows. Where it leaves it open (nulls alone, JSON, maps, values of several
types), the sampled values say it, and so they do where texts are messages in writing.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from batch_scorer.formats.encoded import decoded, looks_encoded
from batch_scorer.formats.kinds import MESSAGE_KEYS, Part
from batch_scorer.formats.steps import is_steps, problem_of
from batch_scorer.formats.values import Columns, is_empty, is_json, is_list, is_text
from batch_scorer.records import ReadBounds


@dataclass(frozen=True, slots=True)
class Held:
    """What one value of a column is, and what its items are where it is a list; None: nothing that
    can be scored."""

    whole: Part | None
    items: Part | None


@dataclass(frozen=True, slots=True)
class Sample:
    """The columns of a file that each have a name of their own, and the values of some rows.

    `encoded` are the columns whose texts are messages in writing; their values here are what these
    texts spell. `unreadable` are those whose texts look so, and mostly cannot be read.
    """

    held: dict[str, Held]
    values: Columns
    encoded: frozenset[str]
    unreadable: frozenset[str]

    def of(self, name: str) -> list[Any]:
        """The sampled values of a column, perhaps none."""
        return list(self.values.get(name, ()))


def look_at(schema: pa.Schema, rows: Columns, *, decode: bool, bounds: ReadBounds) -> Sample:
    """What is in a file of this schema; `rows` are the values of some of its rows, perhaps none.

    Unless `decode`, texts are texts.
    """
    held: dict[str, Held] = {}
    values = dict(rows)
    encoded, unreadable = set(), set()
    for field in schema:
        name = field.name
        if schema.get_field_index(name) < 0:
            continue  # its name is there twice
        own = list(rows.get(name, ()))
        texts = [text for value in own for text in _texts(value) if text.strip()]
        if decode and _most((text.lstrip()[0] in "[{(" for text in texts), len(texts)):
            spelt = [decoded(value, name, bounds) for value in own]
            found = _by_values(spelt)
            if found.whole in _OF_MESSAGES or found.items in _OF_MESSAGES:
                encoded.add(name)
                held[name], values[name] = found, spelt
                continue
            if _most(map(looks_encoded, texts), len(texts)):
                unreadable.add(name)
        held[name] = _held(field.type, own)
    return Sample(held, values, frozenset(encoded), frozenset(unreadable))


_OF_MESSAGES = frozenset({Part.MESSAGE, Part.MESSAGES})


def _held(dtype: pa.DataType, values: list[Any]) -> Held:
    found = Held(_by_type(dtype), _by_type(_item_type(dtype)))
    if found.whole is Part.TEXT and not all(isinstance(v, str | None) for v in values):
        return _by_values(values)
    return found if found.whole or found.items else _by_values(values)


def _by_type(dtype: pa.DataType | None) -> Part | None:
    """What all values of this type are; None where it leaves that open, or they are nothing."""
    if dtype is None or is_json(dtype):
        return None
    if isinstance(dtype, pa.BaseExtensionType):
        return _by_type(dtype.storage_type)
    if _is_text(dtype):
        return Part.TEXT
    if _is_message(dtype):
        return Part.MESSAGE
    item = _item_type(dtype)
    if item is None:
        return None
    if _is_message(item):
        return Part.MESSAGES
    if _is_text(item):
        return Part.STEPS
    return Part.TOKEN_IDS if pa.types.is_integer(item) else None


def _is_message(dtype: pa.DataType) -> bool:
    # get_field_index is -1 for a name that is missing or there twice.
    return pa.types.is_struct(dtype) and any(
        dtype.get_field_index(role) >= 0
        and dtype.get_field_index(text) >= 0
        and _is_text(dtype.field(role).type)
        for role, text in MESSAGE_KEYS
    )


def _is_text(dtype: pa.DataType) -> bool:
    return _is_text(dtype.value_type) if pa.types.is_dictionary(dtype) else is_text(dtype)


def _item_type(dtype: pa.DataType) -> pa.DataType | None:
    """The type of a list's items, or None where it is not a list."""
    return dtype.value_type if is_list(dtype) else None


def _by_values(values: Iterable[Any]) -> Held:
    said = [value for value in values if not is_empty(value)]
    items = [item for value in said if isinstance(value, list) for item in value]
    return Held(_common(said), _common(item for item in items if not is_empty(item)))


def _common(values: Iterable[Any]) -> Part | None:
    """What most of these values are."""
    parts = Counter(part for value in values if (part := _part_of(value)) is not None)
    return parts.most_common(1)[0][0] if parts else None


def _part_of(value: Any) -> Part | None:
    if isinstance(value, str):
        return Part.TEXT
    if _is_message_value(value):
        return Part.MESSAGE
    if problem_of(value) is not None:
        return Part.PROBLEM
    if isinstance(value, list):
        first = next((item for item in value if item is not None), None)
        if _is_message_value(first):
            return Part.MESSAGES
        if type(first) is int:
            return Part.TOKEN_IDS
    return Part.STEPS if is_steps(value) else None


def _is_message_value(value: Any) -> bool:
    return isinstance(value, dict) and any(
        role in value and isinstance(value[role], str) for role, _ in MESSAGE_KEYS
    )


def _texts(value: Any) -> list[str]:
    """The texts that a value is, or is a list of."""
    return [
        text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)
    ]


def _most(flags: Iterable[bool], total: int) -> bool:
    return 2 * sum(flags) > total
