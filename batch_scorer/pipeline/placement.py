"""On which nodes of a cluster the devices of a scoring worker are.

A worker's devices are those of one node where a node has enough of them: then Ray gives them to
the worker's process, and vLLM starts its own processes there. Otherwise only the devices of a stage
are on one node, and vLLM starts its processes over Ray. The worker then holds no device itself: it
reserves them in a placement group. Ray 2.60 still held a dead worker's group after a minute, so
a worker that is started again first gives up what it had, and a run gives up all at its end.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from batch_scorer.config import Config
from batch_scorer.errors import ConfigError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

log = logging.getLogger("batch_scorer")

_NODE_LABEL = "ray.io/node-id"
_PLACED_S = 30.0
"""Seconds after which a reservation is given up: another worker took the devices in between, or
other nodes have come."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How many workers fit into a cluster, and whether each lies on several nodes."""

    workers: int
    over_nodes: bool = False


def layout_of(gpus: Sequence[int], *, tensor: int, stages: int) -> Layout:
    """The layout on nodes with so many GPUs each; a stage's `tensor` GPUs are those of one node.

    Raises ConfigError where not one worker fits.
    """
    if workers := sum(count // (tensor * stages) for count in gpus):
        return Layout(workers)
    if workers := sum(count // tensor for count in gpus) // stages:
        return Layout(workers, over_nodes=True)
    nodes = " + ".join(map(str, sorted(gpus, reverse=True))) or "none"
    if max(gpus, default=0) < tensor:
        raise ConfigError(
            f"tensor_parallel: {tensor} GPUs of one node are asked for, and the nodes have "
            f"{nodes}; lower it and raise pipeline_parallel, whose stages may be on several nodes"
        )
    raise ConfigError(
        f"pipeline_parallel: {stages} stages of {tensor} GPUs are asked for, and the nodes have "
        f"{nodes}; lower it, or add nodes"
    )


def stages_on(free: Mapping[str, int], *, tensor: int, stages: int) -> list[str] | None:
    """The node of each stage, where the nodes have so many GPUs free: those with most come first,
    so that few nodes are used. None where there are too few."""
    chosen: list[str] = []
    for node in sorted(free, key=lambda node: (-free[node], node)):
        chosen += [node] * min(free[node] // tensor, stages - len(chosen))
    return chosen if len(chosen) == stages else None


def cluster_layout(config: Config) -> Layout:
    """The layout of a job's workers on the GPUs of the cluster that Ray has joined.

    With the setting `workers`, nodes that fit may still come, where no worker fits now. Raises
    ConfigError.
    """
    tensor, stages = config.tensor_parallel, config.pipeline_parallel
    try:
        return layout_of(list(_gpus().values()), tensor=tensor, stages=stages)
    except ConfigError:
        if config.workers is None:
            raise
        return Layout(0)


def beside_gpus() -> dict[str, Any]:
    """What a process asks of Ray that has to run on a node with GPUs, and holds none: vLLM looks at
    the node that it is started on."""
    without = [node for node, count in _gpus().items() if not count]
    # Nodes that come later are welcome, so the selector names those that will not do.
    return {"label_selector": {_NODE_LABEL: f"!in({','.join(without)})"}} if without else {}


def reserve(config: Config) -> "PlacementGroup":
    """A bundle for each of this worker's GPUs, those of a stage on one node; waits for them.

    Torch sees no GPU in this process from now on: those of its node are others'.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The same after a restart; a task has none, and is not started again.
    worker = f"{_groups_of_run()}{ray.get_runtime_context().get_actor_id()}/"
    _give_up(worker)
    tensor, stages = config.tensor_parallel, config.pipeline_parallel
    while True:
        nodes = stages_on(_free_gpus(), tensor=tensor, stages=stages)
        # Where there is no room yet, the reservation shows an autoscaler what is missing.
        pins = [{_NODE_LABEL: node} for node in nodes or () for _ in range(tensor)]
        group = placement_group(
            [{"GPU": 1.0}] * (tensor * stages),
            strategy="PACK",
            name=f"{worker}{uuid4().hex}",
            bundle_label_selector=pins or None,
        )
        if group.wait(_PLACED_S):
            log.info("a worker's stages are on the nodes %s", nodes)
            return group
        remove_placement_group(group)


def give_up_all() -> None:
    """Free what the workers of this run have reserved."""
    _give_up(_groups_of_run())


def _groups_of_run() -> str:
    """How the names of its placement groups begin."""
    import ray

    return f"batch_scorer/{ray.get_runtime_context().get_job_id()}/"


def _give_up(beginning: str) -> None:
    from ray.util import get_placement_group, placement_group_table, remove_placement_group

    for group in placement_group_table().values():
        if group["name"].startswith(beginning) and group["state"] != "REMOVED":
            remove_placement_group(get_placement_group(group["name"]))


def _gpus() -> dict[str, int]:
    """The GPUs of each node that is up."""
    import ray

    nodes = (node for node in ray.nodes() if node["Alive"])
    return {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes}


def _free_gpus() -> dict[str, int]:
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()  # Ray has it by node in no public function
    return {node: int(resources.get("GPU", 0)) for node, resources in free.items()}
