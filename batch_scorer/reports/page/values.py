"""What the page needs of a committed shard: arrays, not rows.

Legend: R rows, S sequences (answers), row by row and within a row in the order of its sides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_scorer.formats.shape import RowShape, shape_of
from batch_scorer.inputs.files import open_parquet
from batch_scorer.outputs.by_source import Sources, row_sources
from batch_scorer.records import SCALAR, Commit, Format, Source, TextStyle, family_prefix
from batch_scorer.storage import Store

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_MOST_CHARS = 600
_CUT = " […]"


@dataclass(frozen=True, slots=True)
class ShardValues:
    """The scores of a shard's R rows, and what they are compared with.

    `sources` is str[R]. `rows`, `scores`, `tokens` and `messages` are [S]: the row of each answer,
    its score (NaN without one), the tokens of its sequence, and the messages of its conversation
    (-1 where that is not known). `marked` are places of rows without a score, with the reason.
    `sides` is 2 for preference pairs, whose S = 2 R, and `is_group` true where a row is a prompt
    with any number of answers, all to be compared.
    """

    sources: Sources
    rows: IntArray
    scores: FloatArray
    tokens: FloatArray
    messages: IntArray
    marked: list[tuple[int, str]]
    sides: int
    is_group: bool


def read_values(store: Store, source: Source, commit: Commit) -> ShardValues:
    """Called in a process that may die of the file."""
    file = open_parquet(store, source)
    layout, prefix = commit.layout, commit.score_prefix
    format = Format(layout["format"])
    shape = shape_of(format)
    (score_names,) = shape.value_columns(SCALAR)
    names = [prefix + name for name in score_names]
    # Of several models the first one's: they read the same rows.
    own = family_prefix(commit.column_prefix, next(iter(commit.models), ""))
    token_names = [f"{own}num_tokens{suffix}" for suffix in shape.suffixes]
    has_scores = set(names) <= set(commit.added_columns)
    columns = [commit.error_column, *token_names, *(names if has_scores else ())]
    stored = file.schema_arrow.names
    table = file.read(
        columns=[*columns, *(name for name in ("source",) if name in stored)], use_threads=False
    )
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
    )


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
