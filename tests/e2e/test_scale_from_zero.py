"""A cluster without a worker, as cluster/kuberay/base begins: a run's workers bring the machines.

Ray's own autoscaler (version 2) decides; its provider for tests starts the machines that it asks
for as processes of this one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.util import get_node_ip_address

from cluster.local.local_cluster import CLUSTER_PORTS, HOST
from cluster.local.ports import own_ports
from tests.helpers.inputs import pairs, parquet
from tests.helpers.program import Program

pytestmark = pytest.mark.e2e

_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_HEAD = "f" * 51 + "00000"  # FAKE_HEAD_NODE_ID of that module
_COMMANDS = ("head_setup", "worker_setup", "setup", "initialization", "head_start_ray",
             "worker_start_ray")  # fmt: skip


def _config(address: str) -> dict[str, object]:
    node = {"resources": {"CPU": 4, "GPU": 1, "object_store_memory": 100 << 20}, "node_config": {}}
    return {
        "cluster_name": "from-zero",
        "max_workers": 2,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",
            "module": _PROVIDER,
            "launch_multiple": True,
            "head_node_id": _HEAD,
            "gcs_address": address,
        },
        "auth": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": {**node, "min_workers": 0, "max_workers": 2},
        },
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{name}_commands": [] for name in _COMMANDS},
    }


def test_workers_come_when_a_run_asks_for_them(
    program: Program, tiny_model: Path, tmp_path: Path
) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    for number in range(4):
        (inputs / f"{number}.parquet").write_bytes(parquet(pairs(10, 10 * number)))
    settings = ("--model", tiny_model, "--backend", "fake", "--device", "cuda")
    with own_ports(CLUSTER_PORTS) as ports:
        port = ports[0]
        config = tmp_path / "autoscaler.json"
        config.write_text(json.dumps(_config(f"{get_node_ip_address()}:{port}")))
        subprocess.run(
            [
                sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=0",
                f"--port={port}", f"--ray-client-server-port={port + 1}",
                f"--min-worker-port={port + 10}", f"--max-worker-port={port + 90}",
                "--include-dashboard=false", "--disable-usage-stats",
                f"--object-store-memory={100 << 20}", f"--autoscaling-config={config}",
            ],
            env={
                **os.environ,
                "RAY_TMPDIR": str(program.home),
                "RAY_AUTH_MODE": "disabled",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": _HEAD,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD,
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            },
            check=True,
        )  # fmt: skip
        joined = ("--output", tmp_path / "out", "--ray-address", f"{HOST}:{port}")
        ended = program.run(
            "score", inputs, *settings, *joined, "--workers", "2", "--json",
            RAY_AUTH_MODE="disabled",
        )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    assert ended.json["rows_scored"] == 40
