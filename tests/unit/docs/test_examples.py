"""The example scripts run, here on tiny models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples import skywork_reference

ROOT = Path(__file__).parents[3]


def test_every_published_skywork_score_is_known() -> None:
    published = skywork_reference.published()
    assert published["Skywork/Skywork-Reward-Llama-3.1-8B"] == {"right": 12.625, "wrong": -15.25}
    assert published["Skywork/Skywork-Reward-Gemma-2-27B-v0.2"]["right"] == 4.59375
    assert len(published) >= 5 and all(len(scores) == 2 for scores in published.values())


@pytest.mark.parametrize(
    ("value", "allowed"), [(23.0, 0.125), (-15.25, 0.0625), (4.6, 0.03125), (0.5, 0.02)]
)
def test_the_tolerance_is_one_step_of_bfloat16(value: float, allowed: float) -> None:
    assert skywork_reference.tolerance(value) == allowed


def test_the_example_is_scored_and_set_beside_what_was_published(tiny_model: Path) -> None:
    name = "Skywork/Skywork-Reward-Llama-3.1-8B"
    ended = subprocess.run(
        [sys.executable, ROOT / "examples" / "skywork_reference.py", f"{name}={tiny_model}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith(name)]
    assert [line.split()[1:3] for line in lines] == [["right", "12.6250"], ["wrong", "-15.2500"]]
    assert ended.returncode == 1 and all(line.endswith("differs") for line in lines)
