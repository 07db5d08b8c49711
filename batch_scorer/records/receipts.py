"""What became of a shard: its commit, in the object's footer, and its receipt."""

import json
from collections import Counter, deque
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from sys import intern
from typing import Any, Self, TypeVar

from pydantic import FiniteFloat

from batch_scorer.errors import ShardReason
from batch_scorer.records.judging import Judged
from batch_scorer.records.reading import parsed
from batch_scorer.records.rewards import Rewarded
from batch_scorer.records.rows import AGGREGATES, Effort, family_prefix
from batch_scorer.records.shards import Shard, Source
from batch_scorer.storage import Version

T = TypeVar("T")

_FOOTER_KEY = b"batch_scorer"


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Preference pairs with both scores: how many, how often chosen is strictly higher, ties."""

    pairs: int = 0
    chosen_higher: int = 0
    ties: int = 0

    @property
    def accuracy(self) -> float | None:
        """Share of pairs whose chosen answer is strictly higher; a tie is a miss."""
        return self.chosen_higher / self.pairs if self.pairs else None

    def __add__(self, other: "PairCounts") -> "PairCounts":
        return PairCounts(
            self.pairs + other.pairs,
            self.chosen_higher + other.chosen_higher,
            self.ties + other.ties,
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """How many rows and scores there are, and how the scores spread.

    `mean`, `std` and `quantiles` (at `outputs.by_source.LEVELS`) are in six digits: enough for
    statistics, and a commit is read with every listing. None and () without a score.
    """

    rows: int
    scores: int = 0
    mean: FiniteFloat | None = None
    std: FiniteFloat | None = None
    quantiles: tuple[FiniteFloat, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """What one of several models made of rows: how many it marked, by reason, and its pairs by
    source. Adds up over shards."""

    rows_marked: int
    marked: dict[str, int]
    pairs: dict[str, PairCounts]

    def __add__(self, other: "ModelCounts") -> "ModelCounts":
        pairs = {
            source: self.pairs.get(source, PairCounts()) + other.pairs.get(source, PairCounts())
            for source in sorted({*self.pairs, *other.pairs})
        }
        marked = Counter(self.marked) + Counter(other.marked)
        return ModelCounts(self.rows_marked + other.rows_marked, dict(marked), pairs)


@dataclass(frozen=True, slots=True)
class ModelCommit:
    """What a scored shard holds of one of several models: the fingerprint of its scores, its
    counts, and how its scores spread, by source."""

    fingerprint: str
    counts: ModelCounts
    spread: dict[str, Spread]


@dataclass(frozen=True, slots=True)
class Commit:
    """What a scored shard holds about itself, in its Parquet footer.

    Holds no clock, host or attempt, so the object's bytes are a function of input, model, plan and
    `retries`: how often marked rows of the shard were tried again (`retry_marked`), each time in
    place of the object before. `rows_digest` is over the token ids that were scored,
    `scores_digest` over the score columns. `notes` counts rows by note (`errors.RowNote`), and as
    `special_tokens` those whose messages spell any. `pairs` and `spread` are by source
    (`outputs.by_source`). `num_rows`, `where` and `rows_not_asked` are the shard's: the object has
    the rows that are asked for, and the others are counted. `judged` is of judges only, `models` of
    several models, by name: then a row is scored where each of them scored it, and `pairs` and
    `spread` are of the mean of their scores. `rewards` has the counts of each reward function,
    whose columns are the last ones.
    """

    identity: str
    fingerprint: str
    epoch: int
    input: str
    input_etag: str
    first_row: int
    num_rows: int
    rows_scored: int
    rows_marked: int
    marked: dict[str, int]
    notes: dict[str, int]
    sequences: int
    tokens: int
    rows_digest: str
    scores_digest: str
    pairs: dict[str, PairCounts]
    layout: dict[str, Any]
    added_columns: list[str]
    spread: dict[str, Spread]
    where: str | None = None
    rows_not_asked: int = 0
    retries: int = 0
    judged: Judged | None = None
    models: dict[str, ModelCommit] = field(default_factory=dict)
    rewards: dict[str, Rewarded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not any(name.endswith("score_error") for name in self.added_columns):
            raise ValueError("no column for errors among added_columns")

    @property
    def column_prefix(self) -> str:
        return self.error_column.removesuffix("score_error")

    @property
    def error_column(self) -> str:
        return next(name for name in self.added_columns if name.endswith("score_error"))

    @property
    def families(self) -> dict[str, str]:
        """By the fingerprint of a model's scores, what the names of its columns begin with."""
        prefix = self.column_prefix
        if not self.models:
            return {self.fingerprint: prefix}
        return {own.fingerprint: family_prefix(prefix, name) for name, own in self.models.items()}

    @property
    def score_prefix(self) -> str:
        """What the names of the score columns begin with that stand for a row: of several models,
        the mean of their scores."""
        return family_prefix(self.column_prefix, AGGREGATES[0] if self.models else "")

    @property
    def score_prefixes(self) -> list[str]:
        """The same of all its score columns."""
        if not self.models:
            return [self.column_prefix]
        return [family_prefix(self.column_prefix, name) for name in (*AGGREGATES, *self.models)]

    def reward_prefix(self, name: str) -> str:
        """What the columns of a reward function begin with."""
        return family_prefix(self.column_prefix, name)

    @property
    def prefixes(self) -> list[str]:
        """What the names of all values begin with: the models', then the reward functions'."""
        return [*self.score_prefixes, *map(self.reward_prefix, self.rewards)]

    @property
    def reasons(self) -> set[str]:
        """Why rows lack a score of any model, or a reward function's value."""
        parts = [own.counts.marked for own in self.models.values()]
        parts += [counts.marked for counts in self.rewards.values()]
        return set(self.marked).union(*parts)

    def footer(self) -> dict[bytes, bytes]:
        held = asdict(self)
        # A footer without a judge, or rewards, is the same as before there were any.
        if self.judged is None:
            del held["judged"]
        if not self.models:
            del held["models"]
        if not self.rewards:
            del held["rewards"]
        return {_FOOTER_KEY: json.dumps(held, sort_keys=True).encode()}

    @classmethod
    def from_footer(cls, metadata: dict[bytes, bytes] | None) -> Self | None:
        """The commit in a schema's metadata; None if the file is not one of ours, or damaged."""
        raw = (metadata or {}).get(_FOOTER_KEY)
        if raw is None:
            return None
        try:
            return parsed(raw, cls)
        except ValueError:
            return None


