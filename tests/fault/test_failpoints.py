"""A run that is killed, fails or is paused at any step of the commit protocol.

Killed or failed: the same command again gives what an undisturbed run gives. Paused while another
run, whose plan is newer, takes over and finishes: when it wakes up it damages nothing.
"""

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import batch_scorer
from batch_scorer import Config
from batch_scorer.errors import ConfigError, RowReason
from batch_scorer.failpoints import FAILPOINTS, TESTING, arm
from batch_scorer.outputs.reuse import EARLIER
from batch_scorer.runs.run import score
from tests.fault.forked import STOPPED
from tests.fault.oracles import Found, judge, read_output
from tests.fault.scenes import TERM_S, end_term, failpoint_of, scene_of, sleeper_term_s
from tests.fault.small_job import SmallJob, small_job
from tests.helpers.places import Place
from tests.helpers.program import wait_until
from tests.helpers.weak import WeakBackend, making

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[SmallJob]:
    folder = tmp_path_factory.mktemp("failpoints")
    with small_job(Place(str(folder)), folder, tiny_model) as made:
        yield made


@pytest.fixture(scope="module")
def expected(job: SmallJob) -> Found:
    return job.undisturbed()


def until_taken(job: SmallJob, config: Config) -> None:
    """Run it until the lease of the one that sleeps is over."""

    def is_taken() -> bool:
        code = job.runs.run(config)
        assert code in (0, 2), (code, job.runs.said())
        return code == 0

    wait_until(is_taken, "the lease of the run that sleeps is over")


@pytest.mark.parametrize("action", ["kill", "raise"])
@pytest.mark.parametrize("name", FAILPOINTS)
def test_a_run_that_ends_at_any_step_is_finished_by_the_same_command(
    name: str, action: str, job: SmallJob, expected: Found
) -> None:
    output = f"{action}-{name}"
    config = job.config(output, lease_s=TERM_S if "renew" in name else 30)
    code = job.runs.start(config, failpoint_of(name, action), scene_of(name, job)).wait()
    reached = {-signal.SIGKILL} if action == "kill" else {1, 3}
    assert code in reached, (code, job.runs.said())
    assert job.runs.run(job.config(output)) == 0, job.runs.said()
    assert not judge(job.at(output), job.at("in"), expected).problems


@pytest.mark.parametrize("action", ["kill", "pause"])
@pytest.mark.parametrize("name", ["room.before_delete", "room.after_delete", "commit.before_put",
                                  "manifest.before_put", "earlier.before_delete"])  # fmt: skip
def test_a_run_that_replaces_scored_shards_may_end_or_sleep_at_any_step(
    name: str, action: str, job: SmallJob, expected: Found
) -> None:
    """An input was rewritten, and is cut in another way. While the run sleeps, the file comes back
    as it was, and another run scores it: then the old pieces are the right ones again."""
    inputs, output = f"in-{action}-{name}", f"replaced-{action}-{name}"
    job.write_inputs(inputs)
    config = job.config(output, inputs, lease_s=sleeper_term_s(name))
    assert job.runs.run(config) == 0, job.runs.said()
    job.write_inputs(inputs, newer=True)
    run = job.runs.start(config, failpoint_of(name, action))
    if action == "kill":
        assert run.wait() == -signal.SIGKILL, job.runs.said()
        right = job.undisturbed(inputs)
    else:
        assert run.wait() == STOPPED, job.runs.said()
        end_term(job, output)
        job.write_inputs(inputs)
        right = expected
        until_taken(job, config)
        run.go_on()
        assert run.wait() in (0, 2, 3), job.runs.said()
    assert job.runs.run(config) == 0, job.runs.said()
    assert not judge(job.at(output), job.at(inputs), right, same_bytes=False).problems
    assert not list((job.place / output).store.list(EARLIER))


