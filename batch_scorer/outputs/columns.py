"""The columns that scoring adds: their names, their values, and a digest of them. Pure functions.

A row that could not be scored has nulls and a reason; a list of scores has a null in the place
of each response without one. `score_error` is null exactly when every score of the row is there.
Attributes of a model with several outputs are fixed-size lists under `rewards`, step scores of a
process reward model are lists under `step_scores`, embeddings are fixed-size lists.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.config import OverLength
from batch_scorer.formats.added import GROUPS, added_columns, value_columns
from batch_scorer.records import SCALAR, Format, Layout, Outputs, ScoredRows, Scores

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


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
        arrays = sides(numbers(scored.values[:, 0]))
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


def numbers(values: FloatArray) -> pa.Array:
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
        return lambda values: [pick(values, offsets, place, of=2) for place in (0, 1)]
    if layout.format is Format.BEST_OF_N:
        counts = _list_lengths(table[layout.columns["chosen"]], offsets)
        return lambda values: _split_lists(values, offsets, counts)
    if layout.format is Format.ROLLOUT_GROUP:
        return lambda values: [_lists(values, offsets)]
    return lambda values: [pick(values, offsets, 0, of=1)]


def pick(values: pa.Array, offsets: IntArray, place: int, *, of: int) -> pa.Array:
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

    names, *others = value_columns(layout.format, outputs)
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
    names = value_columns(format, SCALAR)[0]
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
        if format in GROUPS:
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
