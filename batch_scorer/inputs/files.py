"""Rows of a stored file, pinned to the version that was planned."""

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer import formats
from batch_scorer.config import Config
from batch_scorer.errors import ShardError, ShardReason, StorageError
from batch_scorer.inputs.arrow_files import open_arrow, read_batches
from batch_scorer.inputs.sources import FileKind, kind_of
from batch_scorer.inputs.where import Where, where_of
from batch_scorer.quarantine import Died, apart
from batch_scorer.records import ReadBounds, RowError, Shard, Source
from batch_scorer.storage import ObjectChanged, ObjectMissing, Store, open_store

P = ParamSpec("P")
T = TypeVar("T")

BYTES_PER_TOKEN = 4
"""Of English text, roughly; only for estimates."""
_STREAM_BYTES = 1 << 22
_BATCH_ROWS = 1024
_DELIMITERS: dict[FileKind | None, str] = {FileKind.CSV: ",", FileKind.TSV: "\t"}
_WHOLE_BYTES = 1 << 22
"""A file up to this size, a few shards at most, is read in one request and not in one for each
column and footer: 3 for a shard of its own instead of 23 (five leaf columns)."""


def scan_lines(
    store: Store, source: Source, max_rows: int, max_tokens: int, bounds: ReadBounds
) -> tuple[formats.Lines, pa.Table] | None:
    """How a stored file of lines is cut, and the rows of its first run; None for a JSON array."""
    max_bytes = max_tokens * BYTES_PER_TOKEN
    delimiter = _DELIMITERS.get(kind_of(source.key))
    with _open_stream(store, source) as file:
        if delimiter is None:
            return formats.scan_lines(
                file, source.key, max_rows=max_rows, max_bytes=max_bytes, bounds=bounds
            )
        return formats.scan_delimited(
            file,
            source.key,
            delimiter=delimiter,
            max_rows=max_rows,
            max_bytes=max_bytes,
            bounds=bounds,
        )


def read_lines(
    store: Store, source: Source, lines: formats.Lines
) -> tuple[pa.Table, dict[int, RowError]]:
    """Some of a file's lines as rows, and what is wrong with those that are none."""
    data = _line_bytes(store, source, lines)
    if lines.delimiter is not None:
        return formats.read_delimited(data, source.key, lines)
    return formats.read_lines(data, lines)


def _line_bytes(store: Store, source: Source, lines: formats.Lines) -> bytes:
    if lines.codec is None:
        spans = (store.read_range(source.key, source.version, *span) for span in lines.spans)
        return b"".join(spans)
    with _open_stream(store, source) as file:
        return formats.unpack_lines(file, source.key, lines)


def _open_stream(store: Store, source: Source) -> io.BufferedReader:
    return store.open(source.key, source.size_bytes, source.version, _STREAM_BYTES)


def open_parquet(
    store: Store,
    source: Source,
    buffer_bytes: int = 0,
    metadata: pq.FileMetaData | None = None,
) -> pq.ParquetFile:
    """The Parquet file behind `source`, every read pinned to the planned version.

    A small one is read at once. Of others each column of a row group is a request; with
    `buffer_bytes` it is read bit by bit. `metadata` spares reading the footer again.
    Not pre-buffered: Arrow's IO threads would do the reading, which aborted 2 of 1600 short
    processes as they ended (0 of 1600 without).
    A page whose checksum is wrong raises OSError as it is read; without checksums this costs
    nothing.
    """
    file: io.BufferedReader | pa.BufferReader
    if source.size_bytes <= _WHOLE_BYTES:
        file = pa.BufferReader(store.read_whole(source.key, source.version, source.size_bytes))
    else:
        file = store.open(source.key, source.size_bytes, source.version)
    return pq.ParquetFile(
        file,
        metadata=metadata,
        pre_buffer=False,
        buffer_size=buffer_bytes,
        page_checksum_verification=True,
    )