@pytest.mark.parametrize("name", FAILPOINTS)
def test_a_run_that_is_paused_at_any_step_damages_nothing_when_it_wakes_up(
    name: str, job: SmallJob, expected: Found
) -> None:
    inputs, output = f"in-{name}", f"pause-{name}"
    job.write_inputs(inputs)
    config = job.config(output, inputs, lease_s=sleeper_term_s(name))
    paused = job.runs.start(config, failpoint_of(name, "pause"), scene_of(name, job))
    assert paused.wait() == STOPPED, job.runs.said()
    end_term(job, output)

    job.write_inputs(inputs, newer=True)
    newer = job.undisturbed(inputs)
    assert newer.shards.keys() != expected.shards.keys()

    def problems() -> list[str]:
        # The newer plan is the output's second, as its shards say: so their bytes are others.
        return judge(job.at(output), job.at(inputs), newer, same_bytes=False).problems

    until_taken(job, config)
    assert not problems()
    paused.go_on()
    assert paused.wait() in (0, 2, 3), job.runs.said()
    assert not problems()
    assert job.runs.run(config) == 0, job.runs.said()
    assert not problems()


@pytest.mark.parametrize("where", [
    "plan.before_put", "commit.before_put", "commit.after_put", "manifest.before_put",
    "current.after_put", "lease.after_close", "ledger.after_delete", "success.after_put",
    "lease.before_release",
])  # fmt: skip
def test_a_run_that_wakes_up_while_a_newer_one_is_at_work_damages_nothing(
    where: str, job: SmallJob
) -> None:
    """It creates a piece of a file that the newer plan, which is at any of its steps, has cut in
    another way."""
    inputs, output = f"in-early-{where}", f"early-{where}"
    job.write_inputs(inputs)
    config = job.config(output, inputs, lease_s=sleeper_term_s("commit"))
    older = job.runs.start(config, failpoint_of("commit.before_put", "pause"))
    assert older.wait() == STOPPED, job.runs.said()
    end_term(job, output)
    job.write_inputs(inputs, newer=True)
    expected = job.undisturbed(inputs)
    # Its lease lasts, so that it does not stop in the middle of renewing it, with a lock held.
    newer = job.runs.start(job.config(output, inputs, lease_s=60), failpoint_of(where, "pause"))
    assert newer.wait() == STOPPED, job.runs.said()
    older.go_on()
    assert older.wait() == 3, job.runs.said()
    newer.go_on()
    assert newer.wait() == 0, job.runs.said()
    assert not judge(job.at(output), job.at(inputs), expected, same_bytes=False).problems


# Marked rows are tried again

NOT_IN_A_RETRY = {
    "claim.before_put": "the output is begun already",
    "commit.after_refusal": "nobody else writes there",
}
WEAK = (RowReason.ENGINE_ERROR,)


def first_try(job: SmallJob, output: str) -> None:
    """All is committed, and rows of two shards or more are marked."""
    config = job.config(output)
    summary = score(config, make=making(WeakBackend(RowReason.ENGINE_ERROR)))
    marked = [r for r in summary.receipts if r.commit and r.commit.marked.keys() & set(WEAK)]
    assert summary.is_complete
    assert len(marked) > 1


@pytest.fixture(scope="module")
def retried(job: SmallJob, expected: Found) -> Found:
    """What the retry of a first try gives, undisturbed."""
    first_try(job, "retried")
    assert job.runs.run(job.config("retried", retry_marked=WEAK)) == 0, job.runs.said()
    assert not judge(job.at("retried"), job.at("in"), expected, same_bytes=False).problems
    return read_output(job.at("retried"), job.at("in"))


@pytest.mark.parametrize("action", ["kill", "raise"])
@pytest.mark.parametrize("name", sorted(FAILPOINTS.keys() - NOT_IN_A_RETRY.keys()))
def test_a_retry_that_ends_at_any_step_is_finished_by_the_same_command(
    name: str, action: str, job: SmallJob, retried: Found
) -> None:
    output = f"retry-{action}-{name}"
    first_try(job, output)
    config = job.config(output, retry_marked=WEAK, lease_s=TERM_S if "renew" in name else 30)
    code = job.runs.start(config, failpoint_of(name, action), scene_of(name, job)).wait()
    reached = {-signal.SIGKILL} if action == "kill" else {1, 3}
    assert code in reached, (code, job.runs.said())
    assert job.runs.run(job.config(output, retry_marked=WEAK)) == 0, job.runs.said()
    assert not judge(job.at(output), job.at("in"), retried).problems
    assert not list((job.place / output).store.list(EARLIER))


