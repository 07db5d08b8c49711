"""The columns that scoring adds: their names, their values, and a digest of them. Pure functions.

A row that could not be scored has nulls and a reason; a list of scores has a null in the place
of each response without one. `score_error` is null exactly when every score of the row is there.
Attributes of a model with several outputs are fixed-size lists under `rewards`, step scores of a
process reward model are lists under `step_scores`, embeddings are fixed-size lists.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.config import OverLength
from batch_scorer.records import Effort, Format, Layout, RowError, Scores

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

ALL_SOURCES = "all"
"""The source of rows that tell none."""

_MAX_SOURCES = 100


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model gives for a sequence, as columns.

    `attributes` are the names of a reward's parts, in order; `steps`: each step has a score.
    `embedding_size` is not None where there is no score but an embedding.
    """

    attributes: tuple[str, ...] = ()
    steps: bool = False
    embedding_size: int | None = None


SCALAR = Outputs()


@dataclass(slots=True)
class ScoredRows:
    """Scores of R rows and S sequences; the token ids stay behind.

    `values` float32[S, O], NaN where there is no score; `step_values` float32[K] and
    `step_offsets` int64[S+1] of a process reward model; `lengths` and `truncated_tokens`
    int32[S]; `row_offsets` int64[R+1]; errors by sequence and by row. `rows_digest` is over what
    was scored, `engine` says what scored it, `effort` and `score_s` what it took. `was_known` is
    bool[S], the sequences whose scores are those of equal sequences scored before; None: of none.
    """

    values: FloatArray
    lengths: npt.NDArray[np.int32]
    truncated_tokens: npt.NDArray[np.int32]
    row_offsets: IntArray
    sequence_errors: dict[int, RowError]
    row_errors: dict[int, RowError]
    rows_digest: str
    engine: dict[str, Any]
    effort: Effort
    score_s: float
    outputs: Outputs = SCALAR
    step_values: FloatArray | None = None
    step_offsets: IntArray | None = None
    was_known: npt.NDArray[np.bool_] | None = None

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


def added_columns(
    format: Format, prefix: str, over_length: OverLength, outputs: Outputs = SCALAR
) -> list[str]:
    """Names of the columns that scoring adds to a row of this format, in order."""
    names, *others = _value_columns(format, outputs)
    if format is Format.PREFERENCE_PAIR and outputs.embedding_size is None:
        names.append("margin")
    names += [name for names_by_side in others for name in names_by_side]
    names += ["score_error", *(f"num_tokens{side}" for side in _SIDES.get(format, ("",)))]
    if over_length is OverLength.TRUNCATE_LEFT:
        names.append("num_truncated_tokens")
    return [prefix + name for name in names]


def _value_columns(format: Format, outputs: Outputs) -> list[list[str]]:
    """The columns of each kind of value that a sequence has, by side: its score or embedding
    first, then its attributes, then its steps."""
    kinds = ["score" if outputs.embedding_size is None else "embedding"]
    if format in _GROUPS:
        kinds[0] += "s"
    if outputs.attributes:
        kinds.append("rewards")
    if outputs.steps:
        kinds.append("step_scores")
    return [[kind + side for side in _SIDES.get(format, ("",))] for kind in kinds]


_GROUPS = (Format.BEST_OF_N, Format.ROLLOUT_GROUP)
"""Their columns hold a list for each row."""

_SIDES = {
    Format.PREFERENCE_PAIR: ("_chosen", "_rejected"),
    Format.BEST_OF_N: ("_chosen", "_rejected"),
}


def score_columns(
    scored: ScoredRows,
    table: pa.Table,
    layout: Layout,
    prefix: str,
    over_length: OverLength,
) -> dict[str, pa.Array]:
    """The added columns by name, R values each. `table` holds the input rows."""
    offsets, outputs = scored.row_offsets, scored.outputs
    sides = _sides_of(scored, table, layout)
    if outputs.embedding_size is not None:
        arrays = sides(_vectors(scored.values))
    else:
        arrays = sides(_numbers(scored.values[:, 0]))
        if layout.format is Format.PREFERENCE_PAIR:
            arrays.append(pc.subtract(*arrays))
        if outputs.attributes:
            arrays += sides(_vectors(scored.values[:, 1:]))
        if outputs.steps:
            arrays += sides(_steps(scored))
    reasons: list[str | None] = [None] * scored.num_rows
    for row, error in scored.errors_by_row().items():
        reasons[row] = error.reason.value
    arrays += [pa.array(reasons, pa.string()), *sides(pa.array(scored.lengths))]
    if over_length is OverLength.TRUNCATE_LEFT:
        cut_before = np.concatenate([[0], np.cumsum(scored.truncated_tokens)])[offsets]
        arrays.append(pa.array(np.diff(cut_before).astype(np.int32)))
    names = added_columns(layout.format, prefix, over_length, outputs)
    return dict(zip(names, arrays, strict=True))


