"""A store that returns errors or wrong answers, hangs and goes away. A run succeeds or reports it;
what is committed in the end is what an undisturbed run commits."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.local.seaweed import S3Server, s3_server
from tests.fault.forked import Scene
from tests.fault.oracles import Found
from tests.fault.proxy import FaultProxy, Faults, Kind, fault_proxy
from tests.fault.small_job import SmallJob, small_job
from tests.helpers.places import Place
from tests.helpers.program import Program, wait_until

pytestmark = pytest.mark.fault

SEED = int(os.environ.get("SEED", "5"))
RATE = 0.1
BURST = 3
RECORDS_OF_A_RUN = 11
"""That an output's first run writes and one with nothing to do does not: four PUTs that prove the
store refuses a conditional write, `run.json`, its metrics (at its start and, in their place, at its
end: three), the engine, a segment of the ledger, what its plan found out."""
DWELL_S = 2.0
OUTAGE_S = 3.0


@dataclass(frozen=True)
class Bench:
    """A small job on an S3 server, and a proxy before it."""

    s3: S3Server
    proxy: FaultProxy
    job: SmallJob

    def run(self, output: str, faults: Faults) -> int:
        """The exit code of a run through the proxy, which breaks requests."""
        print(f"SEED={SEED}: {faults}")
        with self.proxy.breaking(faults):
            return self.job.runs.run(self.job.config(output, endpoint=self.proxy.endpoint))

    def assert_right(self, output: str, code: int, expected: Found) -> None:
        """At once, or after the same command once more without faults."""
        assert not self.job.finish(output, code, expected).problems


@contextmanager
def bench_at(s3: S3Server, folder: Path, model: Path) -> Iterator[Bench]:
    place = Place(s3.url(f"store-{folder.name}"), s3.options)
    with fault_proxy(s3.endpoint) as proxy, small_job(place, folder, model) as job:
        yield Bench(s3, proxy, job)


@pytest.fixture(scope="module")
def bench(
    s3: S3Server, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Bench]:
    with bench_at(s3, tmp_path_factory.mktemp("faults"), tiny_model) as made:
        yield made


@pytest.fixture(scope="module")
def expected(bench: Bench) -> Found:
    return bench.job.undisturbed()


@pytest.mark.parametrize("how", ["rate", "burst"])
@pytest.mark.parametrize("kind", Kind)
def test_what_a_faulty_store_leaves_is_right_in_the_end(
    kind: Kind, how: str, bench: Bench, expected: Found
) -> None:
    seed = random.Random(f"{SEED} {kind} {how}").randrange(10**6)
    amount: dict[str, Any] = {"rate": RATE} if how == "rate" else {"burst": BURST}
    output = f"{kind}-{how}"
    code = bench.run(output, Faults((kind,), seed, **amount))
    assert how == "rate" or bench.proxy.injected
    bench.assert_right(output, code, expected)


def test_a_put_that_was_applied_although_its_answer_was_lost_is_our_own(
    bench: Bench, expected: Found
) -> None:
    """A third of all PUTs: of the lease, shards and records. A naive retry sees a stranger's."""
    for kind in (Kind.LOST, Kind.TWICE):
        code = bench.run(f"every-{kind}", Faults((kind,), SEED, rate=0.33))
        assert bench.proxy.injected
        assert code == 0, bench.job.runs.said()
        bench.assert_right(f"every-{kind}", code, expected)


def test_a_file_that_the_store_gives_cut_short_for_a_moment_is_planned_all_the_same(
    bench: Bench, expected: Found
) -> None:
    """More often than a request is made again. Left out, it would come with the next run's plan,
    whose shards have another epoch."""
    faults = Faults((Kind.SHORT,), SEED, burst=4, burst_within=1, only="in/b.parquet")
    code = bench.run("cut-short", faults)
    assert len(bench.proxy.injected) == 4
    assert code == 0, bench.job.runs.said()
    bench.assert_right("cut-short", code, expected)


