"""On which nodes a worker's GPUs are; the same on a real Ray: `make stages`."""

import pytest

from batch_scorer.errors import ConfigError
from batch_scorer.pipeline.placement import Layout, layout_of, stages_on


@pytest.mark.parametrize(
    ("gpus", "tensor", "stages", "layout"),
    [
        ([8, 8, 0], 1, 1, Layout(16)),
        ([8, 8], 8, 1, Layout(2)),
        ([8, 8], 4, 2, Layout(2)),
        ([3, 3], 2, 1, Layout(2)),  # six GPUs, but no pair across nodes
        ([8, 8], 8, 2, Layout(1, over_nodes=True)),
        ([8, 8, 8, 8, 8], 8, 2, Layout(2, over_nodes=True)),
        ([1, 1, 1, 1], 1, 2, Layout(2, over_nodes=True)),
        ([6, 6], 4, 2, Layout(1, over_nodes=True)),
        ([16, 8, 8], 8, 2, Layout(1)),  # on one node where a node has room
    ],
)
def test_a_worker_is_on_one_node_or_stage_by_stage_on_several(
    gpus: list[int], tensor: int, stages: int, layout: Layout
) -> None:
    assert layout_of(gpus, tensor=tensor, stages=stages) == layout


@pytest.mark.parametrize(
    ("gpus", "tensor", "stages", "says"),
    [
        ([4, 4], 8, 1, "tensor_parallel: 8 GPUs of one node are asked for, and the nodes have 4"),
        ([8, 6, 0], 8, 2, "pipeline_parallel: 2 stages of 8 GPUs are asked for, .* 8 . 6 . 0;"),
        ([], 2, 1, "the nodes have none"),
    ],
)
def test_a_worker_that_no_nodes_can_hold_is_refused(
    gpus: list[int], tensor: int, stages: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        layout_of(gpus, tensor=tensor, stages=stages)
    assert "\n" not in str(refused.value)


def test_a_stage_is_never_cut_and_few_nodes_are_used() -> None:
    free = {"a": 2, "b": 7, "c": 8, "d": 0}
    assert stages_on(free, tensor=4, stages=2) == ["c", "c"]
    assert stages_on(free, tensor=4, stages=3) == ["c", "c", "b"]
    assert stages_on(free, tensor=4, stages=4) is None  # 17 GPUs are free, but not four fours
    assert stages_on(free, tensor=2, stages=8) == ["c"] * 4 + ["b"] * 3 + ["a"]
    assert stages_on({}, tensor=1, stages=1) is None
