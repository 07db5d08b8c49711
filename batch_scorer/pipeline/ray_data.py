"""The shards of a run on Ray Data.

Ray Data carries shards and not rows: one dataset row is one work item, a list of shards, and
every stage takes one item a call. So no block of Ray's ever mixes, splits or drops a file.

    prepare (CPU tasks) → score (one actor per device) → commit (CPU tasks) → receipts

Stages never raise for data: what goes wrong becomes a receipt. Deaths of whole processes are
counted by `Attempts`, because Ray itself would start a crashing item again forever; it also
remembers which rows were being scored (`isolation`).
"""

import logging
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pyarrow as pa

from batch_scorer import logs, quarantine
from batch_scorer.backends.base import EngineDied
from batch_scorer.backends.registry import BackendFactory
from batch_scorer.errors import (
    BatchScorerError,
    IncompleteError,
    ModelError,
    ShardError,
    ShardReason,
)
from batch_scorer.job import AnyJob, Ensemble
from batch_scorer.parity import Sample
from batch_scorer.pipeline.isolation import Attempts, Try
from batch_scorer.pipeline.placement import give_up_all, reserve
from batch_scorer.pipeline.reward_pace import RewardPace, waiting
from batch_scorer.pipeline.session import Pool, is_over_nodes, worker_pool, worker_resources
from batch_scorer.pipeline.worker import (
    Item,
    ScoredItems,
    Scorer,
    commit_items,
    in_short,
    prepare_items,
    scorers_of,
)
from batch_scorer.records import Receipt, ScoredRows, Shard, TokenizedRows

log = logging.getLogger("batch_scorer")

_CELL = pa.large_binary()
_NO_PROGRESS_S = 1800.0
_NO_PROGRESS_HANGS = 20
"""All that a search may take in a row, before a run in which nothing moves is given up."""
_UNBOUNDED_S = -1
"""What Ray Data takes for no bound."""
_BUNDLE_TOKENS = 20_000
_BUNDLE_SHARDS = 32
_BUNDLE_FROM = 256
_BUNDLE_WRITTEN = 1 << 21
"""Tokens that a judge may write about the shards of an item: minutes of work, which are lost if its
worker is, and enough replies for an engine that writes hundreds at a time."""
_ITEMS_PER_WORKER = 4


# On Ray Data


def run_on_ray(
    job: AnyJob,
    epoch: int,
    todo: list[Shard],
    samples: Mapping[str, Sample],
    attempt: int = 1,
    make: BackendFactory | None = None,
) -> Iterator[Receipt]:
    """Score the shards on the cluster; receipts come as shards are committed, in no order.

    `samples`, `attempt` and `make` are as for `run_here`; every worker has to agree with plain
    Hugging Face, and deaths of processes are retries on top of the attempts.

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
    if job.rewards:
        # Their calls are bounded one by one; how long those of a shard take together, their rate
        # limits and their answers decide.
        patience_s = _UNBOUNDED_S
    context.execution_no_progress_timeout_s = patience_s
    context.max_consecutive_actor_init_deaths = job.config.attempts
    attempts = _here(Attempts).remote(job.config.attempts)
    pace = _here(RewardPace).remote() if job.rewards else None
    stage = {"job": job, "attempts": attempts, "carried": logs.carry(attempt=attempt)}
    pool, over_nodes = worker_pool(job), is_over_nodes(job)
    bundles = [pickle.dumps(bundle) for bundle in _items(job, todo, pool.most)]
    items = pa.table({"item": pa.array(bundles, _CELL)})
    with DataContext.current(context):
        dataset = (
            ray.data.from_arrow(items)
            .repartition(target_num_rows_per_block=1)
            .map_batches(_prepare_stage, batch_size=1, batch_format="pyarrow", fn_kwargs=stage)
        )
        for models in job.stages:
            dataset = dataset.map_batches(
                _ScoreStage,
                batch_size=1,
                batch_format="pyarrow",
                fn_constructor_kwargs=stage
                | {
                    "models": models,
                    "pool": pool,
                    "over_nodes": over_nodes,
                    "samples": samples,
                    "make": make,
                },
                # Ray Data adds workers where nearly all have a second item waiting and the cluster
                # has room, and takes idle ones away where more than half are idle. One that is
                # taken away has nothing in flight.
                compute=ActorPoolStrategy(
                    min_size=pool.least, max_size=pool.most, initial_size=pool.first
                ),
                # By the fewest: threads per worker change the last bits of scores on a CPU, so they
                # must not depend on how many workers have come.
                **worker_resources(job, workers=pool.least),
            )
        dataset = dataset.map_batches(
            _commit_stage,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs=stage | {"epoch": epoch, "pace": pace},
        )
        try:
            for row in dataset.iter_rows():
                receipts = pickle.loads(row["item"])
                if isinstance(receipts, BatchScorerError):
                    raise receipts
                for receipt in receipts:
                    receipt.spent.retries += attempt - 1
                    yield receipt
        except ray.exceptions.RayError as error:
            raise IncompleteError(f"the cluster failed: {str(error).splitlines()[0]}") from error
        finally:
            if over_nodes:
                give_up_all()


def _here(actor: type) -> Any:
    """The actor, to be started on the driver's machine: it is lost with the driver, not before."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(actor)


