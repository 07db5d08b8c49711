"""A part's scores and the groups of its rows; and its rows with the normalised columns.

Legend: R rows, n values of a column, F families.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.derived.output import encode_shard
from batch_scorer.derived.parts import OpenPart, Part, read_part
from batch_scorer.errors import InputError
from batch_scorer.formats.shape import shape_of
from batch_scorer.normalization.groups import ROWS, SCORES, FloatArray
from batch_scorer.normalization.recipe import Normalization
from batch_scorer.outputs.families import Family, families_of
from batch_scorer.records import SCALAR, Format
from batch_scorer.selection.digests import Digests, digests
from batch_scorer.selection.flat import FlatPart
from batch_scorer.selection.recipe import PROMPT
from batch_scorer.selection.texts import NoColumn, joined_texts, prompts_of, texts_of
from batch_scorer.selection.values import require

IntArray: TypeAlias = npt.NDArray[np.int64]
_Named: TypeAlias = Callable[[pa.Table], Digests]
"""The group of each row of a table, uint64[R, 2]."""

NORMALIZED = "normalized_"
MEAN = f"mean_{NORMALIZED}"


@dataclass(frozen=True, slots=True)
class Found:
    """What a part holds: its rows with their groups (`ROWS`), and by the prefix of each family its
    finite scores (`SCORES`, all of family 0)."""

    rows: pa.Table
    scores: Mapping[str, pa.Table]


def find_scores(part: Part, normalization: Normalization, options: Mapping[str, str]) -> Found:
    """Called in a process that may die of the file.

    Raises InputError where it has no scores, or a column that a group is named by is not there.
    """
    try:
        return _find_scores(part, normalization, options)
    except NoColumn as error:
        raise InputError(f"{part.url}: {error}") from None


def _find_scores(part: Part, normalization: Normalization, options: Mapping[str, str]) -> Found:
    opened = OpenPart(part, options)
    families = _families(part, opened.schema, normalization)
    named, columns = _groups(part, opened.schema, normalization, options)
    wanted = {*columns, *(name for family in families for name in family.columns)}
    rows: list[pa.Table] = []
    scores: dict[str, list[pa.Table]] = {family.prefix: [] for family in families}
    for first, table in opened.groups(wanted):
        groups = named(table)  # uint64[R, 2]
        numbers = np.arange(first, first + table.num_rows, dtype=np.int32)
        rows.append(pa.table([numbers, *groups.T], schema=ROWS))
        for family in families:
            for name in family.columns:
                values, owners, _ = _values(table[name])
                finite = np.isfinite(values)
                own = groups[owners[finite]]
                family_0 = np.zeros(len(own), np.int16)
                scores[family.prefix].append(
                    pa.table([family_0, *own.T, values[finite]], schema=SCORES)
                )
    return Found(
        _together(rows, ROWS),
        {prefix: _together(tables, SCORES) for prefix, tables in scores.items()},
    )


def normalized_shard(
    part: Part,
    prefixes: Sequence[str],
    means: FloatArray,
    stds: FloatArray,
    derivation: str,
    options: Mapping[str, str],
) -> bytes:
    """The rows of a part with their normalised columns behind them, as Parquet bytes. `means` and
    `stds` are float64[R, F], those of each row's groups, NaN without a spread.

    Called in a process that may die of the file.
    """
    table = read_part(part, options)
    families = {f.prefix: f for f in _families_in(part, table.schema)}
    added: dict[str, dict[str, _Column]] = {}
    for place, prefix in enumerate(prefixes):
        for name in families[prefix].columns:
            column = _Column.of(table[name], means[:, place], stds[:, place])
            added.setdefault(name.removeprefix(prefix), {})[prefix] = column
            table = _with(
                table, prefix + NORMALIZED + name.removeprefix(prefix), column.array(), part
            )
    for name, columns in added.items():
        if len(prefixes) > 1:
            table = _with(table, MEAN + name, _mean([*columns.values()]).array(), part)
    return encode_shard(table, derivation, part.key)


# Families and groups


def _families(part: Part, schema: pa.Schema, normalization: Normalization) -> list[Family]:
    found = list(_families_in(part, schema))
    there = {family.prefix for family in found}
    for prefix in normalization.prefix:
        if prefix not in there:
            named = ", ".join(map(repr, sorted(there))) or "none"
            raise NoColumn(f"no scores with the prefix {prefix!r}; there are {named}")
    if not found:
        raise NoColumn(f"no scores; there are {', '.join(schema.names)}")
    return [
        each for each in found if not normalization.prefix or each.prefix in normalization.prefix
    ]


def _families_in(part: Part, schema: pa.Schema) -> list[Family]:
    if part.commit is None:
        return list(families_of(schema.names))
    (names,) = shape_of(Format(part.commit.layout["format"])).value_columns(SCALAR)
    return list(families_of(schema.names, names))


def _groups(
    part: Part, schema: pa.Schema, normalization: Normalization, options: Mapping[str, str]
) -> tuple[_Named, list[str]]:
    """What names the group of each row of a table, and the columns that it reads."""
    prompts = None
    columns = [name for name in normalization.by if name != PROMPT]
    for name in columns:
        require(schema.names, name)
    if PROMPT in normalization.by:
        prompts = prompts_of(FlatPart(part, options), is_needed=True)
        for name in prompts.columns:
            require(schema.names, name)  # of a list of dialogues, each answer has its own prompt
        columns += prompts.columns

    def named(table: pa.Table) -> Digests:
        if not normalization.by:
            return np.zeros((table.num_rows, 2), np.uint64)
        keys = [
            prompts.texts(table) if name == PROMPT and prompts else texts_of(table[name])
            for name in normalization.by
        ]
        return digests(joined_texts(keys))

    return named, columns


# Values


def _values(column: pa.ChunkedArray) -> tuple[FloatArray, IntArray, IntArray]:
    """float64[n], NaN for null: the numbers of a column, or in its lists; int64[n], the row of
    each; int64[R], how many each row has."""
    lengths = np.ones(len(column), np.int64)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        column = pc.list_flatten(column)
    if not pa.types.is_floating(column.type):
        raise NoColumn(f"scores are no numbers but {column.type}")
    numbers = pc.fill_null(column.cast(pa.float64()), np.nan)
    values = np.asarray(numbers.to_numpy(zero_copy_only=False), np.float64)
    return values, np.repeat(np.arange(len(lengths)), lengths), lengths


@dataclass(frozen=True, slots=True)
class _Column:
    """Normalised values, float64[n], NaN for none. int64[R] `lengths` are those of each row's list,
    and bool[R] `is_there` says whether a row has one; `is_list` is false where a row is a value."""

    values: FloatArray
    lengths: IntArray
    is_there: npt.NDArray[np.bool_]
    is_list: bool

    @classmethod
    def of(cls, column: pa.ChunkedArray, means: FloatArray, stds: FloatArray) -> "_Column":
        values, owners, lengths = _values(column)
        is_there = column.combine_chunks().is_valid().to_numpy(zero_copy_only=False)
        is_list = not pa.types.is_floating(column.type)
        return cls((values - means[owners]) / stds[owners], lengths, is_there, is_list)

    def array(self) -> pa.Array:
        """float32[R], or list[R] of it; null for none."""
        values = pa.array(self.values.astype(np.float32), mask=~np.isfinite(self.values))
        if not self.is_list:
            return values
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, values, mask=pa.array(~self.is_there))


def _mean(columns: Sequence[_Column]) -> _Column:
    """Over families; none where one of them has none, or another number of answers."""
    first = columns[0]
    is_there = np.logical_and.reduce([c.is_there & (c.lengths == first.lengths) for c in columns])
    if not first.is_list:
        return _Column(
            np.mean([c.values for c in columns], axis=0), first.lengths, is_there, is_list=False
        )
    kept = [c.values[np.repeat(is_there, c.lengths)] for c in columns]
    return _Column(
        np.mean(kept, axis=0), np.where(is_there, first.lengths, 0), is_there, is_list=True
    )


def _with(table: pa.Table, name: str, column: pa.Array, part: Part) -> pa.Table:
    if name in table.column_names:
        raise InputError(f"{part.url}: there is a column {name!r} already")
    return table.append_column(name, column)


def _together(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables(tables) if tables else schema.empty_table()
