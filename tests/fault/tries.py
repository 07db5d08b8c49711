"""One oracle against the program, with rising seeds, until it finds something.

    python -m tests.fault.tries kills 20 MODELS

prints what it found as JSON, `{}` if nothing within 20 seeds. In the folder MODELS are two tiny
reward models, `one` and `other`. Each seed is one small scene: some races, a run that is killed, a
run that sleeps, a store that fails, some histories.
"""

import json
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from batch_scorer.failpoints import FAILPOINTS
from batch_scorer.outputs.lease import Lease
from cluster.local.seaweed import s3_server
from tests.fault.histories import Histories
from tests.fault.oracles import judge
from tests.fault.proxy import Faults, Kind, fault_proxy
from tests.fault.races import assert_one_won, make_bench, race, stored_of
from tests.fault.scenes import scene_of
from tests.fault.sleepers import SHARDS, sleep_while_another_works
from tests.fault.small_job import SmallJob, small_job
from tests.helpers.inputs import pairs, parquet
from tests.helpers.places import Place

HISTORIES = 4
STEPS = 12
RACES = 10
STRANGERS = 0.25
RATE = 0.2
"""Of requests that are broken."""

Try = Callable[[int], list[str]]
"""What is wrong with a seed's scene, in words."""


@contextmanager
def races(folder: Path, model: Path) -> Iterator[Try]:
    """Eight writers, each with scores of its own, create a shard or replace a stale one. Then half
    of them try its marked rows again, and the others come late with the first try."""
    place = Place(str(folder))
    (place / "in").write({"a.parquet": parquet(pairs(5))})
    with Lease((place / "out").store, "an old plan", 60):
        pass
    with Lease((place / "out").store, "a plan", 60):
        bench = make_bench(place, str(model), rounds=RACES)

        def try_seed(number: int) -> list[str]:
            chance = random.Random(number)
            there = stored_of(bench.commit(2)).version
            for turn in range(RACES):
                now = bench.of_plan(f"plan {number} {turn}")
                shard = replace(bench.shard, replaces=there)
                if chance.random() < 0.5:
                    (place / "out").store.delete(bench.shard.output_key)
                    shard = bench.shard
                receipts = race(now, shard)
                assert_one_won(receipts, now.stored())
                there = stored_of(receipts[0]).version
                retry = replace(now.shard, replaces=there, retries=1)
                retries = race(now, retry, and_late=now.shard)[::2]
                assert_one_won(retries, now.stored())
                there = stored_of(retries[0]).version
            (place / "out").store.delete(bench.shard.output_key)
            return []

        yield try_seed


@contextmanager
def with_job(
    scene: Callable[[SmallJob, int], list[str]], folder: Path, model: Path
) -> Iterator[Try]:
    with small_job(Place(str(folder)), folder, model) as job:
        job.undisturbed()
        yield partial(scene, job)


def killed(job: SmallJob, number: int) -> list[str]:
    """A run that is killed or meets a stranger's shard, and perhaps finds its input rewritten and
    cut in another way the next time."""
    chance = random.Random(number)
    inputs, output = f"in-{number}", f"killed-{number}"
    job.write_inputs(inputs)
    config = job.config(output, inputs)
    if chance.random() < STRANGERS:
        # Nobody is killed here, so this run alone has to leave it right.
        if job.runs.start(config, scene=scene_of("commit.after_refusal", job)).wait() == 0:
            expected = job.undisturbed(inputs)
            if found := judge(job.at(output), job.at(inputs), expected).problems:
                return found
    else:
        name = chance.choice([name for name in sorted(FAILPOINTS) if "renew" not in name])
        time = chance.randint(1, SHARDS) if name.startswith("commit.") else 1
        job.runs.start(config, f"{name}:kill:{time}").wait()
    return finish(job, inputs, output, rewritten=chance.random() < 0.5)


def finish(job: SmallJob, inputs: str, output: str, *, rewritten: bool) -> list[str]:
    if rewritten:
        job.write_inputs(inputs, newer=True)
    code = job.runs.run(job.config(output, inputs))
    expected = job.undisturbed(inputs)
    found = judge(job.at(output), job.at(inputs), expected, same_bytes=not rewritten)
    return [*([f"the next run ended with {code}"] if code else []), *found.problems]


def slept(job: SmallJob, number: int) -> list[str]:
    done = sleep_while_another_works(job, f"slept-{number}", random.Random(number))
    return done.findings.problems


@contextmanager
def store_faults(folder: Path, model: Path) -> Iterator[Try]:
    """A store that breaks requests; of lost and doubled ones alone no run may notice anything."""
    with (
        s3_server() as server,
        environment(server.environment),
        fault_proxy(server.endpoint) as proxy,
        small_job(Place(server.url("tries"), server.options), folder, model) as job,
    ):
        expected = job.undisturbed()

        def try_seed(number: int) -> list[str]:
            lost = Faults((Kind.LOST, Kind.TWICE), number, rate=RATE)
            denied = Faults((Kind.DENIED,), number, rate=0.5, only=".rows")  # shards alone
            mixed = Faults(tuple(Kind), number, rate=RATE)
            faults = (lost, denied, mixed)[(number - 1) % 3]
            output = f"store-{number}"
            with proxy.breaking(faults):
                code = job.runs.run(job.config(output, endpoint=proxy.endpoint))
            problems = []
            if code and faults is lost:
                problems.append(f"a lost answer ended a run with {code}")
            if "_SUCCESS" in job.at(output).files():
                problems += judge(job.at(output), job.at("in"), expected).problems
            return problems + job.finish(output, code, expected).problems

        yield try_seed


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    os.environ.update(variables)
    yield


@contextmanager
def histories(folder: Path, model: Path) -> Iterator[Try]:
    class Machine(Histories):
        models: ClassVar[list[Path]] = [model, model.parent / "other"]

    def try_seed(number: int) -> list[str]:
        run_state_machine_as_test(
            seed(number)(Machine),
            settings=settings(
                max_examples=HISTORIES,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                phases=[Phase.generate],  # to find it is enough
                suppress_health_check=list(HealthCheck),
            ),
        )
        return []

    yield try_seed


ORACLES = {
    "races": races,
    "kills": partial(with_job, killed),
    "sleepers": partial(with_job, slept),
    "store faults": store_faults,
    "histories": histories,
}


def main(oracle: str, bound: int, models: Path) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try_seed = stack.enter_context(ORACLES[oracle](folder, models / "one"))
        for number in range(1, bound + 1):
            try:
                problems = try_seed(number)
            except Exception as error:
                traceback.print_exc()
                where = traceback.extract_tb(error.__traceback__)[-1].line
                problems = [f"{type(error).__name__} at {where}"]
            if problems:
                print(json.dumps({"seed": number, "said": problems[0]}))
                return
    print(json.dumps({}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
