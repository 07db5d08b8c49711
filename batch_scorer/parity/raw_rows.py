"""The raw values of some rows, read by the gate itself: pyarrow for columns, json for text.

Nothing here is shared with the readers whose work it checks (`inputs`, `formats`), apart from where
a shard lies in its file. It is short and slow, for a few rows.
"""

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.records import Shard
from batch_scorer.storage import Store

RawRow: TypeAlias = dict[str, Any]
"""One row's values by column: what JSON gives, or the same of Arrow's types."""

_BATCH_ROWS = 256
_READ_BYTES = 1 << 22
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_BOM = b"\xef\xbb\xbf"


def read_raw_rows(store: Store, shard: Shard, rows: Sequence[int]) -> dict[int, RawRow]:
    """Rows of a shard, by their numbers in it (from 0): the columns of its layout.

    A line that is not a JSON object is left out. Raises what the store and the file format raise.
    """
    wanted = sorted(set(rows))
    columns = set(shard.layout.columns.values())
    if shard.row_groups is not None:
        found = _from_parquet(store, shard, wanted)
    elif shard.lines is not None:
        found = _from_lines(store, shard, wanted)
    else:
        found = _from_array(store, shard, wanted)
    return {
        number: {name: value for name, value in row.items() if name in columns}
        for number, row in found
        if isinstance(row, dict)
    }


def _from_parquet(store: Store, shard: Shard, rows: list[int]) -> Iterator[tuple[int, RawRow]]:
    source = shard.source
    file = pq.ParquetFile(store.open(source.key, source.size_bytes, source.version, _READ_BYTES))
    names = [name for name in file.schema_arrow.names if name in shard.layout.columns.values()]
    assert shard.row_groups is not None
    last = shard.skip_rows + rows[-1]
    position = -shard.skip_rows
    for batch in file.iter_batches(_BATCH_ROWS, range(*shard.row_groups), names, use_threads=False):
        for row in rows:
            if 0 <= row - position < batch.num_rows:
                yield row, _row_of(batch, row - position)
        position += batch.num_rows
        if position + shard.skip_rows > last:
            return


def _row_of(batch: pa.RecordBatch, row: int) -> RawRow:
    return {
        name: plain_value(column[row])
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }


def plain_value(value: pa.Scalar) -> Any:
    """An Arrow value as JSON would have it: a field that is null is absent, as it is in the rows
    that the file was made of (Arrow gives every struct the keys of all), but for the content of a
    message."""
    dtype = value.type
    if not value.is_valid:
        return None
    if isinstance(dtype, pa.BaseExtensionType):
        if dtype.extension_name == "arrow.json":
            return json.loads(value.as_py())
        return plain_value(value.value)
    if pa.types.is_dictionary(dtype):
        return value.as_py()
    if pa.types.is_struct(dtype):
        fields = {name: plain_value(item) for name, item in value.items()}
        kept = {"content", "value"} if {"role", "from"} & set(fields) else set()
        return {name: item for name, item in fields.items() if item is not None or name in kept}
    if pa.types.is_map(dtype):
        return {item["key"].as_py(): plain_value(item["value"]) for item in value.values}
    if pa.types.is_nested(dtype):
        return [plain_value(item) for item in value.values]
    return value.as_py()


def _from_lines(store: Store, shard: Shard, rows: list[int]) -> Iterator[tuple[int, Any]]:
    source, lines = shard.source, shard.lines
    assert lines is not None
    first = store.read_range(source.key, source.version, 0, min(4, source.size_bytes))
    stream: BinaryIO
    if (compression := _compression(first)) is None:
        data = store.read_range(source.key, source.version, lines.start, lines.stop)
        stream = io.BytesIO(data)
    else:
        packed = store.open(source.key, source.size_bytes, source.version, _READ_BYTES)
        stream = pa.CompressedInputStream(packed, compression)
        left = lines.start
        while left:
            left -= len(stream.read(min(left, _READ_BYTES)))
    numbers = {shard.skip_rows + row: row for row in rows}
    number = -1
    for line in stream:
        if not line.strip():
            continue
        number += 1
        if number in numbers:
            yield numbers.pop(number), _object(line)
        if not numbers:
            return


def _from_array(store: Store, shard: Shard, rows: list[int]) -> Iterator[tuple[int, Any]]:
    source = shard.source
    data = store.read_whole(source.key, source.version, source.size_bytes)
    if (compression := _compression(data)) is not None:
        data = pa.CompressedInputStream(pa.BufferReader(data), compression).read()
    items = json.loads(data.removeprefix(_BOM))
    for row in rows:
        yield row, items[shard.skip_rows + row]


def _compression(data: bytes) -> str | None:
    return next((name for magic, name in _COMPRESSIONS.items() if data.startswith(magic)), None)


def _object(line: bytes) -> Any:
    try:
        return json.loads(line.removeprefix(_BOM))
    except ValueError:
        return None
