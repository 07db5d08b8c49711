"""The rows of an output that have no score, and why: read from the data, not from counters."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.errors import IntegrityError, OutputError
from batch_scorer.inputs.files import open_parquet
from batch_scorer.outputs.claim import open_scored
from batch_scorer.outputs.scored_inputs import Cut, Inputs, cut_of
from batch_scorer.outputs.state import OutputState
from batch_scorer.quarantine import Bounds, Died, apart
from batch_scorer.records import Commit, Receipt, Source, Status
from batch_scorer.storage import in_threads, open_store

IntArray = npt.NDArray[np.int64]

SCHEMA = pa.schema(
    {
        "file": pa.string(),
        "row": pa.int64(),
        "reason": pa.string(),
        "detail": pa.string(),
        "column": pa.string(),
    }
)
_READERS = 8
_MEMORY_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class MarkedRows:
    """The marked rows of `output`, by file and row, as a table of `SCHEMA`.

    `row` counts from 0 in `file`, a file of the inputs; null where that is not known: rows picked
    by `where` are counted in the input, which has to be there as it was scored. `detail` is null
    where no receipt has it: receipts keep a few for each shard. `column` is the one that holds the
    reason.
    """

    output: str
    rows: pa.Table

    def to_json(self) -> dict[str, Any]:
        return {"output": self.output, "rows": self.rows.to_pylist()}

    def save(self, file: Path) -> None:
        """Write the rows as Parquet, into a folder made if need be. Raises OutputError."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(self.rows, file, compression="zstd")
        except OSError as error:
            raise OutputError(f"{file}: the rows cannot be written: {error}") from error


def read_marked(
    output: str, store_options: Mapping[str, str] | None = None, *, name: str | None = None
) -> MarkedRows:
    """The marked rows of an output, which is shown as `name` where that is another.

    Of a run at work those that are committed so far. Raises OutputError where there is no output,
    IntegrityError for a shard that cannot be read, and StorageError.
    """
    tables = _Scored(output, store_options or {}).marked()
    found = pa.concat_tables([SCHEMA.empty_table(), *tables])
    return MarkedRows(name or output, found.sort_by([("file", "ascending"), ("row", "ascending")]))


class _Scored:
    """The committed shards of one output, and where their rows come from."""

    def __init__(self, output: str, options: Mapping[str, str]) -> None:
        store, claim = open_scored(output, options)
        self._output, self._options = output, options
        self._cut = cut_of(store, claim)
        self._root = store.root
        shards = (receipt for _, receipt in OutputState(store).shards())
        self._shards = {
            receipt.output_key: receipt
            for receipt in shards
            if receipt is not None and receipt.status is Status.COMMITTED
        }
        self._matching: dict[str, IntArray | None] = {}  # by input file

    def marked(self) -> Iterator[pa.Table]:
        """Tables of `SCHEMA`."""
        receipts = [r for r in self._shards.values() if _commit(r).rows_marked]
        found = in_threads(self._reasons, receipts, _READERS)
        for receipt, (places, reasons) in zip(receipts, found, strict=True):
            commit = _commit(receipt)
            rows = self._numbers(receipt, places)
            details: dict[tuple[int | None, str], str] = {
                (row, reason): detail for row, reason, detail in receipt.examples
            }
            columns = {
                "file": [receipt.input] * len(places),
                "row": rows,
                "reason": reasons,
                "detail": [details.get(key) for key in zip(rows, reasons, strict=True)],
                "column": [commit.error_column] * len(places),
            }
            yield pa.table(columns, schema=SCHEMA)

    def _reasons(self, receipt: Receipt) -> tuple[list[int], list[str]]:
        """The places of a shard's marked rows, from 0, and the reason of each."""
        stored = receipt.stored
        assert stored is not None  # it is committed
        source = Source(self._root, receipt.output_key, stored.size_bytes, stored.version)
        column = stored.commit.error_column
        try:
            return apart(_bounds(receipt), _marks_in, self._options, source, column)
        except (pa.ArrowException, OSError, MemoryError, Died) as error:
            raise IntegrityError(
                f"{source.url} is not the shard that was committed ({error}); for details run "
                "`batch-scorer verify`"
            ) from error

    def _numbers(self, receipt: Receipt, places: Sequence[int | None]) -> list[int | None]:
        """The numbers in the receipt's input of the rows at these places of its shard."""
        commit = _commit(receipt)
        if commit.where is None:
            return [None if place is None else commit.first_row + place for place in places]
        if receipt.input not in self._matching:
            self._matching[receipt.input] = self._matching_in(receipt)
        matching = self._matching[receipt.input]
        if matching is None:
            return [None] * len(places)
        ours = matching[matching >= commit.first_row][: commit.num_rows].tolist()
        if len(ours) < commit.num_rows:
            return [None] * len(places)
        return [None if place is None else ours[place] for place in places]

    def _matching_in(self, receipt: Receipt) -> IntArray | None:
        try:
            return apart(_bounds(receipt), _rows_matching, self._options, self._cut, receipt)
        except (Died, MemoryError):
            return None


def _commit(receipt: Receipt) -> Commit:
    assert receipt.commit is not None  # `_Scored` has committed shards only
    return receipt.commit


def _bounds(receipt: Receipt) -> Bounds:
    size_bytes = 0 if receipt.stored is None else receipt.stored.size_bytes
    return Bounds.of_file(size_bytes, _MEMORY_BYTES)


def _marks_in(
    options: Mapping[str, str], source: Source, column: str
) -> tuple[list[int], list[str]]:
    file = open_parquet(open_store(source.root, options), source)
    reasons = file.read(columns=[column], use_threads=False)[column].combine_chunks()
    places = np.flatnonzero(reasons.is_valid().to_numpy(zero_copy_only=False))
    return places.tolist(), reasons.drop_null().to_pylist()


def _rows_matching(options: Mapping[str, str], cut: Cut, receipt: Receipt) -> IntArray | None:
    return Inputs(options, cut).matching(receipt)