class Status(StrEnum):
    """How a shard stands. LEFT: this run was to score fewer shards (`max_shards`). NOT_ASKED: no
    shard, but a whole file of which no row is asked for (`limit`, `where`). INPUT_GONE: committed
    by an earlier run, its input is no longer there; kept and named in the manifest, but not counted
    in any total."""

    COMMITTED = "committed"
    FAILED = "failed"
    LEFT = "left"
    NOT_ASKED = "not_asked"
    INPUT_GONE = "input_gone"


@dataclass(slots=True)
class Spent:
    """What one shard took; seconds unless the name says otherwise.

    `started_at` and `committed_at` are clock times, in seconds since 1970, of the worker that
    scored and of the one that wrote. `peak_flops` is what the scoring worker's devices do together
    in large matrix products, FLOP/s, 0 where it was not measured. `wait_s` is how long the worker
    had nothing to score between the shard before and this one, `score_s` the time inside the
    backend, `reward_s` that of the reward functions, `write_s` that of joining, encoding and
    publishing. `retries` counts the tries after the first: processes that died with the shard,
    refusals of the store. `tokenized_sequences` were rendered and tokenised, each once for all
    models that read the same tokens. `efforts` has what each of several models took, by name;
    `effort` is of all.
    """

    effort: Effort = field(default_factory=Effort)
    started_at: FiniteFloat = 0.0
    committed_at: FiniteFloat = 0.0
    peak_flops: FiniteFloat = 0.0
    read_s: FiniteFloat = 0.0
    tokenize_s: FiniteFloat = 0.0
    wait_s: FiniteFloat = 0.0
    score_s: FiniteFloat = 0.0
    reward_s: FiniteFloat = 0.0
    write_s: FiniteFloat = 0.0
    retries: int = 0
    tokenized_sequences: int = 0
    efforts: dict[str, Effort] = field(default_factory=dict)

    def add(self, other: "Spent") -> None:
        """Count what another of the shard's models took in the same worker, or a later stage."""
        self.effort.add(other.effort)
        for each in ("read_s", "tokenize_s", "wait_s", "score_s", "reward_s", "write_s"):
            setattr(self, each, getattr(self, each) + getattr(other, each))
        self.retries += other.retries
        self.tokenized_sequences += other.tokenized_sequences
        self.started_at = min(filter(None, (self.started_at, other.started_at)), default=0.0)
        self.peak_flops = max(self.peak_flops, other.peak_flops)


