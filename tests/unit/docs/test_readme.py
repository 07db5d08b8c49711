"""What README and the package's face show works as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset as ds

from tests.helpers.inputs import pairs, parquet
from tests.helpers.tiny import tiny_reward_model

ROOT = Path(__file__).parents[3]
ROWS = 12


def run(code: str, folder: Path) -> None:
    """In a Python of its own."""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert ended.returncode == 0, f"{code}\n{ended.stderr}"


def test_the_snippets_of_the_readme_run(tmp_path: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippets) >= 2
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.parquet").write_bytes(parquet(pairs(ROWS)))
    tiny_reward_model(tmp_path / "rm")
    for snippet in snippets:  # in the order of the page: one reads what another has scored
        here = snippet.replace('"/models/rm"', '"rm"')
        run(here.replace('output="scored/"', 'output="scored/", use_ray=False'), tmp_path)
    scored = ds.dataset(tmp_path / "scored", format="parquet").to_table()
    assert scored.num_rows == ROWS and scored["score_error"].null_count == ROWS


def test_the_snippets_of_the_python_page_run(tmp_path: Path) -> None:
    """And after them that of metrics.md, which reads what a run has left."""
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.parquet").write_bytes(parquet(pairs(ROWS)))
    tiny_reward_model(tmp_path / "rm")
    for page in ("python.md", "metrics.md"):
        text = (ROOT / "docs" / page).read_text()
        for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            here = snippet.replace('"/models/rm"', '"rm"')
            run(here.replace('output="scored/"', 'output="scored/", use_ray=False'), tmp_path)


_NO_MODULE = """
import importlib, pkgutil, sys
from types import ModuleType
import batch_scorer

def expect_no_module(names, after):
    for name in names:
        found = getattr(sys.modules["batch_scorer"], name)
        assert callable(found) and not isinstance(found, ModuleType), (name, "after", after)
"""


def test_public_names_stay_what_they_are_whichever_is_used_first(tmp_path: Path) -> None:
    """`batch_scorer.verify` was a function once, and from the second look-up on a module."""
    code = """
names_by_home = {}  # the module that using one of them imports
for name in batch_scorer.__all__:
    names_by_home.setdefault(batch_scorer._HOMES[name], []).append(name)
for first in names_by_home.values():
    for name in [name for name in sys.modules if name.partition(".")[0] == "batch_scorer"]:
        del sys.modules[name]
    importlib.import_module("batch_scorer")
    expect_no_module([*first, *batch_scorer.__all__, *first], first)
"""
    run(_NO_MODULE + code, tmp_path)


def test_public_names_stay_what_they_are_once_their_modules_are_imported(tmp_path: Path) -> None:
    code = """
for home in batch_scorer._HOMES.values():
    importlib.import_module(f"batch_scorer.{home}")
for module in pkgutil.iter_modules(batch_scorer.__path__):
    importlib.import_module(f"batch_scorer.{module.name}")
expect_no_module(batch_scorer.__all__, "all of them")
"""
    run(_NO_MODULE + code, tmp_path)
