"""Receipts as they come in, so that a resumed run need not read the shards themselves."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from batch_scorer.failpoints import failpoint
from batch_scorer.outputs.lease import RECORDS
from batch_scorer.records import Outcome, Receipt
from batch_scorer.records.reading import read_lines
from batch_scorer.storage import Store, in_threads

R = TypeVar("R", Receipt, Outcome)

READERS = 16
_FOLDER = f"{RECORDS}/ledger"


class Ledger:
    """Receipts of this run, appended in segments, so that a resumed run need not read shards."""

    def __init__(self, store: Store, epoch: int, holder_id: str, *, every_s: float = 10.0) -> None:
        self._store = store
        self._prefix = f"{_FOLDER}/{epoch:06d}-{holder_id}"
        self._every_s = every_s
        self._flushed = time.monotonic()
        self._segments = 0
        self._pending: list[Receipt] = []

    def add(self, receipt: Receipt) -> None:
        self._pending.append(receipt)
        if time.monotonic() - self._flushed >= self._every_s:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            lines = [receipt.to_line() for receipt in self._pending]
            key = f"{self._prefix}-{self._segments:06d}.jsonl"
            # Counted before the PUT: should its end stay unknown, the receipts go into a segment
            # with another name, and are there twice rather than not at all.
            self._segments += 1
            failpoint("ledger.before_put")
            self._store.put(key, "\n".join(lines).encode(), instead_of=None)
            failpoint("ledger.after_put")
            self._pending.clear()
        self._flushed = time.monotonic()


@dataclass(frozen=True, slots=True)
class Segment(Generic[R]):
    """A part of the ledger: whose, and when it was written, by the store's clock."""

    holder_id: str
    written_at: datetime
    receipts: list[R]


def read_ledger(store: Store, shape: type[R]) -> Iterator[Segment[R]]:
    """The ledgers of all runs since the current manifest, oldest segment first, the receipts read
    as far as `shape` has them. Raises ObjectDamaged."""
    infos = sorted(store.list(_FOLDER), key=lambda info: info.last_modified)
    contents = in_threads(lambda info: read_lines(store, info.key, shape), infos, READERS)
    for info, found in zip(infos, contents, strict=True):
        holder_id = info.key.removeprefix(_FOLDER).partition("-")[2].partition("-")[0]
        yield Segment(holder_id, info.last_modified, [each.compact() for each in found])
