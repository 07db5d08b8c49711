"""Which Arrow type holds all values of a JSON column exactly, and the columns made of values.

A `Kind` says what a column's values are; `joined` puts the kinds of two parts of a file together.
Where no type holds every value as it is (text here and a number there, an object without fields,
integers beyond 2^53 beside fractions), the column holds each value as JSON text, in Arrow's
extension type `arrow.json`, which Parquet keeps as its type JSON.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

JSON_TEXT = pa.json_(pa.string())
_EXACT = 2**53
"""Up to here every integer is a double."""
_MAX_LEVELS = 100
"""What lies deeper is JSON text: few readers of Parquet go there."""
_MAX_FIELDS = 1000
"""An object with more keys over all rows is a mapping, not a record: a column for each would hold
almost only nulls."""


@dataclass(frozen=True, slots=True)
class Number:
    """Integers in [low, high] (0 is in it), and perhaps fractions."""

    low: int = 0
    high: int = 0
    is_float: bool = False


@dataclass(frozen=True, slots=True)
class ListOf:
    item: "Kind"


@dataclass(frozen=True, slots=True)
class ObjectOf:
    fields: Mapping[str, "Kind"]


@dataclass(frozen=True, slots=True)
class Mixed:
    """Values that no one type holds."""


Kind: TypeAlias = type[bool] | type[str] | Number | ListOf | ObjectOf | Mixed | None
"""None: nothing but nulls."""


def joined(a: Kind, b: Kind) -> Kind:
    """The kind of values that are `a` in some rows and `b` in others."""
    if a == b or b is None:
        return a
    if a is None:
        return b
    if isinstance(a, Number) and isinstance(b, Number):
        return Number(min(a.low, b.low), max(a.high, b.high), a.is_float or b.is_float)
    if isinstance(a, ListOf) and isinstance(b, ListOf):
        return ListOf(joined(a.item, b.item))
    if isinstance(a, ObjectOf) and isinstance(b, ObjectOf):
        return _object(joined_fields(a.fields, b.fields))
    return Mixed()


def joined_fields(a: Mapping[str, Kind], b: Mapping[str, Kind]) -> dict[str, Kind]:
    """As `joined`, for the fields of objects; new ones come last."""
    return {**a, **{name: joined(a.get(name), kind) for name, kind in b.items()}}


def kind_of_value(value: Any, level: int = 0) -> Kind:
    """The kind of what `json.loads` gives."""
    if level > _MAX_LEVELS:
        return Mixed()
    if value is None or isinstance(value, bool):
        return None if value is None else bool
    if isinstance(value, str):
        return str
    if isinstance(value, int):
        return Number(min(value, 0), max(value, 0))
    if isinstance(value, float):
        return Number(is_float=True)
    if isinstance(value, list):
        types = set(map(type, value))
        if types == {int}:  # token ids: a look at each would take most of the time
            return ListOf(Number(min(0, *value), max(0, *value)))
        if types == {str}:
            return ListOf(str)
        items = (kind_of_value(inner, level + 1) for inner in value)
        return ListOf(reduce(joined, items, None))
    return _object({name: kind_of_value(inner, level + 1) for name, inner in value.items()})


def _object(fields: Mapping[str, Kind]) -> Kind:
    return ObjectOf(fields) if len(fields) <= _MAX_FIELDS else Mixed()


def kind_of_array(array: pa.Array, level: int = 0) -> Kind:
    """The kind of what Arrow's JSON reader gives: `Mixed` where it may have rounded an integer."""
    dtype = array.type
    if level > _MAX_LEVELS:
        return Mixed()
    if pa.types.is_null(dtype):
        return None
    if pa.types.is_boolean(dtype):
        return bool
    if pa.types.is_integer(dtype):
        limits = pc.min_max(array).as_py()
        return Number(min(limits["min"] or 0, 0), max(limits["max"] or 0, 0))
    if pa.types.is_floating(dtype):
        limits = pc.min_max(array).as_py()
        low, high = limits["min"] or 0.0, limits["max"] or 0.0
        return Number(is_float=True) if max(-low, high) < _EXACT else Mixed()
    if pa.types.is_list(dtype):
        return ListOf(kind_of_array(array.values, level + 1))
    if pa.types.is_struct(dtype):
        fields = {f.name: kind_of_array(array.field(i), level + 1) for i, f in enumerate(dtype)}
        return _object(fields)
    return str  # timestamps, too: Arrow makes them of text that looks like dates


def is_mixed(kind: Kind) -> bool:
    """Whether no type is known somewhere in these values."""
    if isinstance(kind, ListOf):
        return is_mixed(kind.item)
    if isinstance(kind, ObjectOf):
        return any(map(is_mixed, kind.fields.values()))
    return isinstance(kind, Mixed)


def most_fields(kind: Kind) -> int:
    """The most keys that an object in these values has, over all rows."""
    if isinstance(kind, ListOf):
        return most_fields(kind.item)
    if isinstance(kind, ObjectOf):
        return max([len(kind.fields), *map(most_fields, kind.fields.values())])
    return 0


def column_type(kind: Kind) -> pa.DataType:
    """The type of a column: `JSON_TEXT` where no other holds its values."""
    return _arrow_type(kind) or JSON_TEXT


def _arrow_type(kind: Kind) -> pa.DataType | None:
    if kind is None:
        return pa.null()
    if isinstance(kind, type):
        return pa.bool_() if kind is bool else pa.string()
    if isinstance(kind, Number):
        return _number_type(kind)
    if isinstance(kind, ListOf):
        item = _arrow_type(kind.item)
        return item and pa.list_(item)
    if isinstance(kind, ObjectOf) and kind.fields:
        types = {name: _arrow_type(inner) for name, inner in kind.fields.items()}
        return pa.struct(list(types.items())) if all(types.values()) else None
    return None


def _number_type(kind: Number) -> pa.DataType | None:
    if kind.is_float:
        return pa.float64() if max(-kind.low, kind.high) <= _EXACT else None
    if kind.low >= -(2**63) and kind.high < 2**63:
        return pa.int64()
    return pa.uint64() if kind.low == 0 and kind.high < 2**64 else None


def has_json_text(schema: pa.Schema) -> bool:
    """Whether a column of the schema holds JSON text."""
    return any(isinstance(field.type, pa.JsonType) for field in schema)


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as `json.loads` gives them, as columns of these types. An absent key is a null."""
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if isinstance(field.type, pa.JsonType):
            columns.append(json_column(values))
        else:
            columns.append(pa.array(values, field.type))
    return pa.table(columns, schema=schema)


def json_column(values: Sequence[Any]) -> pa.Array:
    """extension<arrow.json>[R] of the values as `json.loads` gives them; None is null."""
    texts = [None if value is None else _text(value) for value in values]
    return pa.ExtensionArray.from_storage(JSON_TEXT, pa.array(texts, pa.string()))


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
