"""Many small shards, several to a work item: each is still committed, refused and resumed alone."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.data import Dataset

from batch_scorer import Config
from batch_scorer.errors import ShardReason
from batch_scorer.records import Receipt
from batch_scorer.runs.remaining import Work
from batch_scorer.runs.run import score
from tests.helpers.inputs import pairs, parquet
from tests.helpers.program import Program, wait_until

pytestmark = pytest.mark.e2e

SHARDS, ROWS = 300, 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    for number in range(SHARDS):
        (folder / f"{number:03}.parquet").write_bytes(parquet(pairs(ROWS, ROWS * number)))
    return folder


@pytest.fixture(scope="module")
def alone(
    inputs: Path,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    module_program: Program,
) -> dict[str, bytes]:
    """What the plain loop makes of them, one after the other."""
    output = tmp_path_factory.mktemp("alone")
    ended = module_program.run(*asked(inputs, output, tiny_model), "--no-ray")
    assert ended.exit_code == 0, ended.err
    return shards(output)


def asked(inputs: Path, output: Path, model: Path) -> tuple[object, ...]:
    return (
        "score", inputs, "--model", model, "--output", output, "--dtype", "float32",
        "--parity-check", "off", "--workers", "1", "--json",
    )  # fmt: skip


def shards(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.glob("*.parquet")}


class Planned:
    """Does something once the work is known."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def planned(self, work: Work) -> None:
        self._act()

    def finished(self, receipt: Receipt) -> None:
        pass


def test_a_shard_that_fails_costs_itself_alone_and_no_worker_reads_what_it_scores(
    inputs: Path, tiny_model: Path, tmp_path: Path, ray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(ray_home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    seen: list[Dataset] = []
    iterate = Dataset.iter_rows

    def watched(dataset: Dataset) -> Any:
        seen.append(dataset)
        return iterate(dataset)

    monkeypatch.setattr(Dataset, "iter_rows", watched)
    doomed = shutil.copytree(inputs, tmp_path / "in") / "150.parquet"
    config = Config(
        model=str(tiny_model),
        inputs=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        parity_check="off",
        workers=2,
    )
    other = parquet(pairs(ROWS, 7))
    summary = score(config, Planned(lambda: doomed.write_bytes(other)))
    (failed,) = (receipt for receipt in summary.receipts if receipt.reason)
    assert (failed.input, failed.reason) == (doomed.name, ShardReason.INPUT_CHANGED)
    assert summary.totals["rows_scored"] == (SHARDS - 1) * ROWS
    stages = seen[0].stats()
    assert "MapBatches(_ScoreStage)" in stages
    assert "_prepare_stage)->" not in stages  # Ray Data joins stages that ask for the same


@pytest.mark.slow
def test_a_run_that_is_killed_is_resumed_and_ends_in_the_bytes_of_the_plain_loop(
    inputs: Path, alone: dict[str, bytes], tiny_model: Path, tmp_path: Path, program: Program
) -> None:
    output = tmp_path / "out"
    command = asked(inputs, output, tiny_model)
    running = program.start(*command)
    wait_until(lambda: running.is_over or shards(output), "a shard is committed")
    assert not running.is_over, running.said()
    running.send(signal.SIGKILL)
    running.wait()
    program.wait_until_gone()
    written = {file: file.stat().st_mtime_ns for file in output.glob("*.parquet")}
    assert 0 < len(written) < SHARDS
    ended = program.run(*command)
    assert ended.exit_code == 0, ended.err
    assert ended.json["rows_scored"] == SHARDS * ROWS
    assert {file: file.stat().st_mtime_ns for file in written} == written
    assert shards(output) == alone
