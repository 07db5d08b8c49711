"""Which rows of a shard end whatever process scores them: a search that outlives those processes.

Whoever holds a `Search` hears of a try before it is made, and of its end only if it passed: so a
try without an end has failed, whatever became of the process that made it. Parts that fail are
halved, a single row that fails is poison, and in the end everything is scored but the poison.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from batch_scorer.records import RowError, TokenizedRows

MOST_POISON = 8
"""Rows that one search gives up; where there are more, something else is wrong than rows."""


@dataclass(frozen=True, slots=True)
class Try:
    """Rows [start, stop) to be scored next: all of them, but those in `without`, for their scores;
    or a part of them (`is_probe`), only to see whether it passes."""

    start: int
    stop: int
    without: tuple[int, ...] = ()
    is_probe: bool = False


class Search:
    """A search for poison among `num_rows` rows; it begins when all have failed `patience` times.

    Each poison row costs ⌈log2 num_rows⌉ failures on top of those, at most. A part that failed by
    chance costs one: its halves pass.
    """

    def __init__(self, num_rows: int, patience: int) -> None:
        self._num_rows = num_rows
        self._patience = patience
        self._poison: list[int] = []
        self._suspects: list[tuple[int, int]] = []  # the next one last
        self._whole_failed = 0  # times, before the search or after it
        self._has_searched = False
        self._open: Try | None = None
        self.num_failed = 0

    def next(self) -> Try | None:
        """What to try now, or None where no try is left. The last try has failed, if it has not
        passed by now."""
        if self._open is not None:
            self._fail(self._open)
        self._open = self._choose()
        return self._open

    def passed(self, tried: Try) -> None:
        """Note that a try has passed; news of an older one, from a process given up, are none."""
        if tried == self._open:
            self._open = None
            if tried.is_probe:
                self._suspects.pop()

    def _choose(self) -> Try | None:
        gives_up = self._has_searched and self._whole_failed == self._patience
        if gives_up or len(self._poison) > MOST_POISON:
            return None
        if self._suspects:
            return Try(*self._suspects[-1], is_probe=True)
        return Try(0, self._num_rows, tuple(self._poison))

    def _fail(self, tried: Try) -> None:
        self.num_failed += 1
        if tried.is_probe:
            self._suspects.pop()
            self._divide(tried.start, tried.stop)
            return
        self._whole_failed += 1
        if self._whole_failed == self._patience and not self._has_searched:
            self._has_searched, self._whole_failed = True, 0
            self._divide(0, self._num_rows)

    def _divide(self, start: int, stop: int) -> None:
        if stop - start > 1:
            middle = (start + stop) // 2
            self._suspects += [(middle, stop), (start, middle)]
        else:
            self._poison += range(start, stop)


def without(rows: TokenizedRows, marked: Mapping[int, RowError]) -> TokenizedRows:
    """The same rows, those of `marked` without their tokens: their sequences carry the error."""
    if not marked:
        return rows
    kept = np.ones(rows.num_sequences, dtype=bool)  # bool[S]
    errors = dict(rows.sequence_errors)
    for row, error in marked.items():
        first, stop = rows.row_offsets[[row, row + 1]].tolist()
        kept[first:stop] = False
        errors |= {sequence: error for sequence in range(first, stop) if sequence not in errors}
    lengths = np.where(kept, rows.lengths, 0)
    return replace(
        rows,
        token_ids=rows.token_ids[np.repeat(kept, rows.lengths)],
        sequence_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        sequence_errors=errors,
    )


class Attempts:
    """What was begun in each stage and has not ended, across process deaths.

    What has ended is forgotten: Ray begins it once more where its result is lost with a machine.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._counts: dict[str, int] = {}
        self._searches: dict[str, Search] = {}

    def begin(self, key: str) -> int:
        self._counts[key] = self._counts.get(key, 0) + 1
        return self._counts[key]

    def next_try(self, key: str, num_rows: int, passed: Try | None) -> tuple[int, Try | None]:
        """How many tries of an item have failed, and which rows of it to score now."""
        search = self._searches.setdefault(key, Search(num_rows, self._patience))
        if passed is not None:
            search.passed(passed)
        tried = search.next()
        return search.num_failed, tried

    def forget(self, key: str) -> None:
        self._counts.pop(key, None)
        self._searches.pop(key, None)
