"""How many workers a job has."""

from pathlib import Path

from batch_scorer.config import load_config
from batch_scorer.pipeline.session import num_workers
from batch_scorer.runs.derive import derive, look_at_model


def test_a_served_judge_is_asked_by_one_worker_whatever_the_cluster_has(tmp_path: Path) -> None:
    """Its limits hold for the job. Other jobs ask Ray, which does not run here."""
    config = load_config(
        model="judge", task="judge", judge="sfr_grade", backend="endpoint",
        endpoint="http://localhost/v1", inputs=(str(tmp_path),), output=str(tmp_path / "out"),
    )  # fmt: skip
    assert config.use_ray
    assert num_workers(derive(config, look_at_model(config))) == 1
