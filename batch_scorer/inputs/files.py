"""Rows of a stored file, pinned to the version that was planned."""

import io
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer import formats
from batch_scorer.errors import ShardError, ShardReason, StorageError
from batch_scorer.records import RowError, Shard, Source
from batch_scorer.storage import ObjectChanged, ObjectMissing, Store, open_store

BYTES_PER_TOKEN = 4
"""Of English text, roughly; only for estimates."""
_STREAM_BYTES = 1 << 22
_BATCH_ROWS = 1024
_WHOLE_BYTES = 1 << 22
"""A file up to this size, a few shards at most, is read in one request and not in one for each
column and footer: 3 for a shard of its own instead of 23 (five leaf columns)."""


def scan_json(
    store: Store, source: Source, max_rows: int, max_tokens: int
) -> tuple[formats.Lines, pa.Table] | None:
    """`formats.scan_lines` of a stored file."""
    with _open_stream(store, source) as file:
        return formats.scan_lines(
            file, source.key, max_rows=max_rows, max_bytes=max_tokens * BYTES_PER_TOKEN
        )


def read_json(
    store: Store, source: Source, lines: formats.Lines
) -> tuple[pa.Table, dict[int, RowError]]:
    """Some of a file's lines as rows, and which of them are no JSON."""
    if not lines.is_gzip:
        data = store.read_range(source.key, source.version, lines.start, lines.stop)
    else:
        with _open_stream(store, source) as file:
            data = formats.unpack_lines(file, source.key, lines)
    return formats.read_lines(data, source.key, lines)


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
    """
    file: io.BufferedReader | pa.BufferReader
    if source.size_bytes <= _WHOLE_BYTES:
        file = pa.BufferReader(store.read_whole(source.key, source.version, source.size_bytes))
    else:
        file = store.open(source.key, source.size_bytes, source.version)
    return pq.ParquetFile(file, metadata=metadata, pre_buffer=False, buffer_size=buffer_bytes)


def read_rows(
    store: Store,
    source: Source,
    row_groups: tuple[int, int],
    skip_rows: int,
    num_rows: int,
    columns: list[str] | None = None,
) -> pa.Table:
    """Rows of a Parquet file, out of the row groups [start, stop); of all columns, or of some.

    A part of a row group is decoded from its beginning up to there, batch by batch: a group may
    hold a million rows. (1,600 rows from the middle of 103,428: 14 MB and 0.12 s of CPU; the whole
    group at once took 427 MB and 0.24 s.)
    """
    file = open_parquet(store, source)
    groups = list(range(*row_groups))
    if num_rows == sum(file.metadata.row_group(group).num_rows for group in groups):
        return file.read_row_groups(groups, columns=columns, use_threads=False)
    if source.size_bytes > _WHOLE_BYTES:
        file = open_parquet(store, source, _STREAM_BYTES, file.metadata)
    batches: list[pa.RecordBatch] = []
    missing = num_rows
    for batch in file.iter_batches(_BATCH_ROWS, groups, columns, use_threads=False):
        part = batch.slice(skip_rows, missing)
        skip_rows -= min(skip_rows, batch.num_rows)
        if part.num_rows:
            batches.append(part)
            missing -= part.num_rows
        if not missing:
            break
    return pa.Table.from_batches(batches, file.read_row_groups([], columns=columns).schema)


# Reading


def columns_of_shard(
    shard: Shard, store_options: Mapping[str, str], names: list[str]
) -> tuple[formats.Columns, dict[int, RowError]]:
    """The values of some columns of the shard, and the errors of rows that were no JSON.

    Raises as `rows_of_shard`.
    """
    table, malformed = rows_of_shard(shard, store_options, names)
    return formats.columns_of(table, names), malformed


def rows_of_shard(
    shard: Shard, store_options: Mapping[str, str], columns: list[str] | None
) -> tuple[pa.Table, dict[int, RowError]]:
    """The shard's rows, in all columns or in some, and the errors of rows that were no JSON.

    Raises ShardError: the file is unreadable, gone, or changed since it was planned.
    """
    source = shard.source
    store = open_store(source.root, store_options)
    try:
        if shard.row_groups is None:
            if shard.lines is not None:
                table, malformed = read_json(store, source, shard.lines)
            else:
                data = store.read_whole(source.key, source.version, source.size_bytes)
                table, malformed = formats.read_json_table(data, source.key)
            table = table if columns is None else table.select(columns)
            start, stop = shard.skip_rows, shard.skip_rows + shard.num_rows
            kept = {row - start: error for row, error in malformed.items() if start <= row < stop}
            return table.slice(start, shard.num_rows), kept
        return read_rows(
            store, source, shard.row_groups, shard.skip_rows, shard.num_rows, columns
        ), {}
    except ObjectChanged as error:
        raise ShardError(
            ShardReason.INPUT_CHANGED, "the file changed after the run was planned; run again"
        ) from error
    except ObjectMissing as error:
        raise ShardError(ShardReason.INPUT_GONE, "the file is gone") from error
    except StorageError as error:
        raise ShardError(ShardReason.STORE_FAILED, str(error)) from error
    except (pa.ArrowException, OSError) as error:
        raise ShardError(
            ShardReason.UNREADABLE_FILE,
            f"rows {shard.first_row} to {shard.first_row + shard.num_rows}: {error}",
        ) from error
