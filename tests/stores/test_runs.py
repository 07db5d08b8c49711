"""Whole runs on every kind of store: what is there in the end is what an undisturbed run gives,
each row once, whoever counts them."""

import signal
from collections.abc import Iterator

import pytest

from batch_scorer import verify
from batch_scorer.outputs.reuse import EARLIER
from tests.fault.forked import STOPPED
from tests.fault.proxy import FaultProxy, Faults, fault_proxy
from tests.fault.scenes import TERM_S, failpoint_of
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet
from tests.helpers.places import digests
from tests.helpers.program import wait_until
from tests.helpers.stores import REMOTE, AnyStore
from tests.stores.jobs import StoreJob

pytestmark = pytest.mark.fault

OUT = "out"


def test_a_run_scores_every_row_and_a_second_one_changes_nothing(job: StoreJob) -> None:
    config = job.config(OUT)
    expected = job.undisturbed()
    job.run(config)
    job.assert_right(OUT, expected)
    before = (job.place / OUT).shards()
    job.run(config)
    assert (job.place / OUT).shards() == before
    job.assert_right(OUT, expected)


@pytest.mark.parametrize("name", ["commit.after_put", "manifest.after_put", "lease.after_close"])
def test_a_killed_run_is_resumed(name: str, job: StoreJob) -> None:
    """Half-way, and in the steps after the last shard; what it has committed stays as it is."""
    config = job.config(OUT)
    killed = job.runs.start(config, failpoint_of(name, "kill"))
    assert killed.wait() == -signal.SIGKILL, job.runs.said()
    before = (job.place / OUT).shards()
    assert len(before) == (2 if name == "commit.after_put" else 4)
    job.run(config)
    after = (job.place / OUT).shards()
    assert {key: after[key] for key in before} == before
    job.assert_right(OUT, job.undisturbed())


def test_a_rewritten_input_that_is_cut_in_another_way_leaves_no_old_piece(job: StoreJob) -> None:
    """Fault 1: on S3 with versioning and on Azure they were never removed."""
    job.run(job.config(OUT))
    assert "b.rows2-4.parquet" in (job.place / OUT).shard_keys()
    job.write_inputs(newer=True)
    job.run(job.config(OUT))
    assert "b.rows2-4.parquet" not in (job.place / OUT).shard_keys()
    job.assert_right(OUT, job.undisturbed(), same_bytes=False)
    assert not list((job.place / OUT).store.list(EARLIER))


@pytest.mark.parametrize("name", ["room.before_delete", "room.after_delete"])
def test_a_run_that_is_killed_while_it_makes_room_is_resumed(name: str, job: StoreJob) -> None:
    job.run(job.config(OUT))
    job.write_inputs(newer=True)
    killed = job.runs.start(job.config(OUT), failpoint_of(name, "kill"))
    assert killed.wait() == -signal.SIGKILL, job.runs.said()
    job.run(job.config(OUT))
    job.assert_right(OUT, job.undisturbed(), same_bytes=False)


@pytest.mark.parametrize("ends", ["", "ledger.before_put:kill"])
def test_a_stale_shard_is_replaced_and_its_neighbours_are_not(ends: str, job: StoreJob) -> None:
    """Fault 2: on GCS it never could be, where its version was known from a listing. So it is of a
    run that was killed before it could record it."""
    job.runs.start(job.config(OUT), ends).wait()
    before = (job.place / OUT).shards()
    (job.place / "in").write({"a.parquet": parquet(pairs(5, start=200))})
    job.run(job.config(OUT))
    after = (job.place / OUT).shards()
    changed = {key for key, sha256 in digests(after).items() if digests(before).get(key) != sha256}
    assert after.keys() == before.keys()
    assert changed == {key for key in before if key.startswith("a.")}
    assert {k: v for k, v in after.items() if k not in changed}.items() <= before.items()
    job.assert_right(OUT, job.undisturbed(), same_bytes=False)


def test_inputs_named_one_by_one_are_those_of_their_folder(job: StoreJob) -> None:
    """Fault 4: on Azure everything was scored again."""
    config = job.config(OUT)
    folder = config.inputs[0]
    one_by_one = config.model_copy(
        update={"inputs": (f"{folder}/a.parquet", f"{folder}/b.parquet")}
    )
    job.run(config)
    before = (job.place / OUT).shards()
    job.run(one_by_one)
    assert (job.place / OUT).shards() == before
    job.assert_right(OUT, job.undisturbed())


