"""The shards of a run on Ray Data, or one after the other in this process.

Ray Data carries shards and not rows: one dataset row is one work item, a list of shards, and
every stage takes one item a call. So no block of Ray's ever mixes, splits or drops a file.

    prepare (CPU tasks) → score (one actor per device) → commit (CPU tasks) → receipts

Stages never raise for data: what goes wrong becomes a receipt. Deaths of whole processes are
counted by `_Attempts`, because Ray itself would start a crashing item again for ever; it also
remembers which rows were being scored (`isolation`).
"""

import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import pyarrow as pa

from batch_scorer import logs
from batch_scorer.backends.base import EngineDied
from batch_scorer.backends.device import has_lost_device, matmul_peak
from batch_scorer.backends.watchdog import watch
from batch_scorer.columns import ScoredRows
from batch_scorer.commits import Receipt, Shard, Status
from batch_scorer.errors import (
    BatchScorerError,
    IncompleteError,
    RowReason,
    ShardError,
    ShardReason,
)
from batch_scorer.isolation import Search, Try, without
from batch_scorer.parity import Sample, proven_backend
from batch_scorer.records import RowError, TokenizedRows
from batch_scorer.session import num_workers, worker_resources
from batch_scorer.shard import (
    Job,
    commit_shard,
    parse_shard,
    read_known,
    renderer_of,
    score_shard,
)

log = logging.getLogger("batch_scorer")

T = TypeVar("T")

_CELL = pa.large_binary()
_NO_PROGRESS_S = 1800.0
_NO_PROGRESS_HANGS = 20
"""All that a search may take in a row, before a run in which nothing moves is given up."""
_BUNDLE_TOKENS = 20_000
_BUNDLE_SHARDS = 32
_BUNDLE_FROM = 256


@dataclass(frozen=True, slots=True)
class _Spent:
    """What is known of a shard's cost before it is committed; as in `Receipt`."""

    read_s: float = 0.0
    tokenize_s: float = 0.0
    wait_s: float = 0.0
    started_at: float = 0.0
    peak_flops: float = 0.0
    retries: int = 0


@dataclass(frozen=True, slots=True)
class _Read:
    shard: Shard
    rows: TokenizedRows | ShardError
    spent: _Spent = _Spent()


@dataclass(frozen=True, slots=True)
class _Scored:
    shard: Shard
    rows: ScoredRows | ShardError
    spent: _Spent = _Spent()


_Item = TypeVar("_Item", _Read, _Scored)


def run_here(
    job: Job, todo: list[Shard], sample: Sample | None = None, attempt: int = 1
) -> Iterator[Receipt]:
    """Score the shards one after the other: the reference for the other road.

    With a `sample` the engine has to agree with plain Hugging Face first (`parity`). `attempt`
    says for the which time these shards are tried.
    """
    if not todo:
        return
    scorer = _Scorer(job, sample)
    try:
        for shard in todo:
            with logs.fields(attempt=attempt):
                receipt = _commit(job, scorer.score(_prepare(job, shard)))
            yield replace(receipt, retries=attempt - 1)
    except EngineDied as error:
        raise IncompleteError(f"the engine died: {error}; run the same command again") from error
    finally:
        scorer.close()


def _prepare(job: Job, shard: Shard) -> _Read:
    """`read_shard` and `read_known`, reading and tokenising timed; loading the tokenizer belongs
    to neither."""
    renderer = _caught("load the tokenizer", shard, partial(renderer_of, job))
    if isinstance(renderer, ShardError):
        return _Read(shard, renderer)
    started = time.perf_counter()
    parsed = _caught("read", shard, partial(parse_shard, job, shard))
    read_s = time.perf_counter() - started
    if isinstance(parsed, ShardError):
        return _Read(shard, parsed)
    rows = _caught("tokenise", shard, partial(renderer.tokenize, parsed))
    if shard.earlier and not isinstance(rows, ShardError):
        rows = _caught("reuse", shard, partial(read_known, job, shard, rows, renderer))
    return _Read(shard, rows, _Spent(read_s, time.perf_counter() - started - read_s))


class _Scorer:
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

    def score(self, read: _Read, crashed: Sequence[int] = ()) -> _Scored:
        """Score a shard; the rows that ended other processes are only marked."""
        rows = read.rows
        if isinstance(rows, ShardError):
            return _Scored(read.shard, rows, read.spent)
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
        return _Scored(read.shard, scored, spent)

    def probe(self, read: _Read, start: int, stop: int) -> None:
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
            log.info("rows %d to %d: %s", start, stop, _in_short(error))

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
                    marks[tried.start] = RowError(_reason_of(error), _in_short(error))
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
                raise EngineDied(f"the device is lost: {_in_short(error)}") from error
            raise

    def close(self) -> None:
        self._backend.close()


_CRASHED = "a process that scored this row alone died, or hung"


