"""A run that finds everything done loads none of what it would take to do it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.inputs import pairs, parquet
from tests.helpers.program import REPOSITORY
from tests.helpers.tiny import TEMPLATE, tiny_reward_model

HEAVY = ("torch", "transformers", "tokenizers", "ray", "pandas", "vllm", "huggingface_hub")

PROGRAM = f"""
import atexit, sys
from batch_scorer.cli import main
atexit.register(lambda: print("loaded:", *(n for n in {HEAVY!r} if n in sys.modules)))
main()
"""


class Place:
    """A model, some pairs, and a cache of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_reward_model(folder / "model")
        (folder / "in").mkdir()
        (folder / "in" / "2026-11-20.parquet").write_bytes(parquet(pairs(6)))

    def run(self, command: str, *arguments: str, **environment: str) -> tuple[Any, list[str]]:
        """What the command prints as JSON, and which of the heavy libraries it has loaded."""
        inputs, output = self.folder / "in", self.folder / command
        given = [command, inputs, "--output", output, "--model", self.model, "--json", *arguments]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *map(str, given)],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache"), **environment},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        printed, loaded = done.stdout.splitlines()
        return json.loads(printed), loaded.split()[1:]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("command", ["score", "nightly"])
def test_it_loads_no_library_of_models(place: Place, command: str) -> None:
    first, loaded = place.run(command, "--no-ray")
    assert "torch" in loaded
    again, loaded = place.run(command)  # with Ray, had there been anything to do
    assert loaded == []
    if command == "score":
        assert again["rows_scored"] == first["rows_scored"] == 6
    else:
        assert first["night"]["night"] == 1 and again["night"] is None


def test_another_template_is_seen(place: Place) -> None:
    place.run("score", "--no-ray")
    file = place.model / "chat_template.jinja"
    assert file.read_text() == TEMPLATE
    file.write_text(TEMPLATE.replace("<|im_end|>\n", "<|im_end|>\n\n"))
    with pytest.raises(AssertionError, match="template_probe"):
        place.run("score")


def test_a_second_start_loads_no_library_of_models_where_it_plans(
    place: Place, ray_home: Path
) -> None:
    """Neither to know the model nor to choose the gate's sample."""
    place.run("score", "--no-ray")
    shutil.rmtree(place.folder / "score")
    again, loaded = place.run("score", RAY_TMPDIR=str(ray_home))
    assert again["rows_scored"] == 6 and again["parity"]["agrees"]
    assert loaded == ["ray", "pandas"]  # Ray Data brings pandas
