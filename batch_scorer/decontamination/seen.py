"""Rows compared with those before them: the first of alike rows is kept."""

import hashlib
from collections.abc import Sequence

from datasketch import MinHashLSH

from batch_scorer.decontamination.index import (
    PERMUTATIONS,
    Hit,
    Place,
    jaccard,
    shingles_of,
    sketch_of,
)
from batch_scorer.decontamination.recipe import Decontamination, Match
from batch_scorer.decontamination.words import Words, words_of


class Seen:
    """The rows that are kept so far: their texts and, of `near`, their sketches are in memory."""

    def __init__(self, recipe: Decontamination) -> None:
        self._recipe = recipe
        self._kept: dict[bytes, tuple[Place, str]] = {}
        self._near: list[bytes] = []
        self._lsh = MinHashLSH(recipe.threshold, PERMUTATIONS)

    def hit(self, place: Place, texts: Sequence[str]) -> Hit | None:
        """The kept row that this one is like; None: it is kept. Only all of a row's texts together
        are alike."""
        words = words_of("\n".join(texts))
        if not words.words:
            return None
        key = _digest(words)
        if key in self._kept and words_of(self._kept[key][1]).words == words.words:
            return self._hit(words, key, 1.0)
        if self._recipe.match is Match.NEAR:
            shingles = shingles_of(words.words)
            sketch = sketch_of(shingles)
            for number in sorted(self._lsh.query(sketch)):
                like = self._near[number]
                # Sets of shingles take many times the memory of their text.
                others = shingles_of(words_of(self._kept[like][1]).words)
                if (similarity := jaccard(shingles, others)) >= self._recipe.threshold:
                    return self._hit(words, like, similarity)
            self._lsh.insert(len(self._near), sketch)
            self._near.append(key)
        self._kept[key] = place, words.text
        return None

    def _hit(self, words: Words, key: bytes, similarity: float) -> Hit:
        place, text = self._kept[key]
        return Hit(place, words.text, text, similarity)


def _digest(words: Words) -> bytes:
    text = "\x00".join(words.words)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