def group_rows(store: Store, source: Source) -> list[int]:
    """The number of rows of each row group, or record batch."""
    if kind_of(source.key) is FileKind.ARROW:
        with open_arrow(store, source) as file:
            return [batch.num_rows for batch in file.batches(columns=[])]
    metadata = open_parquet(store, source).metadata
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


def read_rows(
    store: Store,
    source: Source,
    row_groups: tuple[int, int],
    skip_rows: int,
    num_rows: int,
    columns: list[str] | None = None,
    where: Where | None = None,
) -> pa.Table:
    """Rows out of the row groups (or record batches) [start, stop); of all columns, or of some.

    With `where` the first ones that match; row groups that hold none by their statistics are not
    read.

    A part of a row group is decoded from its beginning up to there, batch by batch: a group may
    hold a million rows. (1,600 rows from the middle of 103,428: 14 MB and 0.12 s of CPU; the whole
    group at once took 427 MB and 0.24 s.)
    Raises ShardError where a row group that is read to its end has another number of rows than it
    declares.
    """
    if where is not None:
        return _read_matching(store, source, row_groups, skip_rows, num_rows, columns, where)
    if kind_of(source.key) is FileKind.ARROW:
        return read_batches(store, source, row_groups, skip_rows, num_rows, columns)
    file = open_parquet(store, source)
    groups = list(range(*row_groups))
    nothing = file.read_row_groups([], columns=columns)
    if num_rows == sum(file.metadata.row_group(group).num_rows for group in groups):
        read = [file.read_row_group(group, columns, use_threads=False) for group in groups]
        for group, table in zip(groups, read, strict=True):
            _check_rows(file, group, table.num_rows)
        return pa.concat_tables([nothing, *read])
    if source.size_bytes > _WHOLE_BYTES:
        file = open_parquet(store, source, _STREAM_BYTES, file.metadata)
    batches: list[pa.RecordBatch] = []
    missing = num_rows
    for batch in batches_of(file, groups, columns):
        part = batch.slice(skip_rows, missing)
        skip_rows -= min(skip_rows, batch.num_rows)
        if part.num_rows:
            batches.append(part)
            missing -= part.num_rows
        if not missing:
            break
    return pa.Table.from_batches(batches, nothing.schema)


def batches_of(
    file: pq.ParquetFile,
    groups: Iterable[int],
    columns: Sequence[str] | None = None,
    batch_rows: int = _BATCH_ROWS,
) -> Iterator[pa.RecordBatch]:
    """The rows of these row groups. No batch has rows of two: pyarrow cannot put them together
    where a struct holds a dictionary.

    Raises ShardError at the end of a group that has another number of rows than it declares.
    """
    for group in groups:
        num_rows = 0
        for batch in file.iter_batches(batch_rows, [group], columns, use_threads=False):
            num_rows += batch.num_rows
            yield batch
        _check_rows(file, group, num_rows)


def _check_rows(file: pq.ParquetFile, group: int, num_rows: int) -> None:
    """Arrow gives a short table, and no error, where the pages end early."""
    declared = file.metadata.row_group(group).num_rows
    if num_rows != declared:
        raise ShardError(
            ShardReason.WRONG_ROW_COUNT,
            f"row group {group} declares {declared} rows and holds {num_rows}",
        )


