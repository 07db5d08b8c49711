"""What a run shows while it goes, as values: what it set out to do, its shards, its pace."""

from collections.abc import Mapping
from dataclasses import dataclass

from batch_scorer import formats
from batch_scorer.records import Receipt
from batch_scorer.reports.results import FailedShard, failed_shard
from batch_scorer.runs.metrics import Metrics
from batch_scorer.runs.remaining import Work


@dataclass(frozen=True, slots=True)
class Started:
    """What a run sets out to do: all `files`, `shards` and `rows` of its plan, of which
    `shards_done` were committed before, and the `todo_*` that are scored now; of these, the
    `shards_again` were committed too, and their marked rows are tried again.

    `rows_not_asked` are the files' other rows. `layouts` lists the files by what their rows are;
    `input_gone` the stored shards whose input is no longer there, `skipped` files beside the inputs
    that are not read.
    """

    files: int
    shards: int
    rows: int
    shards_done: int
    todo_shards: int
    todo_rows: int
    todo_tokens: int
    layouts: Mapping[str, tuple[str, ...]]
    failed: tuple[FailedShard, ...]
    input_gone: tuple[str, ...]
    rows_not_asked: int = 0
    skipped: tuple[str, ...] = ()
    shards_again: int = 0


def started(work: Work) -> Started:
    plan = work.plan
    keys = [source.key for source in plan.files.sources]
    layouts: dict[str, tuple[str, ...]] = {}
    for alike, places in plan.files.by_alike():
        what = formats.describe(alike.layout, alike.schema)
        layouts[what] = (*layouts.get(what, ()), *(keys[at] for at in places.tolist()))
    return Started(
        files=len(plan.files),
        shards=len(plan.shards),
        rows=plan.num_rows,
        shards_done=len(work.done),
        todo_shards=len(work.todo),
        todo_rows=work.todo.total("num_rows"),
        todo_tokens=work.todo.total("estimated_tokens"),
        layouts=layouts,
        failed=tuple(map(failed_shard, plan.failed)),
        input_gone=tuple(receipt.output_key for receipt in work.gone),
        rows_not_asked=plan.rows_not_asked,
        skipped=tuple(plan.skipped),
        shards_again=sum(shard.retries > 0 for shard in work.todo.changed.values()),
    )


@dataclass(frozen=True, slots=True)
class MarkedRow:
    """A row that is committed without a score. `row` counts from 0 in its file."""

    input: str
    row: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Pace:
    """How far a run is, and how fast; figures as in `Metrics`, None where nothing is known yet."""

    shards: int
    todo_shards: int
    rows: int
    tokens_per_s: float | None
    computed_ratio: float | None
    idle_share: float | None
    left_s: float | None
    rows_marked: int
    shards_failed: int

    @property
    def is_over(self) -> bool:
        return self.shards == self.todo_shards


class Tally:
    """Counts the shards of a run as they end."""

    def __init__(self, start: Started) -> None:
        self._start = start
        self._metrics = Metrics()
        self._shards = self._rows = self._marked = self._failed = 0

    def add(self, receipt: Receipt) -> None:
        self._metrics.add(receipt)
        self._shards += 1
        self._rows += receipt.num_rows
        if receipt.commit is None:
            self._failed += 1
        else:
            self._marked += receipt.commit.rows_marked

    @property
    def estimated_tokens(self) -> int:
        """The plan's estimate for the shards that have ended."""
        return self._metrics.estimated_tokens

    @property
    def pace(self) -> Pace:
        metrics = self._metrics
        return Pace(
            shards=self._shards,
            todo_shards=self._start.todo_shards,
            rows=self._rows,
            tokens_per_s=metrics.tokens_per_s,
            computed_ratio=metrics.computed_ratio,
            idle_share=metrics.idle_share,
            left_s=metrics.left_s(self._start.todo_tokens),
            rows_marked=self._marked,
            shards_failed=self._failed,
        )
