"""Embeddings compared with those of the rows before them: the first of close rows is kept.

Every row is compared with every kept one, a block with a block at a time. What is kept lies in
files on the local disk: in memory are two blocks and, of each kept row, where it is from.

Legend: B and C rows of two blocks, m embeddings of a row, n dimensions.
"""

from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from batch_scorer.decontamination.embeddings import DIGITS, Vectors
from batch_scorer.decontamination.index import Hit, Place

FloatArray: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]
Slots: TypeAlias = tuple[int, ...]
"""Which embeddings a row has: those of its sides, or of the responses in its lists."""

_BLOCK = 4096
"""Rows that are compared at a time with as many: their cosines take 64 MiB."""


class SeenEmbeddings:
    """The rows that are kept so far. Files go into `folder`, which is the caller's to remove."""

    def __init__(self, threshold: float, folder: Path) -> None:
        self._threshold = threshold
        self._folder = folder
        self._kept: dict[Slots, _Kept] = {}

    def hits(self, file: str, vectors: Vectors, texts: Sequence[str]) -> dict[int, Hit]:
        """By row of this file, the kept row that it is closest to, if that is close enough: the
        least close of its embeddings counts, each compared with the one in the same place. Rows
        that have other embeddings are not alike. Every other row with an embedding is kept now."""
        hits: dict[int, Hit] = {}
        for slots, rows, values in _by_slots(vectors):
            if slots not in self._kept:
                self._kept[slots] = _Kept(self._folder / f"{len(self._kept)}")
            kept = self._kept[slots]
            for start in range(0, len(rows), _BLOCK):
                block = slice(start, start + _BLOCK)
                hits |= self._block_hits(kept, file, rows[block], values[block], texts)
        return hits

    def _block_hits(
        self, kept: "_Kept", file: str, rows: IntArray, values: FloatArray, texts: Sequence[str]
    ) -> dict[int, Hit]:
        """`values` are float32[B, m, n]."""
        best, closest = kept.closest(values)
        cosines = _cosines(values, values)  # float32[B, B]
        hits: dict[int, tuple[int, float]] = {}
        added: list[int] = []
        numbers = np.zeros(len(rows), np.int64)
        for place in range(len(rows)):
            if place and cosines[place, :place].max() > best[place]:
                at = cosines[place, :place].argmax()
                best[place], closest[place] = cosines[place, at], numbers[at]
            overlap = round(float(best[place]), DIGITS)
            if overlap >= self._threshold:
                hits[place] = int(closest[place]), overlap
                cosines[:, place] = -np.inf  # nothing is compared with what goes
            else:
                numbers[place] = len(kept) + len(added)
                added.append(place)
        kept.add(file, rows[added], values[added], [texts[row] for row in rows[added]])
        return {
            int(rows[place]): Hit(
                kept.place(number), texts[rows[place]], kept.text(number), overlap
            )
            for place, (number, overlap) in hits.items()
        }


class _Kept:
    """The kept rows with the same slots: embeddings and texts in two files, by number from 0."""

    def __init__(self, path: Path) -> None:
        self._vectors = path.with_suffix(".vectors")
        self._texts = path.with_suffix(".texts")
        self._files: list[str] = []
        self._file_of = array("q")
        self._rows = array("q")
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, number: int) -> Place:
        return Place(self._files[self._file_of[number]], self._rows[number])

    def text(self, number: int) -> str:
        start, stop = self._ends[number : number + 2]
        with self._texts.open("rb") as file:
            file.seek(start)
            return file.read(stop - start).decode(errors="surrogatepass")

    def add(self, file: str, rows: IntArray, values: FloatArray, texts: Sequence[str]) -> None:
        """`values` are float32[C, m, n]."""
        if file not in self._files[-1:]:
            self._files.append(file)
        self._file_of.extend([len(self._files) - 1] * len(rows))
        self._rows.extend(rows.tolist())
        with self._vectors.open("ab") as out:
            values.tofile(out)
        with self._texts.open("ab") as out:
            for text in texts:
                written = out.write(text.encode(errors="surrogatepass"))
                self._ends.append(self._ends[-1] + written)

    def closest(self, values: FloatArray) -> tuple[FloatArray, IntArray]:
        """float32[B] and int64[B]: how close the closest kept row is, the first of equally close
        ones, and its number; minus infinity where none is kept. `values` are float32[B, m, n]."""
        best = np.full(len(values), -np.inf, np.float32)
        closest = np.zeros(len(values), np.int64)
        for start in range(0, len(self), _BLOCK):
            cosines = _cosines(values, self._read(start, values.shape[1:]))  # float32[B, C]
            at = cosines.argmax(axis=1)
            here = cosines[np.arange(len(values)), at]
            is_closer = here > best
            best[is_closer] = here[is_closer]
            closest[is_closer] = start + at[is_closer]
        return best, closest

    def _read(self, start: int, shape: tuple[int, ...]) -> FloatArray:
        """float32[C, m, n], the block that begins with this number."""
        size = int(np.prod(shape))
        count = min(_BLOCK, len(self) - start)
        offset = start * size * np.dtype(np.float32).itemsize
        found = np.fromfile(self._vectors, np.float32, count * size, offset=offset)
        return found.reshape(count, *shape)


def _cosines(left: FloatArray, right: FloatArray) -> FloatArray:
    """float32[B, C] of float32[B, m, n] and float32[C, m, n]: of each two rows, the least cosine
    between their embeddings in one place."""
    least = left[:, 0] @ right[:, 0].T
    for place in range(1, left.shape[1]):
        np.minimum(least, left[:, place] @ right[:, place].T, out=least)
    return np.round(least, DIGITS, out=least)


def _by_slots(vectors: Vectors) -> Iterator[tuple[Slots, IntArray, FloatArray]]:
    """The rows with the same slots, int64[R] in order, and float32[R, m, n] their embeddings."""
    order = np.lexsort((vectors.slots, vectors.rows))
    rows, firsts, counts = np.unique(
        vectors.rows[order], return_index=True, return_counts=True
    )  # int64[R]
    slots = vectors.slots[order].tolist()
    numbers: dict[Slots, list[int]] = defaultdict(list)
    for number, (first, count) in enumerate(zip(firsts.tolist(), counts.tolist(), strict=True)):
        numbers[tuple(slots[first : first + count])].append(number)
    for kind, found in numbers.items():
        places = firsts[found][:, None] + np.arange(len(kind))  # int64[R, m]
        yield kind, rows[found], vectors.values[order[places]]
