"""Parsed rows → token ids: the model's own chat template, exactly one BOS, the length policy.

The ids are those that the model card's two steps give (render to text, then tokenise), taken in
bulk. Families that were trained on another text than their tokenizer's template gives have it in
`models.adapter.Prompt`. Whether BOS comes from the template or from the tokenizer is read off the
rendered text and not guessed from the model's name: Skywork-Reward v0.1 templates hold none, v0.2
and V2 do (model cards).

Legend: R rows, S sequences.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from batch_scorer.config import Config, OverLength
from batch_scorer.errors import ConfigError, ModelError, RowNote, RowReason, ShardError, ShardReason
from batch_scorer.models.adapter import Prompt
from batch_scorer.models.directory import ModelFacts
from batch_scorer.models.kept import kept
from batch_scorer.models.tokenizer import load_tokenizer
from batch_scorer.quarantine import Died, apart
from batch_scorer.records import Conversation, Message, ParsedRows, RowError, TokenizedRows
from batch_scorer.render import messages
from batch_scorer.render.probe import BESIDE, PROBES, Probe, look_at
from batch_scorer.render.readers import Ids, reader_of
from batch_scorer.render.special import SpecialText
from batch_scorer.render.template import ChatTemplate
from batch_scorer.render.text import Talk, TextWriter, holds
from batch_scorer.render.tokens import Encoder, cut

OWN_TEMPLATE = Prompt()
"""The tokenizer's own template and nothing else."""


