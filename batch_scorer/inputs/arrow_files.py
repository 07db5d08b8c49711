"""Arrow's own files (IPC, Feather 2), in both formats: with an index of record batches at the end,
or a stream of them. A record batch is to them what a row group is to Parquet."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice

import pyarrow as pa

from batch_scorer.formats.values import bytes_type, with_leaves
from batch_scorer.records import Source
from batch_scorer.storage import Store

_INDEXED = b"ARROW1"
_FEATHER_1 = b"FEA1"
_STREAM_BYTES = 1 << 22


class ArrowFile:
    """An open file. `schema` has all columns."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        magic = file.read(len(_INDEXED))
        if magic.startswith(_FEATHER_1):
            raise pa.ArrowInvalid("this is Feather version 1: write it again as version 2")
        self._is_indexed = magic == _INDEXED
        self.schema: pa.Schema = self._reader(None).schema

    def batches(self, start: int = 0, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The record batches from number `start` on, of all columns or of some in the file's order.

        Of a stream those before `start` are read too. Raises ArrowException, also where lengths
        and offsets are not those of the values: a batch of them ends the process that uses it.
        """
        reader = self._reader(columns)
        if self._is_indexed:
            for number in range(start, reader.num_record_batches):
                yield _checked(reader.get_batch(number))
            return
        for number, batch in enumerate(reader):
            if number >= start:
                yield _checked(batch)

    def _reader(
        self, columns: list[str] | None
    ) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
        options = None
        if columns is not None:
            fields = [i for i, name in enumerate(self.schema.names) if name in columns]
            options = pa.ipc.IpcReadOptions(included_fields=fields)
        self._file.seek(0)
        open_as = pa.ipc.open_file if self._is_indexed else pa.ipc.open_stream
        return open_as(pa.PythonFile(self._file, mode="r"), options=options)


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch; raises ArrowInvalid where its buffers, offsets and counts are not those of its
    values.

    What the values mean is not judged: text that is not UTF-8 costs its row, and not the file; and
    a date that has a time, as some writers leave it, costs nothing.
    """
    batch.validate()
    for column in batch.columns:
        column.view(_bare(column.type)).validate(full=True)
    return batch


@lru_cache(maxsize=4096)
def _bare(dtype: pa.DataType) -> pa.DataType:
    """The type with plain bytes in place of text, times and decimals, at any depth."""
    return bytes_type(with_leaves(dtype, _instead))


def _instead(dtype: pa.DataType) -> pa.DataType | None:
    if isinstance(dtype, pa.BaseExtensionType):
        return _bare(dtype.storage_type)
    if pa.types.is_temporal(dtype) or pa.types.is_decimal(dtype):
        return pa.binary(dtype.bit_width // 8)
    return None


@contextmanager
def open_arrow(store: Store, source: Source) -> Iterator[ArrowFile]:
    """The file behind `source`, every read pinned to the planned version. Raises ArrowException."""
    with store.open(source.key, source.size_bytes, source.version, _STREAM_BYTES) as file:
        yield ArrowFile(file)


def read_batches(
    store: Store,
    source: Source,
    groups: tuple[int, int],
    skip_rows: int,
    num_rows: int,
    columns: list[str] | None = None,
) -> pa.Table:
    """Rows out of the record batches [start, stop); of all columns, or of some."""
    start, stop = groups
    found: list[pa.RecordBatch] = []
    with open_arrow(store, source) as file:
        schema = file.schema
        for batch in islice(file.batches(start, columns), stop - start):
            schema = batch.schema
            found.append(batch)
    table = pa.Table.from_batches(found, schema)
    return (table if columns is None else table.select(columns)).slice(skip_rows, num_rows)
