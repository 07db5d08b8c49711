"""Embeddings that `--task embed` wrote: what is looked for, and the rows that are close to it.

Legend: V vectors, E entries, n dimensions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_scorer.decontamination.index import Hit, Place
from batch_scorer.derived.parts import Part
from batch_scorer.errors import InputError
from batch_scorer.outputs.claim import open_scored

_BLOCK = 1024
"""Vectors that are compared with all entries at a time."""
DIGITS = 6
"""Of a cosine; what lies behind them depends on the order in which a library adds up."""


_SIDE = 1 << 32
"""From the slots of one column to those of the next; no list is as long."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """`values` are float32[V, n] of length 1, `rows` int64[V], the row of each, and `slots`
    int64[V], which of its row it is: it is of one side, or one response of a list."""

    rows: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


def vectors_of(table: pa.Table, part: Part) -> Vectors:
    """The embeddings of a part's rows, of all sides; a marked row has none. Raises InputError."""
    commit = part.commit
    columns = [] if commit is None else commit.added_columns
    prefix = "" if commit is None else commit.column_prefix
    names = [name for name in columns if name.startswith(f"{prefix}embedding")]
    if not names:
        raise InputError(
            f"{part.source.url}: no embeddings there; write them with score --task embed"
        )
    found = [_vectors(table[name].combine_chunks()) for name in names]
    values = np.concatenate([each.values for each in found])
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    is_there = np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)
    rows = np.concatenate([each.rows for each in found])
    slots = np.concatenate([each.slots + side * _SIDE for side, each in enumerate(found)])
    return Vectors(rows[is_there], slots[is_there], values[is_there] / lengths[is_there])


def _vectors(column: pa.Array) -> Vectors:
    """Of one column: a vector per row, or a list of them where rows are groups."""
    rows = np.arange(len(column))
    slots = np.zeros(len(column), np.int64)
    if not pa.types.is_fixed_size_list(column.type):
        rows = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
        slots = np.arange(len(rows)) - np.searchsorted(rows, rows)
        column = column.flatten()
    is_there = column.is_valid().to_numpy(zero_copy_only=False)
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    values = flat.reshape(-1, column.type.list_size)
    return Vectors(rows[is_there].astype(np.int64), slots[is_there], values)


class EmbeddingIndex:
    """The embeddings of evaluation rows; `entries` are E places and texts, one per vector.

    `without_text` rows have no embedding.
    """

    def __init__(self, threshold: float) -> None:
        self.entries: list[tuple[Place, str]] = []
        self.without_text = 0
        self._threshold = threshold
        self._values: list[npt.NDArray[np.float32]] = []

    def add(self, file: str, vectors: Vectors, texts: Sequence[str]) -> None:
        """The vectors of a file, and the texts of all of its rows."""
        self.without_text += len(texts) - len(np.unique(vectors.rows))
        self.entries += [(Place(file, row), texts[row]) for row in vectors.rows.tolist()]
        self._values.append(vectors.values)

    def hits(self, vectors: Vectors, texts: Sequence[str]) -> dict[int, Hit]:
        """By row, the entry that one of its vectors is closest to, if that is close enough."""
        entries = np.concatenate(self._values)  # float32[E, n]
        hits: dict[int, Hit] = {}
        for start in range(0, len(vectors.rows), _BLOCK):
            block = slice(start, start + _BLOCK)
            cosines = np.round(vectors.values[block] @ entries.T, DIGITS)  # float32[block, E]
            best = cosines.argmax(axis=1)
            for number in np.flatnonzero(cosines.max(axis=1) >= self._threshold).tolist():
                row, entry = int(vectors.rows[start + number]), int(best[number])
                overlap = round(float(cosines[number, entry]), DIGITS)
                if row not in hits or overlap > hits[row].overlap:
                    place, text = self.entries[entry]
                    hits[row] = Hit(place, texts[row], text, overlap)
        return hits


def require_one_model(parts: Sequence[Part], options: Mapping[str, str]) -> None:
    """Raise InputError where embeddings are of several models or are pooled differently: they do
    not compare."""
    first: tuple[str, object] | None = None
    for root in dict.fromkeys(part.source.root for part in parts if part.commit):
        _, claim = open_scored(root, options)
        kind = [claim.fingerprint.get(name) for name in ("model", "embedding")]
        if first is not None and first[1] != kind:
            raise InputError(
                f"{root} and {first[0]} were embedded by two models or in two ways: no cosine "
                "between them means anything"
            )
        first = first or (root, kind)