def _read_matching(
    store: Store,
    source: Source,
    row_groups: tuple[int, int],
    skip_rows: int,
    num_rows: int,
    columns: list[str] | None,
    where: Where,
) -> pa.Table:
    """As `read_rows`, the first `num_rows` rows that match, with the types that they have in the
    output."""
    if kind_of(source.key) is FileKind.ARROW:
        rows = formats.as_stored(read_batches(store, source, row_groups, skip_rows, sys.maxsize))
        places = where.matches(rows)[:num_rows]
        rows = rows if columns is None else rows.select(columns)
        return rows.take(pa.array(places))
    file = open_parquet(store, source)
    if source.size_bytes > _WHOLE_BYTES:
        file = open_parquet(store, source, _STREAM_BYTES, file.metadata)
    found = [formats.as_stored(file.read_row_groups([], columns=columns))]
    missing = num_rows
    for first, batch in matching_batches(file, where, range(*row_groups), columns):
        rows = where.matches(batch)
        rows = rows[first + rows >= skip_rows][:missing]
        if len(rows):
            names = enumerate(batch.schema.names)
            wanted = [i for i, name in names if columns is None or name in columns]
            part = formats.as_stored(pa.Table.from_batches([batch.select(wanted)]))
            found.append(part.take(pa.array(rows)))
            missing -= len(rows)
        if not missing:
            break
    return pa.concat_tables(found)