def _reason_of(error: Exception) -> RowReason:
    return RowReason.OUT_OF_MEMORY if isinstance(error, MemoryError) else RowReason.ENGINE_ERROR


def _commit(job: Job, scored: _Scored) -> Receipt:
    rows = scored.rows
    if isinstance(rows, ShardError):
        return _failed(scored, rows)
    receipt = _caught("commit", scored.shard, partial(commit_shard, job, scored.shard, rows))
    if isinstance(receipt, ShardError):
        return _failed(scored, receipt)
    return replace(receipt, **asdict(scored.spent))


def _failed(scored: _Scored, error: ShardError) -> Receipt:
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
            return ShardError(ShardReason.INTERNAL, _in_short(error))


def _in_short(error: Exception) -> str:
    return logs.mask(f"{type(error).__name__}: {error}")[:500]


# On Ray Data


def run_on_ray(
    job: Job, todo: list[Shard], sample: Sample | None = None, attempt: int = 1
) -> Iterator[Receipt]:
    """Score the shards on the cluster; receipts come as shards are committed, in no order.

    With a `sample` every worker has to agree with plain Hugging Face first (`parity`). `attempt`
    as for `run_here`; deaths of processes come on top of it.

    Raises what stops every shard alike: a model that does not load, a cluster that is lost.
    """
    if not todo:
        return
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    # Ray Data's own lines count work items; ours count rows and tokens.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    patience_s = max(_NO_PROGRESS_S, _NO_PROGRESS_HANGS * job.config.hang_s)
    context.execution_no_progress_timeout_s = patience_s
    context.max_consecutive_actor_init_deaths = job.config.attempts
    attempts = _here(_Attempts).remote(job.config.attempts)
    stage = {"job": job, "attempts": attempts, "carried": logs.carry(attempt=attempt)}
    items = pa.table({"item": pa.array([pickle.dumps(item) for item in _items(todo)], _CELL)})
    workers = num_workers(job)
    with DataContext.current(context):
        dataset = (
            ray.data.from_arrow(items)
            .repartition(target_num_rows_per_block=1)
            .map_batches(_prepare_stage, batch_size=1, batch_format="pyarrow", fn_kwargs=stage)
            .map_batches(
                _ScoreStage,
                batch_size=1,
                batch_format="pyarrow",
                fn_constructor_kwargs=stage
                | {"max_loads": job.config.attempts * workers, "sample": sample},
                compute=ActorPoolStrategy(size=workers),
                **worker_resources(job, workers),
            )
            .map_batches(_commit_stage, batch_size=1, batch_format="pyarrow", fn_kwargs=stage)
        )
        try:
            for row in dataset.iter_rows():
                receipts = pickle.loads(row["item"])
                if isinstance(receipts, BatchScorerError):
                    raise receipts
                for receipt in receipts:
                    yield replace(receipt, retries=receipt.retries + attempt - 1)
        except ray.exceptions.RayError as error:
            raise IncompleteError(f"the cluster failed: {str(error).splitlines()[0]}") from error


def _here(actor: type) -> Any:
    """The actor, to be started on the driver's machine: it is lost with the driver, not before."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(actor)


def _items(todo: list[Shard]) -> Iterator[list[Shard]]:
    """Work items: one shard each, but tiny ones together where there are many shards.

    Ray takes some 30 ms of the driver for each item. Shards are still scored and committed one
    by one, so bundling changes no result.
    """
    bundle: list[Shard] = []
    tokens = 0
    for shard in todo:
        tokens += shard.estimated_tokens
        is_full = tokens > _BUNDLE_TOKENS or len(bundle) == _BUNDLE_SHARDS
        if bundle and (is_full or len(todo) < _BUNDLE_FROM):
            yield bundle
            bundle, tokens = [], shard.estimated_tokens
        bundle.append(shard)
    yield bundle


class _Attempts:
    """What was begun in each stage and has not ended, across process deaths.

    What has ended is forgotten: Ray begins it once more where its result is lost with a machine.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._counts: dict[str, int] = {}
        self._searches: dict[str, Search] = {}

    def begin(self, key: str) -> int:
        self._counts[key] = self._counts.get(key, 0) + 1
        return self._counts[key]

    def next_try(self, key: str, num_rows: int, passed: Try | None) -> tuple[int, Try | None]:
        """How many tries of an item have failed, and which rows of it to score now."""
        search = self._searches.setdefault(key, Search(num_rows, self._patience))
        if passed is not None:
            search.passed(passed)
        tried = search.next()
        return search.num_failed, tried

    def forget(self, key: str) -> None:
        self._counts.pop(key, None)
        self._searches.pop(key, None)


