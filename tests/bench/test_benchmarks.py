"""That the benchmarks still run, agree on the scores and end in JSON; never how fast."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from batch_scorer.backends.device import CPU_ENVIRONMENT
from tests.helpers.program import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
SCRIPTS = sorted(file.stem for file in BENCHMARKS.glob("*.py") if file.stem != "common")

# Each starts Ray or an engine several times, which takes half a minute and more.
LEFT_TO_SLOW = {
    *("end_to_end", "engines", "judges", "numerics", "plans", "scaling", "shards", "starts"),
    *("small_shards", "workers", "written_tokens"),
}

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=pytest.mark.slow if script in LEFT_TO_SLOW else ())
        for script in SCRIPTS
    ],
)
def test_it_runs_and_its_last_line_is_json(script: str, ray_home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", "--tiny"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, **CPU_ENVIRONMENT, "RAY_TMPDIR": str(ray_home)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tiny"] is True
    assert result["machine"]["cores"] == os.cpu_count()
    assert '"sound": false' not in done.stdout


def test_every_benchmark_has_its_line_in_the_readme() -> None:
    readme = (BENCHMARKS / "README.md").read_text()
    assert [script for script in SCRIPTS if f"`{script}.py`" not in readme] == []
