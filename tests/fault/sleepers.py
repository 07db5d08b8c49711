"""Runs that sleep at a step of the commit protocol while another, with a newer plan, takes over."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from batch_scorer.failpoints import FAILPOINTS
from tests.fault.forked import STOPPED
from tests.fault.oracles import Findings, judge
from tests.fault.scenes import TERM_S, end_term, failpoint_of, scene_of, sleeper_term_s
from tests.fault.small_job import SmallJob
from tests.helpers.program import wait_until

COMMITS = ("commit.before_epoch_check", "commit.before_put", "commit.after_put")
SHARDS = 4
AT_WORK = (
    "plan.before_put", "commit.before_put", "commit.after_put", "manifest.before_put",
    "current.after_put", "lease.after_close", "ledger.after_delete", "success.after_put",
    "lease.before_release",
)  # fmt: skip
"""Where the newer run may be while the older one wakes up and commits."""


@dataclass
class Slept:
    """Where the older run slept, where the newer one was when it woke up (None: it had finished),
    how the older one ended, what was in the output then, and what is wrong with it."""

    failpoint: str
    newer_at: str | None
    code: int = 0
    left: list[str] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)


def _scene(chance: random.Random) -> Slept:
    """A third each: anywhere, and the newer run finishes; in a commit; before the PUT of a shard
    that the newer plan does not have."""
    kind = chance.randrange(3)
    if kind == 0:
        return Slept(failpoint_of(chance.choice(sorted(FAILPOINTS)), "pause"), None)
    newer_at = chance.choice(AT_WORK) if chance.random() < 0.5 else None
    name, first = (chance.choice(COMMITS), 1) if kind == 1 else ("commit.before_put", SHARDS - 1)
    return Slept(f"{name}:pause:{chance.randint(first, SHARDS)}", newer_at)


def sleep_while_another_works(
    job: SmallJob,
    output: str,
    chance: random.Random,
    endpoint: str | None = None,
    wakes: Callable[[], object] = lambda: None,
) -> Slept:
    """`job.undisturbed()` has run. The sleeper's requests go to the `endpoint`; `wakes` is called
    right before it wakes up."""
    inputs = f"in-{output}"
    slept = _scene(chance)
    failpoint, newer_at = slept.failpoint, slept.newer_at
    job.write_inputs(inputs)
    config = job.config(output, inputs, lease_s=TERM_S)
    term_s = sleeper_term_s(failpoint)
    through = job.config(output, inputs, lease_s=term_s, endpoint=endpoint)
    older = job.runs.start(through, failpoint, scene_of(failpoint.partition(":")[0], job))
    if (code := older.wait()) != STOPPED:
        slept.findings.problems.append(f"{failpoint} was not reached: {code}")
        return slept
    end_term(job, output)

    job.write_inputs(inputs, newer=True)
    expected = job.undisturbed(inputs)

    def check() -> None:
        # The newer plan is the output's second, as its shards say: so their bytes are others.
        slept.findings.add(judge(job.at(output), job.at(inputs), expected, same_bytes=False))

    if newer_at is None:
        wait_until(lambda: job.runs.run(config) == 0, "the newer run has taken over")
        check()
        wakes()
        older.go_on()
        slept.code = older.wait()
        slept.left = job.at(output).files()
        check()
    else:
        # Its lease lasts, so that it does not stop in the middle of renewing it, with a lock held.
        lasting = job.config(output, inputs, lease_s=60)
        runs = [job.runs.start(lasting, failpoint_of(newer_at, "pause"))]

        def is_at_work() -> bool:
            if runs[-1].wait() == STOPPED:
                return True
            runs.append(job.runs.start(lasting, failpoint_of(newer_at, "pause")))
            return False

        wait_until(is_at_work, "the newer run has taken over")
        wakes()
        older.go_on()
        slept.code = older.wait()
        slept.left = job.at(output).files()
        runs[-1].go_on()
        if (code := runs[-1].wait()) != 0:
            slept.findings.problems.append(f"the newer run ended with {code}")
            return slept
        check()
    if slept.code not in (0, 2, 3):
        slept.findings.problems.append(f"the older run ended with {slept.code}")
    if (code := job.runs.run(config)) != 0:
        slept.findings.problems.append(f"the next run ended with {code}")
    check()
    return slept
