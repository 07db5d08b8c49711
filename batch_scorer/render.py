"""Parsed rows → token ids: the model's own chat template, exactly one BOS, the length policy.

The ids are those that the model card's two steps give (render to text, then tokenise), taken in
bulk. Families that were trained on another text than their tokenizer's template gives have it in
`models.adapter.Prompt`. Whether BOS comes from the template or from the tokenizer is read off the
rendered text and not guessed from the model's name: Skywork-Reward v0.1 templates hold none, v0.2
and V2 do (model cards).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from batch_scorer.config import Config, OverLength
from batch_scorer.errors import ModelError, RowReason, ShardError, ShardReason
from batch_scorer.formats.messages import text_of
from batch_scorer.models.adapter import Prompt, Steps
from batch_scorer.models.directory import ModelFacts, read_json
from batch_scorer.records import Conversation, ParsedRows, RowError, TokenizedRows

OWN_TEMPLATE = Prompt()
"""The tokenizer's own template and nothing else."""

_TEXTS_AT_ONCE = 64
"""What the tokenizer gives back takes a hundred bytes a token and more, of which the id is four:
2.5 million tokens at once take 220 MB and 15 % longer than in pieces."""

PROBES: tuple[Conversation, ...] = (
    [
        {"role": "user", "content": "How many sides does a square have?"},
        {"role": "assistant", "content": "Four."},
    ],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Green."},
        {"role": "user", "content": "Another one, please."},
        {"role": "assistant", "content": "Blue."},
    ],
)
"""Conversations whose rendering stands for the template in the fingerprint. Public templates may
put today's date into the prompt, which no file digest shows."""


@dataclass(frozen=True, slots=True)
class Probe:
    """How this tokenizer and template treat `PROBES`; recorded with the run."""

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr((self.texts, self.token_ids)).encode()).hexdigest()