def column_metadata(outputs: Outputs, prefix: str) -> dict[str, dict[str, str]]:
    """Field metadata by column name: which attribute is where in a `rewards` list."""
    if not outputs.attributes:
        return {}
    named = {"batch_scorer.attributes": json.dumps(outputs.attributes)}
    return {prefix + name: named for name in ("rewards", "rewards_chosen", "rewards_rejected")}


# One value per sequence


def _numbers(values: FloatArray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def _vectors(values: FloatArray) -> pa.Array:
    """fixed_size_list[S] of float32[S, n]; null where the first is NaN."""
    inner = pa.array(np.nan_to_num(values).ravel())
    missing = np.isnan(values).any(axis=1)
    return pa.FixedSizeListArray.from_arrays(inner, values.shape[1], mask=pa.array(missing))


def _steps(scored: ScoredRows) -> pa.Array:
    """list[S]; null for a sequence without a score."""
    assert scored.step_values is not None and scored.step_offsets is not None
    missing = np.isnan(scored.values[:, 0])
    return pa.ListArray.from_arrays(
        pa.array(scored.step_offsets.astype(np.int32)),
        pa.array(scored.step_values),
        mask=pa.array(missing),
    )


# Sequences to rows

_Sides: TypeAlias = Callable[[pa.Array], list[pa.Array]]


def _sides_of(scored: ScoredRows, table: pa.Table, layout: Layout) -> _Sides:
    """A function from one value per sequence to one column per side of the rows."""
    offsets = scored.row_offsets
    if layout.format is Format.PREFERENCE_PAIR:
        return lambda values: [_pick(values, offsets, place, of=2) for place in (0, 1)]
    if layout.format is Format.BEST_OF_N:
        counts = _list_lengths(table[layout.columns["chosen"]], offsets)
        return lambda values: _split_lists(values, offsets, counts)
    if layout.format is Format.ROLLOUT_GROUP:
        return lambda values: [_lists(values, offsets)]
    return lambda values: [_pick(values, offsets, 0, of=1)]


def _pick(values: pa.Array, offsets: IntArray, place: int, *, of: int) -> pa.Array:
    """[R]: the value at `place` of each row that has `of` of them; null for other rows."""
    has_all = np.diff(offsets) == of
    where = np.where(has_all, offsets[:-1] + place, 0)
    return values.take(pa.array(where, mask=~has_all))


def _lists(values: pa.Array, offsets: IntArray) -> pa.Array:
    """list[R] of each row's values; a row without sequences is null."""
    is_empty = np.diff(offsets) == 0
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), values, mask=pa.array(is_empty)
    )


def _split_lists(values: pa.Array, offsets: IntArray, counts: IntArray) -> list[pa.Array]:
    """Two lists per row: its first `counts` values, and the rest."""
    sizes = np.diff(offsets)
    place_in_row = np.arange(len(values)) - np.repeat(offsets[:-1], sizes)
    is_first = place_in_row < np.repeat(counts, sizes)
    parts = ((is_first, counts), (~is_first, sizes - counts))
    return [
        _lists(
            values.filter(pa.array(part)),
            np.concatenate([[0], np.cumsum(count)]).astype(np.int64),
        )
        for part, count in parts
    ]


def _list_lengths(column: pa.ChunkedArray, offsets: IntArray) -> IntArray:
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    return np.where(np.diff(offsets) == 0, 0, lengths)


# And back


def sequence_scores(
    table: pa.Table, layout: Layout, prefix: str, outputs: Outputs, row_offsets: IntArray
) -> Scores:
    """What `score_columns` made columns of: the scores of S sequences, NaN where there is none.

    `row_offsets` is int64[R+1]: how the input columns of `table` are cut into sequences
    (`formats.parse`). A row that holds another number of values has none.
    """

    def of(names: list[str]) -> pa.Array:
        return _of_sequences(table, layout.format, [prefix + n for n in names], row_offsets)

    names, *others = _value_columns(layout.format, outputs)
    if outputs.embedding_size is not None:
        return Scores(_to_vectors(of(names)))
    values = [of(names).to_numpy(zero_copy_only=False)[:, None]]
    if outputs.attributes:
        values.append(_to_vectors(of(others.pop(0))))
    scores = Scores(np.concatenate(values, axis=1, dtype=np.float32))
    if outputs.steps:
        steps = of(others.pop(0))
        counts = pc.fill_null(pc.list_value_length(steps), 0).to_numpy()
        scores.step_values = steps.flatten().to_numpy(zero_copy_only=False)
        scores.step_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return scores


def score_items(table: pa.Table, format: Format, prefix: str) -> tuple[IntArray, FloatArray]:
    """All scores of a scored table, int64[n] and float32[n]: row and score, row by row, and within
    a row in the order of its sequences; NaN where there is none."""
    names = _value_columns(format, SCALAR)[0]
    values, rows = _items(table, format, [prefix + name for name in names])
    return rows, values.to_numpy(zero_copy_only=False).astype(np.float32)


