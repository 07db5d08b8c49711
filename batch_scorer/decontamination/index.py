"""What is looked for: the entries of evaluation sets, and the match that a text has among them.

Hashes find candidates; every candidate is then compared word by word, so that a collision drops
nothing.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash, MinHashLSH

from batch_scorer.decontamination.recipe import Decontamination, Match
from batch_scorer.decontamination.words import Words, gram_hashes, words_of

SHINGLE_WORDS = 3
PERMUTATIONS = 128
SCHEME = "affine32"
"""How datasketch makes its permutations: named, because sketches of two schemes do not compare."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a text is from: a file and the number of a row in it, from 0."""

    file: str
    row: int


@dataclass(frozen=True, slots=True)
class Removed:
    """A row that is left out, and why. `row` is its number in the shard `file` that was read;
    `text` and `entry_text` are what matches on both sides; `overlap` is the share of the entry's
    words in matching n-grams, the similarity of `near`, the cosine of `embedding`, and
    else 1."""

    file: str
    row: int
    source: str
    entry_file: str
    entry_row: int
    text: str
    entry_text: str
    overlap: float


@dataclass(frozen=True, slots=True)
class Hit:
    """A text's match: the entry, what matches on both sides, and how much of it."""

    entry: Place
    text: str
    entry_text: str
    overlap: float


class Index:
    """The entries of one evaluation; equal ones are kept once, the first of them.

    `without_text` entries leave nothing to look for.
    """

    def __init__(
        self, recipe: Decontamination, entries: Sequence[tuple[Place, Sequence[str]]]
    ) -> None:
        self.recipe = recipe
        self.without_text = 0
        found: dict[tuple[str, ...], tuple[Place, Words]] = {}
        for place, texts in entries:
            split = [words for text in texts if (words := words_of(text)).words]
            self.without_text += not split
            for words in split:
                found.setdefault(words.words, (place, words))
        self.entries = list(found.values())
        short = recipe.match is Match.EXACT
        self._whole = {
            key: number
            for number, key in enumerate(found)
            if short or (recipe.match is Match.NGRAM and len(key) < recipe.words)
        }
        if recipe.match is Match.NGRAM:
            lengths = [len(words.words) for _, words in self.entries]
            self._firsts = np.cumsum([0, *lengths])
            grams, places = gram_hashes([w.words for _, w in self.entries], recipe.words)
            order = np.argsort(grams, kind="stable")
            self._grams, self._places = grams[order], places[order]
        if recipe.match is Match.NEAR:
            self._lsh = MinHashLSH(recipe.threshold, PERMUTATIONS)
            self._shingles = [shingles_of(words.words) for _, words in self.entries]
            for number, shingles in enumerate(self._shingles):
                self._lsh.insert(number, sketch_of(shingles))

    def hits(self, rows: Sequence[Sequence[str]]) -> dict[int, Hit]:
        """The match of each row that has one: that of its first text with a match."""
        owners = [row for row, texts in enumerate(rows) for _ in texts]
        split = [words_of(text) for texts in rows for text in texts]
        match self.recipe.match:
            case Match.EXACT:
                found = self._equal(split)
            case Match.NGRAM:
                found = self._equal(split) | self._overlapping(split)
            case Match.NEAR:
                found = self._near(split)
            case Match.EMBEDDING:
                raise ValueError("embeddings are in an EmbeddingIndex")
        hits: dict[int, Hit] = {}
        for number in sorted(found):
            hits.setdefault(owners[number], found[number])
        return hits

    def _equal(self, texts: Sequence[Words]) -> dict[int, Hit]:
        return {
            number: self._hit_whole(words, self._whole[words.words], 1.0)
            for number, words in enumerate(texts)
            if words.words in self._whole
        }

    def _hit_whole(self, words: Words, entry: int, overlap: float) -> Hit:
        place, other = self.entries[entry]
        spans = words.excerpt(0, len(words.words)), other.excerpt(0, len(other.words))
        return Hit(place, *spans, overlap)

    def _overlapping(self, texts: Sequence[Words]) -> dict[int, Hit]:
        size = self.recipe.words
        grams, places = gram_hashes([words.words for words in texts], size)
        lows = np.searchsorted(self._grams, grams, side="left")
        highs = np.searchsorted(self._grams, grams, side="right")
        firsts = np.cumsum([0, *(len(words.words) for words in texts)])
        # text → entry → the pairs of places (in the text, in the entry) of equal n-grams
        shared: dict[int, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for gram in np.flatnonzero(highs > lows).tolist():
            number = int(np.searchsorted(firsts, places[gram], side="right")) - 1
            at = int(places[gram] - firsts[number])
            wanted = texts[number].words[at : at + size]
            for place in self._places[lows[gram] : highs[gram]].tolist():
                entry = int(np.searchsorted(self._firsts, place, side="right")) - 1
                there = int(place - self._firsts[entry])
                if self.entries[entry][1].words[there : there + size] == wanted:
                    shared[number][entry].append((at, there))
        hits = {}
        for number, entries in shared.items():
            if (hit := self._most_covered(texts[number], entries)) is not None:
                hits[number] = hit
        return hits

    def _most_covered(
        self, words: Words, entries: Mapping[int, Sequence[tuple[int, int]]]
    ) -> Hit | None:
        """The entry of which the text has most, the first of equals; its longest common span."""
        size = self.recipe.words
        best: Hit | None = None
        for entry in sorted(entries):
            place, other = self.entries[entry]
            covered = {there + i for _, there in entries[entry] for i in range(size)}
            overlap = len(covered) / len(other.words)
            if overlap <= self.recipe.overlap or (best and overlap <= best.overlap):
                continue
            at, there, length = _longest(entries[entry], size)
            spans = words.excerpt(at, at + length), other.excerpt(there, there + length)
            best = Hit(place, *spans, overlap)
        return best

    def _near(self, texts: Sequence[Words]) -> dict[int, Hit]:
        hits = {}
        for number, words in enumerate(texts):
            if not words.words:
                continue
            shingles = shingles_of(words.words)
            likely = sorted(self._lsh.query(sketch_of(shingles)))
            scored = [(jaccard(shingles, self._shingles[entry]), -entry) for entry in likely]
            if scored and max(scored)[0] >= self.recipe.threshold:
                similarity, entry = max(scored)
                hits[number] = self._hit_whole(words, -entry, similarity)
        return hits


def _longest(pairs: Sequence[tuple[int, int]], size: int) -> tuple[int, int, int]:
    """The longest run of n-grams that follow each other on both sides: its places, its words."""
    lengths: dict[tuple[int, int], int] = {}
    for at, there in sorted(pairs, reverse=True):
        lengths[at, there] = lengths.get((at + 1, there + 1), size - 1) + 1
    length, at, there = max((length, -at, -there) for (at, there), length in lengths.items())
    return -at, -there, length


def shingles_of(words: Sequence[str]) -> frozenset[str]:
    """Every three words in a row; all words of a shorter text."""
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset("\x00".join(words[i : i + SHINGLE_WORDS]) for i in range(count))


def sketch_of(shingles: frozenset[str]) -> MinHash:
    sketch = MinHash(PERMUTATIONS, scheme=SCHEME)
    sketch.update_batch([each.encode(errors="surrogatepass") for each in sorted(shingles)])
    return sketch


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    return len(left & right) / len(left | right)
