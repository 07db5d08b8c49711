"""Parsed rows → token ids: the model's own chat template, exactly one BOS, the length policy.

The ids are those that the model card's two steps give (render to text, then tokenise), taken in
bulk. Families that were trained on another text than their tokenizer's template gives have it in
`models.adapter.Prompt`. Whether BOS comes from the template or from the tokenizer is read off the
rendered text and not guessed from the model's name: Skywork-Reward v0.1 templates hold none, v0.2
and V2 do (model cards).

Legend: R rows, S sequences.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from batch_scorer.config import Config, OverLength
from batch_scorer.errors import ModelError, RowNote, RowReason, ShardError, ShardReason
from batch_scorer.models.adapter import Prompt
from batch_scorer.models.directory import ModelFacts
from batch_scorer.records import Conversation, ParsedRows, RowError, TokenizedRows
from batch_scorer.render import messages
from batch_scorer.render.probe import PROBES, Probe, TemplateFacts, look_at
from batch_scorer.render.special import SpecialText
from batch_scorer.render.template import ChatTemplate
from batch_scorer.render.tokens import Encoder, Ids, cut

OWN_TEMPLATE = Prompt()
"""The tokenizer's own template and nothing else."""


@dataclass(slots=True)
class _Talk:
    """A conversation on its way to a text: its place among the sequences, its row, what the
    template is given, and what came of it."""

    place: int
    row: int
    messages: Conversation
    arguments: Mapping[str, Any]
    text: str | RowError = ""
    notes: set[RowNote] = field(default_factory=set)


