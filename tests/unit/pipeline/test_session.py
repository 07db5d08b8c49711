"""How many workers a job has, and what each gets."""

from pathlib import Path

import pytest

from batch_scorer.config import load_config
from batch_scorer.pipeline.session import Pool, cpus_per_worker, pool_of, worker_pool
from batch_scorer.runs.derive import derive, look_at_model


def test_a_served_judge_is_asked_by_one_worker_whatever_the_cluster_has(tmp_path: Path) -> None:
    """Its limits hold for the job. Other jobs ask Ray, which does not run here."""
    config = load_config(
        model="judge", task="judge", judge="sfr_grade", backend="endpoint",
        endpoint="http://localhost/v1", inputs=(str(tmp_path),), output=str(tmp_path / "out"),
    )  # fmt: skip
    assert config.use_ray
    assert worker_pool(derive(config, look_at_model(config))) == Pool(1, 1, 1)


@pytest.mark.parametrize(
    ("bounds", "fit", "pool"),
    [
        (None, 8, Pool(8, 8, 8)),
        ((4, 4), 8, Pool(4, 4, 4)),
        ((4, 4), 1, Pool(4, 4, 4)),  # three wait for nodes
        ((1, 64), 8, Pool(1, 8, 64)),
        ((1, 64), 0, Pool(1, 1, 64)),
        ((2, 4), 8, Pool(2, 4, 4)),
        ((16, 64), 8, Pool(16, 16, 64)),
    ],
)
def test_a_run_starts_with_what_fits_between_its_bounds(
    bounds: tuple[int, int] | None, fit: int, pool: Pool
) -> None:
    assert pool_of(bounds, fit) == pool
    assert pool.is_elastic == (pool.least < pool.most)


@pytest.mark.parametrize(
    ("machines", "workers", "cpus"),
    [
        ([32.0], 1, 29),
        ([32.0], 2, 14),
        ([32.0, 32.0], 2, 29),
        ([32.0, 32.0], 3, 14),
        ([32.0, 8.0], 1, 5),  # the smallest has to hold one
        ([2.0, 2.0], 1, 1),
    ],
)
def test_workers_share_what_a_machine_can_spare(
    machines: list[float], workers: int, cpus: float
) -> None:
    assert cpus_per_worker(machines, workers) == cpus
