"""What one worker does with a shard: prepare, score, commit. Failures become receipts."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeAlias, TypeVar

from batch_scorer import logs
from batch_scorer.backends.base import EngineDied
from batch_scorer.backends.device import has_lost_device, matmul_peak
from batch_scorer.backends.registry import BackendFactory
from batch_scorer.backends.watchdog import watch
from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.job import AnyJob, Job
from batch_scorer.outputs.commit import commit_shard
from batch_scorer.parity import Sample, Sampled, Samples, proven_backend
from batch_scorer.pipeline.isolation import Search, without
from batch_scorer.records import (
    Receipt,
    RowError,
    ScoredRows,
    Shard,
    Spent,
    Status,
    TokenizedRows,
)
from batch_scorer.rewards.calls import Pace
from batch_scorer.shard import read_known, read_shard, score_shard, score_shards

log = logging.getLogger("batch_scorer")

Rows = TypeVar("Rows", TokenizedRows, ScoredRows)

_CRASHED = "a process that scored this row alone died, or hung"


@dataclass(slots=True)
class Item(Generic[Rows]):
    """A shard on its way through the stages, for one of its models: its rows as the last stage left
    them, or the error that ends its way; then the stages after it pass it on as it is."""

    shard: Shard
    rows: Rows | None = None
    error: ShardError | None = None
    spent: Spent = field(default_factory=Spent)

    @property
    def num_rows(self) -> int:
        """Rows to be scored."""
        return 0 if self.rows is None else self.rows.num_rows

    @contextmanager
    def caught(self) -> Iterator[None]:
        """In here, what goes wrong becomes the item's error, so that no row is lost."""
        with logs.fields(shard=self.shard.output_key):
            try:
                yield
            except ShardError as error:
                self.error = error
            except EngineDied:
                raise
            except Exception as error:  # the one place that turns a defect into a record
                log.exception("unforeseen failure")
                self.error = ShardError(ShardReason.INTERNAL, in_short(error))


Items: TypeAlias = dict[str, Item[TokenizedRows]]
"""A shard that is to be scored, for each of its models by name."""
ScoredItems: TypeAlias = dict[str, Item[ScoredRows]]


def prepare_items(job: AnyJob, shard: Shard) -> Items:
    """Read a shard once, render and tokenise it for each model, and find the scores that are known
    (`read_known`).

    Reading and tokenising are timed, with the first model; loading a tokenizer belongs to neither.
    """
    items: Items = {name: Item(shard) for name in job.members}
    first = next(iter(items.values()))
    with first.caught():
        log.info("read")
        members = [*job.members.values()]
        read, first.spent.read_s, first.spent.tokenize_s = read_shard(shard, members)
        made = {id(rows): rows for rows in read}
        first.spent.tokenized_sequences = sum(rows.num_sequences for rows in made.values())
        rows = dict(zip(job.members, read, strict=True))
        if shard.earlier:
            log.info("reuse")
            started = time.perf_counter()
            rows = read_known(job, shard, rows)
            first.spent.tokenize_s += time.perf_counter() - started
        for name, item in items.items():
            item.rows = rows[name]
    for item in items.values():
        item.error = first.error
    return items


class _Clock:
    """When this worker ended its last work, of whichever of its engines: waits and scores of all of
    them add up to its time since its first shard."""

    def __init__(self) -> None:
        self.ended: float | None = None


class _Peak:
    """What this worker's devices do together in large matrix products: the best of several looks,
    because on a CPU other stages may be busy during any one of them (one look gave 149 %
    utilisation)."""

    _FIRST_PAUSE_S = 5.0

    def __init__(self, job: Job) -> None:
        self._job = job
        self.flops = 0.0
        """FLOP/s; 0 where nothing is computed."""
        self._pause_s = self._FIRST_PAUSE_S
        self._next = time.perf_counter()
        self.look()

    def look(self) -> None:
        """Measure again if it is time: after 5 s, 10 s, 20 s, …, as one look takes 0.2 s."""
        if not self._job.engine.runs_model or time.perf_counter() < self._next:
            return
        peak = matmul_peak(self._job.device, self._job.dtype)
        self.flops = max(self.flops, peak * self._job.config.devices_per_worker)
        # Where the engine has left no memory for it, it will leave none later.
        self._next = time.perf_counter() + self._pause_s if peak else float("inf")
        self._pause_s *= 2


