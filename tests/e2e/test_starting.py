"""What a run does while Ray and its workers start, and what becomes of it where that ends early."""

import signal
from pathlib import Path

import pytest

from batch_scorer import Config, score
from batch_scorer.errors import ModelError
from batch_scorer.runs import run
from tests.helpers.inputs import pairs, parquet
from tests.helpers.program import Program, wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name, count in (("a", 5), ("b", 2), ("c", 9)):
        (tmp_path / "in" / f"{name}.parquet").write_bytes(parquet(pairs(count)))
    return tmp_path / "in"


def test_ctrl_c_while_ray_starts_leaves_no_process(
    program: Program, tiny_model: Path, inputs: Path, tmp_path: Path
) -> None:
    running = program.start("score", inputs, "--model", tiny_model, "--output", tmp_path / "out")
    wait_until(
        lambda: running.is_over or any("gcs_server" in c for c in program.processes().values()),
        "Ray is starting",
    )
    assert not running.is_over, running.said()
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.exit_code == 3
    assert "run the same command again to resume" in ended.error
    program.wait_until_gone()


@pytest.mark.parametrize(
    "error", [ModelError("the template refuses all"), ZeroDivisionError("a defect")]
)
def test_workers_that_wait_for_a_sample_hear_that_there_is_none(
    error: Exception,
    tiny_model: Path,
    inputs: Path,
    tmp_path: Path,
    ray_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def choose(*_: object) -> None:
        raise error

    monkeypatch.setenv("RAY_TMPDIR", str(ray_home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(run, "choose_sample", choose)
    config = Config(model=str(tiny_model), inputs=(str(inputs),), output=str(tmp_path / "out"))
    with pytest.raises(type(error), match=str(error)):
        score(config)
    assert list((tmp_path / "out").glob("*.parquet")) == []
