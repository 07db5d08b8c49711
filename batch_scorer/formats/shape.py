"""How a row becomes sequences, and how the values of sequences become columns again.

One object for both ways, so that they cannot part: `RowShape` puts the sequences of all rows end to
end (`cut`), puts their values back in their places (`to_columns`), and reads them out of columns
again (`from_columns`).

Legend: R rows, S sequences, K sides of a row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.config import OverLength
from batch_scorer.formats.encoded import decoded
from batch_scorer.formats.kinds import KINDS
from batch_scorer.formats.values import columns_of, is_list
from batch_scorer.records import (
    AGGREGATES,
    DISAGREEMENT,
    SCALAR,
    Families,
    Format,
    Layout,
    Outputs,
    ReadBounds,
    family_prefix,
    gather,
)

T = TypeVar("T")
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowShape:
    """The rows of one format.

    `fields` are its K sides, the fields whose values are scored. In a group a side has any number
    of sequences and its columns hold lists; elsewhere a row has one sequence for each side, or
    none at all.
    """

    fields: tuple[str, ...]
    is_group: bool

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of a side's columns end in."""
        return tuple(f"_{name}" for name in self.fields) if len(self.fields) > 1 else ("",)

    def cut(self, rows: Iterable[Sequence[Sequence[T]]]) -> tuple[list[T], IntArray]:
        """S sequences end to end, and int64[R+1]: row r owns those from offset r to offset r + 1.

        Each row comes as the sequences of its K sides, or empty; a row's sequences are those of its
        sides, one side after the other.
        """
        sequences: list[T] = []
        ends = [0]
        for sides in rows:
            for side in sides:
                sequences.extend(side)
            ends.append(len(sequences))
        return sequences, np.array(ends, dtype=np.int64)

    def value_columns(self, outputs: Outputs) -> list[list[str]]:
        """The columns of each kind of value that a sequence has, by side: its score or embedding
        first, if there is one, then its attributes, then its steps or tokens."""
        kinds = ["score"] if outputs.has_score else []
        if outputs.embedding_size is not None:
            kinds = ["embedding"]
        if self.is_group:
            kinds = [f"{kind}s" for kind in kinds]
        if outputs.attributes:
            kinds.append("rewards")
        if outputs.list_column:
            kinds.append(outputs.list_column)
        return [[kind + suffix for suffix in self.suffixes] for kind in kinds]

    def reward_columns(self, prefix: str) -> list[str]:
        """Names of a reward function's columns: its values by side, then why one is missing."""
        (names,) = self.value_columns(SCALAR)
        return [prefix + name for name in (*names, "score_error")]

    def has_margin(self, outputs: Outputs) -> bool:
        """Whether a row's two scores can be subtracted."""
        return len(self.fields) == 2 and not self.is_group and outputs.has_score

    def added_columns(
        self, prefix: str, over_length: OverLength, outputs: Outputs = SCALAR
    ) -> list[str]:
        """Names of all columns that scoring adds, in order."""
        names, *others = self.value_columns(outputs)
        if self.has_margin(outputs):
            names.append("margin")
        names += [name for names_by_side in others for name in names_by_side]
        names += ["score_error", *(f"num_tokens{suffix}" for suffix in self.suffixes)]
        if over_length.cuts:
            names += [f"num_truncated_tokens{suffix}" for suffix in self.suffixes]
        names += ["score_notes", "num_special_tokens", *outputs.judge]
        return [prefix + name for name in names]

    def columns_together(self, prefix: str) -> list[str]:
        """Names of the columns that several models have together (`outputs.together`), in order: of
        the scores alone, and a margin where it is the same for each of its ways to be computed."""
        (scores,) = self.value_columns(SCALAR)
        names = ["score_error"]
        for kind in AGGREGATES:
            names += [f"{kind}_{name}" for name in scores]
            if kind == "mean" and self.has_margin(SCALAR):
                names.append("mean_margin")
        return [prefix + name for name in (*names, DISAGREEMENT)]

    def all_columns(self, prefix: str, over_length: OverLength, families: Families) -> list[str]:
        """Names of all columns that a job adds, in order: of one model, or of several."""
        names = [] if "" in families else self.columns_together(prefix)
        for name, outputs in families.items():
            names += self.added_columns(family_prefix(prefix, name), over_length, outputs)
        return names

    def counts(self, table: pa.Table, layout: Layout, row_offsets: IntArray) -> IntArray:
        """int64[R, K]: how many sequences of each row are of which side.

        `row_offsets` is int64[R+1], how the rows of `table` were cut (`formats.parse`).
        """
        totals = np.diff(row_offsets)
        sides = len(self.fields)
        if not self.is_group:
            return np.repeat((totals == sides).astype(np.int64)[:, None], sides, axis=1)
        counts = np.zeros((len(totals), sides), np.int64)
        for side, name in enumerate(self.fields[:-1]):
            lengths = _input_lengths(table, layout.columns[name], layout.bounds)
            counts[:, side] = np.where(totals == 0, 0, lengths)
        counts[:, -1] = totals - counts.sum(axis=1)
        return counts

    def to_columns(self, values: pa.Array, counts: IntArray) -> list[pa.Array]:
        """One value per sequence → one column per side, R values each.

        A side without sequences is null.
        """
        cells = _offsets(counts.ravel())  # int64[R*K+1]
        columns = []
        for side in range(len(self.fields)):
            own = np.arange(side, counts.size, len(self.fields))  # the side's cells, row by row
            is_empty = counts[:, side] == 0
            if self.is_group:
                places, offsets = gather(cells, own)
                columns.append(
                    pa.ListArray.from_arrays(
                        pa.array(offsets.astype(np.int32)),
                        values.take(pa.array(places)),
                        mask=pa.array(is_empty),
                    )
                )
            else:
                columns.append(values.take(pa.array(cells[own], mask=is_empty)))
        return columns

    def from_columns(self, columns: Sequence[pa.Array], counts: IntArray) -> pa.Array:
        """What `to_columns` made columns of: one value per sequence, S of them.

        Null where a side of its row holds another number of values.
        """
        values, found = self._cells(columns)
        cells = _offsets(counts.ravel())
        fits = np.repeat((found == counts).all(axis=1), counts.shape[1])  # bool[R*K]
        where = np.zeros(cells[-1], np.int64)  # int64[S]
        has_value = np.repeat(fits, counts.ravel())
        where[has_value] = np.flatnonzero(np.repeat(fits, found.ravel()))
        return values.take(pa.array(where, mask=~has_value))

    def flatten(self, columns: Sequence[pa.Array]) -> tuple[pa.Array, IntArray]:
        """All values in these columns, one column for each side, and int64[n], the row of each; in
        the order of rows, and within a row of sides."""
        values, found = self._cells(columns)
        return values, np.repeat(np.arange(len(found)), found.sum(axis=1))

    def _cells(self, columns: Sequence[pa.Array]) -> tuple[pa.Array, IntArray]:
        """All values, cell by cell, and int64[R, K], how many each cell holds."""
        if self.is_group:
            found = np.stack([_list_lengths(column) for column in columns], axis=1)
            columns = [column.flatten() for column in columns]
        else:
            found = np.ones((len(columns[0]), len(columns)), np.int64)
        # Where each cell's values lie among those of all columns, end to end.
        starts = _offsets(found.T.ravel())[:-1].reshape(found.T.shape).T
        sizes = found.ravel()
        firsts = np.repeat(starts.ravel() - _offsets(sizes)[:-1], sizes)
        return pa.concat_arrays(columns).take(pa.array(firsts + np.arange(sizes.sum()))), found


def shape_of(format: Format) -> RowShape:
    """How rows of this format are cut, and put together again."""
    kind = KINDS[format]
    return RowShape(kind.responses, kind.is_group)


def _offsets(counts: IntArray) -> IntArray:
    """int64[n+1], where lists of these lengths begin, end to end."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _input_lengths(table: pa.Table, name: str, bounds: ReadBounds) -> IntArray:
    """int64[R]: how many values a column of the input holds in each row."""
    if is_list(table[name].type):
        return _list_lengths(table[name])
    columns, _ = columns_of(table, [name], bounds)  # lists in JSON or Python's spelling
    cells = [decoded(value, "", bounds) for value in columns[name]]
    return np.array([len(v) if isinstance(v, list) else 0 for v in cells], np.int64)


def _list_lengths(column: pa.Array | pa.ChunkedArray) -> IntArray:
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return np.asarray(lengths).astype(np.int64)
