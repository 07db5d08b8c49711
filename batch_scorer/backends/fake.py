"""A backend without a model, for dry runs and for tests of everything around the model."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from batch_scorer.backends.base import EngineSettings, MakeBackend
from batch_scorer.errors import RowReason
from batch_scorer.records import Effort, RowError, Scores, TokenizedRows

Words: TypeAlias = npt.NDArray[np.uint64]


class FakeBackend:
    """Scores in [-8, 8) that depend on a sequence's token ids and their order, nothing else."""

    num_outputs = 1

    def __init__(self, settings: EngineSettings | None = None) -> None:
        """No setting changes these scores."""
        self.provenance: dict[str, Any] = {"backend": "fake"}

    def score(self, rows: TokenizedRows) -> Scores:
        """One hash per sequence as its score; a sequence without tokens has none."""
        values = np.full((rows.num_sequences, 1), np.nan, dtype=np.float32)  # float32[S, 1]
        scored = np.flatnonzero(rows.lengths)
        if len(scored):
            values[scored, 0] = _hash_scores(rows, scored)
        errors = {
            sequence: RowError(RowReason.EMPTY, "the sequence has no tokens")
            for sequence in np.flatnonzero(rows.lengths == 0).tolist()
            if sequence not in rows.sequence_errors
        }
        pairs = int((rows.lengths * (rows.lengths + 1) // 2).sum())
        effort = Effort(num_batches=1, computed_tokens=rows.num_tokens, attended_pairs=pairs)
        return Scores(values, errors, effort=effort)

    def close(self) -> None:
        """There is nothing to free."""


BACKEND: MakeBackend = FakeBackend


def _hash_scores(rows: TokenizedRows, scored: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """float32[S'], one for each of the `scored` sequences, which have at least one token."""
    places = np.arange(rows.num_tokens) - np.repeat(rows.sequence_offsets[:-1], rows.lengths)
    tokens = rows.token_ids.astype(np.uint64)  # uint64[T]
    hashes = _mix(tokens ^ (places.astype(np.uint64) << np.uint64(32)))
    sums = _mix(np.add.reduceat(hashes, rows.sequence_offsets[scored]))  # uint64[S']
    # 24 bits are what a float32 holds exactly, so the highest score stays below 8.
    return (sums >> np.uint64(40)).astype(np.float32) / np.float32(2**20) - np.float32(8)


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64: every bit of the input moves every bit of the output."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
