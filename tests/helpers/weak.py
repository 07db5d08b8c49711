"""An engine for which some sequences are too much, now and then."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from batch_scorer.backends.fake import FakeBackend
from batch_scorer.errors import RowReason
from batch_scorer.job import Job
from batch_scorer.records import RowError, Scores, TokenizedRows

WEAK_ABOVE = 5.0
"""Of the scores in [-8, 8): about a fifth of all sequences, whoever scores them."""


class WeakBackend(FakeBackend):
    """As the fake engine, but where a sequence's score would lie above `WEAK_ABOVE`, it fails for
    this reason: it raises, as most do, or marks the sequence. `asked` are the sequences it got, by
    their token ids; `add` moves the scores, so that they can be told from others."""

    def __init__(self, reason: RowReason | None = None, add: float = 0.0) -> None:
        super().__init__()
        self._reason = reason
        self._add = add
        self.asked: list[bytes] = []

    def score(self, rows: TokenizedRows) -> Scores:
        found = super().score(rows)
        bounds = rows.sequence_offsets.tolist()
        ids = [rows.token_ids[a:b].tobytes() for a, b in pairwise(bounds)]
        self.asked += [each for each in ids if each]
        weak = np.flatnonzero(found.values[:, 0] > WEAK_ABOVE).tolist() if self._reason else []
        if weak and self._reason is RowReason.ENGINE_ERROR:
            raise ValueError("too much for this engine")
        if weak and self._reason is RowReason.OUT_OF_MEMORY:
            raise MemoryError("too much for this machine")
        found.values += np.float32(self._add)
        for sequence in weak:
            assert self._reason is not None
            found.values[sequence] = np.nan
            found.errors[sequence] = RowError(self._reason, "too much")
        return found


def making(backend: FakeBackend) -> Callable[[Job], FakeBackend]:
    """What `score` makes its engine with."""
    return lambda job: backend
