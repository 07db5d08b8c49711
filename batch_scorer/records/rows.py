"""The types that carry a row from its file to its score.

Legend: R rows of a shard, S sequences (a row has one or more), T tokens, H hidden size,
O outputs of the model (1 for a scalar reward).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_scorer.errors import RowNote, RowReason
from batch_scorer.records.judging import Judged, Questions, Reply

FloatArray = npt.NDArray[np.float32]

IntArray = npt.NDArray[np.int64]


Message: TypeAlias = dict[str, Any]
"""One turn of a conversation with all its fields, as chat templates take it: `role`, `content`, and
whatever else the row has. A field that the row does not have is not a key."""
Conversation: TypeAlias = list[Message]


class Format(StrEnum):
    """What one input row is; the values are the choices of `--format`."""

    PREFERENCE_PAIR = "preference_pair"
    BEST_OF_N = "best_of_n"
    ROLLOUT_GROUP = "rollout_group"
    ROLLOUT = "rollout"
    CONVERSATION = "conversation"
    TEXT = "text"
    TOKEN_IDS = "token_ids"
    STEPS = "steps"


class TextStyle(StrEnum):
    """How strings that hold dialogue are read; the values are the choices of `--text-style`.

    PLAIN     a string is one message: a prompt is the user's, a response the assistant's.
    HH        whole dialogues with turn marks, as Anthropic HH-RLHF writes them.
    RENDERED  text that already went through a chat template: it is tokenised as it is.
    """

    PLAIN = "plain"
    HH = "hh"
    RENDERED = "rendered"


FREELY_UNPACKED_BYTES = 1 << 26
"""What any file may unpack to, however small it is."""


@dataclass(frozen=True)
class ReadBounds:
    """What the rows of a file may take, by the settings of the same names: checked before their
    bytes are parsed, so that no row takes more than its own place.

    A file is read by the bounds that it was planned with: both mark the same rows.
    """

    max_row_bytes: int = 1 << 26
    max_nesting: int = 200
    max_keys: int = 10_000
    max_unpacked_gib: float = 1024.0
    max_expansion: float = 1000.0

    def most_unpacked(self, stored_bytes: int) -> int:
        """The bytes that a file of this size may unpack to."""
        in_proportion = FREELY_UNPACKED_BYTES + self.max_expansion * stored_bytes
        return int(min(self.max_unpacked_gib * 2**30, in_proportion))


DEFAULT_BOUNDS = ReadBounds()


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of one file are read: found once per file by the plan, used by its shards.

    `columns` maps the field names of the format (`prompt`, `chosen`, `responses`, …) and of the
    conversation around it (`system`, `tools`, …) to the file's column names. `text_style` is None
    where the columns hold messages or token ids. `prompt_inside`: plain responses begin with their
    prompt, which is cut off them. `repeated` is the column of a prompt that the responses hold and
    that is no part of a sequence: a response that does not hold it is marked. `encoded` are columns
    whose text is JSON, or Python's spelling, of messages. `watched` are columns that would belong
    to the conversation and are not read: a row where one of them holds anything is marked.
    `fields` are the columns that a judge's questions show beside the conversation.
    `bounds` are those of the settings; they are no part of what makes layouts differ.
    """

    format: Format
    columns: Mapping[str, str]
    text_style: TextStyle | None = None
    prompt_inside: bool = False
    repeated: str | None = None
    encoded: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    bounds: ReadBounds = field(default=DEFAULT_BOUNDS, compare=False)


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row or sequence is not scored: a code for the column, a sentence for people."""

    reason: RowReason
    detail: str


SequenceInput: TypeAlias = Conversation | str | list[int]
"""A conversation to render, rendered text to tokenise, or token ids to take as they are."""


@dataclass(slots=True)
class ParsedRows:
    """R rows cut into S sequences, before rendering.

    `sequences` holds S inputs, an error in place of one that cannot be read.
    `row_offsets` is int64[R+1]: row r owns sequences[row_offsets[r]:row_offsets[r + 1]].
    `row_errors` names the rows that could not be cut into sequences; they own none.
    `arguments` are the chat template's arguments that a row has of its own (`tools`, `documents`,
    …), by row. `steps` are the steps of a sequence's last message where the row gives them as a
    list, by sequence; that message then has no content. `prompt_lengths` are the characters or
    token ids that a row's sequences begin with because its prompt is text or ids apart, by row.
    `beside` is what a model judges the answers of a row by (a reference, a principle), by row, as a
    message. `fields` are the values of the columns that a judge's questions show, R each.
    """

    sequences: list[SequenceInput | RowError]
    row_offsets: npt.NDArray[np.int64]
    row_errors: dict[int, RowError] = field(default_factory=dict)
    arguments: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    steps: dict[int, tuple[str, ...]] = field(default_factory=dict)
    prompt_lengths: dict[int, int] = field(default_factory=dict)
    beside: dict[int, Message] = field(default_factory=dict)
    fields: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1


@dataclass(slots=True)
class TokenizedRows:
    """R rows as token ids, ready for a backend.

    `token_ids` is int32[T], the S sequences end to end; `sequence_offsets` int64[S+1];
    `row_offsets` int64[R+1]; `truncated_tokens` int32[S], tokens cut by the length policy.
    A sequence with an error has no tokens. `row_errors` as in `ParsedRows`. `known` are scores that
    equal sequences got before, NaN for those that a backend has yet to be asked for.
    `too_long` are the tokens of the sequences that are marked for their length, `given_steps` how
    many steps the row gave where each gets a score, both by sequence. `notes` and `special_tokens`
    (how often the text of a message spells a special token) are by row, of those that have any.
    `answer_starts` is int32[S], how many tokens of a sequence stand before the judged answer, which
    is the rest of it; None for models that do not ask where it begins.
    Of a judge the sequences are questions: what they are about is in `questions`. `seeds` is
    int64[S], what makes the reply to a question its own, wherever it is asked, and `verdicts`
    int64[S], how many verdicts a reply holds.
    """

    token_ids: npt.NDArray[np.int32]
    sequence_offsets: npt.NDArray[np.int64]
    row_offsets: npt.NDArray[np.int64]
    truncated_tokens: npt.NDArray[np.int32]
    sequence_errors: dict[int, RowError]
    row_errors: dict[int, RowError]
    known: "Scores | None" = None
    too_long: dict[int, int] = field(default_factory=dict)
    given_steps: dict[int, int] = field(default_factory=dict)
    notes: dict[int, tuple[RowNote, ...]] = field(default_factory=dict)
    special_tokens: dict[int, int] = field(default_factory=dict)
    answer_starts: npt.NDArray[np.int32] | None = None
    questions: Questions | None = None
    seeds: npt.NDArray[np.int64] | None = None
    verdicts: npt.NDArray[np.int64] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64[S], tokens of each sequence."""
        return np.diff(self.sequence_offsets)

    def take(self, sequences: npt.NDArray[np.int64]) -> "TokenizedRows":
        """These sequences, each as a row of its own, without their errors."""
        places, offsets = gather(self.sequence_offsets, sequences)
        starts = self.answer_starts
        return TokenizedRows(
            token_ids=self.token_ids[places],
            sequence_offsets=offsets,
            row_offsets=np.arange(len(sequences) + 1),
            truncated_tokens=self.truncated_tokens[sequences],
            sequence_errors={},
            row_errors={},
            answer_starts=None if starts is None else starts[sequences],
            seeds=None if self.seeds is None else self.seeds[sequences],
            verdicts=None if self.verdicts is None else self.verdicts[sequences],
        )

    @staticmethod
    def joined(parts: "Sequence[TokenizedRows]") -> "TokenizedRows":
        """The sequences of all parts, in their order, each as a row of its own, with their errors.

        The parts belong to one job: what one of them has beside its sequences, all have.
        """
        if len(parts) == 1:
            return parts[0]
        starts = np.cumsum([0, *(part.num_sequences for part in parts)])
        lengths = np.concatenate([part.lengths for part in parts])

        def together(name: str) -> Any:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else np.concatenate(arrays)

        return TokenizedRows(
            token_ids=together("token_ids"),
            sequence_offsets=np.concatenate([[0], np.cumsum(lengths)]),
            row_offsets=np.arange(len(lengths) + 1),
            truncated_tokens=together("truncated_tokens"),
            sequence_errors={
                start + sequence: error
                for start, part in zip(starts.tolist(), parts, strict=False)
                for sequence, error in part.sequence_errors.items()
            },
            row_errors={},
            answer_starts=together("answer_starts"),
            seeds=together("seeds"),
            verdicts=together("verdicts"),
        )

    def part(self, first_row: int, stop_row: int) -> "TokenizedRows":
        """The rows from one to before another, without their errors, but with what is known of
        them: an engine is not asked for that, whichever part it gets."""
        first, stop = self.row_offsets[[first_row, stop_row]]
        offsets = self.sequence_offsets[first : stop + 1]
        starts = self.answer_starts
        return TokenizedRows(
            token_ids=self.token_ids[offsets[0] : offsets[-1]],
            sequence_offsets=offsets - offsets[0],
            row_offsets=self.row_offsets[first_row : stop_row + 1] - first,
            truncated_tokens=self.truncated_tokens[first:stop],
            sequence_errors={},
            row_errors={},
            known=None if self.known is None else self.known.part(first, stop),
            answer_starts=None if starts is None else starts[first:stop],
            seeds=None if self.seeds is None else self.seeds[first:stop],
            verdicts=None if self.verdicts is None else self.verdicts[first:stop],
        )


