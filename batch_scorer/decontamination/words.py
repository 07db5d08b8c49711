"""Texts as words that can be compared: the one normal form.

Unicode NFC, case folded, split at white space, and punctuation taken off the ends of words. Signs,
numbers and marks stay: `2 + 2` is not `2 - 2`, `3.5` not `35`, and no accent is dropped. Scripts
that are written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) give one word per
character.

Legend: T texts, W words of all of them.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

NORMAL_FORM = "NFC, case folded, punctuation off the ends of words, characters of unspaced scripts"
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_ENDS = ".,;:!?\"'()[]{}`…“”‘’«»、。，！？：；（）「」『』【】《》।"  # noqa: RUF001
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_PRIME = np.uint64(0x9E3779B97F4A7C15)

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Words:
    """A text's words, and where each stands in the text's NFC form."""

    text: str
    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    def excerpt(self, start: int, stop: int) -> str:
        """The text from word `start` up to word `stop`."""
        return self.text[self.spans[start][0] : self.spans[stop - 1][1]]


def words_of(text: str) -> Words:
    text = unicodedata.normalize("NFC", text)
    words, spans = [], []
    for found in _WORD.finditer(text):
        whole = found.group()
        word = whole.strip(_ENDS)
        if word:
            start = found.start() + len(whole) - len(whole.lstrip(_ENDS))
            words.append(word.casefold())
            spans.append((start, start + len(word)))
    return Words(text, tuple(words), tuple(spans))


def gram_hashes(texts: Sequence[Sequence[str]], size: int) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """uint64[G] hashes of every `size` words in a row, of all texts, and int64[G], the place of the
    first of these words among all words. Equal hashes are only likely to be equal words."""
    lengths = np.array([len(words) for words in texts], dtype=np.int64)
    hashes = np.array([_hash(word) for words in texts for word in words], dtype=np.uint64)
    if len(hashes) < size:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    grams = np.zeros(len(hashes) - size + 1, dtype=np.uint64)
    for place in range(size):
        grams = grams * _PRIME + hashes[place : place + len(grams)]
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(hashes))
    starts = np.flatnonzero(left[: len(grams)] >= size)
    return grams[starts], starts


@lru_cache(1 << 18)
def _hash(word: str) -> int:
    data = word.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
