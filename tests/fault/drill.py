"""The drill: the faults of this folder's tests, as many as you like, from one seed.

    python -m tests.fault.drill --seed 5 --report docs/drills/first

Processes of a real cluster are killed (workers, nodes, drivers), runs without Ray are killed at
every failpoint, sleep while others take over, or get broken answers from a real server, and eight
writers race for one shard. The store is S3, S3 with versioning or Azure (`--store`). The oracles
look after each; in the end a drill fails that has missed a state which it is there to reach
(`sometimes.py`). REPORT.json has every fault with its seed, REPORT.md the sums.

A long drill can be run in pieces, at any time and in any order: `--piece 2/5` is the second of
five, a piece that has its report is not run again, and the last one joins them.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from batch_scorer.errors import ExitCode
from batch_scorer.failpoints import FAILPOINTS
from batch_scorer.outputs.lease import Lease
from batch_scorer.records import Receipt
from cluster.local.azurite import azure_server
from cluster.local.local_cluster import local_cluster
from cluster.local.seaweed import s3_server
from tests.fault.drill_report import (
    Part,
    Piece,
    joined,
    problems_of,
    report_of,
    require_same,
    write,
    write_json,
)
from tests.fault.fleet import SCORE_S, SHARDS, Fleet, fleet_on, lose, scoring_workers
from tests.fault.oracles import Found
from tests.fault.proxy import FaultProxy, Faults, Kind, fault_proxy
from tests.fault.races import WRITERS, assert_one_won, make_bench, race, stored_of
from tests.fault.scenes import TERM_S, failpoint_of, scene_of
from tests.fault.sleepers import sleep_while_another_works
from tests.fault.small_job import SmallJob, small_job
from tests.fault.sometimes import FAULTS_PER_STATE, of_faults, of_killed, of_sleeper
from tests.helpers.inputs import pairs, parquet
from tests.helpers.places import Place
from tests.helpers.program import Running
from tests.helpers.stores import Server
from tests.helpers.tiny import tiny_reward_model

KILLS_PER_RUN = 6
MOST_RERUNS = 3
STARTUP_S = 10.0
STORES = ("s3", "s3-versioned", "azure")


@contextmanager
def timed(name: str, part: Part) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        part.wall_s = round(time.monotonic() - started, 1)
        print(f"{name}: {part.faults} faults, {len(part.problems)} problems, {part.wall_s} s")


def main() -> int:
    options = parsed()
    pieces = [Piece(k, options.piece.n) for k in range(1, options.piece.n + 1)]
    own = options.piece.file(options.report)
    if own.exists():
        require_same(options, json.loads(own.read_text()))
        print(f"{own} is there already")
    else:
        parts, wall_s = run(options, options.piece)
        write_json(own, report_of(options, parts, wall_s))
    missing = [piece for piece in pieces if not piece.file(options.report).exists()]
    if missing:
        print("still to run: " + ", ".join(f"{piece.k}/{piece.n}" for piece in missing))
        return 0
    report = joined(options, [piece.file(options.report) for piece in pieces])
    write(options.report, report)
    for piece in pieces:
        piece.file(options.report).unlink()
    return int(bool(problems_of(report)))


def run(options: argparse.Namespace, piece: Piece) -> tuple[dict[str, Part], float]:
    """What one piece found, and the seconds that it took."""
    parts = {name: Part() for name in FAULTS_PER_STATE}
    seed = piece.seed(options.seed)
    started = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(server_of(options.store))
        model = tiny_reward_model(folder / "model")
        with timed("races", parts["races"]):
            races(parts["races"], server, model, piece.share(options.races), seed)
        place = Place(server.url("drill"), server.options)
        job = stack.enter_context(small_job(place, folder, model))
        expected = job.undisturbed()
        with timed("failpoints", parts["failpoints"]):
            failpoints(parts["failpoints"], job, expected, list(FAILPOINTS)[piece.k - 1 :: piece.n])
        with fault_proxy(server.endpoint) as proxy:
            with timed("sleepers", parts["sleepers"]):
                sleepers(parts["sleepers"], proxy, job, piece.share(options.sleepers), seed)
            with timed("store faults", parts["store_faults"]):
                count = piece.share(options.store_faults)
                store_faults(parts["store_faults"], proxy, job, expected, count, seed)
        if count := piece.share(options.kills):
            with timed("kills", parts["kills"]):
                kills(parts["kills"], server, model, count, seed)
    return parts, time.monotonic() - started


@contextmanager
def server_of(store: str) -> Iterator[Server]:
    """A server of this kind of store, its keys in this process's environment."""
    if store == "azure":
        with azure_server() as azure:
            os.environ.update(azure.environment)
            yield azure
    else:
        with s3_server() as s3:
            os.environ.update(s3.environment)
            yield s3.versioned("kept") if store == "s3-versioned" else s3


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--store", choices=STORES, default=STORES[0])
    parser.add_argument("--kills", type=int, default=40, help="of processes of a cluster")
    parser.add_argument("--store-faults", type=int, default=100, help="broken requests")
    parser.add_argument("--sleepers", type=int, default=20, help="runs that sleep at a step")
    parser.add_argument("--races", type=int, default=200, help="of eight writers each")
    parser.add_argument("--piece", type=Piece.parsed, default=Piece(1, 1), metavar="K/N")
    parser.add_argument("--report", type=Path, default=Path("drill"), help="without suffix")
    return parser.parse_args()


