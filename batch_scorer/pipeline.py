"""The shards of a run on Ray Data, or one after the other in this process.

Ray Data carries shards and not rows: one dataset row is one work item, a list of shards, and
every stage takes one item a call. So no block of Ray's ever mixes, splits or drops a file.

    prepare (CPU tasks) → score (one actor per device) → commit (CPU tasks) → receipts

Stages never raise for data: what goes wrong becomes a receipt. Deaths of whole processes are
counted by `_Attempts`, because Ray itself would start a crashing item again for ever.
"""

import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa

from batch_scorer.backends.base import EngineDied
from batch_scorer.backends.device import CPU_ENVIRONMENT, matmul_peak
from batch_scorer.columns import ScoredRows
from batch_scorer.commits import Receipt, Shard
from batch_scorer.config import Config, Device
from batch_scorer.errors import (
    BatchScorerError,
    ConfigError,
    IncompleteError,
    ShardError,
    ShardReason,
)
from batch_scorer.parity import Sample, proven_backend
from batch_scorer.records import TokenizedRows
from batch_scorer.shard import (
    Job,
    commit_shard,
    failed,
    parse_shard,
    renderer_of,
    score_shard,
)

log = logging.getLogger("batch_scorer")

T = TypeVar("T")

_CELL = pa.large_binary()
_NO_PROGRESS_S = 1800.0
_CONNECT_TIMEOUT_S = 5.0
_BUNDLE_TOKENS = 20_000
_BUNDLE_SHARDS = 32
_BUNDLE_FROM = 256
_SPARE_CPUS = 3
"""Logical CPUs beside the scoring workers: Ray Data's source keeps one for the whole run, prepare
and commit need one each."""


@dataclass(frozen=True, slots=True)
class _Spent:
    """What is known of a shard's cost before it is committed; as in `Receipt`."""

    read_s: float = 0.0
    tokenize_s: float = 0.0
    wait_s: float = 0.0
    started_at: float = 0.0
    peak_flops: float = 0.0


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


def run_here(job: Job, todo: list[Shard], sample: Sample | None = None) -> Iterator[Receipt]:
    """Score the shards one after the other: the reference for the other road.

    With a `sample` the engine has to agree with plain Hugging Face first (`parity`).
    """
    if not todo:
        return
    scorer = _Scorer(job, sample)
    try:
        for shard in todo:
            yield _commit(job, scorer.score(_prepare(job, shard)))
    except EngineDied as error:
        raise IncompleteError(f"the engine died: {error}; run the same command again") from error
    finally:
        scorer.close()


def _prepare(job: Job, shard: Shard) -> _Read:
    """`read_shard`, its two halves timed; loading the tokenizer belongs to neither."""
    renderer = _caught(partial(renderer_of, job))
    if isinstance(renderer, ShardError):
        return _Read(shard, renderer)
    started = time.perf_counter()
    parsed = _caught(partial(parse_shard, job, shard))
    read_s = time.perf_counter() - started
    if isinstance(parsed, ShardError):
        return _Read(shard, parsed)
    rows = _caught(partial(renderer.tokenize, parsed))
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

    def score(self, read: _Read) -> _Scored:
        rows = read.rows
        if isinstance(rows, ShardError):
            return _Scored(read.shard, rows, read.spent)
        started, started_at = time.perf_counter(), time.time()
        scored = _caught(lambda: score_shard(rows, self._backend, self._job.outputs))
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

    def close(self) -> None:
        self._backend.close()


def _commit(job: Job, scored: _Scored) -> Receipt:
    rows = scored.rows
    if isinstance(rows, ShardError):
        return failed(scored.shard, rows)
    receipt = _caught(lambda: commit_shard(job, scored.shard, rows))
    if isinstance(receipt, ShardError):
        return failed(scored.shard, receipt)
    return replace(receipt, **asdict(scored.spent))


def _caught(work: Callable[[], T]) -> T | ShardError:
    """The result, or the ShardError; anything unforeseen becomes one, so that no row is lost."""
    try:
        return work()
    except ShardError as error:
        return error
    except EngineDied:
        raise
    except Exception as error:  # the one place that turns a defect into a record
        log.exception("unforeseen failure")
        return ShardError(ShardReason.INTERNAL, f"{type(error).__name__}: {error}"[:500])