def test_verify_compares_every_shard_with_its_input(job: StoreJob) -> None:
    """Fault 5: on Azure it compared none, and was content."""
    job.run(job.config(OUT))
    found = verify((job.place / OUT).url, job.place.options)
    assert (found.exit_code, found.shards, found.inputs_compared) == (0, 4, 4)
    assert found.rows == 9

    # A rewritten input is another one: nothing to compare with.
    (job.place / "in").write({"a.parquet": parquet(pairs(5, start=200))})
    found = verify((job.place / OUT).url, job.place.options)
    assert (found.exit_code, found.shards, found.inputs_compared) == (0, 4, 2)


def test_of_two_drivers_one_works_and_one_is_refused(job: StoreJob) -> None:
    config = job.config(OUT, lease_s=60)
    first = job.runs.start(config, failpoint_of("commit.before_put", "pause"))
    assert first.wait() == STOPPED, job.runs.said()
    assert job.runs.run(config) == 2
    assert "is working on this output" in job.runs.said()
    first.go_on()
    assert first.wait() == 0, job.runs.said()
    job.assert_right(OUT, job.undisturbed())


def test_a_driver_that_sleeps_while_another_finishes_damages_nothing(job: StoreJob) -> None:
    """It wakes up in the middle of a commit, of a piece that the other one's plan has not."""
    config = job.config(OUT, lease_s=TERM_S)
    paused = job.runs.start(config, failpoint_of("commit.before_put", "pause"))
    assert paused.wait() == STOPPED, job.runs.said()
    job.write_inputs(newer=True)

    def is_taken() -> bool:
        code = job.runs.run(config)
        assert code in (0, 2), (code, job.runs.said())
        return code == 0

    wait_until(is_taken, "the lease of the run that sleeps is over")
    paused.go_on()
    assert paused.wait() == 3, job.runs.said()
    job.assert_right(OUT, job.undisturbed(), same_bytes=False)


MISSING = {
    "local": ("no-such-folder", "no-such-folder: no such file or folder"),
    "s3": ("s3://no-such-bucket/x", "s3://no-such-bucket: no such bucket"),
    "s3-versioned": ("s3://no-such-bucket/x", "s3://no-such-bucket: no such bucket"),
    "azure": ("az://nobox/x", "az://nobox: no such container"),
    "gcs": ("gs://nobkt/x", "gs://nobkt: no such bucket"),
}


def refused(job: StoreJob, inputs: str, output: str) -> str:
    """The only line of a run that cannot begin."""
    ended = run_cli(
        "score", inputs, "--output", output, *job.place.flags, "--model", job.model,
        "--no-ray", "--backend", "fake",
    )  # fmt: skip
    assert ended.exit_code == 2
    (line,) = ended.error.splitlines()
    return line


def test_inputs_in_a_place_that_is_not_there_are_one_line(
    job: StoreJob, any_store: AnyStore
) -> None:
    url, line = MISSING[any_store.name]
    assert refused(job, url, (job.place / OUT).url).endswith(line)


@pytest.mark.parametrize("any_store", REMOTE, indirect=True)
def test_an_output_in_a_place_that_is_not_there_is_one_line(
    job: StoreJob, any_store: AnyStore
) -> None:
    """Fault 7: Azure's was a raw error, cut off, or a record that was "not there"."""
    url, line = MISSING[any_store.name]
    assert refused(job, (job.place / "in").url, url) == line


@pytest.fixture
def proxy(any_store: AnyStore) -> Iterator[FaultProxy]:
    """Counts requests."""
    assert any_store.server is not None
    with fault_proxy(any_store.server.endpoint) as running:
        yield running


@pytest.mark.parametrize("any_store", REMOTE, indirect=True)
@pytest.mark.parametrize(("ends", "requests"), [("", 28), ("manifest.before_put:kill", 28)])
def test_a_run_with_nothing_to_score_reads_no_shard(
    ends: str, requests: int, job: StoreJob, proxy: FaultProxy
) -> None:
    """Fault 6: neither manifest nor, after a kill, ledger was trusted, and every shard was read.

    What is asked for: the records, the input, listings and the lease; the same on every store.
    Four of the requests are about what is known of the input, which is looked at again: the store
    has another address.
    """
    (job.place / "many").write({"a.parquet": parquet(pairs(60))})
    job.runs.start(job.config(OUT, "many"), ends).wait()
    assert len((job.place / OUT).shard_keys()) == 20
    with proxy.breaking(Faults((), seed=1)):
        job.run(job.config(OUT, "many", endpoint=proxy.endpoint))
    assert abs(sum(proxy.counts.values()) - requests) <= 1, proxy.counts
