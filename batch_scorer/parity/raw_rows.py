"""The raw values of some rows, read by the gate itself: pyarrow for columns, json for text.

Nothing here is shared with the readers whose work it checks (`inputs`, `formats`), apart from where
a shard lies in its file. It is short and slow, for a few rows.
"""

import csv
import io
import json
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.formats.bounded import elements_of
from batch_scorer.records import LineRun, Shard, Source
from batch_scorer.storage import Store

RawRow: TypeAlias = dict[str, Any]
"""One row's values by column: what JSON gives, or the same of Arrow's types."""

_BATCH_ROWS = 256
_READ_BYTES = 1 << 22
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_PARQUET, _ARROW = b"PAR1", b"ARROW1"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_BOM = b"\xef\xbb\xbf"


def read_raw_rows(store: Store, shard: Shard, rows: Sequence[int]) -> dict[int, RawRow]:
    """Rows of a shard, by their numbers in it (from 0): the columns of its layout.

    A line that is not a JSON object is left out. Raises what the store and the file format raise.
    """
    wanted = sorted(set(rows))
    columns = _columns(shard)
    if shard.row_groups is not None:
        found = _from_batches(store, shard, wanted)
    elif shard.lines is not None:
        found = _from_lines(store, shard, wanted)
    else:
        found = _from_array(store, shard, wanted)
    return {
        number: {name: value for name, value in row.items() if name in columns}
        for number, row in found
        if isinstance(row, dict)
    }


def _columns(shard: Shard) -> set[str]:
    return {*shard.layout.columns.values(), *shard.layout.fields}


def _from_batches(store: Store, shard: Shard, rows: list[int]) -> Iterator[tuple[int, RawRow]]:
    position = -shard.skip_rows
    for batch in _batches(store, shard):
        for row in rows:
            if 0 <= row - position < batch.num_rows:
                yield row, _row_of(batch, row - position, _columns(shard))
        position += batch.num_rows
        if position > rows[-1]:
            return


def _batches(store: Store, shard: Shard) -> Iterator[pa.RecordBatch]:
    """The rows of the shard's row groups, or of the record batches of an Arrow file."""
    source = shard.source
    assert shard.row_groups is not None
    file = store.open(source.key, source.size_bytes, source.version, _READ_BYTES)
    magic = file.read(len(_ARROW))
    file.seek(0)
    if magic.startswith(_PARQUET):
        parquet = pq.ParquetFile(file)
        columns = _columns(shard)
        names = [name for name in parquet.schema_arrow.names if name in columns]
        groups = range(*shard.row_groups)
        yield from parquet.iter_batches(_BATCH_ROWS, groups, names, use_threads=False)
    elif magic == _ARROW:
        arrow = pa.ipc.open_file(pa.PythonFile(file, mode="r"))
        for number in range(*shard.row_groups):
            yield arrow.get_batch(number)
    else:
        yield from islice(pa.ipc.open_stream(pa.PythonFile(file, mode="r")), *shard.row_groups)


def _row_of(batch: pa.RecordBatch, row: int, columns: Collection[str]) -> RawRow:
    return {
        name: plain_value(column[row])
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
        if name in columns
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
    lines = shard.lines
    assert lines is not None
    before = -shard.skip_rows
    for run in lines.runs:
        places = [row - before for row in rows if 0 <= row - before < run.num_rows]
        if places and not run.is_too_large:
            data = _bytes_of(store, shard.source, run)
            values = _values(data, shard.source.key, lines.schema.names, places)
            yield from zip((before + place for place in places), values, strict=True)
        before += run.num_rows


def _bytes_of(store: Store, source: Source, run: LineRun) -> bytes:
    first = store.read_range(source.key, source.version, 0, min(4, source.size_bytes))
    if (compression := _compression(first)) is None:
        return store.read_range(source.key, source.version, run.start, run.stop)
    packed = store.open(source.key, source.size_bytes, source.version, _READ_BYTES)
    stream = io.BufferedReader(pa.CompressedInputStream(packed, compression), _READ_BYTES)
    left = run.start
    while left and (skipped := stream.read(min(left, _READ_BYTES))):
        left -= len(skipped)
    return stream.read(run.stop - run.start)


def _values(data: bytes, key: str, names: list[str], places: list[int]) -> list[Any]:
    """What these lines say, or in CSV and TSV these records, of those that are not blank."""
    delimiter = next((mark for ends, mark in _DELIMITERS.items() if ends in key.lower()), None)
    if delimiter is None:
        lines = [line for line in io.BytesIO(data) if line.strip()]
        return [_object(lines[place]) for place in places]
    texts = (line.decode(errors="replace") for line in io.BytesIO(data))
    records = [record for record in csv.reader(texts, delimiter=delimiter) if record]
    return [dict(zip(names, records[place], strict=False)) for place in places]


def _from_array(store: Store, shard: Shard, rows: list[int]) -> Iterator[tuple[int, Any]]:
    source = shard.source
    data = store.read_whole(source.key, source.version, source.size_bytes)
    if (compression := _compression(data)) is not None:
        data = pa.CompressedInputStream(pa.BufferReader(data), compression).read()
    data = data.removeprefix(_BOM)
    spans = elements_of(data) or []
    for row in rows:
        start, stop = spans[shard.skip_rows + row]
        yield row, _object(data[start:stop])


def _compression(data: bytes) -> str | None:
    return next((name for magic, name in _COMPRESSIONS.items() if data.startswith(magic)), None)


def _object(line: bytes) -> Any:
    try:
        return json.loads(line.removeprefix(_BOM))
    except (ValueError, RecursionError):
        return None
