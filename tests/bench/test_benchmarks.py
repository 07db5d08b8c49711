"""That the benchmarks still run and end in JSON; never how fast."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["end_to_end.py", "numerics.py"]

pytestmark = pytest.mark.e2e


def test_no_benchmark_is_left_out() -> None:
    found = {file.name for file in (ROOT / "benchmarks").glob("*.py")}
    assert found == {*SCRIPTS, "machine.py"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs_and_its_last_line_is_json(script: str, ray_home: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), "--tiny"],
        capture_output=True,
        text=True,
        env={**os.environ, "RAY_TMPDIR": str(ray_home)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tiny"] is True
    assert result["machine"]["cores"] == os.cpu_count()