class Renderer:
    """The tokenizer and chat template of one model, and the length policy of one run.

    Raises ModelError if the directory holds no usable tokenizer, or not what the prompt asks for.
    """

    def __init__(
        self,
        model_dir: Path,
        max_tokens: int,
        over_length: OverLength,
        prompt: Prompt = OWN_TEMPLATE,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoTokenizer  # takes seconds and imports torch

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise ModelError(f"{model_dir}: no usable tokenizer: {first_line}") from error
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._over_length = over_length
        self._model_dir = model_dir
        if self._tokenizer.is_fast:
            self._tokenizer.backend_tokenizer.no_truncation()
            self._tokenizer.backend_tokenizer.no_padding()
        self._template = ChatTemplate(self._tokenizer, prompt, model_dir)
        self._special = SpecialText(self._tokenizer, [prompt.steps.tag] if prompt.steps else [])
        self._encoder = Encoder(self._tokenizer, prompt, model_dir)
        if prompt.special_text == "literal":
            self._require_literal()
        if self._pairs and (prompt.bos, prompt.eos) != ("auto", "keep"):
            raise ModelError(
                f"{model_dir}: bos and eos: question and answer are given to this tokenizer as a "
                "pair, and it puts its own tokens around them; leave bos and eos out"
            )

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer can give, added tokens included."""
        return len(self._tokenizer)

    @property
    def renders(self) -> bool:
        """Whether conversations can be turned into text here."""
        return self._pairs or self._template.problem is None

    @property
    def asks_for_date(self) -> bool:
        """Whether the text depends on the date."""
        return not self._pairs and self._template.asks_for_date

    @property
    def bos_id(self) -> int | None:
        """The id that starts every sequence, once; None for tokenizers without one."""
        return cast(int | None, self._tokenizer.bos_token_id)

    def visible(self, token_ids: npt.NDArray[np.int32]) -> str:
        """The text of these ids, special tokens included."""
        return cast(str, self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=False))

    @cached_property
    def _pairs(self) -> bool:
        return self._prompt.pair and self._template.problem is not None

    @property
    def _joins_parts(self) -> bool:
        """Whether the model's text is made of texts alone."""
        return self._pairs or self._template.content == "text"

    def probe(self) -> Probe:
        """Render and tokenise `PROBES`, and see what becomes of marker words.

        Raises ModelError if there is no template, if it fails, or if it writes nothing of a
        conversation.
        """
        if not self.renders:
            raise ModelError(self._template.problem)
        parsed = ParsedRows(list(PROBES), np.arange(len(PROBES) + 1))
        ids, _ = self._tokenize_all(parsed, _empty_rows(parsed))
        for sequence in ids:
            if isinstance(sequence, RowError):
                raise ModelError(f"{self._model_dir}: the chat template fails: {sequence.detail}")
        facts: TemplateFacts | None = None
        if not self._pairs:
            facts = look_at(self._template, self._special.spellings)
            if not facts.has_text:
                raise ModelError(
                    f"{self._model_dir}: the chat template writes nothing of what the user says"
                )
            if self._prompt.system and facts.system != "kept":
                raise ModelError(
                    f"{self._model_dir}: the chat template has no place for a system message: "
                    f"{facts.system}; leave system_prompt out"
                )
        return Probe(
            tuple(self.visible(part) for part in ids),
            tuple(tuple(part.tolist()) for part in ids),
            facts,
        )

    def tokenize(self, parsed: ParsedRows) -> TokenizedRows:
        """Token ids of all sequences, in order.

        Raises ShardError(OVER_LENGTH_ROW) under the `error` policy.
        """
        made = _empty_rows(parsed)
        sequences, notes = self._tokenize_all(parsed, made)
        for place, sequence in enumerate(sequences):
            if not isinstance(sequence, RowError):
                sequence = self._fitted(made, place, np.asarray(sequence, dtype=np.int32))
            if isinstance(sequence, RowError):
                made.sequence_errors[place] = sequence
                sequence = np.empty(0, dtype=np.int32)
            sequences[place] = sequence
        for row in _rows_of_same_tokens(parsed, sequences):
            notes.setdefault(row, set()).add(RowNote.SAME_TOKENS)
        lengths = [len(sequence) for sequence in sequences]
        made.notes = {row: tuple(sorted(found)) for row, found in sorted(notes.items()) if found}
        made.token_ids = np.concatenate([np.empty(0, dtype=np.int32), *sequences])
        made.sequence_offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(
            np.int64
        )
        return made

    # From sequences to ids

    def _tokenize_all(
        self, parsed: ParsedRows, made: TokenizedRows
    ) -> tuple[list[Any], dict[int, set[RowNote]]]:
        """Conversations and texts → int32 ids; ids stay, errors stay or come.

        Gives the notes by row too, and counts special tokens in `made`.
        """
        sequences: list[Any] = list(parsed.sequences)
        notes: dict[int, set[RowNote]] = {}
        talks: list[_Talk] = []
        for row, (start, stop) in enumerate(pairwise(parsed.row_offsets.tolist())):
            for place in range(start, stop):
                if _is_conversation(sequences[place]):
                    own = notes.setdefault(row, set())
                    arguments = parsed.arguments.get(row, {})
                    talk = _Talk(place, row, sequences[place], arguments, notes=own)
                    if error := self._prepare(talk, parsed.steps.get(place), made):
                        sequences[place] = error
                    else:
                        talks.append(talk)
        if self._pairs:
            for talk in talks:
                sequences[talk.place] = self._encode_pair(talk)
        else:
            self._render(talks)
            for talk in talks:
                sequences[talk.place] = talk.text
        rendered = {talk.place for talk in talks}
        self._encode(sequences, rendered)
        for place, ids in enumerate(sequences):
            if not isinstance(ids, RowError):
                sequences[place] = self._encoder.with_suffix(np.asarray(ids, np.int32))
        return sequences, notes

    def _prepare(
        self, talk: _Talk, steps: Sequence[str] | None, made: TokenizedRows
    ) -> RowError | None:
        """What the template is given: system prompt, reasoning, parts and steps as the job has it;
        or why the row is not scored."""
        prompt, talk.messages = self._prompt, list(talk.messages)
        if found := sum(map(self._special.count, talk.messages)) + sum(
            self._special.count({"content": step}) for step in steps or ()
        ):
            made.special_tokens[talk.row] = made.special_tokens.get(talk.row, 0) + found
            if prompt.special_text == "mark":
                return RowError(
                    RowReason.SPECIAL_TEXT, f"{found} times the text spells a special token"
                )
        if prompt.special_text == "literal":
            if not all(map(self._special.is_hideable, talk.messages)):
                detail = "the text has characters of private use, which `literal` needs itself"
                return RowError(RowReason.SPECIAL_TEXT, detail)
            talk.messages = list(map(self._special.hide, talk.messages))
            steps = steps and [self._special.hide({"content": s})["content"] for s in steps]
        if prompt.reasoning == "drop":
            talk.messages = list(map(messages.without_reasoning, talk.messages))
        if any(map(messages.has_parts, talk.messages)) and self._joins_parts:
            talk.notes.add(RowNote.PARTS_JOINED)
            talk.messages = list(map(messages.with_joined_parts, talk.messages))
        if prompt.steps is not None:
            cut_up = messages.with_steps(talk.messages, prompt.steps, steps)
            if isinstance(cut_up, RowError):
                return cut_up
            talk.messages = cut_up
        elif steps is not None:
            talk.messages[-1] = {
                **talk.messages[-1],
                "content": prompt.step_separator.join(steps),
            }
        system = prompt.system
        if system is not None and talk.messages[0].get("role") not in ("system", "developer"):
            talk.messages.insert(0, {"role": "system", "content": system})
        return None

    def _render(self, talks: Sequence[_Talk]) -> None:
        """The text of every conversation, or the template's error."""
        self._apply(talks)
        refused: list[_Talk] = []
        for talk in talks:
            text, usual = talk.text, messages.with_usual_roles(talk.messages)
            if usual is not None and (
                isinstance(text, RowError) or messages.lacks_renamed(talk.messages, text)
            ):
                refused.append(_Talk(talk.place, talk.row, usual, talk.arguments, notes=talk.notes))
        self._apply(refused)
        by_place = {talk.place: talk for talk in refused if isinstance(talk.text, str)}
        for talk in talks:
            if again := by_place.get(talk.place):
                talk.messages, talk.text = again.messages, again.text
                talk.notes.add(RowNote.ROLE_RENAMED)
        if self._prompt.reasoning == "keep":
            self._keep_reasoning(talks)
        for talk in talks:
            if isinstance(talk.text, str) and not _holds(talk.text, talk.messages[-1]):
                talk.notes.add(RowNote.ANSWER_REWRITTEN)

    def _keep_reasoning(self, talks: Sequence[_Talk]) -> None:
        """Put the judged answer with its reasoning where the template would write it, if the
        template does not write the reasoning itself."""
        cut_short = [
            _Talk(
                talk.place,
                talk.row,
                [*talk.messages[:-1], messages.stand_in(talk.messages[-1])],
                talk.arguments,
            )
            for talk in talks
            if isinstance(talk.text, str)
            and messages.reasoning_of(talk.messages[-1]).strip() not in talk.text
        ]
        self._apply(cut_short)
        by_place = {talk.place: talk.text for talk in cut_short}
        for talk in talks:
            if isinstance(text := by_place.get(talk.place), str):
                talk.text = messages.put_back(text, talk.messages[-1]) or talk.text

    def _apply(self, talks: Sequence[_Talk]) -> None:
        given: list[Conversation] = [talk.messages for talk in talks]
        if talks and self._template.content == "parts":
            given = [list(map(messages.with_parts, each)) for each in given]
        texts = self._template.render(given, [talk.arguments for talk in talks])
        for talk, text in zip(talks, texts, strict=True):
            talk.text = text

    def _encode_pair(self, talk: _Talk) -> list[int]:
        """tokenizer(question, answer); the turns before the answer are joined by blank lines."""
        *turns, last = talk.messages
        keeps = self._prompt.reasoning == "keep"
        answer = messages.whole_answer(last) if keeps else messages.joined_text(last)
        if not _holds(answer, last):
            talk.notes.add(RowNote.ANSWER_REWRITTEN)
        question = "\n\n".join(map(messages.joined_text, turns))
        return cast(list[int], self._tokenizer(question, answer)["input_ids"])

    def _encode(self, sequences: list[Any], rendered: Iterable[int]) -> None:
        """Texts → ids, in place; those at the places `rendered` are the template's."""
        texts = {place: text for place, text in enumerate(sequences) if isinstance(text, str)}
        literal = set(rendered) if self._prompt.special_text == "literal" else set()
        for read, places in (
            (None, [place for place in texts if place not in literal]),
            (self._special.encode, [place for place in texts if place in literal]),
        ):
            encoded = self._encoder.encode([texts[place] for place in places], read)
            for place, ids in zip(places, encoded, strict=True):
                sequences[place] = ids

    def _require_literal(self) -> None:
        """Raise ModelError where special tokens cannot be told from text that spells them: where a
        text in pieces does not give the tokenizer's own ids."""
        problem = None if self._tokenizer.is_fast else "the tokenizer is a slow one"
        if self._pairs:
            problem = "question and answer are given to the tokenizer as a pair"
        if self._tokenizer.is_fast and self._template.problem is None:
            talks = [_Talk(place, place, list(each), {}) for place, each in enumerate(PROBES)]
            self._apply(talks)
            texts = [talk.text for talk in talks if isinstance(talk.text, str)]
            texts += [f"{text}\n  é 中文 <b>" for text in texts]
            whole = self._encoder.encode(texts)
            pieces = self._encoder.encode(texts, self._special.encode)
            if any(a.tolist() != b.tolist() for a, b in zip(whole, pieces, strict=True)):
                problem = "its tokenizer reads a text in pieces otherwise than whole"
        if problem:
            raise ModelError(
                f"{self._model_dir}: special_text: literal: {problem}; use mark, which leaves out "
                "the rows that spell special tokens"
            )

    # Lengths

    def _fitted(self, made: TokenizedRows, place: int, ids: Ids) -> Ids | RowError:
        """The ids as the length policy has them; what it did is noted in `made`."""
        if not len(ids):
            return RowError(RowReason.EMPTY, "no tokens")
        if len(ids) <= self._max_tokens:
            return ids
        detail = f"{len(ids)} tokens, at most {self._max_tokens} are scored"
        if self._over_length is OverLength.ERROR:
            row = int(np.searchsorted(made.row_offsets, place, side="right")) - 1
            raise ShardError(ShardReason.OVER_LENGTH_ROW, f"row {row}: {detail}")
        if not self._over_length.cuts or self._prompt.steps is not None:
            made.too_long[place] = len(ids)
            if self._over_length.cuts:
                detail += "; cutting would lose steps"
            return RowError(RowReason.TOO_LONG, detail)
        made.truncated_tokens[place] = len(ids) - self._max_tokens
        return cut(ids, self._max_tokens, self._over_length, self.bos_id, self._encoder.last_id)


def _empty_rows(parsed: ParsedRows) -> TokenizedRows:
    """The rows before any token is known."""
    return TokenizedRows(
        token_ids=np.empty(0, dtype=np.int32),
        sequence_offsets=np.zeros(1, dtype=np.int64),
        row_offsets=parsed.row_offsets,
        truncated_tokens=np.zeros(len(parsed.sequences), dtype=np.int32),
        sequence_errors={},
        row_errors=parsed.row_errors,
        given_steps={place: len(steps) for place, steps in parsed.steps.items()},
    )


def _is_conversation(sequence: object) -> bool:
    return isinstance(sequence, list) and bool(sequence) and isinstance(sequence[0], dict)


def _holds(text: str, answer: Mapping[str, Any]) -> bool:
    return all(part in text for part in messages.judged_texts(dict(answer)))


def _rows_of_same_tokens(parsed: ParsedRows, sequences: Sequence[Any]) -> Iterable[int]:
    """The rows of which two sequences have the same token ids and are not the same."""
    for row, (start, stop) in enumerate(pairwise(parsed.row_offsets.tolist())):
        firsts: dict[bytes, int] = {}
        for place in range(start, stop):
            if stop - start == 1 or not len(sequences[place]):
                continue
            first = firsts.setdefault(sequences[place].tobytes(), place)
            if (parsed.sequences[first], parsed.steps.get(first)) != (
                parsed.sequences[place],
                parsed.steps.get(place),
            ):
                yield row
                break


@lru_cache(maxsize=4)
def _cached_renderer(
    model_dir: Path,
    max_tokens: int,
    over_length: OverLength,
    prompt: Prompt,
    trust_remote_code: bool,
) -> Renderer:
    """One renderer per process: loading a tokenizer takes seconds."""
    return Renderer(model_dir, max_tokens, over_length, prompt, trust_remote_code=trust_remote_code)


def renderer_of(config: Config, model: ModelFacts) -> Renderer:
    """The renderer that these settings ask for. Raises ModelError for an unusable tokenizer."""
    return _cached_renderer(
        model.path,
        max_tokens_of(config, model),
        config.over_length,
        model.prompt,
        config.trust_remote_code,
    )


def max_tokens_of(config: Config, model: ModelFacts) -> int:
    """The longest sequence, in tokens, that is scored: the setting, or else the model's limit;
    never more than the model's positions."""
    return min(config.max_tokens or model.max_tokens, model.positions)