# Races


def races(part: Part, server: Server, model: Path, count: int, seed: str) -> None:
    """Eight writers, each with scores of its own, create a shard or replace a stale one."""
    place = Place(server.url("drill-races"), server.options)
    (place / "in").write({"a.parquet": parquet(pairs(5))})
    chance = random.Random(f"{seed} races")
    with Lease((place / "out").store, "an old plan", 60):
        pass
    with Lease((place / "out").store, "a plan", 60):
        bench = make_bench(place, str(model), rounds=count)
        there = stored_of(bench.commit(2)).version
        for number in range(count):
            creates = chance.random() < 0.5
            if creates:
                (place / "out").store.delete(bench.shard.output_key)
                there = None
            bench = bench.of_plan(f"plan {number}")
            receipts = race(bench, replace(bench.shard, replaces=there))
            there = stored_of(receipts[0]).version
            part.add("create" if creates else "replace", number=number)
            part.runs += WRITERS
            part.saw(of_race(creates, receipts))
            progress("races", part, number, count)
            try:
                assert_one_won(receipts, bench.stored())
            except AssertionError as error:
                part.problems.append(f"race {number}: {error}")


def of_race(creates: bool, receipts: list[Receipt]) -> Counter[str]:
    refused = sum(receipt.detail != "" for receipt in receipts)
    how = "many created one shard" if creates else "many replaced one stale shard"
    return Counter({how: int(refused > 0), "a writer was refused by an equal commit": refused})


def progress(name: str, part: Part, before: int, count: int) -> None:
    """A line every tenth of the way; `before` is how many faults there were one call ago."""
    if 10 * part.faults // count > 10 * before // count:
        print(f"{name}: {part.faults} of {count}, {len(part.problems)} problems", flush=True)


# Without Ray


def failpoints(part: Part, job: SmallJob, expected: Found, names: list[str]) -> None:
    """SIGKILL at these steps of the commit protocol."""
    for name in names:
        output = f"kill-{name}"
        config = job.config(output, lease_s=TERM_S if "renew" in name else 30)
        run = job.runs.start(config, failpoint_of(name, "kill"), scene_of(name, job))
        if run.wait() != -signal.SIGKILL:
            part.problems.append(f"{name} was not reached")
        part.saw(of_killed(name))
        part.add(name)
        part.runs += 1
        part.reruns += 1
        part.judge(job.finish(output, 3, expected))


def sleepers(part: Part, proxy: FaultProxy, job: SmallJob, count: int, seed: str) -> None:
    """Runs that sleep at a step while another, with a newer plan, takes over."""
    chance = random.Random(f"{seed} sleepers")
    while part.faults < count:
        output = f"slept-{part.runs}"
        with proxy.breaking(Faults((), 0)):
            slept = sleep_while_another_works(
                job, output, chance, proxy.endpoint, proxy.answered.clear
            )
            part.saw(of_sleeper(slept, output, proxy.answered))
        part.add(slept.failpoint.partition(":")[0], **asdict(slept))
        part.runs += 1
        part.reruns += 1
        part.judge(slept.findings)
        progress("sleepers", part, part.faults - 1, count)


