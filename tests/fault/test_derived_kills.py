"""`select` and `normalize` killed at random, and run twice at once: the output ends in the same
bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
SHARDS = 30
SHARD_ROWS = 200
COMMANDS = {
    "select": ("--best", "1", "--worst", "1", "--group-by", "prompt"),
    "normalize": ("--by", "prompt"),
}


def _scored(folder: Path) -> Path:
    chance = random.Random(1)
    folder.mkdir()
    for shard in range(SHARDS):
        numbers = range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
        rows = {
            "prompt": [f"question {chance.randrange(900)}" for _ in numbers],
            "response": [f"answer {number}" for number in numbers],
            "score": [chance.choice([0.0, 0.5, 1.0, None]) for _ in numbers],
            "score_error": pa.nulls(SHARD_ROWS, pa.string()),
        }
        pq.write_table(pa.table(rows), folder / f"{shard:03}.parquet")
    return folder


def _start(command: str, scored: Path, output: Path) -> subprocess.Popen[bytes]:
    words = (command, str(scored), "--output", str(output), *COMMANDS[command], "--json")
    return subprocess.Popen(
        [sys.executable, "-m", "batch_scorer", *words],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def _bytes(output: Path) -> dict[str, bytes]:
    """What was written, by name."""
    files = [path for path in output.rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_an_output_killed_at_random_ends_in_the_same_bytes(
    kills: int, command: str, tmp_path: Path
) -> None:
    scored = _scored(tmp_path / "scored")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    assert _start(command, scored, whole).wait() == 0
    whole_s = time.monotonic() - start
    chance = random.Random(2)
    for _ in range(kills):
        process = _start(command, scored, killed)
        time.sleep(whole_s * chance.uniform(0.3, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _start(command, scored, killed).wait() == 0
    assert _bytes(killed) == _bytes(whole)


@pytest.mark.parametrize("command", COMMANDS)
def test_two_runs_at_once_end_in_the_same_bytes(command: str, tmp_path: Path) -> None:
    scored = _scored(tmp_path / "scored")
    both = [_start(command, scored, tmp_path / "out") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert _start(command, scored, tmp_path / "alone").wait() == 0
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "alone")
