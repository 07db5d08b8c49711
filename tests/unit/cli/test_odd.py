"""What is odd in a folder, an input or an output costs that one thing, and is said in a line."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs with two more columns of one name, NaN in one; and an entry that leads nowhere."""
    made = tmp_path / "in"
    made.mkdir()
    table = pairs(2)
    for column in ([float("nan"), 1.0], ["a", "b"]):
        table = table.append_column("extra", pa.array(column))
    (made / "a.parquet").write_bytes(parquet(table))
    (made / "b.parquet").symlink_to("nowhere")
    return made


def test_the_other_files_are_scored_and_verified(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["score", folder, "--model", tiny_model, "--output", out, "--no-ray"]
    ended = run_cli(*command, "--backend", "fake")
    assert ended.exit_code == 3
    (failed,) = json.loads(run_cli("status", out, "--json").out)["failed"]
    assert (failed["input"], failed["reason"]) == ("b.parquet", "unreadable_file")
    assert "cannot be followed" in failed["detail"]
    assert (out / "a.parquet").exists()
    report = json.loads(run_cli("verify", out, "--json").out)
    assert (report["problems"], report["rows_scored"]) == ([], 2)
    assert any("b.parquet" in line for line in report["unfinished"])

    (folder / "b.parquet").unlink()
    assert run_cli(*command, "--backend", "fake").exit_code == 0
    assert run_cli("verify", out).exit_code == 0
    (out / "_batch_scorer" / "run.json").write_text("[1]")
    ended = run_cli("verify", out)
    assert (ended.exit_code, "run.json: damaged" in ended.out) == (4, True)
    for command in (["status", out], ["score", folder, "--config", out]):
        ended = run_cli(*command)
        assert (ended.exit_code, ended.err.count("\n")) == (2, 1)


@pytest.mark.parametrize("command", ["status", "verify", "drift", "doctor", "evaluate"])
@pytest.mark.parametrize("path", ["a\nb", "a\x1b[0mb", "", "file"])
def test_an_output_that_cannot_be_named_is_one_line(
    command: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    ended = run_cli(command, path)
    assert (ended.exit_code, ended.err.count("\n")) == (2, 1)
    assert ended.err.isprintable() or ended.err[:-1].isprintable()
