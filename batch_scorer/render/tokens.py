"""Text → token ids: where BOS and EOS stand, and what is cut of a sequence that is too long."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from batch_scorer.config import OverLength
from batch_scorer.errors import ModelError
from batch_scorer.models.adapter import Prompt
from batch_scorer.models.files import read_json
from batch_scorer.render.readers import Ids, Reader

Read: TypeAlias = Callable[[str], list[int]]

_MOST_ADDED = 8
"""Tokens that a tokenizer puts before a text, at most."""


class Encoder:
    """One tokenizer, what `reader` gives with it, and the rules of a prompt about the ends of a
    sequence.

    Raises ModelError where a rule needs a token that the model does not have.
    """

    def __init__(self, tokenizer: Any, reader: Reader, prompt: Prompt, model_dir: Path) -> None:
        self._tokenizer = tokenizer
        self._reader = reader
        self._prompt = prompt
        self._suffix_id = _suffix_id(model_dir, prompt)
        self._bos_id = cast(int | None, tokenizer.bos_token_id)
        self._eos_id = cast(int | None, tokenizer.eos_token_id)
        if prompt.bos == "always" and self._bos_id is None:
            raise ModelError(f"{model_dir}: bos: always, but the tokenizer has no BOS")
        if prompt.eos in ("append", "openrlhf") and self._eos_id is None:
            raise ModelError(f"{model_dir}: eos: {prompt.eos}, but the tokenizer has no EOS")

    @property
    def last_id(self) -> int | None:
        """The id that ends every sequence; None where any may."""
        if self._suffix_id is not None:
            return self._suffix_id
        return self._eos_id if self._prompt.eos in ("append", "openrlhf") else None

    def encode(self, texts: Sequence[str], read: Read | None = None) -> list[Ids]:
        """int32 ids of each text, as the prompt's rules for BOS and EOS have it.

        `read` gives the ids of a text without what the tokenizer puts around it; default: as the
        tokenizer reads it.
        """
        if self._prompt.eos == "openrlhf":
            texts = [self._ended(text) for text in texts]
        return [self._with_ends(ids) for ids in self._with_bos(texts, read)]

    def encode_answer(self, text: str, border: int) -> tuple[Ids, int | None]:
        """The same of one text, and how many of its ids stand before the first one that holds
        something of the text from the character `border` on; None where none does.

        Needs a fast tokenizer: a slow one does not tell which characters a token holds.
        """
        found = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        (ids,) = self.encode([text], lambda _: found.ids)
        places = (found.char_to_token(place) for place in range(border, len(text)))
        first = next((place for place in places if place is not None), None)
        if first is None:
            return ids, None
        # In front, only BOS and what the tokenizer adds can be there or not.
        bos = next((i for i, token in enumerate(found.ids) if token != self._bos_id), 0)
        head = np.array(found.ids[bos : first + 1], np.int32)
        for start in range(min(_MOST_ADDED, len(ids) - len(head)) + 1):
            if np.array_equal(ids[start : start + len(head)], head):
                return ids, start + len(head) - 1
        return ids, None

    def with_suffix(self, ids: Ids) -> Ids:
        """The same with the suffix token last."""
        if self._suffix_id is None or not len(ids) or ids[-1] == self._suffix_id:
            return ids
        return np.append(ids, np.int32(self._suffix_id))

    def _ended(self, text: str) -> str:
        """As OpenRLHF ends its training texts (0.11)."""
        text, eos = text.rstrip("\n"), cast(str, self._tokenizer.eos_token)
        return text if text.endswith(eos) else f"{text} {eos}"

    def _with_ends(self, ids: Ids) -> Ids:
        bos, eos = self._prompt.bos, self._prompt.eos
        if bos == "always" and ids[:1].tolist() != [self._bos_id]:
            ids = np.concatenate([np.array([self._bos_id], np.int32), ids])
        if bos == "never":
            while len(ids) and ids[0] == self._bos_id:
                ids = ids[1:]
        if eos == "append" and ids[-1:].tolist() != [self._eos_id]:
            ids = np.append(ids, np.array([self._eos_id], np.int32))
        if eos == "never":
            while len(ids) and ids[-1] == self._eos_id:
                ids = ids[:-1]
        return ids

    def _with_bos(self, texts: Sequence[str], read: Read | None) -> list[Ids]:
        """Ids of each text; BOS once where the tokenizer or the template has one."""
        bos = self._tokenizer.bos_token
        # A text that starts with BOS must not get another one from the tokenizer.
        adds = [
            self._prompt.bos != "template" and not (bos and text.startswith(bos)) for text in texts
        ]
        if read is None:
            return self._reader.ids(texts, adds)
        rows = map(read, texts)
        found = [self._added(ids) if add else ids for ids, add in zip(rows, adds, strict=True)]
        return [np.array(ids, dtype=np.int32) for ids in found]

    def _added(self, ids: list[int]) -> list[int]:
        """The ids between those that the tokenizer puts around every text."""
        core = self._tokenizer.backend_tokenizer
        bare = core.encode("a", add_special_tokens=False).ids
        full = core.encode("a", add_special_tokens=True).ids
        before = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return [*full[:before], *ids, *full[before + len(bare) :]]


def cut(
    ids: Ids, most: int, how: OverLength, bos_id: int | None, last_id: int | None
) -> npt.NDArray[np.int64]:
    """int64[most], the places of int32[n], n > most, that stay: a leading BOS stays, and a
    `last_id` stays last.

    The middle is cut so that half of what stays, rounded up, is of the front.
    """
    places = np.arange(len(ids))
    if how is OverLength.TRUNCATE_MIDDLE:
        front = (most + 1) // 2
        return np.concatenate([places[:front], places[len(ids) - (most - front) :]])
    if how is OverLength.TRUNCATE_RIGHT:
        tail = places[-1:] if last_id is not None and ids[-1] == last_id else places[:0]
        return np.concatenate([places[: most - len(tail)], tail])
    head = places[:1] if bos_id is not None and ids[0] == bos_id else places[:0]
    return np.concatenate([head, places[len(ids) - (most - len(head)) :]])


def _suffix_id(model_dir: Path, prompt: Prompt) -> int | None:
    if prompt.suffix_id_of is None:
        return None
    config = read_json(model_dir / "config.json")
    if prompt.suffix_id_of not in config:
        raise ModelError(f"{model_dir}: config.json has no {prompt.suffix_id_of}")
    return int(config[prompt.suffix_id_of])
