"""What an engine is to the rest of the package, and the rules that all engines share.

A backend is built once per worker, scores one shard at a time, and never sees text.
"""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from batch_scorer.errors import ModelError, RowReason
from batch_scorer.models.adapter import Adapter
from batch_scorer.records import RowError, Scores, TokenizedRows

PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
"""Share by which a neighbour may move a hidden state: rounding stays far below it, a neighbour
that leaks in far above."""


class EngineDied(Exception):
    """The engine stopped half-way and cannot be used again: its process has to end.

    Not the model's fault and not the shard's, as far as anyone can tell, so it is neither a
    `ModelError` nor a `ShardError`; whoever holds the backend counts it as a death of the worker.
    """


class Backend(Protocol):
    """Token ids in, raw scores out.

    `num_outputs` is O, the outputs per sequence. `provenance` says what did the work
    (library versions, device, dtype, attention kernel); it is recorded with the run and does
    not enter the fingerprint.
    """

    num_outputs: int
    provenance: dict[str, Any]

    def score(self, rows: TokenizedRows) -> Scores:
        """Scores of all sequences in `rows`, in their order.

        A sequence that cannot be scored (out of memory on its own, non-finite result) is NaN
        and named in `Scores.errors`; one that arrives with an error keeps NaN. Raises
        EngineDied where the engine cannot go on.
        """

    def close(self) -> None:
        """Free the device."""


def unscorable(
    rows: TokenizedRows, *, max_tokens: int | None, vocabulary_size: int
) -> dict[int, RowError]:
    """Sequences that must not reach the model, though they arrived without an error."""
    errors: dict[int, RowError] = {}
    for sequence in np.flatnonzero(rows.lengths == 0).tolist():
        if sequence not in rows.sequence_errors:
            errors[sequence] = RowError(RowReason.EMPTY, "the sequence has no tokens")
    if max_tokens is not None:
        for sequence in np.flatnonzero(rows.lengths > max_tokens).tolist():
            detail = f"{rows.lengths[sequence]} tokens; the model takes {max_tokens}"
            errors[sequence] = RowError(RowReason.TOO_LONG, detail)
    foreign = (rows.token_ids < 0) | (rows.token_ids >= vocabulary_size)  # bool[T]
    places = np.flatnonzero(foreign)
    owners = np.searchsorted(rows.sequence_offsets, places, side="right") - 1
    for sequence, first in zip(*np.unique(owners, return_index=True), strict=True):
        errors[int(sequence)] = RowError(
            RowReason.BAD_TOKEN_ID,
            f"token id {rows.token_ids[places[first]]} is outside the model's vocabulary "
            f"of {vocabulary_size}",
        )
    return errors


def mark_non_finite(scores: Scores, planned: npt.NDArray[np.int64]) -> None:
    """NaN and an error in place of a score that is no number."""
    broken = np.nonzero(~np.isfinite(scores.values))[0]
    for sequence in np.intersect1d(planned, broken).tolist():
        if sequence not in scores.errors:
            detail = f"the model gave {scores.values[sequence].tolist()}"
            scores.errors[sequence] = RowError(RowReason.NON_FINITE_SCORE, detail)
            scores.values[sequence] = np.nan


def refuse_dtype(adapter: Adapter, model_type: str, dtype: str) -> None:
    """Raise ModelError for a dtype in which the body is known to fail."""
    if dtype in adapter.forbidden_dtypes:
        raise ModelError(f"{dtype} is known to fail in {adapter.name} models; set another dtype")
    if dtype == "float16" and model_type.startswith("gemma2"):
        raise ModelError("float16 overflows in Gemma-2; set dtype to bfloat16 or float32")
