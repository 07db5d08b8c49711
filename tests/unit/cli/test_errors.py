"""Messages show others' text as it is: names that look like Rich's markup or emoji."""

from pathlib import Path

import pytest

from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet

NAME = "a[/INST]b[math]:smile:[bold]"
NOWHERE = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", NAME, "--model", "MODEL", "--output", "out"],
        ["score", "in", "--model", NAME, "--output", "out"],
        ["score", "in", "--model", "MODEL", "--output", "out", "--adapter", NAME],
        ["score", "in", "--model", "MODEL", "--output", "out", "--dtype", NAME],
        ["score", "in", "--model", "MODEL", "--output", "out", "--column", NAME],
        ["score", "in", "--model", "MODEL", "--output", "out", "--column", f"chosen={NAME}"],
        ["score", "in", "--model", "MODEL", "--output", "out", "--store-option", f"token{NAME}=1"],
        ["score", "in", "--model", "MODEL", "--output", f"file/{NAME}"],
        ["score", "--config", NAME],
        ["score", "--config", f"file/{NAME}"],
        ["score", f"--{NAME}"],
        ["plan", NAME],
        ["plan", "in", "--config", "bad.yaml"],
        ["check", NAME],
        ["check", "MODEL", NAME],
        ["nightly", "in", "--model", f"b={NAME}", "--output", "out"],
        ["nightly", "in", "--model", "MODEL", "--output", "out", "--since", NAME],
        ["evaluate", NAME],
        ["evaluate", "in", "--benchmark", NAME],
        ["status", NAME],
        ["verify", NAME],
        ["drift", NAME],
        ["submit", "--address", NOWHERE, "--", NAME],
        ["submit", "--address", NAME, "--", "status", "out"],
        ["submit", "--address", NOWHERE, "--tag", NAME, "--", "status", "out"],
        ["submit", "--address", NOWHERE, "--token-file", NAME, "--", "status", "out"],
        ["submit", "--address", NOWHERE, "--", "score", "in", "--dtype", NAME],
        [NAME],
    ],
    ids=lambda arguments: " ".join(arguments).replace(NAME, "NAME").replace("/", "|"),
)
def test_a_name_like_markup_is_shown_as_it_is(
    arguments: list[str],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(parquet(pairs(3)))
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "bad.yaml").write_text(f'"{NAME}": 1\n')
    ended = run_cli(*(str(tiny_model) if each == "MODEL" else each for each in arguments))
    assert ended.exit_code == 2, ended.err
    assert "Traceback" not in ended.err
    assert NAME in ended.err.replace("│\n│", ""), ended.err


def test_a_run_between_such_names_succeeds_and_shows_them(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a[math]:smile:"
    folder.mkdir()
    (folder / "rows.parquet").write_bytes(parquet(pairs(3)))
    output = f"out/{NAME}"
    flags = ("--model", tiny_model, "--output", output, "--no-ray", "--backend", "fake")
    ended = run_cli("score", "a*/*.parquet", *flags)
    assert ended.exit_code == 0, ended.err
    lines = ended.out.splitlines()
    (where,) = [line for line in lines if line.startswith("The scored shards are in ")]
    (check,) = [line for line in lines if line.startswith("Check them against their inputs:")]
    assert where.endswith(NAME) and check.endswith(NAME)