@pytest.mark.parametrize("name", ["room.before_delete", "commit.before_put", "manifest.before_put"])
def test_a_retry_that_was_killed_need_not_be_gone_on_with(
    name: str, job: SmallJob, expected: Found
) -> None:
    """A run without the setting finds every shard committed, tried again or not."""
    output = f"retry-no-more-{name}"
    first_try(job, output)
    config = job.config(output, retry_marked=WEAK)
    code = job.runs.start(config, failpoint_of(name, "kill")).wait()
    assert code == -signal.SIGKILL, job.runs.said()
    left = read_output(job.at(output), job.at("in"))
    assert job.runs.run(job.config(output)) == 0, job.runs.said()
    assert not judge(job.at(output), job.at("in"), left).problems
    assert not list((job.place / output).store.list(EARLIER))


@pytest.mark.parametrize("name", ["room.before_delete", "commit.before_epoch_check",
                                  "commit.before_put", "commit.after_put", "manifest.before_put",
                                  "success.after_put"])  # fmt: skip
def test_a_retry_that_is_paused_while_another_one_finishes_damages_nothing(
    name: str, job: SmallJob, retried: Found
) -> None:
    output = f"retry-pause-{name}"
    first_try(job, output)
    config = job.config(output, retry_marked=WEAK, lease_s=sleeper_term_s(name))
    paused = job.runs.start(config, failpoint_of(name, "pause"))
    assert paused.wait() == STOPPED, job.runs.said()
    end_term(job, output)
    until_taken(job, config)
    assert not judge(job.at(output), job.at("in"), retried).problems
    paused.go_on()
    assert paused.wait() in (0, 2, 3), job.runs.said()
    assert not judge(job.at(output), job.at("in"), retried).problems


def test_a_run_that_counts_on_marked_shards_supersedes_one_that_would_replace_them(
    job: SmallJob,
) -> None:
    """It is without the setting, so it has another plan, and a newer epoch."""
    output = "retry-superseded"
    first_try(job, output)
    config = job.config(output, retry_marked=WEAK, lease_s=60)
    paused = job.runs.start(config, "commit.before_epoch_check:pause")
    assert paused.wait() == STOPPED, job.runs.said()
    end_term(job, output)
    until_taken(job, job.config(output))
    left = read_output(job.at(output), job.at("in"))
    paused.go_on()
    assert paused.wait() == 3, job.runs.said()
    assert not judge(job.at(output), job.at("in"), left).problems


def test_a_retry_that_wakes_up_right_before_its_put_is_found_by_the_next_run(
    job: SmallJob, expected: Found
) -> None:
    """The gap of step 6: no row is lost, doubled or changed but those that get their scores, and
    the next run's manifest names what is there."""
    output = "retry-late"
    first_try(job, output)
    config = job.config(output, retry_marked=WEAK, lease_s=60)
    paused = job.runs.start(config, "commit.before_put:pause")
    assert paused.wait() == STOPPED, job.runs.said()
    end_term(job, output)
    until_taken(job, job.config(output))
    paused.go_on()
    assert paused.wait() == 3, job.runs.said()
    left = read_output(job.at(output), job.at("in"))
    assert job.runs.run(job.config(output)) == 0, job.runs.said()
    assert not judge(job.at(output), job.at("in"), left).problems
    assert job.runs.run(config) == 0, job.runs.said()
    assert not judge(job.at(output), job.at("in"), expected, same_bytes=False).problems


def test_every_failpoint_of_the_table_is_in_the_code_once_and_no_other() -> None:
    """The tests above fail where a run does not get to one."""
    called = []
    for file in Path(batch_scorer.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "failpoint":
                assert isinstance(node.args[0], ast.Constant)
                called.append(node.args[0].value)
    assert sorted(called) == sorted(FAILPOINTS)


@pytest.mark.parametrize("text", ["commit.after_putt:kill", "commit.after_put", "x", "x:kill:1"])
def test_a_failpoint_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected NAME:ACTION"):
        arm(text)


@pytest.mark.parametrize("testing", ["", "0", "true"])
def test_no_failpoint_is_armed_outside_of_tests(
    testing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TESTING, testing)
    with pytest.raises(ConfigError, match="failpoints are for tests"):
        arm("commit.after_put:kill")
    arm("")  # to disarm is always right


def test_no_variable_arms_one() -> None:
    """As the environment of a run in production may hold anything."""
    code = "from batch_scorer.failpoints import failpoint; failpoint('commit.after_put')"
    armed = {"BATCH_SCORER_FAILPOINT": "commit.after_put:kill", TESTING: "1"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **armed}, check=False)
    assert done.returncode == 0