def test_a_shard_that_the_store_refuses_is_reported_and_scored_by_the_next_run(
    bench: Bench, expected: Found
) -> None:
    """As when credentials run out: what is committed stays, the rest is named."""
    code = bench.run("refused", Faults((Kind.DENIED,), SEED, rate=1.0, only="b.rows"))
    assert code == 3
    keys = (bench.job.place / "refused").shard_keys()
    assert [key for key in keys if key.startswith("b")] == [] != keys
    assert "_SUCCESS" not in bench.job.at("refused").files()
    bench.assert_right("refused", code, expected)


def test_a_commit_takes_few_requests(bench: Bench, expected: Found) -> None:
    """For each shard two reads of its input, two of the lease, and the PUT; and what any run takes.

    Counted here so that nobody adds one by accident.
    """
    assert bench.run("counted", Faults((), SEED)) == 0
    first = dict(bench.proxy.counts)
    bench.assert_right("counted", 0, expected)
    assert bench.run("counted", Faults((), SEED)) == 0
    again = dict(bench.proxy.counts)
    print(f"requests for {len(expected.shards)} shards: {first}; with nothing to do: {again}")
    assert first["PUT"] - again["PUT"] <= len(expected.shards) + RECORDS_OF_A_RUN
    assert first["GET"] - again["GET"] <= 6 * len(expected.shards)


def test_a_run_on_ray_gets_through_a_store_that_fails_in_every_way(
    bench: Bench, expected: Found, program: Program
) -> None:
    kinds = tuple(kind for kind in Kind if kind not in (Kind.DENIED, Kind.STALL))
    config = bench.job.config("ray", endpoint=bench.proxy.endpoint)
    options = [f"{key}={value}" for key, value in config.store_options.items()]
    command: list[object] = [
        "score", *config.inputs, "--model", config.model, "--output", config.output,
        "--backend", "fake", "--device", "cpu", "--dtype", "float32",
        "--shard-rows", config.shard_rows, "--json",
        *(part for option in options for part in ("--store-option", option)),
    ]  # fmt: skip
    faults = Faults(kinds, SEED, rate=RATE / 2)
    print(f"SEED={SEED}: {faults}")
    with bench.proxy.breaking(faults):
        ended = program.run(*command)
    assert bench.proxy.injected
    assert "Traceback" not in ended.err
    bench.assert_right("ray", ended.exit_code, expected)


# A store that hangs, is restarted or killed.


@pytest.fixture
def own_bench(tmp_path: Path, tiny_model: Path) -> Iterator[Bench]:
    """The same with a server of its own, which may be stopped."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        with bench_at(server, tmp_path, tiny_model) as made:
            yield made


def restart(server: S3Server) -> subprocess.Popen[bytes]:
    """Kill the server; then the same command in the same folder, which has its data."""
    process = Path(f"/proc/{server.pid}")
    command = (process / "cmdline").read_bytes().split(b"\0")[:-1]
    folder = os.readlink(process / "cwd")
    os.kill(server.pid, signal.SIGKILL)
    time.sleep(OUTAGE_S / 3)
    with Path(folder, "log-again").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


def test_a_store_that_stands_still_or_is_restarted_in_the_middle_of_a_run(
    own_bench: Bench,
) -> None:
    bench, job, server = own_bench, own_bench.job, own_bench.s3
    expected = job.undisturbed()

    def wait_for_a_shard(output: str) -> None:
        wait_until(lambda: (job.place / output).shard_keys(), "a shard is committed")

    os.kill(server.pid, signal.SIGSTOP)  # while the run looks for its inputs
    planning = job.runs.start(job.config("planning"))
    time.sleep(OUTAGE_S)
    os.kill(server.pid, signal.SIGCONT)
    bench.assert_right("planning", planning.wait(), expected)

    dwelling = Scene(dwell_s=DWELL_S)
    paused = job.runs.start(job.config("paused"), scene=dwelling)
    wait_for_a_shard("paused")
    os.kill(server.pid, signal.SIGSTOP)
    time.sleep(OUTAGE_S)
    os.kill(server.pid, signal.SIGCONT)
    bench.assert_right("paused", paused.wait(), expected)

    running = job.runs.start(job.config("restarted"), scene=dwelling)
    wait_for_a_shard("restarted")
    again = restart(server)
    try:
        code = running.wait()
        wait_until(lambda: (job.place / "restarted").shard_keys(), "the server answers again")
        bench.assert_right("restarted", code, expected)
    finally:
        again.kill()
        again.wait()
