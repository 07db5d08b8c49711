"""Many writers of one shard: one commit stands, and a newer run's is never written over."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from batch_scorer import quarantine
from batch_scorer.errors import ShardError, ShardReason
from batch_scorer.outputs.lease import Lease
from batch_scorer.records import Receipt, Shard
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


# Rows that are tried again: of one identity, the commit with more retries stands


def retry_of(bench: Bench, before: Receipt, retries: int = 1) -> Shard:
    return replace(bench.shard, replaces=stored_of(before).version, retries=retries)


def test_a_late_first_try_does_not_replace_a_retry(bench: Bench) -> None:
    stale = bench.of_plan("old").commit(2)
    stale_version = stored_of(stale).version
    first = bench.commit(2, replace(bench.shard, replaces=stale_version))
    retry = bench.commit(2, retry_of(bench, first), add=1.0)
    assert retry.detail == ""
    assert bench.stored().commit.retries == 1
    for late in (bench.shard, replace(bench.shard, replaces=stale_version)):
        receipt = bench.commit(2, late, add=2.0)
        assert receipt.stored == retry.stored
        assert receipt.detail == "scores differ from an equal commit"
    assert bench.stored().sha256 == stored_of(retry).sha256


def test_a_retry_replaces_a_first_try_that_slipped_in(bench: Bench) -> None:
    """What it was to replace is gone, and a late writer of the first try has put its own there."""
    before = bench.commit(2)
    (bench.place / "out").store.delete(bench.shard.output_key)
    bench.commit(2, add=1.0)
    retry = bench.commit(2, retry_of(bench, before), add=2.0)
    assert retry.detail == ""
    assert bench.stored().sha256 == stored_of(retry).sha256


def test_of_two_retries_of_one_number_the_first_wins(bench: Bench) -> None:
    before = bench.commit(2)
    first = bench.commit(2, retry_of(bench, before), add=1.0)
    second = bench.commit(2, retry_of(bench, before), add=2.0)
    assert first.stored == second.stored
    assert second.detail == "scores differ from an equal commit"
    # A later one takes its place, though its rows are marked again and have the same scores.
    third = bench.commit(2, retry_of(bench, first, 2), add=1.0)
    assert stored_of(third).version != stored_of(first).version
    assert bench.stored().commit.retries == 2
    for late in (retry_of(bench, before), retry_of(bench, first), bench.shard):
        assert bench.commit(2, late, add=3.0).stored == third.stored


def test_one_of_many_retries_replaces_the_marked_shard_and_first_tries_come_late(
    bench: Bench,
) -> None:
    before = bench.commit(2)
    for number in range(1, bench.rounds + 1):
        retry = retry_of(bench, before, number)
        receipts = race(bench, retry, and_late=bench.shard)
        after = bench.stored()
        assert after.commit.retries == number
        retries, late = receipts[::2], receipts[1::2]
        assert_one_won(retries, after)
        assert {stored_of(r).sha256 for r in late} <= {stored_of(before).sha256, after.sha256}
        before = retries[0]


def test_a_retry_of_an_old_epoch_is_superseded(bench: Bench) -> None:
    first = bench.commit(2)
    assert_superseded(bench, epoch=1, shard=retry_of(bench, first))
