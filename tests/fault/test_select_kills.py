"""`select` killed at random, and run twice at once: the output ends in the same bytes."""

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

from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.select import select

ROOT = Path(__file__).parents[2]
SHARDS = 30
SHARD_ROWS = 200
RUN = """
import sys
from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.select import select
select([sys.argv[1]], sys.argv[2], Selection(best=1, worst=1, group_by=("prompt",)))
"""


def _scored(folder: Path) -> Path:
    chance = random.Random(1)
    folder.mkdir()
    for shard in range(SHARDS):
        numbers = range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)
        rows = {
            "prompt": [f"question {chance.randrange(900)}" for _ in numbers],
            "response": [f"answer {number}" for number in numbers],
            "score": [chance.choice([0.0, 0.5, 1.0, None]) for _ in numbers],
        }
        pq.write_table(pa.table(rows), folder / f"{shard:03}.parquet")
    return folder


def _start(scored: Path, output: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(scored), str(output)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def _bytes(output: Path) -> dict[str, bytes]:
    """What was written, by name."""
    files = [path for path in output.rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_selection_killed_at_random_ends_in_the_same_bytes(kills: int, tmp_path: Path) -> None:
    scored = _scored(tmp_path / "scored")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    assert _start(scored, whole).wait() == 0
    whole_s = time.monotonic() - start
    chance = random.Random(2)
    for _ in range(kills):
        process = _start(scored, killed)
        time.sleep(whole_s * chance.uniform(0.3, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _start(scored, killed).wait() == 0
    assert _bytes(killed) == _bytes(whole)


def test_two_selections_at_once_end_in_the_same_bytes(tmp_path: Path) -> None:
    scored = _scored(tmp_path / "scored")
    both = [_start(scored, tmp_path / "out") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    selection = Selection(best=1, worst=1, group_by=("prompt",))
    select([str(scored)], str(tmp_path / "alone"), selection)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "alone")
