"""What users of other command lines expect of this one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from batch_scorer import evaluate, read_status, verify
from batch_scorer.cli.commands import _checked_here, app
from batch_scorer.errors import ConfigError, OutputError
from tests.helpers.in_process import run_cli

SECRET = "wJalrXUtnFEMI"


def test_the_package_itself_is_the_program() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "batch_scorer", "--version"], capture_output=True, check=True
    )
    assert ended.stdout == subprocess.check_output(
        [sys.executable, "-m", "batch_scorer.cli", "--version"]
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_the_commands(shell: str) -> None:
    words = {"COMP_WORDS": "batch-scorer ver", "COMP_CWORD": "1"}
    typed = {
        "_TYPER_COMPLETE_ARGS": "batch-scorer ver",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_WORD_TO_COMPLETE": "ver",
    }
    environment = {"_BATCH_SCORER_COMPLETE": f"complete_{shell}", **words, **typed}
    shown = CliRunner().invoke(app, [], prog_name="batch-scorer", env=environment).output
    assert "verify" in shown and "status" not in shown


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (["status", "nowhere"], "OutputError", 2),
        (["score", "in", "--model", "m", "--output", "o", "--dtype", "int3"], "ConfigError", 2),
        (["status", "out", "--no-such-flag"], "UsageError", 2),
    ],
)
def test_errors_are_json_where_results_are(
    arguments: list[str], kind: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, ended = run_cli(*arguments), run_cli(*arguments, "--json")
    assert (plain.exit_code, ended.exit_code, ended.out) == (code, code, "")
    failure = json.loads(ended.err.splitlines()[-1])
    assert (failure["error"], failure["exit_code"]) == (kind, code)
    assert failure["message"]
    assert '"error"' not in plain.err


def test_exit_codes_stand_in_the_help() -> None:
    text = " ".join(run_cli("--help").out.split())
    assert "Exit codes: 0 " in text
    for code in (2, 3, 4):
        assert f"; {code} " in text


def test_what_was_meant_for_a_store_is_not_shown() -> None:
    """`--store-option SECRET` was quoted in the message."""
    ended = run_cli("status", "out", "--store-option", SECRET)
    assert ended.exit_code == 2
    assert "--store-option" in ended.err and SECRET not in ended.err


def test_outputs_are_named_with_the_home_folder_and_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    (tmp_path / "out").mkdir()
    where = str(tmp_path / "out")
    for name in ("~/out", "${SCRATCH}/out", where):
        for command in ("status", "verify", "evaluate"):
            assert where in run_cli(command, name).err, (command, name)
        for call in (read_status, verify, evaluate):
            with pytest.raises(OutputError, match=where):
                call(Path(name))  # type: ignore[operator]


def test_a_name_that_holds_the_mark_is_expanded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "${UNSET}").mkdir()
    for command in ("status", "verify", "evaluate", "drift", "plan"):
        ended = run_cli(command, "$${UNSET}")
        assert ended.exit_code == 2
        assert "${UNSET}" in ended.err and "variable" not in ended.err, command


def test_a_job_may_name_what_only_the_cluster_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its variables and its home folder are not this machine's."""
    monkeypatch.delenv("SCRATCH", raising=False)
    (tmp_path / "job.yaml").write_text("model: ${SCRATCH}/m\n")
    words = ["score", "${SCRATCH}/in", "--output", "~/out", "--config", str(tmp_path / "job.yaml")]
    assert _checked_here(words) == (tmp_path / "job.yaml", None, {})
    assert _checked_here(["status", "${SCRATCH}/out"]) == (None, None, {})
    there = [*words, "--reward", "own=${SCRATCH}/own.py:f"]
    assert _checked_here(there) == (tmp_path / "job.yaml", None, {})
    (tmp_path / "own.py").write_text("def f(responses): ...")
    here = [*words, "--reward", f"own={tmp_path}/own.py:f", "--reward", "short=length"]
    _, _, rewards = _checked_here(here)
    assert [*rewards] == ["own", "short"], "all, as flags go in place of the file's"
    with pytest.raises(ConfigError, match="dtype"):
        _checked_here([*words, "--dtype", "int3"])


def test_the_config_file_of_a_job_lies_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "job.yaml").write_text("model: m\ninputs: a\noutput: b\n")
    assert _checked_here(["score", "--config", "~/job.yaml"]) == (tmp_path / "job.yaml", None, {})


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["plan", "in", "--modle", "m"], "--model"),
        (["scor", "in"], "'score'"),
        (["plan", "nowhere"], "nowhere: no such file or folder"),
        (["plan", "bad.jsonl"], "line 1"),
        (["plan", "in", "--config", "nope.yaml"], "no config file at nope.yaml"),
        (["check", "nomodel"], "nomodel: no such model directory"),
        (["plan", "bad.jsonl", "--model", "badmodel"], "no config.json"),
        (["plan", "bad.jsonl", "--model", "bad.jsonl"], "a model is a directory"),
        (["plan", "s3://me:hunter2@host/x"], "docs/security.md"),
        (["status", "https://host/x?sig=hunter2"], "docs/security.md"),
    ],
)
def test_a_newcomers_mistake_is_one_clear_line(
    arguments: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"a":\n')
    (tmp_path / "badmodel").mkdir()
    ended = run_cli(*arguments, "--json")
    assert (ended.exit_code, ended.out) == (2, "")
    message = json.loads(ended.err.splitlines()[-1])["message"]
    assert hint in message and "\n" not in message
    assert "hunter2" not in ended.err
    assert max(message.count(name) for name in ("bad.jsonl", "nowhere", "nope.yaml")) <= 1


def test_a_token_file_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    ended = run_cli("submit", "--token-file", str(tmp_path / "nope"), "--", "status", "o")
    assert ended.exit_code == 2
    assert " ".join(ended.err.split()).count("nope") == 1
