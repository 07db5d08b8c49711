"""What Parquet, as pyarrow writes it, can hold: of any Arrow type, and of Parquet's own types.

Columns that are not scored come back in the output. Most types do unchanged. Run-end-encoded
values are written out, views (polars writes them) are plain text or bytes, a few types change as
they are written (time in seconds to milliseconds, dictionaries of other values than text to these
values), and what has no place in Parquet at all (unions, intervals, structs without fields) becomes
JSON text in `arrow.json`.
"""

import base64
import io
import json
import re
from collections import Counter
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.errors import ShardError, ShardReason
from batch_scorer.formats.json_types import JSON_TEXT
from batch_scorer.formats.values import bytes_type

_NODE = re.compile(
    r"(?P<indent> *)\w+ \S+ field_id=-?\d+ (?P<name>.*?)(?: \((?P<type>\w+).*\))?[;{ ]*"
)
_SAME = {"List", "Map", "Int"}
"""Of these the lack means the same, or another part of the schema shows it."""


def as_stored(table: pa.Table) -> pa.Table:
    """The table with the types that it has in a Parquet file; texts are the same bytes.

    Raises ShardError(UNREADABLE_FILE) where that is JSON text, and one of its texts is not UTF-8.
    """
    for index, field in enumerate(table.schema):
        wanted = stored_type(field.type)
        if wanted != field.type:
            column = _converted(table.column(index), wanted)
            table = table.set_column(index, field.with_type(wanted), column)
    return table


def stored_schema(schema: pa.Schema) -> pa.Schema:
    """As `as_stored`, of a schema."""
    fields = [field.with_type(stored_type(field.type)) for field in schema]
    return pa.schema(fields, schema.metadata)


@lru_cache(maxsize=4096)
def stored_type(dtype: pa.DataType) -> pa.DataType:
    """The type that a column of this one has in Parquet: JSON text where there is no other."""
    try:
        file = pq.ParquetFile(_empty_file(pa.schema([("c", _plain_type(dtype))])))
    except (pa.ArrowException, OSError):  # Arrow 26 writes deeper types than it reads
        return JSON_TEXT
    return file.schema_arrow.field(0).type


def lost_types(file: pq.ParquetFile) -> tuple[str, ...]:
    """The columns of a Parquet file with values of a type that its output would not have, as
    "column (type)": their values come back, and what they mean is lost."""
    # The first line names the object, and differs each time.
    printed = str(file.schema).partition("\n")[2]
    return _lost_types(printed, file.schema_arrow.remove_metadata())


@lru_cache(maxsize=256)
def _lost_types(printed: str, schema: pa.Schema) -> tuple[str, ...]:
    given = _annotations(printed)
    kept = _annotations(str(pq.ParquetFile(_empty_file(stored_schema(schema))).schema))
    return tuple(
        f"{name} ({', '.join(sorted(lost))})"
        for name, types in given.items()
        if (lost := types - kept.get(name, Counter()))
    )


def _empty_file(schema: pa.Schema) -> io.BytesIO:
    sink = io.BytesIO()
    pq.ParquetWriter(sink, schema).close()
    return io.BytesIO(sink.getvalue())


def _annotations(printed: str) -> dict[str, Counter[str]]:
    """The logical types in each column of a Parquet schema. pyarrow shows those of groups in the
    printed tree only."""
    found: dict[str, Counter[str]] = {}
    column = ""
    for line in printed.splitlines():
        if (node := _NODE.fullmatch(line)) and node["indent"]:
            if len(node["indent"]) == 2:
                column = node["name"]
                found[column] = Counter()
            if node["type"] and node["type"] not in _SAME:
                found[column][node["type"]] += 1
    return found


def _plain_type(dtype: pa.DataType) -> pa.DataType:
    """The type with run-end-encoded values written out, and without views (Arrow 26 cannot write
    those in structs, nor take rows of them), at any depth; all others as they are."""
    if pa.types.is_run_end_encoded(dtype):
        return _plain_type(dtype.value_type)
    if pa.types.is_string_view(dtype):
        return pa.large_string()
    if pa.types.is_binary_view(dtype):
        return pa.large_binary()
    if pa.types.is_dictionary(dtype):
        values = _plain_type(dtype.value_type)
        return dtype if values == dtype.value_type else values
    inner = [dtype.field(i) for i in range(dtype.num_fields)]
    fields = [field.with_type(_plain_type(field.type)) for field in inner]
    if fields == inner:
        return dtype
    if pa.types.is_struct(dtype):
        return pa.struct(fields)
    if pa.types.is_map(dtype):
        return pa.map_(_plain_type(dtype.key_type), _plain_type(dtype.item_type))
    if pa.types.is_fixed_size_list(dtype):
        return pa.list_(fields[0], dtype.list_size)
    if pa.types.is_list(dtype) or pa.types.is_list_view(dtype):
        return pa.list_(fields[0])
    if pa.types.is_large_list(dtype) or pa.types.is_large_list_view(dtype):
        return pa.large_list(fields[0])
    return dtype


def _converted(column: pa.ChunkedArray, wanted: pa.DataType) -> pa.Array | pa.ChunkedArray:
    if wanted == JSON_TEXT:
        try:
            values = column.to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError:
            what = f"text that is not UTF-8 in a column of type {column.type}, which has no Parquet"
            raise ShardError(ShardReason.UNREADABLE_FILE, what) from None
        texts = [None if value is None else _text(value) for value in values]
        return pa.ExtensionArray.from_storage(JSON_TEXT, pa.array(texts, pa.string()))
    # Texts go as bytes: those that are not UTF-8 come back, too.
    given = _viewed(column, bytes_type(column.type))
    try:
        found = given.cast(bytes_type(wanted))
    except pa.ArrowException:  # Arrow casts few nested types
        found = pa.chunked_array([pa.array(given.to_pylist(), bytes_type(wanted))])
    return _viewed(found, wanted)


def _viewed(column: pa.ChunkedArray, dtype: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.view(dtype) for chunk in column.chunks], dtype)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