def matching_batches(
    file: pq.ParquetFile, where: Where, groups: Sequence[int], columns: Sequence[str] | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Those of the row groups that may hold a match, in batches, each with the number of rows
    before it in `groups`; all columns, or these and those that `where` reads."""
    sizes = [file.metadata.row_group(group).num_rows for group in groups]
    begins = dict(zip(groups, accumulate(sizes, initial=0), strict=False))
    names = None if columns is None else [*dict.fromkeys([*columns, *where.columns])]
    for group in where.row_groups(file.metadata, groups):
        first = begins[group]
        for batch in batches_of(file, [group], names):
            yield first, batch
            first += batch.num_rows


# Reading


def read_apart(
    config: Config, size_bytes: int, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """What `read` returns, which reads a stored file of `size_bytes`, from a process that may die
    of it (`quarantine`). Everything that parses what others wrote is called in here.

    Raises what `read` raises; and ShardError where its process dies, or takes longer or more memory
    than the settings allow.
    """
    try:
        return apart(config.reader_bounds(size_bytes), read, *args, **kwargs)
    except Died as died:
        raise ShardError(ShardReason.READER_DIED, str(died)) from None
    except MemoryError:
        raise ShardError(
            ShardReason.READER_DIED,
            f"reading it takes more than {config.read_memory_gib:g} GiB (read_memory_gib)",
        ) from None


def rows_of_shard(
    shard: Shard, store_options: Mapping[str, str], columns: list[str] | None
) -> tuple[pa.Table, dict[int, RowError]]:
    """The shard's rows, in all columns or in some, with the types that they have in the output; and
    the errors of rows that could not be read.

    Raises ShardError: the file is unreadable, gone, or changed since it was planned.
    """
    with _reading(shard):
        source = shard.source
        store = open_store(source.root, store_options)
        if shard.row_groups is not None:
            where = None if shard.where is None else where_of(shard.where)
            place = shard.row_groups, shard.skip_rows, shard.num_rows
            return formats.as_stored(read_rows(store, source, *place, columns, where)), {}
        if shard.lines is not None:
            table, malformed = read_lines(store, source, shard.lines)
        else:
            data, bounds = _whole(store, source), shard.layout.bounds
            table, malformed = formats.read_json_table(data, source.key, bounds)
        places = rows_asked(shard, table)
        table = table if columns is None else table.select(columns)
        return _rows_at(places, table), _errors_at(places, malformed)


def columns_of_shard(
    shard: Shard, store_options: Mapping[str, str], names: Sequence[str]
) -> tuple[formats.Columns, dict[int, RowError]]:
    """The values of some columns, a Python value for each row; and errors as `rows_of_shard` gives
    them. Of JSON they are what `json.loads` gives, with None for an absent key.

    Raises ShardError as `rows_of_shard` does.
    """
    if kind_of(shard.source.key) is not FileKind.JSON:
        table, malformed = rows_of_shard(shard, store_options, list(names))
        with _reading(shard):
            columns, errors = formats.columns_of(table, names, shard.layout.bounds)
        return columns, errors | malformed
    with _reading(shard):
        source = shard.source
        store = open_store(source.root, store_options)
        if shard.lines is not None:
            data = _line_bytes(store, source, shard.lines)
            columns, malformed = formats.read_line_values(data, shard.lines, names)
            rows = formats.read_lines(data, shard.lines)[0] if shard.where else None
        else:
            data, bounds = _whole(store, source), shard.layout.bounds
            columns, malformed = formats.read_json_values(data, source.key, names, bounds)
            rows = formats.read_json_table(data, source.key, bounds)[0] if shard.where else None
        places = rows_asked(shard, rows)
        values = {name: _values_at(places, columns[name]) for name in names}
        return values, _errors_at(places, malformed)


def column_names(shard: Shard, store_options: Mapping[str, str]) -> list[str]:
    """The columns of the shard's file. Raises ShardError as `rows_of_shard` does."""
    if shard.lines is not None:
        return list(shard.lines.schema.names)
    source = shard.source
    with _reading(shard):
        store = open_store(source.root, store_options)
        if kind_of(source.key) is FileKind.ARROW:
            with open_arrow(store, source) as file:
                return list(file.schema.names)
        if shard.row_groups is not None:
            return list(open_parquet(store, source).schema_arrow.names)
        table, _ = formats.read_json_table(_whole(store, source), source.key, shard.layout.bounds)
        return list(table.column_names)


def _whole(store: Store, source: Source) -> bytes:
    return store.read_whole(source.key, source.version, source.size_bytes)


def rows_asked(shard: Shard, rows: pa.Table | None) -> Sequence[int]:
    """Which rows are the shard's, of those that its `skip_rows` are the first of. With a `where`
    these `rows` are needed."""
    if shard.where is None or rows is None:
        return range(shard.skip_rows, shard.skip_rows + shard.num_rows)
    places = where_of(shard.where).matches(rows)
    asked: list[int] = places[places >= shard.skip_rows][: shard.num_rows].tolist()
    return asked


def _rows_at(places: Sequence[int], table: pa.Table) -> pa.Table:
    if isinstance(places, range):
        return table.slice(places.start, len(places))
    return table.take(pa.array(places, pa.int64()))


def _values_at(places: Sequence[int], values: list[Any]) -> list[Any]:
    if isinstance(places, range):
        return values[places.start : places.stop]
    return [values[place] for place in places]


def _errors_at(places: Sequence[int], errors: Mapping[int, RowError]) -> dict[int, RowError]:
    """The errors of these rows, of all those that were read."""
    if not errors:
        return {}
    if isinstance(places, range):
        return {place - places.start: e for place, e in errors.items() if place in places}
    return {row: errors[place] for row, place in enumerate(places) if place in errors}


@contextmanager
def _reading(shard: Shard) -> Iterator[None]:
    """What goes wrong with the shard's file, as ShardError."""
    try:
        yield
    except ObjectChanged as error:
        raise ShardError(
            ShardReason.INPUT_CHANGED, "the file changed after the run was planned; run again"
        ) from error
    except ObjectMissing as error:
        raise ShardError(ShardReason.INPUT_GONE, "the file is gone") from error
    except StorageError as error:
        raise ShardError(ShardReason.STORE_FAILED, str(error)) from error
    except MemoryError:  # Arrow's is an ArrowException too
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # of a column's name
        raise ShardError(
            ShardReason.UNREADABLE_FILE,
            f"rows {shard.first_row} to {shard.first_row + shard.num_rows}: {error}",
        ) from error


def row_numbers(shard: Shard, store_options: Mapping[str, str]) -> Sequence[int]:
    """The numbers of the shard's rows in the file, from 0. Raises as `rows_of_shard`."""
    if shard.where is None:
        return range(shard.first_row, shard.first_row + shard.num_rows)
    where = where_of(shard.where)
    all_rows = replace(shard, where=None, num_rows=sys.maxsize)
    rows, _ = rows_of_shard(all_rows, store_options, where.columns)
    return [shard.first_row + place for place in where.matches(rows)[: shard.num_rows].tolist()]
