"""Kill the driver or a worker at work; the result is that of an undisturbed run."""

import os
import signal
from pathlib import Path

import pytest

from tests.fault.long_job import SHARDS, LongJob
from tests.helpers.places import Stored, digests
from tests.helpers.program import Ended, Program, wait_until

pytestmark = pytest.mark.fault

# In the titles of Ray's processes.
STAGES, SCORING_STAGE = "MapBatches(", "_ScoreStage"
LOADS = 2


def workers_of(program: Program, stage: str) -> list[int]:
    """Processes that work on a stage."""
    return [pid for pid, title in program.processes().items() if stage in title]


def assert_as_undisturbed(
    ended: Ended, job: LongJob, name: str, undisturbed: dict[str, Stored]
) -> None:
    assert ended.exit_code == 0, ended.err
    assert digests(job.output(name).shards()) == digests(undisturbed)
    verdict = job.verify(name)
    assert verdict.exit_code == 0, verdict.out
    assert verdict.json["ok"]


def test_a_killed_driver_is_resumed_and_no_shard_scored_twice_though_a_worker_dies_too(
    long_job: LongJob, program: Program, undisturbed: dict[str, Stored]
) -> None:
    running = program.start(*long_job.arguments("driver-killed"))
    long_job.wait_for_shards("driver-killed", 2, running)
    running.send(signal.SIGKILL)
    assert running.wait().exit_code == -signal.SIGKILL
    wait_until(lambda: not workers_of(program, STAGES), "the workers follow their driver")
    before = long_job.output("driver-killed").shards()
    assert 2 <= len(before) < SHARDS

    resumed = program.start(*long_job.arguments("driver-killed"))
    long_job.wait_for_shards("driver-killed", len(before) + 1, resumed)
    (worker,) = workers_of(program, SCORING_STAGE)
    os.kill(worker, signal.SIGKILL)
    assert len(long_job.output("driver-killed").shard_keys()) < SHARDS
    again = resumed.wait()
    assert_as_undisturbed(again, long_job, "driver-killed", undisturbed)
    after = long_job.output("driver-killed").shards()
    assert {key: after[key] for key in before} == before
    done = sum(shard.commit.tokens for shard in before.values())
    assert again.json["metrics"]["scored_tokens"] == again.json["tokens"] - done > 0


@pytest.mark.parametrize(
    "flags",
    [pytest.param([], marks=pytest.mark.slow, id="ray"), pytest.param(["--no-ray"], id="no-ray")],
)
def test_a_run_that_is_asked_to_stop_lets_go_and_can_be_finished(
    long_job: LongJob, program: Program, undisturbed: dict[str, Stored], flags: list[str]
) -> None:
    name = f"stopped{''.join(flags)}"
    running = program.start(*long_job.arguments(name, *flags))
    long_job.wait_for_shards(name, 2, running)
    running.send(signal.SIGTERM)
    ended = running.wait()
    assert len(long_job.output(name).shard_keys()) < SHARDS
    assert long_job.output(name).read_json("_batch_scorer/lease.json")["released"]
    program.wait_until_gone()
    assert ended.exit_code == 3
    assert ended.error == "stopped; run the same command again to resume"

    again = program.run(*long_job.arguments(name, "--no-ray"))
    assert_as_undisturbed(again, long_job, name, undisturbed)


def is_loading_the_model(pid: int) -> bool:
    """Whether the process has torch, which a worker imports to load its model."""
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


@pytest.mark.slow
def test_a_worker_that_dies_whenever_it_loads_the_model_ends_the_run(
    long_job: LongJob, program: Program
) -> None:
    """As when the model does not fit the machine's memory, and the kernel kills every loader."""
    running = program.start(*long_job.arguments("never-loads", "--attempts", LOADS))
    killed: set[int] = set()

    def kill_loaders_until_the_end() -> bool:
        for pid in workers_of(program, SCORING_STAGE):
            if pid not in killed and is_loading_the_model(pid):
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
        return running.is_over

    wait_until(kill_loaders_until_the_end, "the run gives up")
    ended = running.wait()
    assert ended.exit_code == 3, ended.err
    assert len(killed) == LOADS
    assert ended.error.startswith(f"{LOADS} scoring workers died while loading the model")
    assert long_job.output("never-loads").shard_keys() == []
