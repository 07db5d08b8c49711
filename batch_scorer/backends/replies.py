"""How a judge's reply is written, whichever engine makes the tokens.

A reply is written in parts, each a request of its own: a think block, within a budget of its own;
the answer; and, where the page has a `closing`, the verdict behind it. An engine is given one part
after the other and the tokens that belong before it; what ends a part, and what of it is text, is
decided here.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from batch_scorer.judges.page import Generation, Page
from batch_scorer.models.files import read_json
from batch_scorer.records import Reply

OPEN, CLOSE = "<think>", "</think>"
"""The marks of a think block, as the chat templates of most reasoning models spell them."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What bytes are decoded to that are no whole character."""

_BLOCK = re.compile(rf"\s*{OPEN}(.*?)({CLOSE}|\Z)", re.DOTALL)
_BEFORE_TOKENS = 4
"""Tokens before a text that are decoded with it: tokenizers drop the blank of a first token."""
_REWRITTEN_TOKENS = 16
"""Room for what is encoded again of a token that a stop text cuts."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """Where a think block at the beginning of a reply ends.

    `reasoning` is what stands in it, "" without a block. `begun` is what is left of the text that
    the reply was begun with, and the answer goes on at `start` of what was written; None: the block
    is open.
    """

    reasoning: str
    begun: str
    start: int | None


def split_thinking(begun: str, written: str) -> Thinking:
    """A reply begins with `begun`, and the judge wrote `written` behind it. A block may open in
    either."""
    reasoning = ""
    if block := _BLOCK.match(begun):
        if not block[2]:
            whole = _BLOCK.match(begun + written)
            assert whole is not None, "the block that opens in its beginning is there"
            start = whole.end() - len(begun) if whole[2] else None
            return Thinking(whole[1], "", start)
        reasoning, begun = block[1], begun[block.end() :]
    if block := _BLOCK.match(written):
        return Thinking(reasoning + block[1], begun, block.end() if block[2] else None)
    return Thinking(reasoning, begun, 0)


def end_ids(model_dir: Path, config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a reply: what generation_config.json, the config and the tokenizer call
    the end of a sequence. `config` is transformers'. Raises ModelError for a damaged file."""
    file = model_dir / "generation_config.json"
    named = read_json(file).get("eos_token_id") if file.is_file() else None
    found: set[int] = set()
    for ids in (named, getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        found.update([ids] if isinstance(ids, int) else ids or ())
    return sorted(found)


class Decoder:
    """Token ids to text: special tokens are none, unless they are among `marks`."""

    def __init__(self, tokenizer: Any, marks: Iterable[str]) -> None:
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        special = {token_id for token_id, token in added.items() if token.special}
        special.update(tokenizer.all_special_ids)
        marks = set(marks)
        self._hidden = {i for i in special if i not in added or added[i].content not in marks}
        self._tokenizer = tokenizer

    def text(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of `ids` where they stand behind the tokens `after`."""
        before = self._shown(after[-_BEFORE_TOKENS:])
        shown = self._shown(ids)
        prefix, whole = self._decode(before), self._decode([*before, *shown])
        return whole[len(prefix) :] if whole.startswith(prefix) else self._decode(shown)

    def _shown(self, ids: Sequence[int]) -> list[int]:
        return [token_id for token_id in ids if token_id not in self._hidden]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids,
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,
        )
        return text


class Watch:
    """Looks for texts in tokens as they come."""

    def __init__(self, decoder: Decoder, texts: Collection[str]) -> None:
        self._decoder = decoder
        self._texts = texts
        # A text is in as many of the last tokens as it has bytes, or in fewer.
        self._tokens = max((len(text.encode()) for text in texts), default=0) + _BEFORE_TOKENS
        self._completes: dict[int, bool] = {}

    def sees(self, ids: Sequence[int]) -> bool:
        """Whether one of the texts may have come with the last of these tokens.

        Decoding takes 0.1 ms, so it is left out for tokens without the last character of a text.
        """
        if not self._texts or not self._may_complete(ids[-1]):
            return False
        tail = self._decoder.text(ids[-self._tokens :])
        return any(text in tail for text in self._texts)

    def _may_complete(self, token_id: int) -> bool:
        known = self._completes.get(token_id)
        if known is None:
            piece = self._decoder.text([token_id], after=[token_id])
            # A part of a character may complete it.
            known = REPLACEMENT in piece or any(text[-1] in piece for text in self._texts)
            self._completes[token_id] = known
        return known


@dataclass(frozen=True, slots=True)
class Part:
    """What an engine is asked for: at most `max_tokens` behind `prompt_ids`. `number` tells the
    parts of a reply apart; `schema`, of JSON, is what the text has to follow."""

    number: int
    prompt_ids: list[int]
    max_tokens: int
    schema: str | None


_THINKING, _ANSWER, _VERDICT = range(3)


class Writer:
    """What all replies of one judge share. `end_ids` end a reply; there have to be `room_tokens`
    behind every prompt."""

    def __init__(self, page: Page, tokenizer: Any, end_ids: Collection[int]) -> None:
        self.page = page
        self.end_ids = frozenset(end_ids)
        generation = page.generation
        self.decoder = Decoder(tokenizer, (OPEN, CLOSE, *generation.stop))
        self._tokenizer = tokenizer
        self.stops = Watch(self.decoder, generation.stop)
        self.closes = Watch(self.decoder, (CLOSE,))
        self.room_tokens = generation.thinking_tokens + generation.max_tokens
        if generation.closing:
            closing = len(self.encode(generation.closing)) + _REWRITTEN_TOKENS
            self.room_tokens += closing + generation.verdict_tokens

    def with_generation(self, generation: Generation) -> "Writer":
        """The same judge, let write in another way."""
        page = self.page.model_copy(update={"generation": generation})
        return Writer(page, self._tokenizer, self.end_ids)

    def greedy(self, max_tokens: int) -> "Writer":
        """The same judge, let write the most probable tokens and nothing else: none ends the
        reply before it has `max_tokens`."""
        page = self.page.model_copy(update={"generation": Generation(max_tokens=max_tokens)})
        return Writer(page, self._tokenizer, ())

    def encode(self, text: str) -> list[int]:
        """The ids of a text that goes on behind another one: without the blank that some
        tokenizers put before a text."""
        first, both, alone = (
            self._tokenizer.encode(each, add_special_tokens=False)
            for each in ("\n", f"\n{text}", text)
        )
        ids: list[int] = both[len(first) :] if both[: len(first)] == first else alone
        return ids

    def begin(self, prompt_ids: Sequence[int], schema: str | None) -> "Writing":
        """A reply to a prompt, which ends in the page's `begins`."""
        return Writing(self, list(prompt_ids), schema)

    def begun(self, prompt_ids: Sequence[int]) -> str:
        """What the reply begins with: the mark of a block that the template opens, and `begins`.

        Only the end of the prompt is looked at, since a row's text may hold a mark too.
        """
        begins = self.page.begins
        last = len(begins.encode()) + len(OPEN) + 2 * _BEFORE_TOKENS
        tail = self.decoder.text(prompt_ids[-last:]).removesuffix(begins).rstrip()
        return (OPEN if tail.endswith(OPEN) else "") + begins

    def stop_in(self, text: str, start: int) -> int | None:
        """Where the first stop text behind `start` begins."""
        places = [text.find(stop, start) for stop in self.page.generation.stop]
        return min((place for place in places if place >= 0), default=None)


class Writing:
    """One reply while it is written. `part` is what is to be asked for, None once `reply` is there;
    `continues`: it is not the first one. `generated` are the tokens of all parts, those that end
    them included.

    The engine's tokens go to `take` as they come. It says whether they end the part; the engine
    then stops there. Where the engine ends it by itself, that goes to `finish`, or to `fail`.
    """

    def __init__(self, writer: Writer, prompt_ids: list[int], schema: str | None) -> None:
        self.reply: Reply | None = None
        self._writer = writer
        self._prompt = prompt_ids
        self._schema = schema
        self._begun = writer.begun(prompt_ids)
        self._is_open = split_thinking(self._begun, "").start is None
        self._thought: list[int] = []  # a closed think block
        self._answer = Thinking("", "", 0)
        self._critique = ""
        self._ids: list[int] = []  # of the part that is written
        self.generated: list[int] = []
        self.continues = False
        page = writer.page
        thinks = page.generation.thinking_tokens and (self._is_open or CLOSE not in self._begun)
        self.part: Part | None = self._thinking_part() if thinks else self._answer_part()

    def take(self, ids: Iterable[int]) -> bool:
        """Whether the part is over with these tokens."""
        assert self.part is not None
        for token_id in ids:
            self.generated.append(token_id)
            self._ids.append(token_id)
            if self.part.number == _THINKING:
                over = self._thinking_is_over()
            else:
                over = self._writer.stops.sees(self._ids) and self._has_stopped()
            if over:
                self._go_on("stop")
                return True
        return False

    def finish(self, ended: Literal["stop", "length"]) -> None:
        """The part is over: the judge was done, or has had its tokens."""
        self._go_on(ended)

    def fail(self, detail: str) -> None:
        """The engine gave up the part."""
        self._end(Reply("", "error", generated_tokens=len(self.generated), detail=detail))

    # Parts

    def _thinking_part(self) -> Part:
        tokens = self._writer.page.generation.thinking_tokens
        return Part(_THINKING, self._prompt, tokens, None)

    def _answer_part(self) -> Part:
        generation = self._writer.page.generation
        schema = None if generation.closing else self._schema
        return Part(_ANSWER, self._prompt + self._thought, generation.max_tokens, schema)

    def _verdict_part(self, critique_ids: list[int], rest: str) -> Part:
        generation = self._writer.page.generation
        closing = self._writer.encode(rest + generation.closing)
        prompt_ids = self._prompt + self._thought + critique_ids + closing
        return Part(_VERDICT, prompt_ids, generation.verdict_tokens, self._schema)

    def _go_on(self, ended: Literal["stop", "length"]) -> None:
        """From the part that is over to the next one, or to the reply."""
        assert self.part is not None
        self.continues = True
        ids, self._ids = self._ids, []
        if ids and ids[-1] in self._writer.end_ids:
            del ids[-1]
        if self.part.number == _THINKING:
            self._after_thinking(ids, ended)
        elif self.part.number == _ANSWER:
            self._after_answer(ids, ended)
        else:
            text = self._text(ids, after=self.part.prompt_ids)
            stop = self._writer.stop_in(text, 0)
            self._end_with(self._critique + text[:stop], ended if stop is None else "stop")

    def _after_thinking(self, ids: list[int], ended: Literal["stop", "length"]) -> None:
        text = self._text(ids, after=self._prompt)
        if not self._is_open:  # no block came; the answer begins anew, which may need a schema
            self.part = self._answer_part()
        elif (thinking := split_thinking(self._begun, text)).start is None:
            self._answer = thinking
            self._end_with("", ended)
        else:
            self._thought = ids
            self.part = self._answer_part()

    def _after_answer(self, ids: list[int], ended: Literal["stop", "length"]) -> None:
        written = self._text(self._thought + ids, after=self._prompt)
        self._answer = split_thinking(self._begun, written)
        if self._answer.start is None:
            self._end_with("", ended)
            return
        stop = self._writer.stop_in(written, self._answer.start)
        text = self._answer.begun + written[self._answer.start : stop]
        closing = self._writer.page.generation.closing
        if not closing:
            self._end_with(text, ended if stop is None else "stop")
            return
        self._critique = text + closing
        rest = ""
        if stop is not None:
            kept = self._kept(ids, written[:stop])
            rest = written[:stop].removeprefix(self._text(self._thought + kept, after=self._prompt))
            ids = kept
        self.part = self._verdict_part(ids, rest)

    def _end_with(self, text: str, ended: Literal["stop", "length"]) -> None:
        self._end(Reply(text, ended, self._answer.reasoning, generated_tokens=len(self.generated)))

    def _end(self, reply: Reply) -> None:
        self.reply, self.part = reply, None

    # Texts

    def _text(self, ids: list[int], after: list[int]) -> str:
        return self._writer.decoder.text(ids, after)

    def _thinking_is_over(self) -> bool:
        """Whether the block is closed, or what is written is none."""
        if self._is_open:
            return self._writer.closes.sees(self._ids)
        written = self._text(self._ids, after=self._prompt).lstrip()
        self._is_open = written.startswith(OPEN)
        if self._is_open:
            return CLOSE in written
        return not OPEN.startswith(written)

    def _has_stopped(self) -> bool:
        """Whether a stop text is in the answer: in an open think block it is none."""
        assert self.part is not None
        start: int | None = 0
        if self.part.number == _VERDICT:
            written = self._text(self._ids, after=self.part.prompt_ids)
        else:
            written = self._text(self._thought + self._ids, after=self._prompt)
            start = split_thinking(self._begun, written).start
        return start is not None and self._writer.stop_in(written, start) is not None

    def _kept(self, ids: list[int], text: str) -> list[int]:
        """The first of the answer's tokens whose text is no more than this one."""
        count = len(ids)
        while count and not text.startswith(
            self._text(self._thought + ids[:count], after=self._prompt)
        ):
            count -= 1
        return ids[:count]


def seed_of(seed: int, part: int) -> int:
    """The seed of a part of a reply: without it, a reply's parts would be drawn from the same
    random numbers. 63 bits, which engines take as int64."""
    state = np.random.SeedSequence([seed % 2**64, part]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
