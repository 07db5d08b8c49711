"""A real Ray cluster of several nodes on this machine, to try things out and for tests.

A head that computes nothing, as on Kubernetes, and worker nodes beside it. Each is a set of
processes of its own, started with `ray start`, with its own folder, ports and fake GPUs. Token
authentication is on; the dashboard listens on loopback, but Ray's other ports on all interfaces.
Everything ends by process id: `ray stop` would end every Ray of the machine.

    with local_cluster(nodes=4, cpus=2, gpus=1) as cluster:
        subprocess.run(command, env={**os.environ, **cluster.environment})
        cluster.nodes[0].kill()
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster.local.ports import own_ports
from cluster.local.processes import end_processes_in

HOST = "127.0.0.1"
MOST_NODES = 8
_START_TIMEOUT_S = 600
_POLL_S = 0.05
_STARTED = "Ray runtime started."
_TOO_SLOW = "timed out during startup"
"""Ray gives a node 30 s to belong to the cluster. Its log advises another
RAY_raylet_start_wait_time_s, which that code does not read (Ray 2.60)."""
_OBJECT_STORE_BYTES = 100 << 20
"""Of each node. Ray's least is 75 MiB."""

CLUSTER_PORTS = range(10_000, 20_000, 1_000)
"""Where the ports of a cluster begin, below those that Linux gives to outgoing connections."""
_HEAD_PORTS = 9
_NODE_PORTS = 110
"""Seven of its own, and the rest for workers and drivers."""
_LONGEST_FOLDER = 30
"""Paths of sockets end at 107 bytes, and Ray puts up to 76 of its own under our folder."""


@dataclass
class Node:
    """The processes of one node."""

    name: str
    folder: Path
    command: list[str]
    environment: Mapping[str, str] = field(repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        """Process id of its `ray start --block`, which all others of the node follow."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    def start(self) -> None:
        """Start it, again after a `kill`, and return once it belongs to the cluster."""
        self.launch()
        self.wait_until_up()

    def launch(self) -> None:
        self.folder.mkdir(exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_up(self) -> None:
        """Started again where a busy machine was too slow for Ray. Raises RuntimeError, with Ray's
        own message, if it does not come up."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while _STARTED not in (said := self._log.read_text()):
            assert self._process is not None
            is_over, is_late = self._process.poll() is not None, time.monotonic() > deadline
            if is_over and _TOO_SLOW in said and not is_late:
                self.kill()
                self.launch()
            elif is_over or is_late:
                said = self._log.read_text()[-4000:]
                raise RuntimeError(f"{self.name} of the local cluster did not start: {said}")
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """SIGKILL all its processes and no others, as when its machine is lost."""
        assert self._process is not None
        # Its group first, which has the raylet: that would report the deaths of its workers.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        end_processes_in(self.folder)

    @property
    def _log(self) -> Path:
        return self.folder / "ray-start.log"


@dataclass(frozen=True)
class Cluster:
    """A running cluster: how to reach it, and its nodes; `nodes` are without the head."""

    address: str
    dashboard: str
    token: str = field(repr=False)
    token_file: Path
    folder: Path
    head: Node
    nodes: list[Node]

    @property
    def environment(self) -> dict[str, str]:
        """For processes that join the cluster or submit to it."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_TMPDIR": str(self.folder),
        }


@contextmanager
def local_cluster(
    nodes: int = 4, cpus: int = 2, gpus: int = 1, env: Mapping[str, str] | None = None
) -> Iterator[Cluster]:
    """A cluster of `nodes` workers with `cpus` CPUs and `gpus` fake GPUs each; gone afterwards.

    `env` goes on top of the environment of its processes, e.g. the keys of an S3 server.
    """
    folder = Path(tempfile.mkdtemp(prefix="bs", dir="/tmp"))
    try:
        yield start_cluster(folder, nodes=nodes, cpus=cpus, gpus=gpus, env=env or {})
    finally:
        end_processes_in(folder)
        shutil.rmtree(folder)


def start_cluster(
    folder: Path, *, nodes: int, cpus: int, gpus: int, env: Mapping[str, str]
) -> Cluster:
    """Start a cluster that outlives this process; all that it has is in `folder`, which exists.

    `end_processes_in(folder)` ends it, also where it was only half up. Raises ValueError for a
    folder with too long a name or too many nodes, and RuntimeError if it does not start.
    """
    if len(str(folder.resolve())) > _LONGEST_FOLDER:
        raise ValueError(
            f"{folder}: too long a path for the sockets that Ray puts there; "
            f"{_LONGEST_FOLDER} characters at most"
        )
    if not 1 <= nodes <= MOST_NODES:
        raise ValueError(f"{nodes} nodes: from 1 to {MOST_NODES}")
    token, token_file = secrets.token_hex(32), folder / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    environment = _environment(folder, token_file, env)
    with own_ports(CLUSTER_PORTS) as ports:
        gcs, dashboard, metrics, client = ports[:4]
        address = f"{HOST}:{gcs}"
        first_port = gcs + _HEAD_PORTS
        head = Node(
            "head",
            folder / "head",
            [
                *_ray_start(folder / "head", first_port, cpus=0, gpus=0),
                "--head", f"--port={gcs}", "--include-dashboard=true",
                f"--dashboard-host={HOST}", f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={client}", "--no-monitor",
            ],
            {**environment, "DASHBOARD_METRIC_PORT": str(metrics)},
        )  # fmt: skip
        workers = []
        for number in range(1, nodes + 1):
            own = folder / f"node{number}"
            first_port += _NODE_PORTS
            command = [*_ray_start(own, first_port, cpus=cpus, gpus=gpus), f"--address={address}"]
            workers.append(Node(own.name, own, command, environment))
        # All at once: they wait for the head by themselves.
        for node in (head, *workers):
            node.launch()
        for node in (head, *workers):
            node.wait_until_up()
    url = f"http://{HOST}:{dashboard}"
    return Cluster(address, url, token, token_file, folder, head, workers)


def _environment(folder: Path, token_file: Path, env: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without its Ray variables; jobs find this Python as `python`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        **env,
    }


def _ray_start(folder: Path, first_port: int, *, cpus: int, gpus: int) -> list[str]:
    names = (
        "node-manager-port", "object-manager-port", "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port",
        "min-worker-port",
    )  # fmt: skip
    ports = [f"--{name}={port}" for port, name in enumerate(names, first_port)]
    return [
        str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats",
        f"--temp-dir={folder}", f"--node-name={folder.name}", f"--num-cpus={cpus}",
        f"--num-gpus={gpus}", f"--object-store-memory={_OBJECT_STORE_BYTES}",
        "--include-log-monitor=false", *ports,
        f"--max-worker-port={first_port + _NODE_PORTS - 1}",
    ]  # fmt: skip