def _items(job: AnyJob, todo: list[Shard], workers: int) -> Iterator[list[Shard]]:
    """Work items: one shard each, but small ones together where there are many. Shards are
    committed one by one whatever the item."""
    if job.asks_together:
        assert not isinstance(job, Ensemble) and job.model.judge is not None
        tokens_of_row = job.model.judge.generation.most_tokens
        costs = [shard.num_rows * tokens_of_row for shard in todo]
        # Every worker gets several items, so that they end at about the same time.
        most_shards = min(_BUNDLE_SHARDS, len(todo) // (_ITEMS_PER_WORKER * workers))
        return _bundled(todo, costs, _BUNDLE_WRITTEN, most_shards)
    # Ray takes some 30 ms of the driver for each item.
    most_shards = _BUNDLE_SHARDS if len(todo) >= _BUNDLE_FROM else 1
    return _bundled(todo, [shard.estimated_tokens for shard in todo], _BUNDLE_TOKENS, most_shards)


def _bundled(
    todo: list[Shard], costs: list[int], most: int, most_shards: int
) -> Iterator[list[Shard]]:
    """As many shards in a row as cost no more than `most` together; at least one."""
    bundle: list[Shard] = []
    total = 0
    for shard, cost in zip(todo, costs, strict=True):
        if bundle and (total + cost > most or len(bundle) >= most_shards):
            yield bundle
            bundle, total = [], 0
        bundle.append(shard)
        total += cost
    yield bundle


def _begin(
    stage: str, shard: Shard, job: AnyJob, attempts: Any, carried: logs.Carried
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


def _prepare_stage(batch: pa.Table, job: AnyJob, attempts: Any, carried: logs.Carried) -> pa.Table:
    shards: list[Shard] = _unpack(batch)
    quarantine.prepare()  # it imports while we ask and look
    retries, refused = _begin("prepare", shards[0], job, attempts, carried)
    try:
        job = job.on_this_node(weights=False)
    except ModelError as error:
        return _pack(error)
    items = [
        {name: Item(shard, error=refused) for name in job.members}
        if refused
        else prepare_items(job, shard)
        for shard in shards
    ]
    for each in items:
        _first(each).spent.retries += retries
    attempts.forget.remote(f"prepare {shards[0].output_key}")
    return _pack(items)


class _ScoreStage:
    """Holds the models of a stage; one per device.

    A model that does not load is no reason for Ray to start the worker again: the error travels
    with the results, and the driver raises it.
    """

    def __init__(
        self,
        job: AnyJob,
        attempts: Any,
        carried: logs.Carried,
        models: Sequence[str],
        pool: Pool,
        over_nodes: bool,
        samples: Mapping[str, Sample],
        make: BackendFactory | None,
    ) -> None:
        import ray

        logs.resume(carried)
        self._job = job
        self._attempts = attempts
        self._carried = carried
        self._failure: BatchScorerError | None = None
        # All that the cluster has room for now may be loading.
        num_workers = worker_pool(job).first if pool.is_elastic else pool.first
        max_loads = job.config.attempts * num_workers
        loads = " ".join(["load", *models])
        if ray.get(attempts.begin.remote(loads)) > max_loads:
            self._failure = IncompleteError(
                f"{max_loads} scoring workers died while loading the model (out of memory?)"
            )
            return
        try:
            here = job.on_this_node().members
            members = {name: here[name] for name in models}
            if over_nodes:
                group = reserve(job.config)
                members = {n: replace(own, placement_group=group) for n, own in members.items()}
            self._scorers = scorers_of(members, samples, make)
        except BatchScorerError as error:
            self._failure = error
        except Exception as error:  # a defect of a library must reach the user by its own words
            log.exception("the model does not load")
            self._failure = IncompleteError(in_short(error))
        attempts.forget.remote(loads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._failure is not None:
            return _pack(self._failure)
        items: list[dict[str, Item[Any]]] | BatchScorerError = _unpack(batch)
        if isinstance(items, BatchScorerError):
            return batch
        try:
            for name, scorer in self._scorers.items():
                scored = self._score(name, scorer, [each[name] for each in items])
                for each, own in zip(items, scored, strict=True):
                    each[name] = own
            return _pack(items)
        except EngineDied:
            # Nothing in this process can be relied on: Ray starts another, and the death counts.
            log.exception("the engine died, and this worker with it")
            os._exit(1)

    def _score(
        self, name: str, scorer: Scorer, items: list[Item[TokenizedRows]]
    ) -> list[Item[ScoredRows]]:
        """The shards of a work item, for one model. What ends this process is searched for by those
        after it."""
        import ray

        key = f"score {name} {items[0].shard.output_key}"
        starts = [0, *accumulate(item.num_rows for item in items)]  # of each shard's rows
        tried: Try | None = None
        while True:
            asked = self._attempts.next_try.remote(key, starts[-1], tried)
            num_failed, tried = ray.get(asked)
            logs.resume(self._carried, num_failed)
            if tried is None or not tried.is_probe:
                break
            for item, start in zip(items, starts, strict=False):
                scorer.probe(item, tried.start - start, tried.stop - start)
        scored = []
        if self._job.asks_together and len(items) > 1 and not num_failed:
            scored = scorer.score_together(items)
        else:
            for item, start in zip(items, starts, strict=False):
                item.spent.retries += num_failed
                crashed: list[int] = []
                if tried is None:
                    item.rows, item.error = None, _gives_up(num_failed)
                else:
                    stop = start + item.num_rows
                    crashed = [row - start for row in tried.without if start <= row < stop]
                scored.append(scorer.score(item, crashed))
        self._attempts.forget.remote(key)
        return scored


def _gives_up(num_failed: int) -> ShardError:
    return ShardError(
        ShardReason.WORKER_DIED,
        f"{num_failed} processes died in the score stage, and no few rows are to blame",
    )


def _commit_stage(
    batch: pa.Table, job: AnyJob, attempts: Any, carried: logs.Carried, epoch: int, pace: Any
) -> pa.Table:
    items: list[ScoredItems] | BatchScorerError = _unpack(batch)
    if isinstance(items, BatchScorerError):
        return batch
    shard = _first(items[0]).shard
    retries, refused = _begin("commit", shard, job, attempts, carried)
    for each in items:
        item = _first(each)
        item.spent.retries += retries
        if refused:
            item.rows, item.error = None, item.error or refused

    def wait_s(reward: str, per_minute: float, responses: int) -> float:
        import ray

        return float(ray.get(pace.wait_s.remote(reward, per_minute, responses)))

    receipts = [commit_items(job, epoch, each, waiting(wait_s)) for each in items]
    attempts.forget.remote(f"commit {shard.output_key}")
    return _pack(receipts)


def _first(items: Mapping[str, Item[Any]]) -> Item[Any]:
    """That of the first model, with which is counted what is done for all."""
    return next(iter(items.values()))


def _unpack(batch: pa.Table) -> Any:
    if batch.num_rows != 1:
        raise RuntimeError(f"a stage was given {batch.num_rows} items, expected 1")
    return pickle.loads(batch["item"][0].as_buffer())


def _pack(item: object) -> pa.Table:
    return pa.table({"item": pa.array([pickle.dumps(item, protocol=5)], _CELL)})
