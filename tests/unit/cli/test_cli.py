import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batch_scorer import cli

ROOT = Path(__file__).parents[3]
PAIRS = ROOT / "tests" / "data" / "formats" / "skywork.parquet"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["batch-scorer", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> Any:
    def score(*arguments: str) -> int:
        needed = ["--model", str(tiny_model), "--output", str(tmp_path / "out"), "--no-ray"]
        return run(monkeypatch, "score", str(PAIRS), *needed, "--backend", "fake", *arguments)

    return score


def test_score_status_and_verify_speak_json(
    score: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert score("--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert (scored["rows"], scored["rows_scored"], scored["complete"]) == (48, 47, True)
    assert run(monkeypatch, "status", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["state"] == "complete"
    assert run(monkeypatch, "verify", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_verify_finds_a_changed_score(
    score: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score() == 0
    file = tmp_path / "out" / "skywork.parquet"
    table = pq.read_table(file)
    index = table.column_names.index("margin")
    changed = table.set_column(index, "margin", [[0.5] * table.num_rows])
    pq.write_table(changed.cast(table.schema).replace_schema_metadata(table.schema.metadata), file)
    capsys.readouterr()
    assert run(monkeypatch, "verify", str(tmp_path / "out")) == 4
    printed = capsys.readouterr().out
    assert "skywork.parquet: its scores are not those that were committed" in printed


def test_verify_finds_missing_strange_and_altered_objects(
    score: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert score() == 0
    (out / "stranger.parquet").write_bytes((out / "skywork.parquet").read_bytes())
    assert run(monkeypatch, "verify", str(out)) == 4
    assert "stranger.parquet: not in the manifest" in capsys.readouterr().out
    (out / "stranger.parquet").unlink()
    table = pq.read_table(out / "skywork.parquet")
    swapped = table.set_column(2, "source", [["x"] * table.num_rows])
    pq.write_table(swapped.replace_schema_metadata(table.schema.metadata), out / "skywork.parquet")
    assert run(monkeypatch, "verify", str(out)) == 4
    assert "column source is not as it was in the input" in capsys.readouterr().out
    (out / "skywork.parquet").unlink()
    assert run(monkeypatch, "verify", str(out)) == 4
    assert "skywork.parquet: missing" in capsys.readouterr().out


def test_plan_needs_no_model_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "plan", str(PAIRS), "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["rows"], made["shards"]) == (48, 1)
    assert made["files"][0]["format"] == "preference_pair"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["score", "plan", "check", "nightly", "evaluate"])
def test_a_command_names_what_it_needs(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"plan": ["inputs"], "evaluate": ["inputs"], "check": ["model"]}
    assert run(monkeypatch, command) == 2
    lines = [f"`{name}` is needed" for name in needed.get(command, ["model", "inputs", "output"])]
    assert capsys.readouterr().err == f"error: {chr(10).join(lines)}\n"


@pytest.mark.parametrize("is_named", [True, False])
def test_check_takes_a_model_as_its_flag_or_first_argument_and_has_a_sample(
    is_named: bool,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_model)] if is_named else [str(tiny_model)]
    names = []
    for inputs in ([], [str(PAIRS)]):
        flags = ["--no-ray", "--device", "cpu", "--dtype", "float32", "--json"]
        assert run(monkeypatch, "check", *model, *inputs, *flags) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["model"]["model"] == str(tiny_model)
        names.append(found["parity"]["compared"][0]["name"])
    assert "skywork" in names[1] and names[0] != names[1]
    assert list(tmp_path.iterdir()) == []


def test_plan_tells_the_tokens_that_a_run_then_finds(
    score: Any,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "plan", str(PAIRS), "--model", str(tiny_model), "--json") == 0
    estimate = json.loads(capsys.readouterr().out)["estimate"]
    assert score("--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert (estimate["sampled_rows"], estimate["row_tokens"]) == (48, scored["tokens"])
    assert 0 < estimate["computed_tokens"] < estimate["row_tokens"] and estimate["flop"] > 0


def test_settings_come_from_a_file_with_flags_on_top(
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        f"model: {tiny_model}\ninputs: [{PAIRS}]\noutput: {tmp_path / 'out'}\n"
        "backend: fake\nuse_ray: false\ncolumn_prefix: a_\n"
    )
    assert run(monkeypatch, "score", "--config", str(file), "--column-prefix", "b_") == 0
    assert "b_margin" in pq.read_schema(tmp_path / "out" / "skywork.parquet").names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--column", "chosen"], "error: --column: expected FIELD=COLUMN, got 'chosen'"),
        (["--quantization", "fp8"], "error: quantization: the fake backend does not take it"),
        (["--column", "chosen=chosn"], "chosen"),
        (["--shard-rows", "0"], "greater than 0"),
        (["--dtype", "int4"], "'bfloat16', 'float32' or 'float16'"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    score: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert score(*arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert "Traceback" not in shown


def test_an_unknown_flag_is_refused(score: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert score("--token-buget", "5") == 2
    assert "--token-budget" in capsys.readouterr().err
