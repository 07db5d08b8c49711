"""Texts → token ids, as the model's own tokenizer gives them.

`PlainReader` is that tokenizer, Hugging Face's. `FastReader` lets fastokens read with the same
vocabulary, many times as fast, and keeps to what Hugging Face's gives: it compares both on strings
that tokenizers read differently, on all texts of the first shard, and on some of every later one.
Once they differ it reads no more in this process.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from batch_scorer.render.hard_strings import hard_strings

Ids: TypeAlias = npt.NDArray[np.int32]

log = logging.getLogger("batch_scorer")

_TEXTS_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 1 << 22
"""What the tokenizer gives back takes a hundred bytes a token and more, of which the id is four:
2.5 million tokens at once take 220 MB and 15 % longer than in pieces."""
_WORTH_LOADING = 1 << 22
"""Characters that a process reads before it loads fastokens: with a vocabulary of 128,000 tokens
Hugging Face's tokenizer reads about so many while fastokens is loaded. So a process never takes
more than twice the time that it needs at best, however much it reads in the end."""
_PROOF_TEXTS = 256
"""Texts that are all compared, at least: a shard may be small."""
_COMPARED = 251
"""Afterwards one text in so many is. A prime number, so that in rows of several sequences each side
has its turn."""
_NONE = np.empty(0, np.int32)


class Reader(Protocol):
    """A tokenizer."""

    def ids(self, texts: Sequence[str], adds: Sequence[bool]) -> list[Ids]:
        """int32 ids of each text; with what the tokenizer puts around a text, where it `adds`."""


class PlainReader:
    """Hugging Face's tokenizer. It makes a Python object of every id, whatever it is asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def ids(self, texts: Sequence[str], adds: Sequence[bool]) -> list[Ids]:
        return _in_pieces(self._read, texts, adds)

    def _read(self, texts: list[str], adds: bool) -> list[Ids]:
        if self._tokenizer.is_fast:
            encode = self._tokenizer.backend_tokenizer.encode_batch_fast
            rows = [found.ids for found in encode(texts, add_special_tokens=adds)]
        else:
            rows = self._tokenizer(texts, add_special_tokens=adds)["input_ids"]
        return [np.array(row, dtype=np.int32) for row in rows]


class FastReader:
    """fastokens, once there is enough to read, and as long as it gives the ids of `plain`.

    `tokenizer` is one of the tokenizers library; it may not change any more.
    """

    def __init__(self, tokenizer: Any, plain: PlainReader) -> None:
        self._tokenizer = tokenizer
        self._plain = plain
        self._core: Any = None
        self._is_off = False
        self._until_loaded = _WORTH_LOADING
        self._unproven = _PROOF_TEXTS

    def ids(self, texts: Sequence[str], adds: Sequence[bool]) -> list[Ids]:
        if not self._is_ready():
            self._until_loaded -= sum(map(len, texts))
            return self._plain.ids(texts, adds)
        is_proof = self._unproven > 0
        found = self._compared(texts, adds, every=1 if is_proof else _COMPARED)
        if found is None:
            self._give_up(logging.WARNING, "it gives other ids for a text of the input")
            return self._plain.ids(texts, adds)
        if is_proof:
            self._unproven -= len(texts)
            if self._unproven <= 0:
                log.info("fastokens reads from now on: all ids were those of the tokenizer")
        return found

    def _is_ready(self) -> bool:
        """Whether fastokens may be asked; it is loaded where that is due."""
        if self._core is None and not self._is_off and self._until_loaded <= 0:
            self._load()
        return not self._is_off and self._core is not None

    def _load(self) -> None:
        try:
            from fastokens import Tokenizer

            self._core = Tokenizer.from_json_str(self._tokenizer.backend_tokenizer.to_str())
        except Exception as error:  # what it does not know of a vocabulary it says in many ways
            self._give_up(logging.INFO, f"it cannot read this vocabulary: {error}")
            return
        tokens = self._tokenizer.added_tokens_decoder.values()
        texts = hard_strings(str(token.content) for token in tokens)
        for adds in (True, False):
            if self._compared(texts, [adds] * len(texts), every=1) is None:
                self._give_up(logging.WARNING, "it reads this vocabulary otherwise")
                return

    def _give_up(self, level: int, why: str) -> None:
        log.log(level, "texts are read by Hugging Face's tokenizer, not by fastokens: %s", why)
        self._is_off, self._core = True, None

    def _compared(self, texts: Sequence[str], adds: Sequence[bool], every: int) -> list[Ids] | None:
        """The ids by fastokens; None where one of `every` so many texts has others."""
        found = _in_pieces(self._read, texts, adds)
        places = range(0, len(texts), every)
        own = self._plain.ids([texts[p] for p in places], [adds[p] for p in places])
        same = (np.array_equal(found[p], ids) for p, ids in zip(places, own, strict=True))
        return found if all(same) else None

    def _read(self, texts: list[str], adds: bool) -> list[Ids]:
        """A text at which it raises goes to the tokenizer alone."""
        try:
            ids, offsets = self._core.encode_batch_flat(texts, adds)
        except BaseException as error:
            if not _is_about_text(error):
                raise
            if len(texts) == 1:
                return self._plain.ids(texts, [adds])
            half = len(texts) // 2
            return self._read(texts[:half], adds) + self._read(texts[half:], adds)
        flat = np.frombuffer(ids, np.int32)
        bounds = np.frombuffer(offsets, np.uint64).tolist()
        return [flat[start:stop] for start, stop in pairwise(bounds)]


def _is_about_text(error: BaseException) -> bool:
    """Whether fastokens raised it: an error where a vocabulary lacks a byte, or a panic of Rust,
    which is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def reader_of(tokenizer: Any, *, fast: bool) -> Reader:
    """What reads texts with this tokenizer of transformers."""
    plain = PlainReader(tokenizer)
    return FastReader(tokenizer, plain) if fast and tokenizer.is_fast else plain


def _in_pieces(
    read: Callable[[list[str], bool], list[Ids]], texts: Sequence[str], adds: Sequence[bool]
) -> list[Ids]:
    """The ids of each text, read in pieces of texts that all add or all do not."""
    found = [_NONE] * len(texts)
    for flag in (True, False):
        places = [place for place, each in enumerate(adds) if each == flag]
        for some in _pieces(places, texts):
            ids = read([texts[place] for place in some], flag)
            for place, own in zip(some, ids, strict=True):
                found[place] = own
    return found


def _pieces(places: Sequence[int], texts: Sequence[str]) -> Iterator[Sequence[int]]:
    """Places of texts that are read at once."""
    start = characters = 0
    for end, place in enumerate(places):
        characters += len(texts[place])
        is_full = end - start == _TEXTS_AT_ONCE or characters > _CHARACTERS_AT_ONCE
        if is_full and end > start:
            yield places[start:end]
            start, characters = end, len(texts[place])
    if start < len(places):
        yield places[start:]