def store_faults(
    part: Part, proxy: FaultProxy, job: SmallJob, expected: Found, count: int, seed: str
) -> None:
    """Every kind by turns, as a rate and as a burst, and all kinds mixed."""
    chance = random.Random(f"{seed} store")
    mixed = tuple(kind for kind in Kind if kind is not Kind.DENIED)
    choices = [*((kind,) for kind in Kind), mixed]
    while part.faults < count:
        kinds = choices[part.runs % len(choices)]
        how: dict[str, Any] = {"rate": 0.2} if chance.random() < 0.5 else {"burst": 4}
        faults = Faults(kinds, chance.randrange(10**6), **how)
        output = f"store-{part.runs}"
        with proxy.breaking(faults):
            code = job.runs.run(job.config(output, endpoint=proxy.endpoint))
            injected = list(proxy.injected)
            part.saw(of_faults(proxy.answered, code))
        for fault in injected:
            path = fault.path.partition("?")[0]
            part.add(fault.kind, run=part.runs, seed=faults.seed, method=fault.method, path=path)
        part.runs += 1
        part.reruns += code != 0
        part.judge(job.finish(output, code, expected))
        progress("store faults", part, part.faults - len(injected), count)


# On a cluster


def kills(part: Part, server: Server, model: Path, count: int, seed: str) -> None:
    """SIGKILL of scoring workers, of nodes with all that runs there, and of drivers, at moments
    that the seed chooses; a killed driver's run is resumed."""
    chance = random.Random(f"{seed} kills")
    noticed = {"RAY_health_check_period_ms": "500", "RAY_health_check_initial_delay_ms": "0"}
    with (
        local_cluster(nodes=4, cpus=2, gpus=1, env={**server.environment, **noticed}) as cluster,
        fleet_on(cluster, server, model) as fleet,
    ):
        while part.faults < count:
            disturb(part, fleet, f"kills-{part.runs}", count, chance)
        for node in cluster.nodes:
            node.wait_until_up()


def disturb(part: Part, fleet: Fleet, output: str, count: int, chance: random.Random) -> None:
    """One run, hit several times at random moments, resumed as often as its driver is killed or it
    gives up: several workers may have died loading their models."""
    run = fleet.start(output)
    planned = min(KILLS_PER_RUN, count - part.faults)
    part.runs += 1
    for _ in range(planned):
        kill: Callable[[Fleet, Running, random.Random], str | None]
        kill = chance.choice([kill_worker, kill_worker, kill_node, kill_driver])
        await_moment(fleet, output, run, chance)
        if run.is_over:
            break
        what = kill(fleet, run, chance)
        if what is not None:
            shards = fleet.committed(output)
            part.add(what, output=output, shards=shards)
            how = "lost" if what == "node" else "killed"
            part.saw(Counter({f"a {what} was {how} while shards were left": int(shards < SHARDS)}))
            progress("kills", part, part.faults - 1, count)
        if what == "driver":
            part.saw(Counter({"a run was resumed that had committed shards": int(shards > 0)}))
            run.wait()
            part.reruns += 1
            run = fleet.start(output)
    ended = run.wait()
    for _ in range(MOST_RERUNS):
        if ended.exit_code != ExitCode.INCOMPLETE:
            break
        part.reruns += 1
        ended = fleet.start(output).wait()
    part.judge(fleet.judge(output, ended))


def await_moment(fleet: Fleet, output: str, run: Running, chance: random.Random) -> None:
    """Some time, which hits what starts up, or some shards, and a part of what one takes."""
    enough, wait_s = 0, chance.uniform(0, STARTUP_S)
    if chance.random() < 0.75:
        enough, wait_s = fleet.committed(output) + chance.randrange(5), chance.uniform(0, SCORE_S)
    while fleet.committed(output) < enough and not run.is_over:
        time.sleep(0.05)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and not run.is_over:
        time.sleep(0.05)


def kill_worker(fleet: Fleet, run: Running, chance: random.Random) -> str | None:
    """None where no model is loaded yet."""
    workers = [pid for node in fleet.cluster.nodes for pid in scoring_workers(node)]
    if not workers:
        return None
    with suppress(ProcessLookupError):
        os.kill(chance.choice(workers), signal.SIGKILL)
        return "worker"
    return None


def kill_node(fleet: Fleet, run: Running, chance: random.Random) -> str | None:
    """Not the driver's, and not before the last one that was lost has come back."""
    nodes = fleet.free_nodes(run)
    for node in nodes:
        node.wait_until_up()
    lose(chance.choice(nodes))
    return "node"


def kill_driver(fleet: Fleet, run: Running, chance: random.Random) -> str | None:
    run.send(signal.SIGKILL)
    return "driver"


if __name__ == "__main__":
    sys.exit(main())
