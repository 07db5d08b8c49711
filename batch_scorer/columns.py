"""The columns that scoring adds: their names, their values, and a digest of them. Pure functions.

A row that could not be scored has nulls and a reason; a list of scores has a null in the place
of each response without one. `score_error` is null exactly when every score of the row is there.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.config import OverLength
from batch_scorer.records import Format, Layout, RowError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_MAX_SOURCES = 100


@dataclass(slots=True)
class ScoredRows:
    """Scores of R rows and S sequences; the token ids stay behind.

    `values` float32[S], NaN where there is no score; `lengths` and `truncated_tokens` int32[S];
    `row_offsets` int64[R+1]; errors by sequence and by row. `rows_digest` is over what was
    scored, `engine` says what scored it. The rest is measured: forward passes, the tokens in
    them, batches halved, seconds.
    """

    values: FloatArray
    lengths: npt.NDArray[np.int32]
    truncated_tokens: npt.NDArray[np.int32]
    row_offsets: IntArray
    sequence_errors: dict[int, RowError]
    row_errors: dict[int, RowError]
    rows_digest: str
    engine: dict[str, Any]
    computed_tokens: int
    num_batches: int
    oom_splits: int
    score_s: float

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    def errors_by_row(self) -> dict[int, RowError]:
        """The first error of each row that has one, in row order."""
        errors = dict(self.row_errors)
        sequences = sorted(self.sequence_errors)
        rows = np.searchsorted(self.row_offsets, sequences, side="right") - 1
        for row, sequence in zip(rows.tolist(), sequences, strict=True):
            errors.setdefault(row, self.sequence_errors[sequence])
        return dict(sorted(errors.items()))


def added_columns(format: Format, prefix: str, over_length: OverLength) -> list[str]:
    """Names of the columns that scoring adds to a row of this format, in order."""
    names = {
        Format.PREFERENCE_PAIR: ["score_chosen", "score_rejected", "margin"],
        Format.BEST_OF_N: ["scores_chosen", "scores_rejected"],
        Format.ROLLOUT_GROUP: ["scores"],
    }.get(format, ["score"])
    sides = ["_chosen", "_rejected"] if "_chosen" in names[0] else [""]
    names += ["score_error", *(f"num_tokens{side}" for side in sides)]
    if over_length is OverLength.TRUNCATE_LEFT:
        names.append("num_truncated_tokens")
    return [prefix + name for name in names]


def score_columns(
    scored: ScoredRows,
    table: pa.Table,
    layout: Layout,
    prefix: str,
    over_length: OverLength,
) -> dict[str, pa.Array]:
    """The added columns by name, R values each. `table` holds the input rows."""
    values, lengths, offsets = scored.values, scored.lengths, scored.row_offsets
    if layout.format is Format.PREFERENCE_PAIR:
        chosen, rejected = (_pick(values, offsets, place, of=2) for place in (0, 1))
        arrays = [chosen, rejected, pc.subtract(chosen, rejected)]
        tokens = [_pick(lengths, offsets, place, of=2) for place in (0, 1)]
    elif layout.format is Format.BEST_OF_N:
        counts = _list_lengths(table[layout.columns["chosen"]], offsets)
        arrays = _split_lists(values, offsets, counts)
        tokens = _split_lists(lengths, offsets, counts)
    elif layout.format is Format.ROLLOUT_GROUP:
        arrays = [_lists(values, offsets)]
        tokens = [_lists(lengths, offsets)]
    else:
        arrays = [_pick(values, offsets, 0, of=1)]
        tokens = [_pick(lengths, offsets, 0, of=1)]
    reasons: list[str | None] = [None] * scored.num_rows
    for row, error in scored.errors_by_row().items():
        reasons[row] = error.reason.value
    arrays += [pa.array(reasons, pa.string()), *tokens]
    if over_length is OverLength.TRUNCATE_LEFT:
        cut_before = np.concatenate([[0], np.cumsum(scored.truncated_tokens)])[offsets]
        arrays.append(pa.array(np.diff(cut_before).astype(np.int32)))
    names = added_columns(layout.format, prefix, over_length)
    return dict(zip(names, arrays, strict=True))


def _pick(values: npt.NDArray[Any], offsets: IntArray, place: int, *, of: int) -> pa.Array:
    """[R]: the value at `place` of each row that has `of` of them; null for NaN and other rows."""
    has_all = np.diff(offsets) == of
    picked = np.zeros(len(has_all), dtype=values.dtype)
    picked[has_all] = values[offsets[:-1][has_all] + place]
    return pa.array(picked, mask=~has_all | np.isnan(picked))


def _lists(values: npt.NDArray[Any], offsets: IntArray) -> pa.Array:
    """list[R] of each row's values, NaN as null; a row without sequences is null."""
    inner = pa.array(values, mask=np.isnan(values))
    is_empty = np.diff(offsets) == 0
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), inner, mask=pa.array(is_empty)
    )


