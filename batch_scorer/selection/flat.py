"""Rows as `select` sees them: flat ones. Where a row is a list of responses, each is a row.

Both passes read rows through here, so that a place in the one is the same place in the other.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.derived.parts import OpenPart, Part
from batch_scorer.formats.kinds import KNOWN_NAMES
from batch_scorer.records import Format

IntArray: TypeAlias = npt.NDArray[np.int64]

_ONE_OF = {
    "scores": "score",
    "rewards": "rewards",
    "num_tokens": "num_tokens",
    "num_truncated_tokens": "num_truncated_tokens",
}
"""Columns with one value for each response of a list, and what one of them is called."""


@dataclass(frozen=True, slots=True)
class FlatRows:
    """`table` has n rows; of each, int64[n] `rows` is the row of the part that it is of, and
    int64[n] `slots` its place in that row's list of responses, -1 where there is none."""

    table: pa.Table
    rows: IntArray
    slots: IntArray


class FlatPart:
    """A part that is being read, in a process that may die of it."""

    def __init__(self, part: Part, options: Mapping[str, str]) -> None:
        self._opened = OpenPart(part, options)
        self._part = part
        self.prefix = part.commit.score_prefix if part.commit else ""
        self.error_column = part.commit.error_column if part.commit else "score_error"
        self._stored = self._opened.schema

    @cached_property
    def schema(self) -> pa.Schema:
        return self._flat(0, self._stored.empty_table()).table.schema

    def column_of(self, field: str) -> str | None:
        """The column that holds a field of the format (`prompt`, `chosen`, …), None without one."""
        if field == "response" and self._lists:
            return field
        if self._part.commit is not None:
            found: str | None = self._part.commit.layout["columns"].get(field)
            return found
        tiers = KNOWN_NAMES.get(field, ())
        return next((n for _, names in tiers for n in names if n in self._stored.names), None)

    @property
    def stored_layout(self) -> Mapping[str, Any] | None:
        """How the rows were read for scoring; None where they were not scored here."""
        return None if self._part.commit is None else self._part.commit.layout

    @property
    def is_hh(self) -> bool:
        """Whether strings hold whole dialogues, with turn marks."""
        return self._part.commit is not None and self._part.commit.layout["text_style"] == "hh"

    def groups(self, columns: Collection[str] | None = None) -> Iterator[FlatRows]:
        """The rows of each row group, in all columns or in these."""
        if columns is not None:
            columns = {*columns, *(many for many, one in self._lists.items() if one in columns)}
            if self._lists:  # its lengths say which rows there are
                columns.add(next(iter(self._lists)))
        for first, table in self._opened.groups(columns):
            yield self._flat(first, table)

    def taken(self, places: npt.NDArray[np.int32]) -> pa.Table:
        """The rows at int32[k, 2] places, row and slot of each, which are in their order."""
        taken = []
        for group in self.groups():
            bounds = [group.rows[0], group.rows[-1] + 1] if len(group.rows) else [0, 0]
            rows, slots = places[slice(*np.searchsorted(places[:, 0], bounds))].T
            # A row's first place in the group, and its slot after it.
            flat = np.searchsorted(group.rows, rows) + np.maximum(slots, 0)
            taken.append(group.table.take(pa.array(flat)))
        return pa.concat_tables(taken)

    @cached_property
    def _lists(self) -> dict[str, str]:
        """The columns of lists, that of the responses first, and their names when flat."""
        commit, names = self._part.commit, self._stored.names
        if commit is not None:
            if commit.layout["format"] != Format.ROLLOUT_GROUP:
                return {}
            responses = commit.layout["columns"]["responses"]
        else:
            known = [name for _, names in KNOWN_NAMES["responses"] for name in names]
            found = [name for name in known if name in names]
            if not found or "scores" not in names:
                return {}
            responses = found[0]
        prefixes = [""] if commit is None else commit.prefixes
        for prefix, other in self._part.beside:
            if other.commit:
                prefixes += [prefix + own for own in other.commit.prefixes]
        values = {p + many: p + one for p in prefixes for many, one in _ONE_OF.items()}
        return {responses: "response"} | {n: one for n, one in values.items() if n in names}

    def _flat(self, first: int, table: pa.Table) -> FlatRows:
        """The responses alone say which rows there are; one that is null or empty stays a row. A
        list of another length gives nulls."""
        count = table.num_rows
        if not self._lists:
            return FlatRows(table, first + np.arange(count), np.full(count, -1))
        responses = _lengths(table[next(iter(self._lists))])
        counts = np.maximum(responses, 1)
        rows = np.repeat(np.arange(count), counts)
        slots = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        slots[responses[rows] == 0] = -1
        columns: dict[str, Any] = {}
        for name in table.column_names:
            if name in self._lists:
                lengths = _lengths(table[name])
                places = (np.cumsum(lengths) - lengths)[rows] + slots
                missing = (slots < 0) | (lengths != responses)[rows]
                flat = pc.list_flatten(table[name])
                columns[self._lists[name]] = flat.take(pa.array(places, mask=missing))
            elif name not in self._lists.values():
                columns[name] = table[name].take(pa.array(rows))
        fields = [table.schema.field(n) for n in table.column_names if n in columns]
        metadata = {field.name: field.metadata for field in fields}
        schema = pa.schema(
            [pa.field(n, c.type, metadata=metadata.get(n)) for n, c in columns.items()],
            table.schema.metadata,
        )
        return FlatRows(pa.table(columns, schema=schema), first + rows, slots)


def _lengths(column: pa.ChunkedArray) -> IntArray:
    """int64[n]: values of each list, 0 for null."""
    lengths = pc.if_else(pc.is_valid(column), pc.list_value_length(column), 0)
    found: IntArray = lengths.to_numpy().astype(np.int64)
    return found
