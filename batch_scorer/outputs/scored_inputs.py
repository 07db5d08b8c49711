"""The inputs of an output, read again as they were when it was scored."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_scorer import formats
from batch_scorer.errors import ShardError, StorageError
from batch_scorer.inputs.files import (
    batches_of,
    group_rows,
    open_parquet,
    read_lines,
    read_rows,
    scan_lines,
)
from batch_scorer.inputs.selection import kept_of, matching_rows, rows_of_bits
from batch_scorer.inputs.sources import FileKind, kind_of
from batch_scorer.inputs.tables import parts_holding
from batch_scorer.inputs.where import where_of
from batch_scorer.outputs.claim import RUN_KEY, Claim
from batch_scorer.records import DEFAULT_BOUNDS, Commit, ReadBounds, Receipt, Source
from batch_scorer.records.reading import parsed
from batch_scorer.storage import ObjectDamaged, Store, Version, open_store

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cut:
    """What says which rows of an input are in which shard: settings of the output."""

    shard_rows: int
    shard_tokens: int
    keep_columns: tuple[str, ...] = ()
    drop_columns: tuple[str, ...] = ()
    limit: int | None = None
    where: str | None = None
    bounds: ReadBounds = DEFAULT_BOUNDS


def cut_of(store: Store, claim: Claim) -> Cut:
    """Raises ObjectDamaged."""
    recorded = {bound.name for bound in fields(ReadBounds)} & claim.fingerprint.keys()
    bounds = {name: claim.fingerprint[name] for name in recorded}
    try:
        return parsed(json.dumps({**claim.layout, "bounds": bounds}), Cut)
    except ValueError as error:
        raise ObjectDamaged(f"{store.url(RUN_KEY)}: damaged: layout: {error}") from None


class Inputs:
    """The rows that were scored. How a JSON file is cut is found once; an array, which is parsed
    whole, is kept for its next shard, and so are the places of rows that match `where`."""

    def __init__(self, options: Mapping[str, str], cut: Cut) -> None:
        self._options = options
        self._max_rows, self._max_tokens = cut.shard_rows, cut.shard_tokens
        self._keep, self._drop = cut.keep_columns, cut.drop_columns
        self._where = None if cut.where is None else where_of(cut.where)
        self._bounds = cut.bounds
        self._json: tuple[Source, formats.Lines | pa.Table] | None = None
        self._matching = np.zeros(0, np.int64)  # of the same file

    def rows(self, receipt: Receipt, commit: Commit) -> pa.Table | None:
        """In the columns that were kept. None if the file is gone, not readable, or no longer the
        one that was scored."""
        try:
            if (found := self._find(receipt)) is None:
                return None
            read = self._of_groups if has_groups(receipt) else self._of_lines
            table = read(*found, commit.first_row, commit.num_rows)
        except (StorageError, ShardError, pa.ArrowException, OSError):
            return None
        return kept_of(table, self._keep, self._drop)

    def count(self, receipt: Receipt) -> tuple[int, int] | None:
        """All rows of a receipt's input, and those that match `where`; None as for `rows`."""
        try:
            if (found := self._find(receipt)) is None:
                return None
            if not has_groups(receipt):
                num_rows = _num_rows(self._scanned(*found))
                return num_rows, num_rows if self._where is None else len(self._matching)
            num_rows = sum(group_rows(*found))
            if self._where is None:
                return num_rows, num_rows
            if kind_of(receipt.input) is not FileKind.PARQUET:
                bits = matching_rows(*found, num_rows, self._where, None, self._bounds)
                return num_rows, len(rows_of_bits(bits, num_rows))
            # All of the rows, whatever the statistics of their groups say.
            file = open_parquet(*found)
            groups = range(file.metadata.num_row_groups)
            batches = batches_of(file, groups, self._where.columns)
            return num_rows, sum(len(self._where.matches(batch)) for batch in batches)
        except (StorageError, ShardError, pa.ArrowException, OSError):
            return None

    def matching(self, receipt: Receipt) -> IntArray | None:
        """int64[n]: the rows of a receipt's input for which `where` is true, in order; None as for
        `rows`."""
        try:
            if self._where is None or (found := self._find(receipt)) is None:
                return None
            if not has_groups(receipt):
                self._scanned(*found)
                return self._matching
            num_rows = sum(group_rows(*found))
            bits = matching_rows(*found, num_rows, self._where, None, self._bounds)
            return rows_of_bits(bits, num_rows)
        except (StorageError, ShardError, pa.ArrowException, OSError):
            return None

    def _find(self, receipt: Receipt) -> tuple[Store, Source] | None:
        """The input, if it is known and still the one that was looked at."""
        if not receipt.input_root:
            return None
        store = open_store(receipt.input_root, self._options)
        info = store.head(receipt.input)
        if info.version != Version(receipt.input_etag):
            return None
        return store, Source(receipt.input_root, info.key, info.size_bytes, info.version)

    def _of_groups(self, store: Store, source: Source, first_row: int, num_rows: int) -> pa.Table:
        ends = list(accumulate(group_rows(store, source)))
        # Nobody knows where the last one of some rows that match is.
        stop_row = ends[-1] if self._where and num_rows else first_row + num_rows
        start, stop = parts_holding(ends, first_row, stop_row)
        skip_rows = first_row - (ends[start - 1] if start else 0)
        place = (start, stop), skip_rows, num_rows
        return formats.as_stored(read_rows(store, source, *place, None, self._where))

    def _of_lines(self, store: Store, source: Source, first_row: int, num_rows: int) -> pa.Table:
        found = self._scanned(store, source)
        rows = np.arange(first_row, first_row + num_rows)
        if self._where is not None:
            rows = self._matching[self._matching >= first_row][:num_rows]
        if isinstance(found, pa.Table):
            before, table = 0, found
        else:
            ends = list(accumulate(run.num_rows for run in found.runs))
            start, stop = parts_holding(ends, int(rows[0]), int(rows[-1]) + 1)
            before = ends[start - 1] if start else 0
            table, _ = read_lines(store, source, found.part(start, stop))
        if self._where is None:
            return table.slice(first_row - before, num_rows)
        return table.take(pa.array(rows - before))

    def _scanned(self, store: Store, source: Source) -> formats.Lines | pa.Table:
        """How a file of lines is cut, or the rows of a JSON array."""
        if self._json is None or self._json[0] != source:
            scanned = scan_lines(store, source, self._max_rows, self._max_tokens, self._bounds)
            if scanned is None:
                data = store.read(source.key, source.version)
                table, _ = formats.read_json_table(data, source.key, self._bounds)
                self._json = source, table
            else:
                self._json = source, scanned[0]
            self._matching = self._matches(store, source, self._json[1])
        return self._json[1]

    def _matches(self, store: Store, source: Source, found: formats.Lines | pa.Table) -> IntArray:
        if self._where is None:
            return np.zeros(0, np.int64)
        if isinstance(found, pa.Table):
            return self._where.matches(found)
        num_rows = _num_rows(found)
        bits = matching_rows(store, source, num_rows, self._where, found, self._bounds)
        return rows_of_bits(bits, num_rows)


def _num_rows(found: formats.Lines | pa.Table) -> int:
    return found.num_rows if isinstance(found, pa.Table) else sum(r.num_rows for r in found.runs)


def has_groups(receipt: Receipt) -> bool:
    kind = kind_of(receipt.input)
    return kind is not None and kind.has_groups