@dataclass(frozen=True, slots=True)
class Embedding:
    """What an embedding is: the pooled hidden state, scaled to length 1 with `normalize`."""

    pooling: Literal["last", "mean", "cls"]
    normalize: bool


@dataclass(frozen=True, slots=True)
class PooledTokens:
    """The tokens whose hidden states the score head reads.

    Those of sequence s are at `positions[offsets[s]:offsets[s + 1]]`, counted from its first
    token: int64[K] and int64[S+1]. `next_ids` is int32[K], the token that follows each of them;
    None where the head does not ask for it.
    """

    positions: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    next_ids: npt.NDArray[np.int32] | None = None

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """int64[S], pooled tokens of each sequence."""
        return np.diff(self.offsets)

    def of(self, sequences: npt.NDArray[np.int64]) -> "PooledTokens":
        """The same for these sequences, in this order."""
        places, offsets = gather(self.offsets, sequences)
        next_ids = None if self.next_ids is None else self.next_ids[places]
        return PooledTokens(self.positions[places], offsets, next_ids)


def gather(
    offsets: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of lists that lie end to end at `offsets`, the items of the chosen ones, in this order.

    Returns int64[K], their places, and int64[n+1], where each list begins among them.
    """
    counts = np.diff(offsets)[chosen]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    places = np.arange(starts[-1]) + np.repeat(offsets[chosen] - starts[:-1], counts)
    return places, starts


@dataclass(slots=True)
class Effort:
    """What it took to score some sequences; adds up over shards.

    Of the tokens of all sequences, `computed_tokens` went through the model, `shared_tokens` did
    not because another sequence of their prefix already had (a sequence that is asked twice is
    neither: it counts once).
    """

    num_batches: int = 0
    """Forward passes."""
    computed_tokens: int = 0
    """Tokens that went through the model, padding not counted."""
    padding_tokens: int = 0
    """Places of padded batches that held no token."""
    shared_tokens: int = 0
    """Tokens of distinct sequences that were found computed, as part of a shared prefix."""
    attended_pairs: int = 0
    """Pairs of a computed token and a token that it attends to, its own included; sliding windows
    not considered."""
    oom_splits: int = 0
    """Batches that were cut smaller for lack of memory."""
    generated_tokens: int = 0
    """Tokens that a judge wrote."""

    def add(self, other: "Effort") -> None:
        """Count the other's as well."""
        for field_ in fields(self):
            setattr(self, field_.name, getattr(self, field_.name) + getattr(other, field_.name))


@dataclass(slots=True)
class Scores:
    """What a backend gives back for S sequences, in their order.

    `values` is float32[S, O], raw outputs without activation; NaN where `errors` names the
    sequence. Output 0 is the score, the others the model's attributes; without a score all O are
    attributes, or the dimensions of an embedding. A process reward model adds `step_values`,
    float32[K], those of sequence s at `[step_offsets[s]:step_offsets[s + 1]]`. Where every token
    has a score (`Outputs.tokens`), every token is a step. Of a judge that writes, `replies` are
    what it wrote, None where it was not asked, and `prompt_tokens`, int32[S], a server's count of
    each question's tokens, where only the server knows it.
    """

    values: npt.NDArray[np.float32]
    errors: dict[int, RowError] = field(default_factory=dict)
    step_values: npt.NDArray[np.float32] | None = None
    step_offsets: npt.NDArray[np.int64] | None = None
    effort: Effort = field(default_factory=Effort)
    replies: list[Reply | None] | None = None
    prompt_tokens: npt.NDArray[np.int32] | None = None

    @property
    def is_there(self) -> npt.NDArray[np.bool_]:
        """bool[S]: the sequences whose outputs are all numbers."""
        return np.asarray(np.isfinite(self.values).all(axis=1))

    def part(self, first: int, stop: int) -> "Scores":
        """Those of the sequences from one to before another, without their errors."""
        if self.step_values is None or self.step_offsets is None:
            return Scores(self.values[first:stop])
        places, offsets = gather(self.step_offsets, np.arange(first, stop))
        steps = self.step_values[places]
        return Scores(self.values[first:stop], step_values=steps, step_offsets=offsets)

    def split(self, counts: Sequence[int]) -> "list[Scores]":
        """Those of the first `counts[0]` sequences, of the next `counts[1]`, and so on, with all
        that is theirs. The effort cannot be told apart: it stays with the first ones."""
        if len(counts) == 1:
            return [self]
        bounds = np.cumsum([0, *counts]).tolist()
        split = [self.part(first, stop) for first, stop in pairwise(bounds)]
        split[0].effort = self.effort
        for own, (first, stop) in zip(split, pairwise(bounds), strict=True):
            own.replies = None if self.replies is None else self.replies[first:stop]
            if self.prompt_tokens is not None:
                own.prompt_tokens = self.prompt_tokens[first:stop]
        for sequence, error in self.errors.items():
            number = int(np.searchsorted(bounds, sequence, side="right")) - 1
            split[number].errors[sequence - bounds[number]] = error
        return split


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model gives for a sequence, as columns.

    `attributes` are the names of a reward's parts, in order; `steps`: each step has a score;
    `tokens`: each token has one, which no model has beside `steps`. `embedding_size` is not None
    where there is no score but an embedding, `only_attributes` true where nothing makes a score of
    the attributes. `judge` are the columns that a judge adds.
    """

    attributes: tuple[str, ...] = ()
    steps: bool = False
    embedding_size: int | None = None
    tokens: bool = False
    only_attributes: bool = False
    judge: tuple[str, ...] = ()

    @property
    def has_score(self) -> bool:
        """Whether a sequence gets one number that orders answers."""
        return self.embedding_size is None and not self.only_attributes

    @property
    def list_column(self) -> str | None:
        """The column of the scores that a sequence has several of (`Scores.step_values`)."""
        return "step_scores" if self.steps else "token_scores" if self.tokens else None


SCALAR = Outputs()

Families: TypeAlias = Mapping[str, Outputs]
"""What each model of a job gives, by its name; the name of a single one is ""."""

AGGREGATES = ("mean", "min", "std", "z")
"""What the scores of several models become together: the beginnings of those columns' names."""
DISAGREEMENT = "rank_disagreement"
"""The column that says how differently several models order the answers of a row."""


def family_prefix(prefix: str, model: str) -> str:
    """What the names of a model's columns begin with: for a single one, "", the prefix of all."""
    return f"{prefix}{model}_" if model else prefix


@dataclass(slots=True)
class ScoredRows:
    """R rows and the scores of their S sequences; the token ids stay behind.

    Every sequence without a finite score is NaN and named in `scores.errors`. `lengths` (before the
    mark of one that is too long) and `truncated_tokens` are int32[S], `row_offsets` int64[R+1],
    `row_errors` as in `ParsedRows`, `notes` and `special_tokens` as in `TokenizedRows`.
    `rows_digest` is over what was scored, `engine` describes what scored it, `score_s` is the time
    inside the backend. `was_known` is bool[S], the sequences whose scores are those of equal
    sequences scored before; None: of none. Of a judge, `added` are its columns, R values each, and
    `judged` counts its questions.
    """

    scores: Scores
    lengths: npt.NDArray[np.int32]
    truncated_tokens: npt.NDArray[np.int32]
    row_offsets: IntArray
    row_errors: dict[int, RowError]
    rows_digest: str
    engine: dict[str, Any]
    score_s: float
    was_known: npt.NDArray[np.bool_] | None = None
    notes: dict[int, tuple[RowNote, ...]] = field(default_factory=dict)
    special_tokens: dict[int, int] = field(default_factory=dict)
    added: dict[str, pa.Array] = field(default_factory=dict)
    judged: Judged | None = None

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    def errors_by_row(self) -> dict[int, RowError]:
        """The first error of each row that has one, in row order."""
        return first_errors(self.row_offsets, self.row_errors, self.scores.errors)


def first_errors(
    row_offsets: IntArray,
    row_errors: Mapping[int, RowError],
    sequence_errors: Mapping[int, RowError],
) -> dict[int, RowError]:
    """The first error of each row that has one, in row order: its own, or else one of its
    sequences', which are at int64[R+1] `row_offsets`."""
    errors = dict(row_errors)
    sequences = sorted(sequence_errors)
    rows = np.searchsorted(row_offsets, sequences, side="right") - 1
    for row, sequence in zip(rows.tolist(), sequences, strict=True):
        errors.setdefault(row, sequence_errors[sequence])
    return dict(sorted(errors.items()))
