"""What the scores of several models are together: columns of their own. Pure functions.

`mean`, `min` and `std` (over the whole population) are over the models. `z` is the mean over the
models of a score that was normalised over its own row: minus the mean of the row's answers, over
their standard deviation; null where an answer is alone, or a model gives all of them the same
score. A row's `rank_disagreement` is the share of all pairs of two models and two answers that the
models order differently; where only one of the two models has a tie, that is half of one. All of
them leave out the answers that some model gave no score to: null is their place.

Legend: M models, S sequences, R rows, G rows with n answers each, P pairs of answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.errors import RowNote
from batch_scorer.formats.shape import shape_of
from batch_scorer.outputs.columns import numbers, reasons_of
from batch_scorer.records import SCALAR, Layout, RowError, ScoredRows, Scores
from batch_scorer.records.digest import digest_of

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_AT_ONCE = 1 << 22
"""Orders of pairs of answers that are in memory together, in bytes."""


@dataclass(frozen=True, slots=True)
class Together:
    """float32[S] each, but for `disagreement`, float32[R]; NaN where there is none."""

    mean: FloatArray
    min: FloatArray
    std: FloatArray
    z: FloatArray
    disagreement: FloatArray


def together(values: FloatArray, row_offsets: IntArray) -> Together:
    """Of float32[M, S] scores, NaN where there is none; row r has the sequences from
    `row_offsets[r]` to `row_offsets[r + 1]`, int64[R+1]."""
    exact = values.astype(np.float64)
    is_there = np.asarray(np.isfinite(values).all(axis=0))  # bool[S]
    z = np.full(len(is_there), np.nan)
    disagreement = np.full(len(row_offsets) - 1, np.nan)
    there = np.flatnonzero(is_there)
    rows = np.searchsorted(row_offsets, there, side="right") - 1
    counts = np.bincount(rows, minlength=len(disagreement))
    starts = np.cumsum(counts) - counts
    for size in np.unique(counts[counts > 1]).tolist():
        alike = np.flatnonzero(counts == size)
        answers = there[starts[alike][:, None] + np.arange(size)]  # int64[G, n]
        z[answers] = _normalised(exact[:, answers])
        pairs = size * (size - 1) // 2
        step = max(1, _AT_ONCE // (pairs * len(values)))
        for first in range(0, len(alike), step):
            some = slice(first, first + step)
            disagreement[alike[some]] = _disagreement(values[:, answers[some]])

    return Together(
        mean=_mean(values),
        min=exact.min(axis=0).astype(np.float32),  # NaN where any is
        std=exact.std(axis=0).astype(np.float32),
        z=z.astype(np.float32),
        disagreement=disagreement.astype(np.float32),
    )


def _mean(values: FloatArray) -> FloatArray:
    """float32[S] of float32[M, S]; NaN where any is."""
    mean: FloatArray = values.astype(np.float64).mean(axis=0).astype(np.float32)
    return mean


def _normalised(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """float64[G, n] of [M, G, n]."""
    spread = scores.std(axis=2, keepdims=True)
    # Of equal scores it may differ from 0 by rounding.
    spread[np.ptp(scores, axis=2, keepdims=True) == 0] = np.nan
    found: npt.NDArray[np.float64] = ((scores - scores.mean(axis=2, keepdims=True)) / spread).mean(
        axis=0
    )
    found[np.isnan(found).any(axis=1)] = np.nan
    return found


def _disagreement(scores: FloatArray) -> npt.NDArray[np.float64]:
    """float64[G] of [M, G, n]; NaN for one model."""
    one, other = np.triu_indices(scores.shape[2], 1)
    orders = np.sign(scores[:, :, one] - scores[:, :, other]).astype(np.int8)  # [M, G, P]
    models = list(combinations(orders, 2))
    if not models:
        return np.full(scores.shape[1], np.nan)
    apart = [np.abs(a - b).mean(axis=1) / 2 for a, b in models]
    found: npt.NDArray[np.float64] = np.mean(apart, axis=0)
    return found


def joined(scored: Mapping[str, ScoredRows]) -> ScoredRows:
    """What several models made of the same rows, as of one that gives the mean of their scores: a
    row's reason is that of the first model that did not score it."""
    parts = [*scored.values()]
    first = parts[0]
    mean = _mean(np.stack([part.scores.values[:, 0] for part in parts]))
    errors: dict[int, RowError] = {}
    row_errors: dict[int, RowError] = {}
    notes: dict[int, set[RowNote]] = {}
    special_tokens: dict[int, int] = {}
    for name, part in scored.items():
        for place, error in part.scores.errors.items():
            errors.setdefault(place, _of_model(name, error))
        for row, error in part.row_errors.items():
            row_errors.setdefault(row, error)
        for row, found in part.notes.items():
            notes.setdefault(row, set()).update(found)
        special_tokens = part.special_tokens | special_tokens
    return ScoredRows(
        scores=Scores(mean[:, None], errors),
        lengths=first.lengths,
        truncated_tokens=first.truncated_tokens,
        row_offsets=first.row_offsets,
        row_errors=row_errors,
        rows_digest=digest_of([part.rows_digest for part in parts]),
        engine={"models": {name: part.engine for name, part in scored.items()}},
        score_s=sum(part.score_s for part in parts),
        notes={row: tuple(sorted(found)) for row, found in sorted(notes.items())},
        special_tokens=special_tokens,
    )


def _of_model(name: str, error: RowError) -> RowError:
    return RowError(error.reason, f"{name}: {error.detail}")


def columns_together(
    scored: Mapping[str, ScoredRows],
    whole: ScoredRows,
    table: pa.Table,
    layout: Layout,
    prefix: str,
) -> dict[str, pa.Array]:
    """The columns of all models together by name, R values each. `whole` is what they are `joined`,
    `table` holds the input rows."""
    shape = shape_of(layout.format)
    counts = shape.counts(table, layout, whole.row_offsets)
    values = np.stack([part.scores.values[:, 0] for part in scored.values()])
    found = together(values, whole.row_offsets)
    arrays = [reasons_of(whole)]
    for each in (found.mean, found.min, found.std, found.z):
        arrays += shape.to_columns(numbers(each), counts)
        if each is found.mean and shape.has_margin(SCALAR):
            arrays.append(pc.subtract(*arrays[-2:]))
    arrays.append(numbers(found.disagreement))
    return dict(zip(shape.columns_together(prefix), arrays, strict=True))