def _split_lists(values: npt.NDArray[Any], offsets: IntArray, counts: IntArray) -> list[pa.Array]:
    """Two lists per row: its first `counts` values, and the rest."""
    sizes = np.diff(offsets)
    place_in_row = np.arange(len(values)) - np.repeat(offsets[:-1], sizes)
    is_first = place_in_row < np.repeat(counts, sizes)
    parts = ((values[is_first], counts), (values[~is_first], sizes - counts))
    return [
        _lists(part, np.concatenate([[0], np.cumsum(count)]).astype(np.int64))
        for part, count in parts
    ]


def _list_lengths(column: pa.ChunkedArray, offsets: IntArray) -> IntArray:
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    return np.where(np.diff(offsets) == 0, 0, lengths)


def pair_counts(scored: ScoredRows, table: pa.Table) -> dict[str, list[int]]:
    """Of preference pairs: [pairs with both scores, chosen higher, ties] by `source`.

    Without a text column of that name, or with more than a hundred values in it, all pairs
    count under "all".
    """
    chosen, rejected = (
        np.asarray(_pick(scored.values, scored.row_offsets, place, of=2)) for place in (0, 1)
    )
    both = ~(np.isnan(chosen) | np.isnan(rejected))
    sources = _sources(table)
    if sources is None or len(set(sources)) > _MAX_SOURCES:
        sources = np.full(len(both), "all", dtype=object)
    counts = {}
    for source in sorted(set(sources[both])):
        here = both & (sources == source)
        wins, ties = chosen[here] > rejected[here], chosen[here] == rejected[here]
        counts[str(source)] = [int(here.sum()), int(wins.sum()), int(ties.sum())]
    return counts


def _sources(table: pa.Table) -> npt.NDArray[np.object_] | None:
    if "source" not in table.column_names:
        return None
    column = table["source"]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return None
    return np.array([str(value) for value in column.to_pylist()], dtype=object)


def digest_columns(columns: Mapping[str, pa.Array]) -> str:
    """sha256 over names, types and logical values; what lies under a null does not count."""
    digest = hashlib.sha256()
    for name, column in columns.items():
        digest.update(name.encode())
        _update(digest, column)
    return digest.hexdigest()


def _update(digest: Any, column: pa.Array) -> None:
    digest.update(np.asarray(column.is_valid()).tobytes())
    if pa.types.is_list(column.type):
        # Not str(type): Parquet gives the list's inner field another name.
        digest.update(b"list")
        lengths = pc.fill_null(pc.list_value_length(column), 0)
        digest.update(np.asarray(lengths).astype(np.int64).tobytes())
        _update(digest, column.flatten())
    elif pa.types.is_string(column.type):
        digest.update(b"string")
        digest.update("\n".join(pc.fill_null(column, "").to_pylist()).encode())
    else:
        digest.update(str(column.type).encode())
        digest.update(np.asarray(pc.fill_null(column, 0)).tobytes())
