"""Text in a message that spells a special token of the tokenizer, such as `<|im_end|>`.

Tokenizers read such text as the token, so an answer can close its own turn. Here it is counted, and
under `special_text: literal` kept as text: while the template is applied, characters without a
meaning stand for the spellings in messages; what still spells a special token then is the
template's own, and the text between is tokenised with special tokens switched off.
"""

import re
from collections.abc import Iterable
from typing import Any

from batch_scorer.records import Message
from batch_scorer.render.messages import all_texts, map_text

_FIRST = 0x100000
"""Plane 16 is for private use: 65,534 characters that no text has to hold."""
_NOTHING = r"(?!)"
"""A pattern that no text has."""
_PRIVATE = re.compile("[\U00100000-\U0010fffd]")


class SpecialText:
    """The special tokens of one tokenizer, but for those that belong into messages: the `tags` of
    steps, and the marks of reasoning, which some tokenizers call special."""

    def __init__(self, tokenizer: Any, tags: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        tokens = {
            str(token.content): token
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and token.content
        }
        spellings = sorted(set(tokens) - {*tags, "<think>", "</think>"})
        self._stand_ins = {text: chr(_FIRST + place) for place, text in enumerate(spellings)}
        self._spellings = {stand_in: text for text, stand_in in self._stand_ins.items()}
        self._in_messages = re.compile(_one_of(spellings) or _NOTHING)
        # As the tokenizer does it, a token may take in the blanks beside it.
        patterns = [
            (r"\s*" if tokens[text].lstrip else "")
            + f"({re.escape(text)})"
            + (r"\s*" if tokens[text].rstrip else "")
            for text in sorted(tokens, key=lambda spelling: (-len(spelling), spelling))
        ]
        self._in_text = re.compile("|".join(patterns) or _NOTHING)

    @property
    def spellings(self) -> re.Pattern[str]:
        """Finds them in a text."""
        return self._in_messages

    def count(self, message: Message) -> int:
        """How often the texts of a message, at any depth, spell a special token."""
        find, count = self._in_messages.findall, 0
        for key, value in message.items():
            if key != "role":
                for text in (value,) if isinstance(value, str) else all_texts(value):
                    count += len(find(text))
        return count

    def is_hideable(self, message: Message) -> bool:
        """Whether the message is free of the characters that stand for spellings."""
        return not any(_PRIVATE.search(text) for text in all_texts(message))

    def hide(self, message: Message) -> Message:
        """The message with a character in place of each spelling."""

        def hidden(text: str) -> str:
            return self._in_messages.sub(lambda found: self._stand_ins[found[0]], text)

        changed = {key: map_text(value, hidden) for key, value in message.items() if key != "role"}
        return {**message, **changed}

    def show(self, text: str) -> str:
        """The text with the spellings where `hide` took them."""
        return _PRIVATE.sub(lambda found: self._spellings.get(found[0], found[0]), text)

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text whose messages are hidden, without what the tokenizer adds."""
        ids: list[int] = []
        end = 0
        for found in self._in_text.finditer(text):
            ids += self._encode_plain(text[end : found.start()])
            ids.append(self._tokenizer.convert_tokens_to_ids(found[found.lastindex or 0]))
            end = found.end()
        return ids + self._encode_plain(text[end:])

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        core = self._tokenizer.backend_tokenizer
        core.encode_special_tokens = True
        try:
            return list(core.encode(self.show(text), add_special_tokens=False).ids)
        finally:
            core.encode_special_tokens = False


def _one_of(words: Iterable[str]) -> str:
    """A pattern for the longest of these words, each character of a common beginning tried once: a
    plain list of a hundred tokens that begin with `<` reads 12 MB/s of text that has many."""
    rests: dict[str, list[str]] = {}
    is_end = False
    for word in words:
        if word:
            rests.setdefault(word[0], []).append(word[1:])
        else:
            is_end = True
    if not rests:
        return ""
    if len(rests) == 1 and not is_end:
        ((first, rest),) = rests.items()
        return re.escape(first) + _one_of(rest)
    branches = "|".join(re.escape(first) + _one_of(rest) for first, rest in rests.items())
    return f"(?:{branches})" + ("?" if is_end else "")
