"""An item that ends its worker whenever it is scored costs that item and nothing else."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inputs import pairs, parquet
from places import Place

from batch_scorer import Config, pipeline
from batch_scorer.backends.base import EngineDied
from batch_scorer.backends.fake import FakeBackend
from batch_scorer.errors import ShardReason
from batch_scorer.records import Scores, TokenizedRows
from batch_scorer.run import score as run_score

pytestmark = pytest.mark.fault

POISON_ROWS = 3
POISON_S, NEIGHBOUR_S = 0.3, 1.0
"""How long they keep a worker busy: a neighbour in the same worker is begun when it ends."""


@pytest.fixture
def private_ray(ray_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_TMPDIR", str(ray_home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    import ray

    ray.shutdown()


def poisoned_stage(engine_dies: bool) -> type:
    """The scoring stage with a backend that a shard of `POISON_ROWS` rows ends.

    The process goes down with it, or only the engine in it, which says so.
    """

    class PoisonedBackend(FakeBackend):
        def score(self, rows: TokenizedRows) -> Scores:
            if rows.num_rows == POISON_ROWS:
                time.sleep(POISON_S)
                if engine_dies:
                    raise EngineDied("out of order")
                os._exit(1)
            time.sleep(NEIGHBOUR_S)
            return super().score(rows)

    class PoisonedStage(pipeline._ScoreStage):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self._scorer._backend = PoisonedBackend()

    return PoisonedStage


@pytest.mark.usefixtures("private_ray")
@pytest.mark.parametrize("engine_dies", [False, True], ids=["process", "engine"])
def test_a_shard_that_ends_every_worker_fails_alone(
    engine_dies: bool, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(str(tmp_path))
    # Longest first: the poison comes in the middle.
    files = {f"{rows}.parquet": parquet(pairs(rows)) for rows in (1, 2, POISON_ROWS, 4, 5)}
    (place / "in").write(files)
    monkeypatch.setattr(pipeline, "_ScoreStage", poisoned_stage(engine_dies))
    config = Config(
        model=str(tiny_model),
        inputs=((place / "in").url,),
        output=(place / "out").url,
        backend="fake",
        attempts=2,
    )
    summary = run_score(config)
    failed = [receipt for receipt in summary.receipts if receipt.commit is None]
    assert [(r.input, r.reason) for r in failed] == [("3.parquet", ShardReason.WORKER_DIED)]
    assert "2" in failed[0].detail
    totals = summary.totals
    assert (totals["rows"], totals["rows_scored"], totals["rows_failed"]) == (15, 12, POISON_ROWS)
    assert sorted((place / "out").shards()) == ["1.parquet", "2.parquet", "4.parquet", "5.parquet"]