class Scorer:
    """A model's engine at work, and the time for which it had nothing to do. Engines of one worker
    share a `clock`."""

    def __init__(
        self,
        job: Job,
        sampled: Sampled,
        make: BackendFactory | None = None,
        clock: _Clock | None = None,
    ) -> None:
        self._job = job
        self._backend = proven_backend(job, sampled, make)
        self._peak = _Peak(job)  # after loading: an engine may set the number of threads
        self._clock = clock or _Clock()

    def score(self, item: Item[TokenizedRows], crashed: Sequence[int] = ()) -> Item[ScoredRows]:
        """Score a shard; the rows that ended other processes are only marked."""
        scored: Item[ScoredRows] = Item(item.shard, error=item.error, spent=replace(item.spent))
        if item.rows is None:
            return scored
        started, scored.spent.started_at = time.perf_counter(), time.time()
        marks = {row: RowError(RowReason.WORKER_CRASH, _CRASHED) for row in crashed}
        with scored.caught():
            log.info("score")
            scored.rows = self._score_rows(without(item.rows, marks))
        self._end([scored], started)
        return scored

    def score_together(self, items: Sequence[Item[TokenizedRows]]) -> list[Item[ScoredRows]]:
        """Score several shards, of which the engine is asked at once; one after the other where
        that raises, so that only the shard at fault has an error."""
        asked = [item for item in items if item.rows is not None]
        started, started_at = time.perf_counter(), time.time()
        try:
            with self._at_work():
                rows = [item.rows for item in asked if item.rows is not None]
                found = iter(score_shards(rows, self._backend, self._job.judging))
        except EngineDied:
            raise
        except Exception as error:
            log.info("%d shards are scored one by one: %s", len(asked), in_short(error))
            return [self.score(item) for item in items]
        scored = [
            Item(
                item.shard,
                None if item.rows is None else next(found),
                item.error,
                replace(item.spent, started_at=started_at),
            )
            for item in items
        ]
        self._end([item for item in scored if item.rows is not None], started)
        return scored

    def _end(self, scored: Sequence[Item[ScoredRows]], started: float) -> None:
        """Note what these shards took, which were begun at `started`."""
        since = started if self._clock.ended is None else self._clock.ended
        now = self._clock.ended = time.perf_counter()
        self._peak.look()
        for item in scored:
            spent = item.spent
            spent.peak_flops = self._peak.flops
            if item.rows is not None:
                spent.effort, spent.score_s = item.rows.scores.effort, item.rows.score_s
                spent.wait_s = now - since - spent.score_s
                since = now

    def probe(self, item: Item[TokenizedRows], start: int, stop: int) -> None:
        """Score rows [start, stop), as far as the shard has them, to see whether the process
        outlives it."""
        rows = item.rows
        if rows is None or start >= rows.num_rows or stop <= 0:
            return
        part = rows.part(max(start, 0), min(stop, rows.num_rows))
        try:
            self._score_rows(part)  # those at which it raises must not hide the others
        except EngineDied:
            raise
        except Exception as error:  # it is no death, and comes again when the shard is scored
            log.info("rows %d to %d: %s", start, stop, in_short(error))

    def _score_rows(self, rows: TokenizedRows) -> ScoredRows:
        """`score_shard`, the rows at which the engine raises marked.

        Raises what the engine raised where leaving out rows does not help.
        """
        search = Search(rows.num_rows, patience=1)
        marks: dict[int, RowError] = {}
        failure: Exception | None = None
        while (tried := search.next()) is not None:
            try:
                with self._at_work():
                    if tried.is_probe:
                        part = rows.part(tried.start, tried.stop)
                        score_shard(part, self._backend, self._job.judging)
                    else:
                        return score_shard(without(rows, marks), self._backend, self._job.judging)
                search.passed(tried)
            except (ShardError, EngineDied):
                raise
            except Exception as error:
                failure = error
                if tried.stop - tried.start == 1:
                    log.warning("the engine fails at row %d", tried.start, exc_info=error)
                    marks[tried.start] = RowError(_reason_of(error), in_short(error))
        assert failure is not None
        raise failure

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """In here a hang ends the process, and without its device the engine is dead."""
        try:
            with watch(self._job.config.hang_s):
                yield
        except Exception as error:
            if has_lost_device(error):
                raise EngineDied(f"the device is lost: {in_short(error)}") from error
            raise

    def close(self) -> None:
        self._backend.close()


def _reason_of(error: Exception) -> RowReason:
    return RowReason.OUT_OF_MEMORY if isinstance(error, MemoryError) else RowReason.ENGINE_ERROR


def scorers_of(
    members: Mapping[str, Job],
    samples: Callable[[], Samples],
    make: BackendFactory | None = None,
) -> dict[str, Scorer]:
    """The engines of these models in one worker, by name; `samples` are asked for as late as can
    be."""
    clock = _Clock()

    def sampled(name: str) -> Sample | None:
        return samples().get(name)

    return {name: Scorer(own, partial(sampled, name), make, clock) for name, own in members.items()}


def commit_items(job: AnyJob, epoch: int, items: ScoredItems, pace: Pace) -> Receipt:
    """Commit a shard that every model has scored; the receipt of a failed one where there is
    nothing to commit. `pace` is the job's, for reward functions."""
    item = _together(items)
    scored = {name: own.rows for name, own in items.items() if own.rows is not None}
    if item.error is None:
        started = time.perf_counter()
        with item.caught():
            log.info("commit")
            receipt = commit_shard(job, epoch, item.shard, scored, pace)
            item.spent.reward_s = receipt.spent.reward_s
            item.spent.write_s = time.perf_counter() - started - receipt.spent.reward_s
            item.spent.committed_at = time.time()
            return replace(receipt, spent=item.spent)
    assert item.error is not None
    return Receipt.of_shard(
        item.shard, Status.FAILED, item.error.reason, item.error.detail, spent=item.spent
    )


def _together(items: ScoredItems) -> Item[ScoredRows]:
    """What all models took, and the first error of any."""
    errors = filter(None, (item.error for item in items.values()))
    first, *others = items.values()
    spent = replace(first.spent, effort=replace(first.spent.effort))
    for item in others:
        spent.add(item.spent)
    if others:
        spent.efforts = {name: item.spent.effort for name, item in items.items()}
    return Item(first.shard, error=next(errors, None), spent=spent)


def in_short(error: BaseException) -> str:
    return logs.mask(f"{type(error).__name__}: {error}")[:500]