class Renderer:
    """The tokenizer and chat template of one model, and the length policy of one run.

    Raises ModelError if the directory holds no usable tokenizer.
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
        if prompt.template is not None:
            self._tokenizer.chat_template = prompt.template
        self._prompt = prompt
        self._suffix_id = _suffix_id(model_dir, prompt)
        self._max_tokens = max_tokens
        self._over_length = over_length
        self._model_dir = model_dir
        if self._tokenizer.is_fast:
            self._tokenizer.backend_tokenizer.no_truncation()
            self._tokenizer.backend_tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer can give, added tokens included."""
        return len(self._tokenizer)

    @property
    def renders(self) -> bool:
        """Whether conversations can be turned into text here."""
        return self._pairs or bool(self._tokenizer.chat_template)

    @property
    def bos_id(self) -> int | None:
        """The id that starts every sequence, once; None for tokenizers without one."""
        return cast(int | None, self._tokenizer.bos_token_id)

    def visible(self, token_ids: npt.NDArray[np.int32]) -> str:
        """The text of these ids, special tokens included."""
        return cast(str, self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=False))

    @property
    def _pairs(self) -> bool:
        return self._prompt.pair and not self._tokenizer.chat_template

    def probe(self) -> Probe:
        """Render and tokenise `PROBES`. Raises ModelError if there is no template, or it fails."""
        if not self.renders:
            raise ModelError(
                f"{self._model_dir}: the tokenizer has no chat template, so conversations cannot "
                "be rendered; add chat_template.jinja, or score pre-rendered text (--format text)"
            )
        sequences: list[Any] = [list(probe) for probe in PROBES]
        self._tokenize_all(sequences)
        for sequence in sequences:
            if isinstance(sequence, RowError):
                raise ModelError(f"{self._model_dir}: the chat template fails: {sequence.detail}")
        return Probe(
            tuple(self.visible(ids) for ids in sequences),
            tuple(tuple(int(i) for i in ids) for ids in sequences),
        )

    def tokenize(self, parsed: ParsedRows) -> TokenizedRows:
        """Token ids of all sequences, in order.

        Raises ShardError(OVER_LENGTH_ROW) under the `error` policy.
        """
        sequences: list[Any] = list(parsed.sequences)
        self._tokenize_all(sequences)
        errors: dict[int, RowError] = {}
        truncated = np.zeros(len(sequences), dtype=np.int32)
        for index, sequence in enumerate(sequences):
            if not isinstance(sequence, RowError):
                sequence = np.asarray(sequence, dtype=np.int32)
                if len(sequence) > self._max_tokens:
                    sequence, truncated[index] = self._shorten(parsed, index, sequence)
                elif len(sequence) == 0:
                    sequence = RowError(RowReason.EMPTY, "no tokens")
            if isinstance(sequence, RowError):
                errors[index] = sequence
                sequence = np.empty(0, dtype=np.int32)
            sequences[index] = sequence
        lengths = [len(sequence) for sequence in sequences]
        return TokenizedRows(
            token_ids=np.concatenate([np.empty(0, dtype=np.int32), *sequences]),
            sequence_offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(
                np.int64
            ),
            row_offsets=parsed.row_offsets,
            truncated_tokens=truncated,
            sequence_errors=errors,
            row_errors=parsed.row_errors,
        )

    def _tokenize_all(self, sequences: list[Any]) -> None:
        """Conversations and texts → int32 ids, in place; ids stay, errors stay or come."""
        for index, sequence in enumerate(sequences):
            if _is_conversation(sequence):
                sequences[index] = self._prepare(sequence)
        if self._pairs:
            self._encode_pairs(sequences)
        self._render_conversations(sequences)
        self._tokenize_texts(sequences)
        if self._suffix_id is not None:
            for index, ids in enumerate(sequences):
                if not isinstance(ids, RowError) and len(ids) and ids[-1] != self._suffix_id:
                    sequences[index] = np.append(np.asarray(ids, np.int32), self._suffix_id)

    def _prepare(self, conversation: Conversation) -> Conversation | RowError:
        """The conversation that the template sees: system prompt and steps as trained."""
        system, steps = self._prompt.system, self._prompt.steps
        if system is not None and conversation[0]["role"] != "system":
            conversation = [{"role": "system", "content": system}, *conversation]
        return conversation if steps is None else _with_steps(conversation, steps)

    def _encode_pairs(self, sequences: list[Any]) -> None:
        """tokenizer(question, answer); the turns before the answer are joined by blank lines."""
        for index, sequence in enumerate(sequences):
            if _is_conversation(sequence):
                turns = [text_of(message) for message in sequence]
                question, answer = "\n\n".join(turns[:-1]), turns[-1]
                sequences[index] = self._tokenizer(question, answer)["input_ids"]

    def _render_conversations(self, sequences: list[Any]) -> None:
        where = [i for i, s in enumerate(sequences) if _is_conversation(s)]
        if not where:
            return
        conversations = [sequences[i] for i in where]
        try:
            texts: Sequence[str | RowError] = self._tokenizer.apply_chat_template(
                conversations, tokenize=False
            )
        except Exception:  # a template may raise anything; find out which rows it refuses
            texts = [self._render(conversation) for conversation in conversations]
        for index, text in zip(where, texts, strict=True):
            sequences[index] = text

    def _render(self, conversation: Conversation) -> str | RowError:
        try:
            return cast(str, self._tokenizer.apply_chat_template(conversation, tokenize=False))
        except Exception as error:  # a template is foreign code: raise_exception, type errors, …
            return RowError(RowReason.TEMPLATE_ERROR, f"{type(error).__name__}: {error}"[:200])

    def _tokenize_texts(self, sequences: list[Any]) -> None:
        where = [i for i, s in enumerate(sequences) if isinstance(s, str)]
        for index, ids in zip(where, self._tokenize([sequences[i] for i in where]), strict=True):
            sequences[index] = ids

    def _tokenize(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """int32 ids of each text with exactly one BOS where the tokenizer or template has one."""
        bos = self._tokenizer.bos_token
        has_bos = [bool(bos) and text.startswith(bos) for text in texts]
        ids = [np.empty(0, dtype=np.int32)] * len(texts)
        for given in (True, False):
            where = [i for i, flag in enumerate(has_bos) if flag == given]
            # A text that starts with BOS must not get another one from the tokenizer.
            encoded = self._encode([texts[i] for i in where], add_special_tokens=not given)
            for index, row in zip(where, encoded, strict=True):
                ids[index] = row
        return ids

    def _encode(
        self, texts: list[str], *, add_special_tokens: bool
    ) -> Iterator[npt.NDArray[np.int32]]:
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            some = texts[start : start + _TEXTS_AT_ONCE]
            if self._tokenizer.is_fast:
                encode = self._tokenizer.backend_tokenizer.encode_batch_fast
                rows = [row.ids for row in encode(some, add_special_tokens=add_special_tokens)]
            else:
                rows = self._tokenizer(some, add_special_tokens=add_special_tokens)["input_ids"]
            for row in rows:
                yield np.array(row, dtype=np.int32)

    def _shorten(
        self, parsed: ParsedRows, index: int, ids: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32] | RowError, int]:
        detail = f"{len(ids)} tokens, at most {self._max_tokens} are scored"
        if self._over_length is OverLength.MARK:
            return RowError(RowReason.TOO_LONG, detail), 0
        if self._over_length is OverLength.ERROR:
            row = int(np.searchsorted(parsed.row_offsets, index, side="right")) - 1
            raise ShardError(ShardReason.OVER_LENGTH_ROW, f"row {row}: {detail}")
        if self._prompt.steps is not None:
            return RowError(RowReason.TOO_LONG, f"{detail}; cutting would lose steps"), 0
        keeps_bos = ids[0] == self._tokenizer.bos_token_id
        head = ids[:1] if keeps_bos else ids[:0]
        tail = ids[len(ids) - (self._max_tokens - len(head)) :]
        return np.concatenate([head, tail]), len(ids) - self._max_tokens


def _is_conversation(sequence: object) -> bool:
    return isinstance(sequence, list) and bool(sequence) and isinstance(sequence[0], dict)


def _with_steps(conversation: Conversation, steps: Steps) -> Conversation | RowError:
    """The answer cut into steps, each followed or answered by the tag (`models.adapter.Steps`)."""
    *before, answer = conversation
    text = text_of(answer)
    is_tagged = steps.layout == "tagged" and steps.tag in text
    mark = steps.tag if is_tagged else steps.separator
    parts = [part.strip() for part in text.split(mark)]
    parts = [part for part in parts if part]
    if not parts:
        return RowError(RowReason.NO_STEPS, "the answer has no step that could be judged")
    if steps.layout == "tagged":
        text = steps.joint.join(part + steps.tag for part in parts)
        return [*before, {"role": answer["role"], "content": text}]
    if before and before[-1]["role"] == "user":
        parts[0] = f"{before[-1]['content']} {parts[0]}"
        before = before[:-1]
    turns = [
        message
        for part in parts
        for message in (
            {"role": "user", "content": part},
            {"role": "assistant", "content": steps.tag},
        )
    ]
    return [*before, *turns]


def _suffix_id(model_dir: Path, prompt: Prompt) -> int | None:
    if prompt.suffix_id_of is None:
        return None
    config = read_json(model_dir / "config.json")
    if prompt.suffix_id_of not in config:
        raise ModelError(f"{model_dir}: config.json has no {prompt.suffix_id_of}")
    return int(config[prompt.suffix_id_of])


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
    """The longest sequence, in tokens, that is scored."""
    return min(config.max_tokens or model.max_tokens, model.max_tokens)
