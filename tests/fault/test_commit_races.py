"""Many writers of one shard: one commit stands, and a newer run's is never written over."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from batch_scorer import quarantine
from batch_scorer.errors import ShardError, ShardReason
from batch_scorer.outputs.lease import Lease
from batch_scorer.records import Shard
from cluster.local.seaweed import S3Server
from tests.fault.races import WRITERS, Bench, assert_one_won, make_bench, race, stored_of
from tests.helpers.inputs import pairs, parquet
from tests.helpers.places import Place

pytestmark = pytest.mark.fault

ROUNDS = {"local": 80, "s3": 20}
"""Of each of the two races, so 200 in all."""


@pytest.fixture(params=["local", "s3"])
def bench(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Bench]:
    # Writers of one run are processes, each with a reading process at hand; ours are threads.
    monkeypatch.setattr(quarantine, "_MOST_IDLE", WRITERS)
    place = Place(str(tmp_path))
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        place = Place(s3.url(f"races/{tmp_path.name}"), s3.options)
    (place / "in").write({"a.parquet": parquet(pairs(5))})
    with Lease((place / "out").store, "an old plan", 60):
        pass
    with Lease((place / "out").store, "a plan", 60) as lease:
        assert lease.epoch == 2
        yield make_bench(place, str(tiny_model), ROUNDS[request.param])


def test_one_of_many_writers_creates_a_shard_and_all_report_it(bench: Bench) -> None:
    for _ in range(bench.rounds):
        receipts = race(bench)
        assert_one_won(receipts, bench.stored())
        (bench.place / "out").store.delete(bench.shard.output_key)


def test_one_of_many_writers_replaces_a_stale_shard(bench: Bench) -> None:
    stale = bench.commit(2)
    for number in range(bench.rounds):
        bench = bench.of_plan(f"plan {number}")
        receipts = race(bench, replace(bench.shard, replaces=stored_of(stale).version))
        assert_one_won(receipts, bench.stored())
        assert bench.stored().commit.fingerprint == bench.job.fingerprint.digest
        stale = receipts[0]


def test_writing_the_same_scores_twice_is_one_commit(bench: Bench) -> None:
    first, second = bench.commit(2), bench.commit(2)
    assert first.detail == second.detail == ""
    assert first.stored == second.stored


def test_a_second_attempt_does_not_replace_the_first(bench: Bench) -> None:
    first = bench.commit(2)
    second = bench.commit(2, add=1.0)
    assert bench.stored().sha256 == stored_of(first).sha256 == stored_of(second).sha256
    assert second.detail == "scores differ from an equal commit"


def assert_superseded(bench: Bench, epoch: int, shard: Shard | None = None) -> None:
    before = (bench.place / "out").shards()
    with pytest.raises(ShardError) as raised:
        bench.commit(epoch, shard, add=1.0)
    assert raised.value.reason is ShardReason.SUPERSEDED
    assert (bench.place / "out").shards() == before


def test_a_run_of_an_old_epoch_may_not_begin_a_commit(bench: Bench) -> None:
    assert_superseded(bench, epoch=1)


def test_a_writer_that_wakes_up_late_does_not_replace_a_newer_commit(bench: Bench) -> None:
    """It saw its own epoch before it fell asleep, so only the store can refuse it."""
    stale = bench.of_plan("oldest").commit(2)
    replaces = replace(bench.shard, replaces=stored_of(stale).version)
    newer = bench.commit(2, replaces)
    bench.set_epoch(1)  # what the late writer saw
    for late in (bench, bench.of_plan("old")):
        assert_superseded(late, 1)
        assert_superseded(late, 1, replaces)
    assert bench.stored().sha256 == stored_of(newer).sha256


def test_a_late_commit_of_an_old_epoch_is_replaced_by_the_newer_run(bench: Bench) -> None:
    """The old writer's commit slipped in after the new run had listed the output."""
    bench.set_epoch(1)
    bench.of_plan("old").commit(1)
    bench.set_epoch(2)
    newer = bench.commit(2)
    assert newer.detail == ""
    assert bench.stored().sha256 == stored_of(newer).sha256
    assert bench.stored().commit.epoch == 2
