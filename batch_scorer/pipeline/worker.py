"""What one worker does with a shard: prepare, score, commit. Failures become receipts."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TypeVar

from batch_scorer import logs
from batch_scorer.backends.base import EngineDied
from batch_scorer.backends.device import has_lost_device, matmul_peak
from batch_scorer.backends.watchdog import watch
from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.job import Job
from batch_scorer.outputs.commit import commit_shard
from batch_scorer.parity import Sample, proven_backend
from batch_scorer.pipeline.isolation import Search, without
from batch_scorer.records import Receipt, RowError, ScoredRows, Shard, Status, TokenizedRows
from batch_scorer.render import renderer_of
from batch_scorer.shard import parse_shard, read_known, score_shard

log = logging.getLogger("batch_scorer")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spent:
    """What is known of a shard's cost before it is committed; as in `Receipt`."""

    read_s: float = 0.0
    tokenize_s: float = 0.0
    wait_s: float = 0.0
    started_at: float = 0.0
    peak_flops: float = 0.0
    retries: int = 0


@dataclass(frozen=True, slots=True)
class Read:
    shard: Shard
    rows: TokenizedRows | ShardError
    spent: Spent = Spent()


@dataclass(frozen=True, slots=True)
class Scored:
    shard: Shard
    rows: ScoredRows | ShardError
    spent: Spent = Spent()


def prepare_shard(job: Job, shard: Shard) -> Read:
    """`read_shard` and `read_known`, reading and tokenising timed; loading the tokenizer belongs
    to neither."""
    renderer = _caught("load the tokenizer", shard, partial(renderer_of, job.config, job.model))
    if isinstance(renderer, ShardError):
        return Read(shard, renderer)
    started = time.perf_counter()
    parsed = _caught("read", shard, partial(parse_shard, shard, job.config.store_options))
    read_s = time.perf_counter() - started
    if isinstance(parsed, ShardError):
        return Read(shard, parsed)
    rows = _caught("tokenise", shard, partial(renderer.tokenize, parsed))
    if shard.earlier and not isinstance(rows, ShardError):
        rows = _caught("reuse", shard, partial(read_known, job, shard, rows, renderer))
    return Read(shard, rows, Spent(read_s, time.perf_counter() - started - read_s))


class Scorer:
    """An engine at work, and the time for which it had nothing to do."""

    def __init__(self, job: Job, sample: Sample | None) -> None:
        self._job = job
        self._backend = proven_backend(job, sample)
        self._peak_flops = 0.0
        if job.backend != "fake":
            # After loading: an engine may set the number of threads.
            peak = matmul_peak(job.device, job.dtype)
            self._peak_flops = peak * job.config.tensor_parallel
        self._ended: float | None = None

    def score(self, read: Read, crashed: Sequence[int] = ()) -> Scored:
        """Score a shard; the rows that ended other processes are only marked."""
        rows = read.rows
        if isinstance(rows, ShardError):
            return Scored(read.shard, rows, read.spent)
        started, started_at = time.perf_counter(), time.time()
        marks = {row: RowError(RowReason.WORKER_CRASH, _CRASHED) for row in crashed}
        scored = _caught("score", read.shard, partial(self._score_rows, without(rows, marks)))
        ended = time.perf_counter()
        wait_s = 0.0
        if isinstance(scored, ScoredRows):
            # Waits and scores of a worker add up to its time since its first shard.
            since = started if self._ended is None else self._ended
            wait_s = ended - since - scored.score_s
        self._ended = ended
        spent = replace(
            read.spent, wait_s=wait_s, started_at=started_at, peak_flops=self._peak_flops
        )
        return Scored(read.shard, scored, spent)

    def probe(self, read: Read, start: int, stop: int) -> None:
        """Score rows [start, stop), as far as the shard has them, to see whether the process
        outlives it."""
        rows = read.rows
        if isinstance(rows, ShardError) or start >= rows.num_rows or stop <= 0:
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
                        self._backend.score(rows.part(tried.start, tried.stop))
                    else:
                        return score_shard(without(rows, marks), self._backend, self._job.outputs)
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


_CRASHED = "a process that scored this row alone died, or hung"


def _reason_of(error: Exception) -> RowReason:
    return RowReason.OUT_OF_MEMORY if isinstance(error, MemoryError) else RowReason.ENGINE_ERROR


def commit_scored(job: Job, epoch: int, scored: Scored) -> Receipt:
    rows = scored.rows
    if isinstance(rows, ShardError):
        return failed_receipt(scored, rows)
    receipt = _caught("commit", scored.shard, partial(commit_shard, job, epoch, scored.shard, rows))
    if isinstance(receipt, ShardError):
        return failed_receipt(scored, receipt)
    return replace(receipt, **asdict(scored.spent))


def failed_receipt(scored: Scored, error: ShardError) -> Receipt:
    receipt = Receipt.of_shard(scored.shard, Status.FAILED, error.reason, error.detail)
    return replace(receipt, retries=scored.spent.retries)


def _caught(step: str, shard: Shard, work: Callable[[], T]) -> T | ShardError:
    """The result, or the ShardError; anything unforeseen becomes one, so that no row is lost."""
    with logs.fields(shard=shard.output_key):
        log.info(step)
        try:
            return work()
        except ShardError as error:
            return error
        except EngineDied:
            raise
        except Exception as error:  # the one place that turns a defect into a record
            log.exception("unforeseen failure")
            return ShardError(ShardReason.INTERNAL, in_short(error))


def in_short(error: Exception) -> str:
    return logs.mask(f"{type(error).__name__}: {error}")[:500]
