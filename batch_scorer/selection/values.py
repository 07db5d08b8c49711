"""What ranks a row: one float64, with the offset of its source."""

import json
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.selection.recipe import EVERY_OTHER, Selection
from batch_scorer.selection.texts import NoColumn, texts_of

FloatArray: TypeAlias = npt.NDArray[np.float64]


class Ranking:
    """How the rows of a part with this schema are ranked; `columns` are those that it reads."""

    def __init__(self, selection: Selection, schema: pa.Schema, prefix: str) -> None:
        self._sides: tuple[str, str] | None = None
        self._is_needed = True
        self._offsets = selection.offsets
        self._offset_by = selection.offset_by
        usual = (f"{prefix}margin", f"{prefix}score")
        by = selection.by or next((name for name in usual if name in schema.names), usual[1])
        if selection.lays_out and selection.by is None and by not in schema.names:
            self._sides = side_scores(schema.names, prefix)
            self._is_needed = self._sides is not None or selection.needs_value
        self._is_mean = by.startswith("mean(") and by.endswith(")")
        self._attribute: int | None = None
        if self._is_mean:
            by = by[5:-1]
        elif by not in schema.names and "." in by:
            by, name = by.split(".", 1)
            self._attribute = _place_of(schema, by, name)
        self._by = by
        self.columns = list(self._sides or ([by] if self._is_needed else []))
        self.columns += [self._offset_by] if self._offsets else []
        for name in self.columns:
            require(schema.names, name)

    def values(self, table: pa.Table) -> FloatArray:
        """float64[n]: NaN where there is none; 0 where the selection needs none and the rows of
        this part have none."""
        if not self._is_needed:
            value = np.zeros(table.num_rows)
        elif self._sides is not None:
            chosen, rejected = (numbers_of(table[name]) for name in self._sides)
            value = chosen - rejected
        elif self._is_mean or self._attribute is not None:
            value = _of_vectors(table[self._by], self._attribute)
        else:
            value = numbers_of(table[self._by])
        if not self._offsets:
            return value
        other = self._offsets.get(EVERY_OTHER, 0.0)
        sources = texts_of(table[self._offset_by]).dictionary_encode()
        known = [self._offsets.get(name, other) for name in sources.dictionary.to_pylist()]
        places = pc.fill_null(sources.indices, len(known)).to_numpy(zero_copy_only=False)
        moved: FloatArray = value + np.array([*known, other])[places]
        return moved


def side_scores(names: Sequence[str], prefix: str) -> tuple[str, str] | None:
    """The columns of a pair's two scores, chosen first; None where there are none."""
    found = [
        next((name for name in each if name in names), None) for each in side_names("score", prefix)
    ]
    return (found[0], found[1]) if found[0] and found[1] else None


def side_names(what: Literal["score", "tokens"], prefix: str) -> list[tuple[str, str]]:
    """What a column of each side of a pair can be called: as scoring names it, or as pairs that
    were made here or by others do."""
    scored = {"score": "score", "tokens": "num_tokens"}[what]
    other = {"score": "{}_score", "tokens": "tokens_{}"}[what]
    return [(f"{prefix}{scored}_{side}", other.format(side)) for side in ("chosen", "rejected")]


def numbers_of(column: pa.ChunkedArray) -> FloatArray:
    """float64[n]: NaN for null."""
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise NoColumn(f"what ranks is no column of numbers: {column.type}")
    found: FloatArray = pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy()
    return found


def _of_vectors(column: pa.ChunkedArray, place: int | None) -> FloatArray:
    """float64[n]: of each list the value at a place, or the mean without one."""
    if not hasattr(column.type, "value_type") or not pa.types.is_floating(column.type.value_type):
        raise NoColumn(f"what ranks is no column of lists of numbers: {column.type}")
    lengths = pc.if_else(pc.is_valid(column), pc.list_value_length(column), 0).to_numpy()
    values = numbers_of(pc.list_flatten(column))
    starts = np.cumsum(lengths) - lengths
    found = np.full(len(lengths), np.nan)
    there = lengths > (place or 0)
    if place is not None:
        found[there] = values[starts[there] + place]
    elif there.any():
        found[there] = np.add.reduceat(values, starts[there]) / lengths[there]
    return found


def _place_of(schema: pa.Schema, column: str, name: str) -> int:
    require(schema.names, column)
    metadata = schema.field(column).metadata or {}
    names: list[Any] = json.loads(metadata.get(b"batch_scorer.attributes", b"[]"))
    if name not in names:
        raise NoColumn(f"{column} has no {name!r}; there are {', '.join(names) or 'no names'}")
    return names.index(name)


def require(names: list[str], name: str) -> None:
    """Raise NoColumn unless there is one column of that name."""
    if names.count(name) != 1:
        raise NoColumn(f"there is no column {name!r}; there are {', '.join(names)}")
