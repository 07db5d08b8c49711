"""Runs on the local cluster that are long enough to be hit, and what there is to hit."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from batch_scorer.errors import StorageError
from cluster.local.local_cluster import Cluster, Node
from cluster.local.processes import processes_in
from tests.fault.oracles import Findings, Folder, Found, judge, read_output
from tests.fault.proxy import FaultProxy, fault_proxy, redirected
from tests.helpers.inputs import pairs, parquet
from tests.helpers.places import Place
from tests.helpers.program import Ended, Program, Running, temporary_ray_home, wait_until
from tests.helpers.stores import Server

SHARDS = 20
SHARD_ROWS = 2
SCORE_S, LOAD_S = 0.5, 1.0


@dataclass(frozen=True)
class Fleet:
    """A cluster, a store behind a proxy, and the inputs of runs on them."""

    cluster: Cluster
    server: Server
    proxy: FaultProxy
    model: Path
    expected: Found

    def start(
        self, output: str, environment: dict[str, str] | None = None, gate: Path | None = None
    ) -> Running:
        """A driver of its own process, on the cluster unless the environment says otherwise. With a
        `gate`, no engine is loaded before that file is there."""
        flags = arguments(self.server, self.proxy.endpoint, self.model, output)
        device = "cuda" if environment is None else "cpu"
        command = [
            sys.executable,
            "-m",
            "tests.fault.slow_driver",
            *map(str, flags),
            "--device",
            device,
        ]
        slow = {"SLOW_LOAD_S": str(LOAD_S), "SLOW_SCORE_S": str(SCORE_S)}
        slow["SLOW_GATE"] = str(gate or "")
        ours = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        joins = self.cluster.environment if environment is None else environment
        folder = Path(joins["RAY_TMPDIR"])
        return Running(command, {**ours, **joins, **slow}, folder)

    def place(self, output: str) -> Place:
        return Place(self.server.url(f"nodes/{output}"), self.server.options)

    def committed(self, output: str) -> int:
        return len(self.place(output).shard_keys())

    def wait_for_shards(self, output: str, count: int, run: Running) -> None:
        def reached() -> bool:
            assert not run.is_over, run.said()
            return self.committed(output) >= count

        wait_until(reached, f"{count} shards are committed")

    def wait_for_record(self, output: str, name: str, run: Running) -> None:
        def is_there() -> bool:
            assert not run.is_over, run.said()
            with suppress(StorageError):
                return bool(self.place(output).read_json(f"_batch_scorer/{name}"))
            return False

        wait_until(is_there, f"{name} is written")

    def judge(self, output: str, ended: Ended) -> Findings:
        assert ended.exit_code == 0, ended.err
        return judge(self.at(output), self.at("in"), self.expected)

    def at(self, name: str) -> Folder:
        return Folder(self.server.url(f"nodes/{name}"), self.server.options)

    def free_nodes(self, run: Running) -> list[Node]:
        """Nodes that the driver itself is not attached to; on a real cluster that is the head."""
        links = []
        for link in Path(f"/proc/{run.pid}/fd").iterdir():
            with suppress(OSError):
                links.append(os.readlink(link))
        return [
            node
            for node in self.cluster.nodes
            if not any(link.startswith(f"{node.folder.resolve()}/") for link in links)
        ]


def arguments(server: Server, endpoint: str, model: Path, output: str) -> list[object]:
    options = redirected(server.options, endpoint)
    return [
        "score", server.url("nodes/in"), "--model", model,
        "--output", server.url(f"nodes/{output}"),
        *(part for k, v in options.items() for part in ("--store-option", f"{k}={v}")),
        "--backend", "fake", "--dtype", "float32", "--shard-rows", SHARD_ROWS, "--json",
    ]  # fmt: skip


def scoring_workers(node: Node) -> list[int]:
    """Processes of the scoring stage on a node."""
    found = []
    for pid in processes_in(node.folder):
        with suppress(OSError):
            if b"_ScoreStage" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def owner_of_port(port: int, nodes: list[Node]) -> Node | None:
    """The node with a process that has a connection from this local port."""
    wanted = f":{port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    sockets = {f"socket:[{line[9]}]" for line in lines if line[1].endswith(wanted)}
    for node in nodes:
        for pid in processes_in(node.folder):
            with suppress(OSError):
                links = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
                if links & sockets:
                    return node
    return None


def lose(node: Node) -> None:
    """Kill a node, and have another come up in its place, some seconds later."""
    node.kill()
    node.launch()


@contextmanager
def fleet_on(cluster: Cluster, server: Server, model: Path) -> Iterator[Fleet]:
    """With inputs written, and what an undisturbed run makes of them."""
    table = pairs(SHARDS * SHARD_ROWS)
    Place(server.url("nodes/in"), server.options).write({"a.parquet": parquet(table)})
    with temporary_ray_home() as home:
        flags = arguments(server, server.endpoint, model, "undisturbed")
        ended = Program(home).run(*flags, "--device", "cpu", "--no-ray")
    assert ended.exit_code == 0, ended.err
    output, inputs = (
        Folder(server.url(f"nodes/{name}"), server.options) for name in ("undisturbed", "in")
    )
    expected = read_output(output, inputs)
    assert len(expected.shards) == SHARDS
    with fault_proxy(server.endpoint) as proxy:
        yield Fleet(cluster, server, proxy, model, expected)
