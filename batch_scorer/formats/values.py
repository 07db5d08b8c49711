"""Columns as Python values: what is parsed, whichever file it comes from.

Parquet and Arrow write the union of all keys into a struct and fill those that a row does not have
with nulls. A chat template takes an absent key for something else than a null one, so here a null
field of a struct is an absent key. What cannot be told apart in such a file is a key that the row
had with an explicit null; JSON files keep that difference.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import compress, pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.formats.bounded import fault_of, too_large, too_many_keys, too_nested
from batch_scorer.records import DEFAULT_BOUNDS, ReadBounds, RowError

IntArray: TypeAlias = npt.NDArray[np.int64]
Measure: TypeAlias = Callable[[pa.Array], IntArray]
"""Of an array that is no list or object: a number for each value."""

Columns: TypeAlias = Mapping[str, Sequence[Any]]
"""Column name → R values, one a row."""

_JSON = "arrow.json"
_KEPT_NULLS = (("role", "content"), ("from", "value"))
"""The text of a message stays a key where it is null: an answer may be a tool call alone, and
templates ask for its content."""


def columns_of(
    table: pa.Table, names: Iterable[str] | None = None, bounds: ReadBounds = DEFAULT_BOUNDS
) -> tuple[dict[str, list[Any]], dict[int, RowError]]:
    """The values of these columns, R each; None: of all that have a name of their own. And why some
    rows are not to be scored; their values are None.

    Structs are dicts without the fields that are null, at any depth, except for the content of a
    message; maps are dicts with all their items; lists of every kind are lists, and dictionaries
    what they stand for. Arrow's JSON type is what its text says; other extension types are their
    storage. Binary values stay bytes, and text of the JSON type that is no JSON stays text. A row
    is not to be scored where a text is not UTF-8, or JSON beyond the bounds, or where these columns
    have more bytes than `max_row_bytes`.

    Raises ShardError(WRONG_SCHEMA) for a column that is not there, or there twice; ArrowInvalid for
    one that is damaged.
    """
    once = [name for name in table.column_names if table.schema.get_field_index(name) >= 0]
    wanted = list(dict.fromkeys(once if names is None else names))
    for name in wanted:
        if name not in once:
            raise ShardError(ShardReason.WRONG_SCHEMA, f"no column {name!r}")
    found = table.select(wanted)
    errors = _faults(found, bounds)
    return {name: _values_of(found.column(name), errors) for name in wanted}, errors


def texts_of(column: pa.ChunkedArray) -> list[str | None]:
    """A text column for people: bytes that are not UTF-8 are spelt as `\\xff`."""
    texts = []
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type):
            chunk = chunk.dictionary_decode()
        texts += [
            None if text is None else text.decode(errors="backslashreplace")
            for text in chunk.cast(pa.large_binary()).to_pylist()
        ]
    return texts


_AS_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


def bytes_type(dtype: pa.DataType) -> pa.DataType:
    """The type of the same buffers with bytes in place of texts, at any depth."""
    return with_leaves(dtype, _AS_BYTES.get)


def with_leaves(
    dtype: pa.DataType, instead: Callable[[pa.DataType], pa.DataType | None]
) -> pa.DataType:
    """The type with other types in its place, or at any depth, where `instead` names one."""
    if (other := instead(dtype)) is not None:
        return other
    if pa.types.is_dictionary(dtype):
        return pa.dictionary(
            dtype.index_type, with_leaves(dtype.value_type, instead), dtype.ordered
        )
    if pa.types.is_run_end_encoded(dtype):
        return pa.run_end_encoded(dtype.run_end_type, with_leaves(dtype.value_type, instead))
    if pa.types.is_map(dtype):
        return pa.map_(with_leaves(dtype.key_type, instead), with_leaves(dtype.item_type, instead))
    fields = [dtype.field(i) for i in range(dtype.num_fields)]
    fields = [field.with_type(with_leaves(field.type, instead)) for field in fields]
    if pa.types.is_struct(dtype):
        return pa.struct(fields)
    if pa.types.is_union(dtype):
        return pa.union(fields, dtype.mode, dtype.type_codes)
    if pa.types.is_fixed_size_list(dtype):
        return pa.list_(fields[0], dtype.list_size)
    return _LISTS[dtype.id](fields[0]) if dtype.id in _LISTS else dtype


_LISTS = {
    pa.list_(pa.null()).id: pa.list_,
    pa.large_list(pa.null()).id: pa.large_list,
    pa.list_view(pa.null()).id: pa.list_view,
    pa.large_list_view(pa.null()).id: pa.large_list_view,
}


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


def is_text(dtype: pa.DataType) -> bool:
    return dtype in _AS_BYTES


# Rows that are not to be scored


def _faults(table: pa.Table, bounds: ReadBounds) -> dict[int, RowError]:
    """The rows whose values cannot be made, or are not to be."""
    errors: dict[int, RowError] = {}
    sizes = np.zeros(table.num_rows, np.int64)
    # All rows together are seldom too large, or a column wrong: each is looked at only then.
    may_be_large = table.nbytes > bounds.max_row_bytes
    for name, column in zip(table.column_names, table.columns, strict=True):
        if may_be_large or _repeats(column.type):
            sizes += _by_row(column, _num_bytes)
        if not _is_valid(column):
            error = RowError(RowReason.NOT_UTF8, f"{name} holds text that is not UTF-8")
            errors |= dict.fromkeys(np.flatnonzero(_by_row(column, _not_utf8)).tolist(), error)
        for fault in (too_nested(bounds), too_many_keys(bounds)):
            if _has_json(column.type):
                measure = partial(_faulty_json, reason=fault.reason, bounds=bounds)
                bad = np.flatnonzero(_by_row(column, measure)).tolist()
                errors |= dict.fromkeys(bad, replace(fault, detail=f"{name}: {fault.detail}"))
    for row in np.flatnonzero(sizes > bounds.max_row_bytes).tolist():
        errors[row] = too_large(int(sizes[row]), bounds)
    return dict(sorted(errors.items()))


def _is_valid(column: pa.ChunkedArray) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _repeats(dtype: pa.DataType) -> bool:
    """Whether rows may hold more bytes than their column, which has equal values once."""
    if isinstance(dtype, pa.BaseExtensionType):
        return _repeats(dtype.storage_type)
    if pa.types.is_dictionary(dtype) or pa.types.is_run_end_encoded(dtype):
        return True
    return any(_repeats(dtype.field(i).type) for i in range(dtype.num_fields))


def _by_row(column: pa.ChunkedArray, measure: Measure) -> IntArray:
    """int64[R]: the sum over all that a row holds, however deep."""
    return np.concatenate([np.zeros(0, np.int64), *(_sums(c, measure) for c in column.chunks)])


def _sums(array: pa.Array, measure: Measure) -> IntArray:
    dtype = array.type
    if isinstance(dtype, pa.BaseExtensionType) and not is_json(dtype):
        return _sums(array.storage, measure)
    if pa.types.is_struct(dtype):
        fields = [_sums(array.field(i), measure) for i in range(dtype.num_fields)]
        return np.asarray(np.sum([np.zeros(len(array), np.int64), *fields], axis=0))
    if pa.types.is_map(dtype):
        ends = array.offsets.to_numpy()
        both = (array.keys, array.items)
        parts = [_sums(part.slice(ends[0], ends[-1] - ends[0]), measure) for part in both]
        return np.asarray(np.diff(_before(parts[0] + parts[1])[ends - ends[0]]))
    if is_list(dtype):
        sizes = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        return np.asarray(np.diff(_before(_sums(array.flatten(), measure))[_before(sizes)]))
    if pa.types.is_dictionary(dtype):
        words = np.append(_sums(array.dictionary, measure), 0)  # the last one is a null's
        at = pc.fill_null(array.indices.cast(pa.int64()), len(words) - 1)
        return np.asarray(words[at.to_numpy(zero_copy_only=False)])
    if pa.types.is_run_end_encoded(dtype):
        return _sums(pc.run_end_decode(array), measure)
    return measure(array)


def _before(sizes: IntArray) -> IntArray:
    """int64[n+1]: the sum of those before each, and of all."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _num_bytes(array: pa.Array) -> IntArray:
    stored = array.storage if is_json(array.type) else array
    if not (is_text(stored.type) or stored.type in _AS_BYTES.values()):
        return np.full(len(array), -(-array.nbytes // max(1, len(array))))
    lengths = pc.binary_length(stored.cast(pa.large_binary()))
    return np.asarray(pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False))


def _not_utf8(array: pa.Array) -> IntArray:
    stored = array.storage if is_json(array.type) else array
    if is_text(stored.type):
        try:
            stored.validate(full=True)
        except pa.ArrowInvalid:
            texts = stored.view(_AS_BYTES[stored.type])
            texts.validate(full=True)  # raises where it is more than the bytes of a text
            are_bad = (text is not None and not _is_utf8(text) for text in texts.to_pylist())
            return np.fromiter(are_bad, np.int64, len(array))
    return np.zeros(len(array), np.int64)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _faulty_json(array: pa.Array, reason: RowReason, bounds: ReadBounds) -> IntArray:
    if not is_json(array.type):
        return np.zeros(len(array), np.int64)
    texts = array.storage.cast(pa.large_binary()).to_pylist()
    faults = [None if text is None else fault_of(text, bounds) for text in texts]
    return np.array([fault is not None and fault.reason is reason for fault in faults], np.int64)


def _has_json(dtype: pa.DataType) -> bool:
    if isinstance(dtype, pa.BaseExtensionType):
        return is_json(dtype) or _has_json(dtype.storage_type)
    if pa.types.is_dictionary(dtype):
        return _has_json(dtype.value_type)
    return any(_has_json(dtype.field(i).type) for i in range(dtype.num_fields))


# Values


def _values_of(column: pa.ChunkedArray, errors: Mapping[int, RowError]) -> list[Any]:
    """A value for each row, without a look at those that have an error."""
    values: list[Any] = []
    for row in errors:
        values += _good_values(column.slice(len(values), row - len(values)))
        values.append(None)
    return values + _good_values(column.slice(len(values)))


def _good_values(column: pa.ChunkedArray) -> list[Any]:
    return [value for chunk in column.chunks for value in _values(chunk)]


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
    return _texts(array) if is_text(dtype) else array.to_pylist()


def _texts(array: pa.Array) -> list[str | None]:
    try:
        return array.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:  # words of a dictionary that only marked rows have
        found = array.view(_AS_BYTES[array.type]).to_pylist()
        return [text.decode() if text is not None and _is_utf8(text) else None for text in found]


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