class Renderer:
    """The tokenizer and chat template of one model, and the length policy of one run.

    `model_dir` has the model's config, and the tokenizer unless there is a `tokenizer_dir`. With a
    `vocab_size`, a sequence with a larger id is an error. `fast`: texts may be read by the
    `FastReader`, with the same ids. Raises ModelError if the directory holds
    no usable tokenizer, or not what the prompt asks for.
    """

    def __init__(
        self,
        model_dir: Path,
        max_tokens: int,
        over_length: OverLength,
        prompt: Prompt = OWN_TEMPLATE,
        *,
        tokenizer_dir: Path | None = None,
        vocab_size: int | None = None,
        trust_remote_code: bool = False,
        fast: bool = True,
    ) -> None:
        tokenizer_dir = tokenizer_dir or model_dir
        self._tokenizer = load_tokenizer(tokenizer_dir, trust_remote_code=trust_remote_code)
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._over_length = over_length
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        if self._tokenizer.is_fast:
            self._tokenizer.backend_tokenizer.no_truncation()
            self._tokenizer.backend_tokenizer.no_padding()
        self._template = ChatTemplate(self._tokenizer, prompt, tokenizer_dir)
        self._special = SpecialText(self._tokenizer, [prompt.steps.tag] if prompt.steps else [])
        self._writer = TextWriter(self._template, self._special, prompt, in_pairs=self._pairs)
        reader = reader_of(self._tokenizer, fast=fast)
        self._encoder = Encoder(self._tokenizer, reader, prompt, model_dir)
        if prompt.special_text == "literal":
            self._require_literal()
        if prompt.answer:
            self._require_answers()
        if self._pairs and (prompt.bos, prompt.eos) != ("auto", "keep"):
            raise ModelError(
                f"{model_dir}: bos and eos: question and answer are given to this tokenizer as a "
                "pair, and it puts its own tokens around them; leave bos and eos out"
            )

        if prompt.question_prefix and not self._pairs:
            raise ModelError(
                f"{model_dir}: its default prompt stands before the question of a pair, and "
                "conversations go through a chat template here; set default_prompt_name to null in "
                "config_sentence_transformers.json"
            )

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer can give, tokens that were added to it left out: a pad token
        beyond the model's embedding does no harm while no text has it."""
        return int(self._tokenizer.vocab_size)

    @property
    def problem(self) -> str | None:
        """Why conversations cannot be turned into text here; None: they can."""
        return None if self._pairs else self._template.problem

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

    def probe(self) -> Probe:
        """Render and tokenise `PROBES`, and see what becomes of marker words.

        Raises ModelError if there is no template, if it fails, or if it writes nothing of a
        conversation.
        """
        if self.problem:
            raise ModelError(self.problem)
        facts = None
        if not self._pairs:
            facts = look_at(self._template, self._writer.written, self._special.spellings)
        if facts and facts.has_text and self._prompt.system and facts.system != "kept":
            raise ModelError(
                f"{self._model_dir}: the chat template has no place for a system message: "
                f"{facts.system}; leave system_prompt out"
            )
        beside = dict.fromkeys(range(len(PROBES)), BESIDE)
        parsed = ParsedRows(list(PROBES), np.arange(len(PROBES) + 1), beside=beside)
        ids, _ = self._tokenize_all(parsed, _empty_rows(parsed))
        for sequence in ids:
            if isinstance(sequence, RowError):
                raise ModelError(f"{self._model_dir}: the chat template fails: {sequence.detail}")
        if facts and not facts.has_text:
            raise ModelError(
                f"{self._model_dir}: the chat template writes nothing of what the user says"
            )
        return Probe(
            tuple(self.visible(part) for part in ids),
            tuple(tuple(part.tolist()) for part in ids),
            facts,
        )

    def choice_ids(self, choices: Sequence[str]) -> tuple[int, ...]:
        """The token of each of a judge's choices in the place where its reply begins.

        Raises ConfigError for one that is more than a token there, or the same token as another.
        """
        talk = Talk([{"role": "user", "content": "?"}])
        self._writer.write([talk])
        if isinstance(talk.text, RowError):
            raise ModelError(f"{self._model_dir}: the chat template fails: {talk.text.detail}")
        asked = talk.text + self._prompt.begins
        before, *after = self._encoder.encode([asked, *(asked + choice for choice in choices)])
        ids: dict[str, int] = {}
        for choice, whole in zip(choices, after, strict=True):
            own = whole[len(before) :].tolist()
            if len(own) != 1 or not np.array_equal(whole[: len(before)], before):
                raise ConfigError(
                    f"judge: {choice!r} is not one token where the reply of {self._model_dir} "
                    "begins: a probability can be read of one token only; choose another spelling"
                )
            if own[0] in ids.values():
                raise ConfigError(f"judge: {choice!r} is the same token as another choice")
            ids[choice] = own[0]
        return tuple(ids.values())

    def tokenize(self, parsed: ParsedRows) -> TokenizedRows:
        """Token ids of all sequences, in order.

        Raises ShardError: OVER_LENGTH_ROW under the `error` policy.
        """
        made = _empty_rows(parsed)
        if self._prompt.steps is None:
            made.given_steps = {}  # joined to one answer
        sequences, notes = self._tokenize_all(parsed, made)
        self._mark_unknown(sequences)
        for place, sequence in enumerate(sequences):
            if not isinstance(sequence, RowError):
                sequence = self._fitted(made, place, np.asarray(sequence, dtype=np.int32))
            if isinstance(sequence, RowError):
                made.sequence_errors[place] = sequence
                sequence = np.empty(0, dtype=np.int32)
            sequences[place] = sequence
        for row in _rows_of_same_tokens(parsed, sequences, made.answer_starts):
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
        talks: dict[int, Talk] = {}
        for row, (start, stop) in enumerate(pairwise(parsed.row_offsets.tolist())):
            for place in range(start, stop):
                if _is_conversation(sequences[place]):
                    own = notes.setdefault(row, set())
                    beside = self._beside(parsed, row, place)
                    if isinstance(beside, RowError):
                        sequences[place] = beside
                        continue
                    arguments = parsed.arguments.get(row, {})
                    talk = Talk(sequences[place], arguments, own, beside=beside)
                    talks[place] = self._writer.prepare(talk, parsed.steps.get(place))
                    if talk.special_tokens:
                        made.special_tokens.setdefault(row, 0)
                        made.special_tokens[row] += talk.special_tokens
        if not self._pairs:
            self._writer.write([talk for talk in talks.values() if talk.text == ""])
        if self._prompt.answer:
            self._encode_answers(parsed, sequences, talks, made)
            return sequences, notes
        for place, talk in talks.items():
            if self._prompt.begins and isinstance(talk.text, str):
                talk.text += self._prompt.begins
            is_pair = self._pairs and talk.text == ""
            sequences[place] = self._encode_pair(talk) if is_pair else talk.text
        self._encode(sequences, talks)
        for place, ids in enumerate(sequences):
            if not isinstance(ids, RowError):
                sequences[place] = self._encoder.with_suffix(np.asarray(ids, np.int32))
        return sequences, notes

    def _beside(self, parsed: ParsedRows, row: int, place: int) -> Message | RowError | None:
        """What the model reads beside a conversation; None where that is nothing, or the same for
        all rows."""
        if self._prompt.beside is None:
            return None
        if row in parsed.beside:
            return parsed.beside[row]
        if self._prompt.beside.field != "other":
            if self._prompt.column_beside is None:
                return None
            detail = f"the row gives no {self._prompt.column_beside}"
            return RowError(RowReason.NULL_VALUE, detail)
        return _other_answer(parsed, row, place)

    def _encode_pair(self, talk: Talk) -> list[int]:
        """tokenizer(question, answer); the turns before the answer are joined by blank lines."""
        *turns, last = talk.messages
        keeps = self._prompt.reasoning == "keep"
        answer = messages.whole_answer(last) if keeps else messages.joined_text(last)
        if not holds(answer, last):
            talk.notes.add(RowNote.ANSWER_REWRITTEN)
        question = "\n\n".join(map(messages.joined_text, turns))
        question = self._prompt.question_prefix + question
        return cast(list[int], self._tokenizer(question, answer)["input_ids"])

    def _encode(self, sequences: list[Any], rendered: Collection[int]) -> None:
        """Texts → ids, in place; those at the places `rendered` are the template's."""
        texts = {place: text for place, text in enumerate(sequences) if isinstance(text, str)}
        literal = rendered if self._prompt.special_text == "literal" else ()
        for read, places in (
            (None, [place for place in texts if place not in literal]),
            (self._special.encode, [place for place in texts if place in literal]),
        ):
            encoded = self._encoder.encode([texts[place] for place in places], read)
            for place, ids in zip(places, encoded, strict=True):
                sequences[place] = ids

    def _encode_answers(
        self,
        parsed: ParsedRows,
        sequences: list[Any],
        talks: Mapping[int, Talk],
        made: TokenizedRows,
    ) -> None:
        """Texts → ids, in place, and where the judged answer begins in each, noted in `made`."""
        borders: dict[int, int | None] = dict(
            zip(talks, self._writer.answer_starts(list(talks.values())), strict=True)
        )
        made.answer_starts = np.zeros(len(sequences), np.int32)
        for row, (first, stop) in enumerate(pairwise(parsed.row_offsets.tolist())):
            for place in range(first, stop):
                content, start = sequences[place], parsed.prompt_lengths.get(row)
                if place in talks:
                    content, start = talks[place].text, borders[place]
                if isinstance(content, str) and start is not None:
                    content, start = self._encoder.encode_answer(content, start)
                if isinstance(content, RowError):
                    sequences[place] = content
                elif not start or start >= len(content):
                    detail = "it is not known which tokens are the answer's, and what is before"
                    sequences[place] = RowError(RowReason.ANSWER_NOT_FOUND, detail)
                else:
                    sequences[place] = np.asarray(content, np.int32)
                    made.answer_starts[place] = start

    def _require_answers(self) -> None:
        """Raise ModelError where it cannot be told which tokens hold the answer."""
        if not self._tokenizer.is_fast:
            raise ModelError(
                f"{self._model_dir}: its tokenizer is a slow one, which does not tell the tokens "
                "of the answer; save it with tokenizer.json"
            )
        if self._prompt.special_text == "literal":
            raise ModelError(
                f"{self._model_dir}: special_text: literal reads a text in pieces, so that the "
                "tokens of the answer are not known; use mark, which leaves out the rows that "
                "spell special tokens"
            )

    def _require_literal(self) -> None:
        """Raise ModelError where special tokens cannot be told from text that spells them: where a
        text in pieces does not give the tokenizer's own ids."""
        problem = None if self._tokenizer.is_fast else "the tokenizer is a slow one"
        if self._pairs:
            problem = "question and answer are given to the tokenizer as a pair"
        if self._tokenizer.is_fast and self._template.problem is None:
            talks = [Talk(list(each), beside=BESIDE) for each in PROBES]
            self._writer.write(talks)
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

    # Ids that the model knows, and lengths

    def _mark_unknown(self, sequences: list[Any]) -> None:
        """Put an error in the place of a sequence with an id that the model does not know."""
        ids = [each for each in sequences if not isinstance(each, RowError)]
        most = self._vocab_size
        # One look at all takes a fraction of one at each.
        if most is None or not ids or np.concatenate(ids).max(initial=0) < most:
            return
        for place, each in enumerate(sequences):
            if not isinstance(each, RowError) and len(each) and each.max() >= most:
                detail = f"token id {each.max()}, and the model knows {most} tokens"
                sequences[place] = RowError(RowReason.BAD_TOKEN_ID, detail)

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
        kept = cut(ids, self._max_tokens, self._over_length, self.bos_id, self._encoder.last_id)
        if made.answer_starts is not None:
            start = int(np.searchsorted(kept, made.answer_starts[place]))
            if not 0 < start < len(kept) or kept[start] != made.answer_starts[place]:
                made.too_long[place] = len(ids)
                return RowError(
                    RowReason.TOO_LONG, detail + "; the beginning of the answer would be cut"
                )
            made.answer_starts[place] = start
        made.truncated_tokens[place] = len(ids) - self._max_tokens
        return ids[kept]


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


