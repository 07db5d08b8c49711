"""Scoring workers, nodes, drivers and whole clusters are lost; no row is.

On a real cluster of five nodes, with one scoring worker for each fake GPU and an engine that only
takes time. Moments of kills come from a seed, which is printed.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.local.local_cluster import Cluster
from cluster.local.seaweed import S3Server
from tests.fault.fleet import (
    SCORE_S,
    SHARD_ROWS,
    SHARDS,
    Fleet,
    fleet_on,
    lose,
    owner_of_port,
    scoring_workers,
)
from tests.fault.proxy import Faults, Kind
from tests.helpers.program import end_processes, temporary_ray_home, wait_until

pytestmark = pytest.mark.fault

SEED = int(os.environ.get("SEED", "5"))
WORKER_KILLS = 4
HELD_SHARD = f"rows{SHARD_ROWS * (SHARDS // 2)}-"
LAST_SHARD = f"rows{SHARD_ROWS * (SHARDS - 1)}-"
HOLD_S = 100.0
"""At most: whoever uploads it is killed meanwhile. Less than the client waits for an answer."""


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, s3: S3Server, tiny_model: Path) -> Iterator[Fleet]:
    with fleet_on(cluster, s3, tiny_model) as made:
        yield made


def test_nodes_are_lost_while_a_run_plans_loads_scores_and_uploads(
    fleet: Fleet, tmp_path: Path
) -> None:
    """Each comes back later, as new machines do."""
    output, gate = "nodes-lost", tmp_path / "may-load"
    holding = Faults((Kind.STALL,), SEED, burst=1, burst_within=1, stall_s=HOLD_S, only=HELD_SHARD)
    with fleet.proxy.breaking(holding):
        run = fleet.start(output, gate=gate)
        fleet.wait_for_record(output, "plan.json", run)
        nodes = fleet.free_nodes(run)
        lose(nodes[0])

        wait_until(lambda: any(map(scoring_workers, nodes[1:])), "a worker loads its model")
        assert fleet.committed(output) == 0
        loading = next(node for node in nodes[1:] if scoring_workers(node))
        lose(loading)
        gate.touch()

        fleet.wait_for_shards(output, 3, run)
        wait_until(lambda: any(map(scoring_workers, nodes)), "a worker is there")
        lose(next(node for node in nodes if scoring_workers(node)))

        wait_until(lambda: fleet.proxy.injected or run.is_over, "an upload is held back")
        assert fleet.proxy.injected, run.said()
        uploading = owner_of_port(fleet.proxy.injected[0].client_port, nodes)
        if uploading is not None:  # otherwise it uploads where the driver is
            lose(uploading)
        ended = run.wait()
    for node in nodes:
        node.wait_until_up()
    assert not fleet.judge(output, ended).problems
    assert uploading is not None


@pytest.mark.slow  # the drill does so too
def test_workers_are_killed_at_any_moment_and_a_node_is_lost_for_good(fleet: Fleet) -> None:
    output = "workers-killed"
    moments = random.Random(SEED)
    run = fleet.start(output)
    fleet.wait_for_shards(output, 1, run)
    nodes = fleet.free_nodes(run)
    print(f"SEED={SEED}")
    for _ in range(WORKER_KILLS):
        time.sleep(moments.uniform(0, 2 * SCORE_S))
        workers = [pid for node in nodes for pid in scoring_workers(node)]
        if workers:
            with suppress(ProcessLookupError):
                os.kill(moments.choice(workers), signal.SIGKILL)
    lost = moments.choice([node for node in nodes if scoring_workers(node)] or nodes)
    lost.kill()
    assert not run.is_over, run.said()
    ended = run.wait()
    lost.start()
    assert not fleet.judge(output, ended).problems


@pytest.mark.slow
def test_a_cluster_that_is_lost_with_its_driver_is_replaced_by_another(fleet: Fleet) -> None:
    """Everything of the first is killed by its process id when nine tenths are done; the next run,
    on another cluster and on another kind of device, scores the last tenth."""
    output, done = "cluster-lost", SHARDS * 9 // 10
    with temporary_ray_home() as home, fleet.proxy.holding(LAST_SHARD):
        run = fleet.start(output, {"RAY_TMPDIR": str(home)})
        fleet.wait_for_shards(output, done, run)
        end_processes(home)
        assert run.wait().exit_code == -signal.SIGKILL
    before = fleet.place(output).shards()
    assert done <= len(before) < SHARDS

    again = fleet.start(output).wait()
    assert not fleet.judge(output, again).problems
    after = fleet.place(output).shards()
    assert {key: after[key] for key in before} == before
    scored = sum(shard.commit.tokens for key, shard in after.items() if key not in before)
    assert again.json["metrics"]["scored_tokens"] == scored