def _begin(
    stage: str, shard: Shard, job: Job, attempts: Any, carried: logs.Carried
) -> tuple[int, ShardError | None]:
    """How often the item that starts with `shard` was begun here before; the error is not None
    once it has ended too many processes."""
    import ray

    tries = ray.get(attempts.begin.remote(f"{stage} {shard.output_key}"))
    logs.resume(carried, retries=tries - 1)
    if tries <= job.config.attempts:
        return tries - 1, None
    return tries - 1, ShardError(
        ShardReason.WORKER_DIED, f"{job.config.attempts} processes died in the {stage} stage"
    )


def _again(item: _Item, retries: int) -> _Item:
    """The item, its retries of one more stage counted."""
    return replace(item, spent=replace(item.spent, retries=item.spent.retries + retries))


def _prepare_stage(batch: pa.Table, job: Job, attempts: Any, carried: logs.Carried) -> pa.Table:
    shards: list[Shard] = _unpack(batch)
    if not job.config.trust_remote_code:
        _leave_out_torch()
    retries, refused = _begin("prepare", shards[0], job, attempts, carried)
    reads = [_Read(shard, refused) if refused else _prepare(job, shard) for shard in shards]
    attempts.forget.remote(f"prepare {shards[0].output_key}")
    return _pack([_again(read, retries) for read in reads])


def _leave_out_torch() -> None:
    """Let transformers find no torch in this process, whose part of it are the tokenizers.

    It would be loaded for nothing: 330 MB and two seconds of every process that reads, of which
    there may be one for every core.
    """
    if "transformers" not in sys.modules:
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # as the import system has it


class _ScoreStage:
    """Holds the model; one per device.

    A model that does not load is no reason for Ray to start the worker again: the error travels
    with the results, and the driver raises it.
    """

    def __init__(
        self,
        job: Job,
        attempts: Any,
        carried: logs.Carried,
        max_loads: int,
        sample: Sample | None,
    ) -> None:
        import ray

        logs.resume(carried)
        self._job = job
        self._attempts = attempts
        self._carried = carried
        self._failure: BatchScorerError | None = None
        if ray.get(attempts.begin.remote("load")) > max_loads:
            self._failure = IncompleteError(
                f"{max_loads} scoring workers died while loading the model (out of memory?)"
            )
            return
        try:
            self._scorer = _Scorer(job, sample)
        except BatchScorerError as error:
            self._failure = error
        except Exception as error:  # a defect of a library must reach the user by its own words
            log.exception("the model does not load")
            self._failure = IncompleteError(_in_short(error))
        attempts.forget.remote("load")

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._failure is not None:
            return _pack(self._failure)
        try:
            return _pack(self._score(_unpack(batch)))
        except EngineDied:
            # Nothing in this process can be relied on: Ray starts another, and the death counts.
            log.exception("the engine died, and this worker with it")
            os._exit(1)

    def _score(self, reads: list[_Read]) -> list[_Scored]:
        """The shards of an item. What ends this process is searched for by those after it."""
        import ray

        key = f"score {reads[0].shard.output_key}"
        sizes = [0 if isinstance(read.rows, ShardError) else read.rows.num_rows for read in reads]
        starts = [0, *accumulate(sizes)]  # of each shard's rows among those of the item
        tried: Try | None = None
        while True:
            asked = self._attempts.next_try.remote(key, starts[-1], tried)
            num_failed, tried = ray.get(asked)
            logs.resume(self._carried, num_failed)
            if tried is None or not tried.is_probe:
                break
            for read, start in zip(reads, starts, strict=False):
                self._scorer.probe(read, tried.start - start, tried.stop - start)
        scored = []
        for read, start, size in zip(reads, starts, sizes, strict=False):
            read = _again(read, num_failed)
            if tried is None:
                scored.append(_Scored(read.shard, _gives_up(num_failed), read.spent))
            else:
                crashed = [row - start for row in tried.without if 0 <= row - start < size]
                scored.append(self._scorer.score(read, crashed))
        self._attempts.forget.remote(key)
        return scored


def _gives_up(num_failed: int) -> ShardError:
    return ShardError(
        ShardReason.WORKER_DIED,
        f"{num_failed} processes died in the score stage, and no few rows are to blame",
    )


def _commit_stage(batch: pa.Table, job: Job, attempts: Any, carried: logs.Carried) -> pa.Table:
    scored: list[_Scored] | BatchScorerError = _unpack(batch)
    if isinstance(scored, BatchScorerError):
        return batch
    retries, refused = _begin("commit", scored[0].shard, job, attempts, carried)
    key = f"commit {scored[0].shard.output_key}"
    scored = [_again(item, retries) for item in scored]
    ended = [_failed(item, refused) if refused else _commit(job, item) for item in scored]
    attempts.forget.remote(key)
    return _pack(ended)


def _unpack(batch: pa.Table) -> Any:
    if batch.num_rows != 1:
        raise RuntimeError(f"a stage was given {batch.num_rows} items, expected 1")
    return pickle.loads(batch["item"][0].as_buffer())


def _pack(item: object) -> pa.Table:
    return pa.table({"item": pa.array([pickle.dumps(item, protocol=5)], _CELL)})