def _other_answer(parsed: ParsedRows, row: int, place: int) -> Message | RowError:
    """The answer that a pairwise model compares with the one at this place."""
    start, stop = parsed.row_offsets[row : row + 2].tolist()
    if stop - start != 2:
        detail = f"the model compares two answers, the row has {stop - start}"
        return RowError(RowReason.NOT_A_PAIR, detail)
    own, other = parsed.sequences[place], parsed.sequences[start + stop - 1 - place]
    if not _is_conversation(other):
        return RowError(RowReason.NOT_A_PAIR, "the answer to compare with cannot be read")
    own, other = cast(Conversation, own), cast(Conversation, other)
    if own[:-1] != other[:-1]:
        return RowError(RowReason.NOT_A_PAIR, "the two answers do not follow the same turns")
    return other[-1]


def _rows_of_same_tokens(
    parsed: ParsedRows, sequences: Sequence[Any], answer_starts: Ids | None
) -> Iterable[int]:
    """The rows of which two sequences have the same token ids, their answers begin at the same one
    where that counts, and they are not the same."""
    for row, (start, stop) in enumerate(pairwise(parsed.row_offsets.tolist())):
        firsts: dict[tuple[bytes, int], int] = {}
        for place in range(start, stop):
            if stop - start == 1 or not len(sequences[place]):
                continue
            begins = 0 if answer_starts is None else int(answer_starts[place])
            first = firsts.setdefault((sequences[place].tobytes(), begins), place)
            if (parsed.sequences[first], parsed.steps.get(first)) != (
                parsed.sequences[place],
                parsed.steps.get(place),
            ):
                yield row
                break


