"""What the page needs of a committed shard: arrays, not rows.

Legend: R rows, S sequences (answers), row by row and within a row in the order of its sides, M
members, U answers that any member has a score for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_scorer.errors import RowNote
from batch_scorer.evaluation.pairs import WRITERS
from batch_scorer.formats.shape import RowShape, shape_of
from batch_scorer.formats.values import is_text, texts_of
from batch_scorer.inputs.files import open_parquet
from batch_scorer.outputs.by_source import Sources, row_sources
from batch_scorer.outputs.families import (
    SPREAD,
    Family,
    families_of,
    headline_prefix,
)
from batch_scorer.records import DISAGREEMENT, SCALAR, Commit, Format, Source, TextStyle
from batch_scorer.storage import Store

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_MOST_CHARS = 600
_CUT = " […]"
_MODEL = ("model", "generator", "response_model")
"""The columns that name the model that wrote all answers of a row."""


@dataclass(frozen=True, slots=True)
class MemberValues:
    """The scores of the same answers by M models or functions.

    `rows` is int64[U], the row of each answer, `scores` float64[U, M] and `stds` float64[U], their
    standard deviation over members; NaN where there is none. `disagreement` is float64[R], of each
    row the share of pairs of answers that two members order differently, NaN without one.
    """

    names: tuple[str, ...]
    rows: IntArray
    scores: FloatArray
    stds: FloatArray
    disagreement: FloatArray


@dataclass(frozen=True, slots=True)
class ShardValues:
    """The scores of a shard's R rows, and what they are compared with.

    `sources` is str[R]. `rows`, `scores`, `tokens` and `messages` are [S]: the row of each answer,
    its score (NaN without one), the tokens of its sequence, and the messages of its conversation
    (-1 where that is not known). `marked` are places of rows without a score, with the reason.
    `sides` is 2 for preference pairs, whose S = 2 R, and `is_group` true where a row is a prompt
    with any number of answers, all to be compared. `same_tokens` is bool[R], the pairs whose sides
    no model can tell apart. `models` is object[S], the name of the model that wrote each answer or
    None; () where no column has it. `members` is None of an output with one score for an answer.
    """

    sources: Sources
    rows: IntArray
    scores: FloatArray
    tokens: FloatArray
    messages: IntArray
    marked: list[tuple[int, str]]
    sides: int
    is_group: bool
    same_tokens: npt.NDArray[np.bool_]
    models: Sources | tuple[()] = ()
    members: MemberValues | None = None


def read_values(store: Store, source: Source, commit: Commit) -> ShardValues:
    """Called in a process that may die of the file."""
    file = open_parquet(store, source)
    schema = file.schema_arrow
    layout, added = commit.layout, commit.added_columns
    format = Format(layout["format"])
    shape = shape_of(format)
    (score_names,) = shape.value_columns(SCALAR)
    # Of several members the mean stands for a row; all of them have read the same tokens.
    names = [headline_prefix(added, score_names) + name for name in score_names]
    token_names = [
        next(name for name in added if name.endswith(f"num_tokens{suffix}"))
        for suffix in shape.suffixes
    ]
    notes = [name for name in added if name.endswith("score_notes")]
    has_scores = set(names) <= set(added)
    columns = [commit.error_column, *token_names, *notes]
    families: list[Family] = []
    writers: tuple[str, ...] = ()
    if has_scores:
        families = _members_of(schema, score_names)
        writers = _writers_of(schema, format)
        columns += [*names, *writers, *(name for each in families for name in each.columns)]
    spread = tuple(commit.column_prefix + SPREAD + name for name in score_names)
    disagreement = commit.column_prefix + DISAGREEMENT
    wanted = ("source", disagreement, *spread)
    columns += [name for name in wanted if name in schema.names]
    table = file.read(columns=list(dict.fromkeys(columns)), use_threads=False)
    if has_scores:
        values, rows = shape.flatten([table[name].combine_chunks() for name in names])
        tokens, _ = shape.flatten([table[name].combine_chunks() for name in token_names])
        scores = values.to_numpy(zero_copy_only=False).astype(np.float64)
    else:
        scores, rows, tokens = np.zeros(0), np.zeros(0, np.int64), pa.array([], pa.int32())
    reasons = table[commit.error_column].combine_chunks()
    places = np.flatnonzero(reasons.is_valid().to_numpy(zero_copy_only=False)).tolist()
    return ShardValues(
        sources=row_sources(table),
        rows=rows,
        scores=scores,
        tokens=tokens.to_numpy(zero_copy_only=False).astype(np.float64),
        messages=_messages(file, layout, shape, rows) if has_scores else np.zeros(0, np.int64),
        marked=list(zip(places, reasons.drop_null().to_pylist(), strict=True)),
        sides=2 if format is Format.PREFERENCE_PAIR and has_scores else 1,
        is_group=format is Format.ROLLOUT_GROUP and has_scores,
        same_tokens=_same_tokens(table, notes),
        models=_models(table, writers, rows) if writers else (),
        members=_members(table, shape, families, spread, disagreement)
        if len(families) > 1
        else None,
    )


def places_of(rows: IntArray) -> IntArray:
    """int64[S]: row and place in the row of each answer, as one number."""
    _, firsts, sizes = np.unique(rows, return_index=True, return_counts=True)
    return np.asarray((rows << 32) + np.arange(len(rows)) - np.repeat(firsts, sizes))


def _same_tokens(table: pa.Table, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """bool[R]: the rows with that note in one of these columns."""
    found = np.zeros(table.num_rows, dtype=bool)
    for name in names:
        notes = table[name].combine_chunks()
        rows = pc.list_parent_indices(notes).to_numpy(zero_copy_only=False)
        is_same = pc.equal(notes.flatten(), RowNote.SAME_TOKENS.value)
        found[rows[is_same.to_numpy(zero_copy_only=False)]] = True
    return found


# Which model wrote an answer


def _writers_of(schema: pa.Schema, format: Format) -> tuple[str, ...]:
    """The columns that name the models that wrote a row's answers, one for each side, or one for
    all; () without them."""
    spellings = list(WRITERS.values()) if format is Format.PREFERENCE_PAIR else [_MODEL]
    found = [
        next((name for name in names if name in schema.names and _is_text(schema, name)), None)
        for names in spellings
    ]
    return tuple(name for name in found if name) if all(found) else ()


def _is_text(schema: pa.Schema, name: str) -> bool:
    return is_text(schema.field(name).type)


def _models(table: pa.Table, writers: tuple[str, ...], rows: IntArray) -> Sources:
    """object[S]"""
    by_row = np.array([texts_of(table[name]) for name in writers], object).T  # [R, sides]
    return by_row.ravel() if len(writers) > 1 else by_row[rows, 0]


# Members


def _members_of(schema: pa.Schema, score_names: Sequence[str]) -> list[Family]:
    """The families that have a score for each side of a row."""

    def is_number(name: str) -> bool:
        kind = schema.field(name).type
        return bool(pa.types.is_floating(kind.value_type if pa.types.is_list(kind) else kind))

    return [
        family
        for family in families_of(schema.names, score_names)
        if len(family.columns) == len(score_names) and all(map(is_number, family.columns))
    ]


def _members(
    table: pa.Table,
    shape: RowShape,
    families: Sequence[Family],
    spread: Sequence[str],
    disagreement: str,
) -> MemberValues:
    """`spread` and `disagreement` name the columns of both, which need not be there."""
    # A row of which one member has no score at all may have no list of it: answers are found by
    # their place.
    columns = [family.columns for family in families]
    has_spread = set(spread) <= set(table.column_names)
    found = []
    for names in [*columns, *([tuple(spread)] if has_spread else [])]:
        values, rows = shape.flatten([table[name].combine_chunks() for name in names])
        found.append((places_of(rows), values.to_numpy(zero_copy_only=False).astype(np.float64)))
    places = np.unique(np.concatenate([own for own, _ in found]))
    scores = np.full((len(places), len(families) + 1), np.nan)
    for member, (own, values) in enumerate(found):
        scores[np.searchsorted(places, own), member] = values
    by_row = np.full(table.num_rows, np.nan)
    if disagreement in table.column_names:
        values = table[disagreement].combine_chunks().to_numpy(zero_copy_only=False)
        by_row = values.astype(np.float64)
    return MemberValues(
        names=tuple(family.name for family in families),
        rows=places >> 32,
        scores=scores[:, :-1],
        stds=scores[:, -1],
        disagreement=by_row,
    )


# Messages


def _messages(
    file: pq.ParquetFile, layout: Mapping[str, Any], shape: RowShape, rows: IntArray
) -> IntArray:
    """int64[S]: the messages in the columns of prompt and answer; -1 where they cannot be counted,
    as in text that holds a whole dialogue."""
    unknown = np.full(len(rows), -1)
    num_rows = file.metadata.num_rows
    names: Mapping[str, str] = layout["columns"]
    fields = {"prompt", *shape.fields} & names.keys()
    if not {names[field] for field in fields} <= set(file.schema_arrow.names):
        return unknown  # they were not kept
    before = np.zeros(num_rows, np.int64)
    if "prompt" in names:
        found = _lengths(file, names["prompt"])
        if found is None:
            return unknown
        before = found
    is_answer_alone = layout["text_style"] == TextStyle.PLAIN and (
        "prompt" in names or layout["prompt_inside"]
    )
    sides = []
    for field in shape.fields:
        kind = file.schema_arrow.field(names[field]).type if field in names else None
        if kind is None or names[field] in layout["encoded"]:
            return unknown
        if shape.is_group:
            kind = kind.value_type if pa.types.is_list(kind) else None
        if kind is not None and pa.types.is_string(kind) and is_answer_alone:
            sides.append(before + 1 + (1 if layout["prompt_inside"] else 0))
        elif not shape.is_group and (own := _lengths(file, names[field])) is not None:
            if kind is not None and pa.types.is_string(kind):
                return unknown
            sides.append(before + own)
        else:
            return unknown
    if shape.is_group:
        return sides[0][rows]
    return np.stack(sides, axis=1).ravel()


def _lengths(file: pq.ParquetFile, name: str) -> IntArray | None:
    """int64[R]: the messages in a column, 1 where it holds text. None for other types."""
    kind = file.schema_arrow.field(name).type
    if pa.types.is_string(kind) or pa.types.is_struct(kind):
        return np.ones(file.metadata.num_rows, np.int64)
    if not pa.types.is_list(kind) or not pa.types.is_struct(kind.value_type):
        return None
    # Any one leaf tells the lengths of the lists: the smallest one, which is not the text.
    metadata = file.metadata
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            leaf = metadata.row_group(group).column(place)
            if leaf.path_in_schema.split(".")[0] == name:
                path = leaf.path_in_schema
                sizes[path] = sizes.get(path, 0) + leaf.total_compressed_size
    if not sizes:
        return np.zeros(file.metadata.num_rows, np.int64)
    table = file.read(columns=[min(sizes, key=lambda path: sizes[path])], use_threads=False)
    lengths = pc.fill_null(pc.list_value_length(table[name]), 0)
    return np.asarray(lengths.to_numpy()).astype(np.int64)


def read_texts(
    store: Store, source: Source, commit: Commit, places: Sequence[int]
) -> list[dict[str, str]]:
    """The texts of the rows at these places of a shard, by field, each cut to be shown.

    Called in a process that may die of the file.
    """
    file = open_parquet(store, source)
    names = {field: name for field, name in commit.layout["columns"].items()}
    there = {field: name for field, name in names.items() if name in file.schema_arrow.names}
    if not there:
        return [{} for _ in places]  # they were not kept
    table = file.read(columns=list(dict.fromkeys(there.values())), use_threads=False)
    rows = table.take(pa.array(places, pa.int64())).to_pylist()
    return [{field: _shown(row[name]) for field, name in there.items()} for row in rows]


def _shown(value: Any) -> str:
    """A value of a row as people read it: of messages role and content."""
    text = "\n\n".join(map(_line, value)) if isinstance(value, list) else _line(value)
    return text if len(text) <= _MOST_CHARS else text[:_MOST_CHARS] + _CUT


def _line(value: Any) -> str:
    if isinstance(value, dict):
        role = value.get("role", value.get("from"))
        content = value.get("content", value.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return f"{role}: {content}"
    return value if isinstance(value, str) else repr(value)