@dataclass(frozen=True, slots=True)
class Stored:
    """A committed shard as the store holds it. `sha256` is over its bytes, in hex."""

    commit: Commit
    version: Version
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Reused:
    """What took the scores that equal sequences had got before: sequences, their tokens, and whole
    rows by source."""

    sequences: int = 0
    tokens: int = 0
    rows: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Receipt:
    """How one shard ended; `stored` is None where it is not committed.

    `input` is relative to `input_root`, so that a verifier can find the file. Of its rows
    `num_rows` are the shard's, and `rows_not_asked` are counted with it (`Shard`). `file_etag` is
    the version of a file that was not cut into shards. `engine` names the record of what scored the
    shard (device, versions, attention kernel).
    `examples` names up to a few marked rows as [row of the file, reason, detail].
    `epoch` is that of the run that did the work, 0 where no record shows it. `estimated_tokens` are
    those of the plan.
    """

    output_key: str
    input: str
    input_root: str
    num_rows: int
    status: Status
    stored: Stored | None = None
    reason: ShardReason | None = None
    detail: str = ""
    engine: str = ""
    examples: list[tuple[int, str, str]] = field(default_factory=list)
    epoch: int = 0
    estimated_tokens: int = 0
    reused: Reused = field(default_factory=Reused)
    spent: Spent = field(default_factory=Spent)
    rows_not_asked: int = 0
    file_etag: str = ""

    @property
    def commit(self) -> Commit | None:
        return None if self.stored is None else self.stored.commit

    @property
    def input_etag(self) -> str:
        """The version of the input that was looked at."""
        return self.file_etag if self.commit is None else self.commit.input_etag

    @classmethod
    def of_shard(
        cls,
        shard: Shard,
        status: Status,
        reason: ShardReason | None = None,
        detail: str = "",
        spent: Spent | None = None,
    ) -> Self:
        """The receipt of a shard that is not committed."""
        return cls(
            output_key=shard.output_key,
            input=shard.source.key,
            input_root=shard.source.root,
            num_rows=shard.num_rows,
            status=status,
            reason=reason,
            detail=detail,
            estimated_tokens=shard.estimated_tokens,
            spent=spent or Spent(),
            rows_not_asked=shard.rows_not_asked,
        )

    @classmethod
    def of_file(
        cls,
        source: Source,
        status: Status,
        reason: ShardReason | None = None,
        detail: str = "",
        rows_not_asked: int = 0,
    ) -> Self:
        """The receipt of a file that was not cut into shards: nobody knows its rows, or none of
        them is asked for."""
        return cls(
            output_key=source.key,
            input=source.key,
            input_root=source.root,
            num_rows=0,
            status=status,
            reason=reason,
            detail=detail,
            rows_not_asked=rows_not_asked,
            file_etag=source.version.etag,
        )

    def to_line(self) -> str:
        """As one line of JSON, without line feeds. Half a surrogate pair, which the text of an
        example may hold, becomes a question mark: no reader of UTF-8 takes it."""
        text = json.dumps(asdict(self), ensure_ascii=False)
        return text.encode(errors="replace").decode()

    def compact(self) -> Self:
        """The same, holding once for all receipts what most of them have alike.

        A run keeps a receipt of every shard: 2.1 kB each instead of 3.7.
        """
        stored = self.stored
        if stored is not None:
            commit = replace(
                stored.commit,
                fingerprint=intern(stored.commit.fingerprint),
                input=self.input,
                layout=_shared(stored.commit.layout),
                added_columns=_shared(stored.commit.added_columns),
            )
            stored = replace(stored, commit=commit)
        return replace(
            self, stored=stored, input_root=intern(self.input_root), engine=intern(self.engine)
        )


@dataclass(frozen=True, slots=True)
class CommitCounts:
    """The counts of a `Commit`."""

    rows_scored: int
    rows_marked: int
    marked: dict[str, int]
    sequences: int
    tokens: int
    rows_not_asked: int = 0
    judged: Judged | None = None
    rewards: dict[str, Rewarded] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredCounts:
    """A `Stored` with nothing but the counts of its commit."""

    commit: CommitCounts


@dataclass(frozen=True, slots=True)
class Outcome:
    """A receipt, read as far as it is counted. `status` counts all shards of an output, and to read
    the rest of their receipts takes most of the time."""

    output_key: str
    input: str
    num_rows: int
    status: Status
    stored: StoredCounts | None = None
    reason: ShardReason | None = None
    detail: str = ""
    engine: str = ""
    estimated_tokens: int = 0
    reused: Reused = field(default_factory=Reused)
    spent: Spent = field(default_factory=Spent)
    rows_not_asked: int = 0

    @property
    def commit(self) -> CommitCounts | None:
        return None if self.stored is None else self.stored.commit

    def compact(self) -> Self:
        """As of a `Receipt`: this one holds little."""
        return self


def _shared(value: T) -> T:
    """A value equal to this one, which nobody changes: the outputs of a run have few of them."""
    for known in tuple(_alike):
        if known == value:
            same: T = known
            return same
    _alike.appendleft(value)
    return value


_alike: deque[Any] = deque(maxlen=16)