def _items(table: pa.Table, format: Format, names: list[str]) -> tuple[pa.Array, IntArray]:
    """The values in these columns, one for each side, and int64[n], the row of each; in the order
    of rows, and within a row of sides."""
    values: list[pa.Array] = []
    rows: list[IntArray] = []
    for name in names:
        column = table[name].combine_chunks()
        sizes = np.ones(len(column), np.int64)
        if format in _GROUPS:
            sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
            column = column.flatten()
        values.append(column)
        rows.append(np.repeat(np.arange(len(sizes)), sizes))
    owners = np.concatenate(rows)
    order = np.argsort(owners, kind="stable")
    return pa.concat_arrays(values).take(pa.array(order)), owners[order]


def _of_sequences(
    table: pa.Table, format: Format, names: list[str], row_offsets: IntArray
) -> pa.Array:
    """One value for each of S sequences, null where its row holds another number of them."""
    values, rows = _items(table, format, names)
    sizes = np.diff(row_offsets)
    fits = np.bincount(rows, minlength=len(sizes)) == sizes  # bool[R]
    where = np.zeros(row_offsets[-1], np.int64)  # int64[S]
    has_value = np.repeat(fits, sizes)
    where[has_value] = np.flatnonzero(fits[rows])
    return values.take(pa.array(where, mask=~has_value))


def _to_vectors(array: pa.Array) -> FloatArray:
    """float32[S, n] of fixed_size_list[S]; NaN for a null."""
    vectors = np.full((len(array), array.type.list_size), np.nan, np.float32)
    is_there = array.is_valid().to_numpy(zero_copy_only=False)
    flat = array.flatten().to_numpy(zero_copy_only=False)
    vectors[is_there] = flat.reshape(-1, array.type.list_size)
    return vectors


# Counts by source


def pair_counts(scored: ScoredRows, table: pa.Table) -> dict[str, list[int]]:
    """Of preference pairs: [pairs with both scores, chosen higher, ties] by source
    (`row_sources`)."""
    scores = _numbers(scored.values[:, 0])
    chosen, rejected = (
        _pick(scores, scored.row_offsets, place, of=2).to_numpy(zero_copy_only=False)
        for place in (0, 1)
    )
    both = ~(np.isnan(chosen) | np.isnan(rejected))
    sources = row_sources(table)
    counts = {}
    for source in sorted(set(sources[both])):
        here = both & (sources == source)
        wins, ties = chosen[here] > rejected[here], chosen[here] == rejected[here]
        counts[str(source)] = [int(here.sum()), int(wins.sum()), int(ties.sum())]
    return counts


def spread_by_source(scored: ScoredRows, table: pa.Table) -> dict[str, list[float]]:
    """By source (`row_sources`): [rows, scores, their mean, their standard deviation, and their
    quantiles at `LEVELS`]; without a score only the first two.

    In six digits: enough for statistics, and a commit is read with every listing.
    """
    sources = row_sources(table)
    owners = np.repeat(np.arange(scored.num_rows), np.diff(scored.row_offsets))
    scores = scored.values[:, 0].astype(np.float64)
    has_score = ~np.isnan(scores)
    if scored.outputs.embedding_size is not None:
        has_score[:] = False
    spread = {}
    for source in sorted(set(sources)):
        here = sources == source
        found = scores[has_score & here[owners]]
        figures = [float(here.sum()), float(len(found))]
        if len(found):
            figures += [found.mean(), found.std(), *np.quantile(found, LEVELS)]
        spread[str(source)] = [float(f"{figure:.6g}") for figure in figures]
    return spread


LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def row_sources(table: pa.Table) -> npt.NDArray[np.object_]:
    """str[R]: the text column `source` of the rows.

    Without such a column, or with more than a hundred values in it, all rows are of "all".
    """
    found = _source_column(table)
    if found is None or len(set(found)) > _MAX_SOURCES:
        return np.full(table.num_rows, ALL_SOURCES, dtype=object)
    return np.array([str(value) for value in found], dtype=object)


def _source_column(table: pa.Table) -> list[str | None] | None:
    if "source" not in table.column_names:
        return None
    column = table["source"]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return None
    return column.to_pylist()  # type: ignore[no-any-return]


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
    elif pa.types.is_fixed_size_list(column.type):
        digest.update(f"vector {column.type.list_size}".encode())
        _update(digest, column.flatten())
    elif pa.types.is_string(column.type):
        digest.update(b"string")
        digest.update("\n".join(pc.fill_null(column, "").to_pylist()).encode())
    else:
        digest.update(str(column.type).encode())
        digest.update(np.asarray(pc.fill_null(column, 0)).tobytes())
