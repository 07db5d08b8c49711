"""Races of many writers for one shard; the drill runs them too."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Barrier

from batch_scorer import Config
from batch_scorer.backends.fake import FakeBackend
from batch_scorer.fingerprint import Fingerprint
from batch_scorer.inputs.plan import make_plan
from batch_scorer.job import Job
from batch_scorer.models.directory import inspect_model
from batch_scorer.outputs.commit import commit_shard
from batch_scorer.records import Receipt, ScoredRows, Shard
from batch_scorer.records import Stored as CommittedShard
from batch_scorer.runs.derive import derive
from batch_scorer.shard import read_shard, score_shard
from tests.helpers.places import Place, Stored

WRITERS = 8


@dataclass(frozen=True)
class Bench:
    """One shard, read and scored, and an output whose lease is at epoch 2."""

    place: Place
    job: Job
    shard: Shard
    scored: ScoredRows
    rounds: int

    def commit(self, epoch: int, shard: Shard | None = None, add: float = 0.0) -> Receipt:
        """Commit by a run of this epoch; `add` moves the scores, so that writers can be told."""
        scores = replace(self.scored.scores, values=self.scored.scores.values + add)
        scored = replace(self.scored, scores=scores)
        return commit_shard(self.job, epoch, shard or self.shard, {"": scored}, lambda *_: None)

    def of_plan(self, name: str) -> "Bench":
        """The same shard with another identity, as if its input had been rewritten."""
        return replace(self, job=replace(self.job, fingerprint=Fingerprint({"plan": name})))

    def stored(self) -> Stored:
        return (self.place / "out").shards()[self.shard.output_key]

    def set_epoch(self, epoch: int) -> None:
        store = (self.place / "out").store
        body = json.loads(store.read("_batch_scorer/lease.json"))
        data = json.dumps(body | {"epoch": epoch}).encode()
        store.replace(
            "_batch_scorer/lease.json", data, store.head("_batch_scorer/lease.json").version
        )


def make_bench(place: Place, model: str, rounds: int) -> Bench:
    config = Config(
        model=model,
        inputs=((place / "in").url,),
        output=(place / "out").url,
        store_options=dict(place.options),
        backend="fake",
        use_ray=False,
    )
    job = derive(config, inspect_model(Path(model)))
    shard = make_plan(config).shards[0]
    (rows,) = read_shard(shard, [job]).rows
    scored = score_shard(rows, FakeBackend())
    return Bench(place, job, shard, scored, rounds)


def race(bench: Bench, shard: Shard | None = None, and_late: Shard | None = None) -> list[Receipt]:
    """All writers at once, each with scores of its own; every second one writes `and_late`."""
    ready = Barrier(WRITERS)

    def write(writer: int) -> Receipt:
        ready.wait()
        theirs = and_late if and_late is not None and writer % 2 else shard
        return bench.commit(2, theirs, add=float(writer))

    with ThreadPoolExecutor(WRITERS) as pool:
        return list(pool.map(write, range(WRITERS)))


def stored_of(receipt: Receipt) -> CommittedShard:
    assert receipt.stored is not None
    return receipt.stored


def assert_one_won(receipts: list[Receipt], stored: Stored) -> None:
    assert sum(receipt.detail == "" for receipt in receipts) == 1
    found = {(r.stored.sha256, r.stored.version.etag) for r in receipts if r.stored}
    assert found == {(stored.sha256, stored.etag)}
    assert all(receipt.commit == stored.commit for receipt in receipts)