# On Ray Data


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Join the cluster that the settings name, or run a private Ray on this machine."""
    if not config.use_ray:
        yield
        return
    import ray

    if ray.is_initialized():
        yield
        return
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _require_listener(address)
            ray.init(address=address, **quiet)
        else:
            cpus = (os.cpu_count() or 1) + _SPARE_CPUS
            with _native_log_off():
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot join Ray at {address or 'this machine'}: {error}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # ray.init puts its own in place, which aborts
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise OSError if nothing answers at host:port; Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()


@contextmanager
def _native_log_off() -> Iterator[None]:
    """Keep Ray's native log off a person's terminal.

    It greets every Ray Data actor with an error-level line (ray-project/ray#53727), and the
    switch that turns it off announces itself: so stderr is held back while Ray starts, and shown
    if that fails. Ray's log files are not affected by the latter.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(terminal, 2)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def has_gpus(config: Config) -> bool:
    """Whether the cluster, or without Ray this machine, has a CUDA device."""
    if config.use_ray:
        import ray

        return bool(ray.cluster_resources().get("GPU", 0) > 0)
    from batch_scorer.backends.device import cuda_is_available

    return cuda_is_available()


def run_on_ray(job: Job, todo: list[Shard], sample: Sample | None = None) -> Iterator[Receipt]:
    """Score the shards on the cluster; receipts come as shards are committed, in no order.

    With a `sample` every worker has to agree with plain Hugging Face first (`parity`).

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
    context.execution_no_progress_timeout_s = _NO_PROGRESS_S
    context.max_consecutive_actor_init_deaths = job.config.attempts
    stage = {"job": job, "attempts": ray.remote(num_cpus=0)(_Attempts).remote()}
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
                **_worker_resources(job, workers),
            )
            .map_batches(_commit_stage, batch_size=1, batch_format="pyarrow", fn_kwargs=stage)
        )
        try:
            for row in dataset.iter_rows():
                receipts = pickle.loads(row["item"])
                if isinstance(receipts, BatchScorerError):
                    raise receipts
                yield from receipts
        except ray.exceptions.RayError as error:
            raise IncompleteError(f"the cluster failed: {str(error).splitlines()[0]}") from error


def num_workers(job: Job) -> int:
    """How many models score at the same time: one per GPU, or one per machine on CPU."""
    if not job.config.use_ray:
        return 1
    import ray

    if job.device is Device.CUDA:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if gpus == 0:
            raise ConfigError("device is cuda, but the cluster has no GPU")
        return job.config.workers or max(1, gpus // job.config.tensor_parallel)
    return job.config.workers or len(_machine_cpus())


def on_worker(job: Job, work: Callable[[], T]) -> T:
    """The result of `work` on a machine like the scoring workers', in a process of its own.

    Raises what `work` raises, and IncompleteError if its process dies.
    """
    if not job.config.use_ray:
        return work()
    import ray

    remote = ray.remote(max_calls=1, max_retries=0, **_worker_resources(job, workers=1))
    try:
        result: T = ray.get(remote(_call).remote(work))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # as it was raised there, without Ray's frames around it
    except ray.exceptions.RayError as error:
        raise IncompleteError(f"a worker died: {str(error).splitlines()[0]}") from error
    return result


def _call(work: Callable[[], T]) -> T:
    return work()


def _machine_cpus() -> list[float]:
    """Logical CPUs of each machine of the cluster that has any."""
    import ray

    cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return [count for count in cpus if count >= 1]


def _worker_resources(job: Job, workers: int) -> dict[str, Any]:
    """What one worker asks of Ray: a GPU, or its part of what a machine can spare."""
    if job.device is Device.CUDA:
        return {
            "num_gpus": job.config.tensor_parallel,  # all of one machine, as Ray gives them
            # Any environment will do: Ray then never takes a process that has read shards.
            "runtime_env": {"env_vars": {"BATCH_SCORER_WORKER": "scores"}},
        }
    machines = _machine_cpus()
    per_machine = -(-workers // len(machines))
    return {
        "num_cpus": max(1, (min(machines) - _SPARE_CPUS) // per_machine),
        "runtime_env": {"env_vars": CPU_ENVIRONMENT},
    }


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
    """How often each item was begun in each stage, across process deaths."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def begin(self, key: str) -> int:
        self._counts[key] = self._counts.get(key, 0) + 1
        return self._counts[key]

    def forget(self, key: str) -> None:
        self._counts.pop(key, None)


def _refusal(stage: str, shard: Shard, job: Job, attempts: Any) -> ShardError | None:
    """Not None once the item that starts with `shard` has ended too many processes."""
    import ray

    tries = ray.get(attempts.begin.remote(f"{stage} {shard.output_key}"))
    if tries <= job.config.attempts:
        return None
    return ShardError(
        ShardReason.WORKER_DIED, f"{job.config.attempts} processes died in the {stage} stage"
    )


def _prepare_stage(batch: pa.Table, job: Job, attempts: Any) -> pa.Table:
    shards: list[Shard] = _unpack(batch)
    if not job.config.trust_remote_code:
        _leave_out_torch()
    refused = _refusal("prepare", shards[0], job, attempts)
    return _pack([_Read(shard, refused) if refused else _prepare(job, shard) for shard in shards])


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

    def __init__(self, job: Job, attempts: Any, max_loads: int, sample: Sample | None) -> None:
        import ray

        self._job = job
        self._attempts = attempts
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
            self._failure = IncompleteError(f"{type(error).__name__}: {error}"[:500])
        attempts.forget.remote("load")

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._failure is not None:
            return _pack(self._failure)
        reads: list[_Read] = _unpack(batch)
        refused = _refusal("score", reads[0].shard, self._job, self._attempts)
        if refused is not None:
            return _pack([_Scored(read.shard, refused) for read in reads])
        try:
            return _pack([self._scorer.score(read) for read in reads])
        except EngineDied:
            # Nothing in this process can be relied on: Ray starts another, and the death counts.
            log.exception("the engine died, and this worker with it")
            os._exit(1)


def _commit_stage(batch: pa.Table, job: Job, attempts: Any) -> pa.Table:
    scored: list[_Scored] | BatchScorerError = _unpack(batch)
    if isinstance(scored, BatchScorerError):
        return batch
    refused = _refusal("commit", scored[0].shard, job, attempts)
    return _pack(
        [failed(item.shard, refused) if refused else _commit(job, item) for item in scored]
    )


def _unpack(batch: pa.Table) -> Any:
    if batch.num_rows != 1:
        raise RuntimeError(f"a stage was given {batch.num_rows} items, expected 1")
    return pickle.loads(batch["item"][0].as_buffer())


def _pack(item: object) -> pa.Table:
    return pa.table({"item": pa.array([pickle.dumps(item, protocol=5)], _CELL)})