@lru_cache(maxsize=16)
def _cached_renderer(
    model_dir: Path,
    max_tokens: int,
    over_length: OverLength,
    prompt: Prompt,
    tokenizer_dir: Path,
    vocab_size: int,
    trust_remote_code: bool,
    fast: bool,
    _digest: str,
) -> Renderer:
    """One renderer per process: loading a tokenizer takes seconds. A program may score several
    models that were saved into one folder one after the other, which differ in their digest."""
    return Renderer(
        model_dir,
        max_tokens,
        over_length,
        prompt,
        tokenizer_dir=tokenizer_dir,
        vocab_size=vocab_size,
        trust_remote_code=trust_remote_code,
        fast=fast,
    )


def renderer_of(config: Config, model: ModelFacts) -> Renderer:
    """The renderer that these settings ask for. Raises ModelError for an unusable tokenizer."""
    return _cached_renderer(
        model.path,
        max_tokens_of(config, model),
        config.over_length,
        model.prompt,
        model.tokenizer_path,
        model.vocab_size,
        config.trust_remote_code,
        config.fast_tokenizer,
        model.digest,
    )


@dataclass(frozen=True, slots=True)
class Rendering:
    """What a model's tokenizer and chat template do under a job's settings.

    `vocab_size` as in `Renderer`. `problem` is why conversations cannot be rendered; without one
    there is a `probe`. `asks_for_date`: the text depends on the `date`, which was today's for it.
    `choice_ids` are the tokens of the choices of a judge that is read by probability.
    """

    vocab_size: int
    problem: str | None
    probe: Probe | None
    asks_for_date: bool
    date: datetime | None
    choice_ids: tuple[int, ...]


