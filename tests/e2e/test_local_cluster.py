"""The cluster that the other tests run on: what it is made of, who may use it, how it ends."""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local.local_cluster import Cluster, Node, local_cluster, start_cluster
from cluster.local.processes import processes_in
from tests.helpers.program import REPOSITORY, processes_of, wait_until
from tests.helpers.ray_nodes import asked, nodes

pytestmark = pytest.mark.e2e


def test_it_has_a_head_without_cpus_and_four_nodes_with_fake_gpus(cluster: Cluster) -> None:
    found = nodes(cluster)
    assert sorted(found) == ["head", "node1", "node2", "node3", "node4"]
    for name, (node,) in found.items():
        has = {kind: node["resources_total"].get(kind) for kind in ("CPU", "GPU")}
        assert has == ({"CPU": None, "GPU": None} if name == "head" else {"CPU": 2.0, "GPU": 1.0})
        assert node["is_head_node"] == (name == "head")
        assert node["state"] == "ALIVE"


def test_who_has_no_token_or_a_wrong_one_is_sent_away(cluster: Cluster) -> None:
    assert cluster.token_file.stat().st_mode & 0o777 == 0o600
    for token, status in ((None, 401), ("wrong" * 8, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            asked(cluster, "/api/jobs/", token)
        assert refused.value.code == status
    assert isinstance(asked(cluster, "/api/jobs/", cluster.token_file.read_text()), list)


def test_the_dashboard_listens_on_loopback_only(cluster: Cluster) -> None:
    port = int(cluster.dashboard.rpartition(":")[2])
    assert listeners(port) == {"0100007F"}  # 127.0.0.1, as /proc has it


def listeners(port: int) -> set[str]:
    """Addresses in hex on which somebody listens at the port."""
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            address, _, hexadecimal = local.partition(":")
            if state == "0A" and int(hexadecimal, 16) == port:
                addresses.add(address)
    return addresses


def test_a_killed_node_takes_its_own_processes_only_and_can_come_back(cluster: Cluster) -> None:
    lost, *others = cluster.nodes
    before = {node.name: processes_in(node.folder) for node in (cluster.head, *others)}
    assert len(processes_in(lost.folder)) >= 4  # ray start, the raylet and its two agents
    lost.kill()
    assert not processes_in(lost.folder)
    for name, processes in before.items():
        left = processes_in(cluster.folder / name)
        assert processes & left, name
    wait_until(
        lambda: [node["state"] for node in nodes(cluster)[lost.name]] == ["DEAD"],
        "the head notices",
    )
    lost.start()
    states = sorted(node["state"] for node in nodes(cluster)[lost.name])
    assert states == ["ALIVE", "DEAD"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A name for a folder, short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="bs", dir="/tmp") as parent:
        yield Path(parent) / "up"


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"cluster.local.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)


def test_up_prints_what_to_export_and_down_leaves_nothing(folder: Path) -> None:
    up = script("up", "--nodes", 1, "--folder", folder)
    try:
        assert up.returncode == 0, up.stderr
        state = json.loads((folder / "cluster.json").read_text())
        assert sorted(state["pids"]) == ["head", "node1", "s3"]
        assert all(os.path.exists(f"/proc/{pid}") for pid in state["pids"].values())
        exports = dict(
            shlex.split(line)[1].split("=", 1)
            for line in up.stdout.splitlines()
            if line.startswith("export ")
        )
        with urllib.request.urlopen(
            urllib.request.Request(
                f"{exports['RAY_API_SERVER_ADDRESS']}/api/version",
                headers={
                    "Authorization": f"Bearer {Path(exports['RAY_AUTH_TOKEN_PATH']).read_text()}"
                },
            )
        ) as answer:
            assert answer.status == 200
        assert exports["AWS_ACCESS_KEY_ID"]
        assert "batch-scorer submit -- score" in up.stdout
        twice = script("up", "--folder", folder)
        assert twice.returncode == 1
        assert "is a cluster up there?" in twice.stderr
        (down_command,) = re.findall(r"^python (-m \S+down --folder \S+)$", up.stdout, re.M)
    finally:
        down = script("down", "--folder", folder)
    assert down.returncode == 0, down.stderr
    assert down_command == shlex.join(["-m", "cluster.local.down", "--folder", str(folder)])
    assert not folder.exists()
    wait_until(lambda: not processes_of(folder), "nothing runs any more")
    assert not listeners(int(state["dashboard"].rpartition(":")[2]))
    port = state["s3"].rpartition(":")[2]
    assert not list(Path("/tmp").glob(f"seaweedfs-*-{port}.sock"))
    again = script("down", "--folder", folder)
    assert again.returncode == 1
    assert "is no folder of a local cluster" in again.stderr


def test_a_cluster_that_does_not_start_says_why_and_leaves_nothing() -> None:
    token = Path("/nowhere/token")
    with (
        pytest.raises(
            RuntimeError, match=r"(?s)of the local cluster did not start: .*/nowhere/token"
        ),
        local_cluster(nodes=1, env={"RAY_AUTH_TOKEN_PATH": str(token)}),
    ):
        pass
    wait_until(lambda: not processes_of(token), "nothing that was told of the token is left")


def test_a_folder_with_too_long_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match="too long a path"):
        start_cluster(Path("/tmp") / ("x" * 40), nodes=1, cpus=1, gpus=0, env={})


def test_a_node_that_was_too_slow_for_ray_is_started_again(tmp_path: Path) -> None:
    """Seen on a machine with thirty busy processes for two cores."""
    first = tmp_path / "first"
    script = (
        f"if [ -e {first} ]; then echo Ray runtime started.; exec sleep 100; fi; touch {first}; "
        "echo The current node timed out during startup.; exit 1"
    )
    node = Node("slow", tmp_path / "slow", ["sh", "-c", script], {})
    node.start()
    assert first.exists()
    node.kill()
    broken = Node("broken", tmp_path / "broken", ["sh", "-c", "echo no port; exit 1"], {})
    with pytest.raises(RuntimeError, match="did not start: no port"):
        broken.start()
