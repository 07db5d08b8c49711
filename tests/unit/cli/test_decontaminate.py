"""The command `decontaminate`."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from batch_scorer.cli.commands import app
from batch_scorer.errors import ConfigError


def call(folder: Path, *flags: str) -> list[str]:
    (folder / "in").mkdir()
    pq.write_table(pa.table({"prompt": ["What is it?", "b"]}), folder / "in/a.parquet")
    (folder / "eval.jsonl").write_text('{"question": "what is it"}\n')
    where = ["--against", str(folder / "eval.jsonl"), "--output", str(folder / "out")]
    return ["decontaminate", str(folder / "in"), *where, *flags]


def test_the_flags_are_the_recipe(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, call(tmp_path, "--match", "exact", "--json"))
    assert done.exception is None
    found = json.loads(done.stdout)
    assert (found["rows"], found["removed"], found["totals"]["rows_written"]) == (2, 1, 1)
    record = json.loads((tmp_path / "out/_batch_scorer/derived.json").read_text())
    assert record["recipe"]["match"] == "exact"


def test_a_wrong_choice_is_refused_by_name(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, call(tmp_path, "--match", "fuzzy"))
    assert isinstance(done.exception, ConfigError)
    with pytest.raises(ConfigError, match="match"):
        raise done.exception