def rendering_of(config: Config, model: ModelFacts) -> Rendering:
    """Load the model's tokenizer, and render and tokenise with it, in a process apart; or what that
    gave before (`models.kept`). Without a date in the model's prompt, that of any day.

    Raises ModelError where that process dies or hangs, and as `renderer_of` and `Renderer.probe`
    do; ConfigError as `Renderer.choice_ids` does.
    """
    if config.trust_remote_code:  # code of the model's own may come from anywhere
        return _find_rendering(config, model)
    date = model.prompt.date
    return kept(
        Rendering,
        [model.path, model.tokenizer_path],
        {
            "prompt": replace(model.prompt, date=None).to_json(),
            "max_tokens": max_tokens_of(config, model),
            "over_length": config.over_length,
            "vocab_size": model.vocab_size,
            "choices": _choices(model),
        },
        partial(_find_rendering, config, model),
        lambda found: not found.asks_for_date or date in (None, found.date),
    )


def _find_rendering(config: Config, model: ModelFacts) -> Rendering:
    try:
        return apart(config.reader_bounds(), _rendering, config, model)
    except (Died, MemoryError) as error:
        why = str(error) or f"it takes more than {config.read_memory_gib:g} GiB (read_memory_gib)"
        raise ModelError(
            f"{model.tokenizer_path}: its tokenizer or chat template cannot be run: {why}"
        ) from None


def _rendering(config: Config, model: ModelFacts) -> Rendering:
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that there is no torch
    renderer = renderer_of(config, model)
    choices = _choices(model)
    return Rendering(
        vocab_size=renderer.vocab_size,
        problem=renderer.problem,
        probe=None if renderer.problem else renderer.probe(),
        asks_for_date=renderer.asks_for_date,
        date=model.prompt.date,
        choice_ids=renderer.choice_ids(choices) if choices else (),
    )


def _choices(model: ModelFacts) -> list[str]:
    """What a judge that is read by probability may answer; [] for other models."""
    if model.judge is None or model.judge.generates:
        return []
    return [*model.judge.verdict.choices]


def max_tokens_of(config: Config, model: ModelFacts) -> int:
    """The longest sequence, in tokens, that is scored: the setting, or else the model's limit;
    never more than the model's positions."""
    return min(config.max_tokens or model.max_tokens, model.positions)
