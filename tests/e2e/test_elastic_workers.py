"""A range of workers: their number follows the cluster."""

import os
import sys
from pathlib import Path

import pytest

from cluster.local.local_cluster import local_cluster
from tests.helpers.inputs import pairs, parquet
from tests.helpers.program import Program, Running, wait_until
from tests.helpers.ray_nodes import nodes

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SHARDS, SHARD_ROWS = 12, 4


def test_a_worker_starts_on_a_node_that_joins_and_scores_shards(
    program: Program, tiny_model: Path, tmp_path: Path
) -> None:
    """No shard is done before a worker of each node has one."""
    inputs, notes = tmp_path / "in", tmp_path / "notes"
    inputs.mkdir()
    notes.mkdir()
    for number in range(SHARDS):
        table = pairs(SHARD_ROWS, SHARD_ROWS * number)
        (inputs / f"{number:02}.parquet").write_bytes(parquet(table))
    settings = (
        "score", inputs, "--model", tiny_model, "--backend", "fake", "--dtype", "float32",
        "--device", "cuda", "--json",
    )  # fmt: skip
    with local_cluster(nodes=2, cpus=2, gpus=1) as cluster:
        first, second = cluster.nodes
        second.kill()
        wait_until(lambda: nodes(cluster)[second.name][0]["state"] == "DEAD", "the node is gone")
        command = (*settings, "--output", tmp_path / "elastic", "--workers", "1..2")
        run = Running(
            [sys.executable, "-m", "tests.e2e.elastic_run", *map(str, command)],
            {**os.environ, **cluster.environment, "ELASTIC_NOTES": str(notes)},
            cluster.folder,
        )
        wait_until(lambda: run.is_over or any(notes.iterdir()), "a shard is being scored")
        assert not run.is_over, run.said()
        second.start()
        ended = run.wait()
        assert ended.exit_code == 0, ended.err
        ids = {
            name: next(node["node_id"] for node in found if node["state"] == "ALIVE")
            for name, found in nodes(cluster).items()
        }
    scored = {file.name: len(file.read_text().splitlines()) for file in notes.iterdir()}
    assert set(scored) == {ids[first.name], ids[second.name]}
    assert sum(scored.values()) == SHARDS
    assert ended.json["rows_scored"] == SHARDS * SHARD_ROWS
    assert ended.json["metrics"]["workers"] == 2
    alone = program.run(*settings, "--output", tmp_path / "alone", "--no-ray")
    assert alone.exit_code == 0, alone.err
    assert len(_shards(tmp_path / "alone")) == SHARDS
    assert _shards(tmp_path / "elastic") == _shards(tmp_path / "alone")


def _shards(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.glob("*.parquet")}
