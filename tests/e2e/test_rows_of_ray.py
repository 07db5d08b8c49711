"""Rows of a Ray dataset in memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
CODE = """
import sys
import ray
from batch_scorer import score_rows
from tests.helpers.inputs import pairs

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
rows = ray.data.from_arrow([pairs(3), pairs(0), pairs(4, start=3)])
settings = {"model": sys.argv[1], "backend": "fake"}
found = score_rows(rows, **settings)
assert isinstance(found, ray.data.Dataset)
by_source = lambda row: row["chosen"][0]["content"]
expected = score_rows(pairs(7), **settings).to_pylist()
assert sorted(found.take_all(), key=by_source) == sorted(expected, key=by_source)
"""


def test_a_ray_dataset_stays_one(ray_home: Path, tiny_model: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CODE, str(tiny_model)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(ray_home)},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
