"""The columns that scoring adds: their values, and a digest of them. Pure functions.

A row that could not be scored has nulls and a reason; a list of scores has a null in the place
of each response without one. `score_error` is null exactly when every score of the row is there.
Attributes of a model with several outputs are fixed-size lists under `rewards`, alone where nothing
makes a score of them; step scores of a process reward model are lists under `step_scores`, scores
of all tokens lists under `token_scores`, embeddings are fixed-size lists. Where a sequence's values
go is the row's shape (`formats.shape`). `score_notes` lists what is worth knowing of a row, scored
or not, and `num_special_tokens` counts the places where its messages spell a special token; null
where there is nothing.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.config import OverLength
from batch_scorer.errors import RowReason
from batch_scorer.formats.shape import shape_of
from batch_scorer.records import (
    SCALAR,
    Format,
    Layout,
    Outputs,
    Rewarded,
    RewardedRows,
    RowError,
    ScoredRows,
    Scores,
    first_errors,
)

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


def score_columns(
    scored: ScoredRows,
    outputs: Outputs,
    table: pa.Table,
    layout: Layout,
    prefix: str,
    over_length: OverLength,
) -> dict[str, pa.Array]:
    """The added columns by name, R values each. `table` holds the input rows."""
    shape = shape_of(layout.format)
    counts = shape.counts(table, layout, scored.row_offsets)
    values = scored.scores.values
    if outputs.embedding_size is not None:
        arrays = shape.to_columns(_vectors(values), counts)
    else:
        arrays = shape.to_columns(numbers(values[:, 0]), counts) if outputs.has_score else []
        if shape.has_margin(outputs):
            arrays.append(pc.subtract(*arrays))
        if outputs.attributes:
            arrays += shape.to_columns(_vectors(values[:, int(outputs.has_score) :]), counts)
        if outputs.list_column:
            arrays += shape.to_columns(_steps(scored.scores), counts)
    arrays += [
        reasons_of(scored),
        *shape.to_columns(pa.array(scored.lengths), counts),
    ]
    if over_length.cuts:
        arrays += shape.to_columns(pa.array(scored.truncated_tokens), counts)
    rows = range(scored.num_rows)
    arrays += [
        pa.array([scored.notes.get(row) for row in rows], pa.list_(pa.string())),
        pa.array([scored.special_tokens.get(row) for row in rows], pa.int32()),
        *(scored.added[name] for name in outputs.judge),
    ]
    names = shape.added_columns(prefix, over_length, outputs)
    return dict(zip(names, arrays, strict=True))


def reasons_of(scored: ScoredRows) -> pa.Array:
    """string[R]: why a row has no score; null where it has one."""
    reasons: list[str | None] = [None] * scored.num_rows
    for row, error in scored.errors_by_row().items():
        reasons[row] = error.reason.value
    return pa.array(reasons, pa.string())


# Reward functions


def reward_columns(
    rewarded: RewardedRows, table: pa.Table, layout: Layout, prefix: str
) -> tuple[dict[str, pa.Array], dict[str, Rewarded]]:
    """The columns of all reward functions by name, R values each, and what they hold by function.
    `table` holds the input rows."""
    shape = shape_of(layout.format)
    counts = shape.counts(table, layout, rewarded.row_offsets)
    columns: dict[str, pa.Array] = {}
    counted: dict[str, Rewarded] = {}
    for name, values in rewarded.values.items():
        reasons: list[str | None] = [None] * table.num_rows
        errors = first_errors(rewarded.row_offsets, rewarded.row_errors, rewarded.errors[name])
        for row, error in errors.items():
            reasons[row] = _words(error)
        arrays = [*shape.to_columns(numbers(values), counts), pa.array(reasons, pa.string())]
        names = shape.reward_columns(f"{prefix}{name}_")
        columns |= zip(names, arrays, strict=True)
        counted[name] = count_rewards(arrays)
    return columns, counted


def _words(error: RowError) -> str:
    """The reason, and behind it what a function itself says of a response without a value."""
    reason = error.reason.value
    says = error.reason is RowReason.REWARD_NONE and error.detail
    return f"{reason}: {error.detail}" if says else reason


def count_rewards(columns: Sequence[pa.Array]) -> Rewarded:
    """What the columns of a reward function hold (`RowShape.reward_columns`)."""
    *sides, reasons = columns
    responses = values = 0
    for side in sides:
        if pa.types.is_list(side.type):
            side = side.flatten()
        responses += len(side)
        values += len(side) - side.null_count
    marked = Counter(text.partition(": ")[0] for text in reasons.drop_null().to_pylist())
    return Rewarded(
        responses=responses,
        values=values,
        rows_valued=reasons.null_count,
        marked=dict(sorted(marked.items())),
    )


def column_metadata(outputs: Outputs, prefix: str) -> dict[str, dict[str, str]]:
    """Field metadata by column name: which attribute is where in a `rewards` list."""
    if not outputs.attributes:
        return {}
    named = {"batch_scorer.attributes": json.dumps(outputs.attributes)}
    return {prefix + name: named for name in ("rewards", "rewards_chosen", "rewards_rejected")}


# One value per sequence


def numbers(values: FloatArray) -> pa.Array:
    """float32[S]; null for NaN."""
    return pa.array(values, mask=np.isnan(values))


def _vectors(values: FloatArray) -> pa.Array:
    """fixed_size_list[S] of float32[S, n]; null where the first is NaN."""
    inner = pa.array(np.nan_to_num(values).ravel())
    missing = np.isnan(values).any(axis=1)
    return pa.FixedSizeListArray.from_arrays(inner, values.shape[1], mask=pa.array(missing))


def _steps(scores: Scores) -> pa.Array:
    """list[S]; null for a sequence without a score. No step is NaN, which readers would order."""
    missing = np.isnan(scores.values[:, 0])
    if scores.step_values is None or scores.step_offsets is None:
        assert missing.all(), "scores without their steps"
        return pa.nulls(len(missing), pa.list_(pa.float32()))
    return pa.ListArray.from_arrays(
        pa.array(scores.step_offsets.astype(np.int32)),
        numbers(scores.step_values),
        mask=pa.array(missing),
    )


# And back


def sequence_scores(
    table: pa.Table, layout: Layout, prefix: str, outputs: Outputs, row_offsets: IntArray
) -> Scores:
    """What `score_columns` made columns of: the scores of S sequences, NaN where there is none.

    `row_offsets` is int64[R+1]: how the input columns of `table` are cut into sequences
    (`formats.parse`). A row that holds another number of values has none.
    """
    shape = shape_of(layout.format)
    counts = shape.counts(table, layout, row_offsets)

    def of(names: list[str]) -> pa.Array:
        return shape.from_columns(_columns(table, prefix, names), counts)

    kinds = shape.value_columns(outputs)
    if outputs.embedding_size is not None:
        return Scores(_to_vectors(of(kinds[0])))
    values = []
    if outputs.has_score:
        values.append(of(kinds.pop(0)).to_numpy(zero_copy_only=False)[:, None])
    if outputs.attributes:
        values.append(_to_vectors(of(kinds.pop(0))))
    scores = Scores(np.concatenate(values, axis=1, dtype=np.float32))
    if outputs.list_column:
        steps = of(kinds.pop(0))
        step_counts = pc.fill_null(pc.list_value_length(steps), 0).to_numpy()
        scores.step_values = steps.flatten().to_numpy(zero_copy_only=False)
        scores.step_offsets = np.concatenate([[0], np.cumsum(step_counts)]).astype(np.int64)
    return scores


def score_items(table: pa.Table, format: Format, prefix: str) -> tuple[IntArray, FloatArray]:
    """All scores of a scored table, int64[n] and float32[n]: row and score, row by row, and within
    a row in the order of its sequences; NaN where there is none."""
    shape = shape_of(format)
    (names,) = shape.value_columns(SCALAR)
    values, rows = shape.flatten(_columns(table, prefix, names))
    return rows, values.to_numpy(zero_copy_only=False).astype(np.float32)


def _columns(table: pa.Table, prefix: str, names: list[str]) -> list[pa.Array]:
    return [table[prefix + name].combine_chunks() for name in names]


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
    elif pa.types.is_struct(column.type):
        for name, part in zip(column.type.names, column.flatten(), strict=True):
            digest.update(f"field {name}".encode())
            _update(digest, part)
    elif pa.types.is_string(column.type):
        digest.update(b"string")
        digest.update("\n".join(pc.fill_null(column, "").to_pylist()).encode())
    else:
        digest.update(str(column.type).encode())
        digest.update(np.asarray(pc.fill_null(column, 0)).tobytes())
