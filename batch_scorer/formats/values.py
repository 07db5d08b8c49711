"""Columns as Python values: what is parsed, whichever file it comes from.

Parquet and Arrow write the union of all keys into a struct and fill those that a row does not have
with nulls. A chat template takes an absent key for something else than a null one, so here a null
field of a struct is an absent key. What cannot be told apart in such a file is a key that the row
had with an explicit null; JSON files keep that difference.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress, pairwise
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.errors import ShardError, ShardReason

Columns: TypeAlias = Mapping[str, Sequence[Any]]
"""Column name → R values, one a row."""

_JSON = "arrow.json"
_KEPT_NULLS = (("role", "content"), ("from", "value"))
"""The text of a message stays a key where it is null: an answer may be a tool call alone, and
templates ask for its content."""


def columns_of(table: pa.Table, names: Iterable[str] | None = None) -> dict[str, list[Any]]:
    """The values of these columns, R each; None: of all that have a name of their own.

    Structs are dicts without the fields that are null, at any depth, except for the content of a
    message; maps are dicts with all their items; lists of every kind are lists, and dictionaries
    what they stand for. Arrow's JSON type is what its text says; other extension types are their
    storage. Binary values stay bytes, and text of the JSON type that is no JSON stays text. Raises
    ShardError(WRONG_SCHEMA) for a column that is not there, or there twice.
    """
    columns = {}
    once = [name for name in table.column_names if table.schema.get_field_index(name) >= 0]
    for name in once if names is None else names:
        if name not in once:
            raise ShardError(ShardReason.WRONG_SCHEMA, f"no column {name!r}")
        columns[name] = values_of(table.column(name))
    return columns


def values_of(column: pa.ChunkedArray) -> list[Any]:
    """The values of one column, as `columns_of` gives them."""
    return [value for chunk in column.chunks for value in _values(chunk)]


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, blank text, or a list or object of such values."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or value == b""


def is_json(dtype: pa.DataType) -> bool:
    """Whether values of this type are JSON text, to be read as what the text says."""
    return isinstance(dtype, pa.BaseExtensionType) and dtype.extension_name == _JSON


def is_list(dtype: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(dtype)
        or pa.types.is_large_list(dtype)
        or pa.types.is_fixed_size_list(dtype)
        or pa.types.is_list_view(dtype)
        or pa.types.is_large_list_view(dtype)
    )


def _values(array: pa.Array) -> list[Any]:
    dtype = array.type
    if isinstance(dtype, pa.BaseExtensionType):
        values = _values(array.storage)
        return [_decoded(text) for text in values] if is_json(dtype) else values
    if pa.types.is_struct(dtype):
        return _objects(array)
    if pa.types.is_map(dtype):
        return _maps(array)
    if is_list(dtype):
        return _lists(array)
    if pa.types.is_dictionary(dtype):
        words = _values(array.dictionary)
        return [None if at is None else words[at] for at in array.indices.to_pylist()]
    if pa.types.is_run_end_encoded(dtype):
        return _values(pc.run_end_decode(array))
    return array.to_pylist()  # type: ignore[no-any-return]


def _objects(array: pa.Array) -> list[Any]:
    names = [field.name for field in array.type]
    kept = {text for role, text in _KEPT_NULLS if role in names and text in names}
    columns = [_values(array.field(i)) for i in range(len(names))]
    may_lack = any(array.field(i).null_count for i, name in enumerate(names) if name not in kept)
    objects: list[Any]
    if not names:
        objects = [{} for _ in range(len(array))]
    elif not may_lack and len(names) == 2:  # most messages: a third of the time of the next line
        first, second = names
        objects = [{first: a, second: b} for a, b in zip(*columns, strict=True)]
    elif not may_lack:
        objects = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    else:
        objects = [
            {
                name: value
                for name, value in zip(names, row, strict=True)
                if value is not None or name in kept
            }
            for row in zip(*columns, strict=True)
        ]
    return _with_nulls(array, objects)


def _maps(array: pa.MapArray) -> list[Any]:
    ends = array.offsets.to_pylist()
    first, size = ends[0], ends[-1] - ends[0]
    items = list(
        zip(
            _values(array.keys.slice(first, size)),
            _values(array.items.slice(first, size)),
            strict=True,
        )
    )
    return _with_nulls(array, [dict(items[a - first : b - first]) for a, b in pairwise(ends)])


def _lists(array: pa.Array) -> list[Any]:
    items = _values(array.flatten())  # without those behind a null
    sizes = pc.fill_null(pc.list_value_length(array), 0).to_pylist()
    lists: list[Any] = []
    start = 0
    for size in sizes:
        lists.append(items[start : start + size])
        start += size
    return _with_nulls(array, lists)


def _with_nulls(array: pa.Array, values: list[Any]) -> list[Any]:
    if array.null_count:
        for place in compress(range(len(values)), array.is_null().to_pylist()):
            values[place] = None
    return values


def _decoded(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text  # no message, so its row is marked where it is read
