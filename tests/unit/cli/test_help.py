"""What `--help` shows on a terminal of 80 columns."""

import inspect
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import typer
from typer.testing import CliRunner

from batch_scorer.cli.commands import app
from batch_scorer.cli.help import Command
from batch_scorer.config import Config
from tests.helpers.in_process import run_cli

DOCSTRINGS = {
    info.callback.__name__: inspect.cleandoc(info.callback.__doc__ or "")
    for info in app.registered_commands
    if info.callback
}
NEEDS = {
    "score": {"model", "inputs", "output"},
    "nightly": {"model", "inputs", "output"},
    "plan": {"inputs"},
    "check": set(),
    "evaluate": set(),  # inputs are needed, but may be a scored output: its help explains that
}
USAGE = {
    "inputs": "INPUT",
    "columns": "--column FIELD=COLUMN",
    "rewards": "--reward NAME=FUNCTION",
    "store_options": "--store-option KEY=VALUE",
    "template_arguments": "--template-argument NAME=VALUE",
    "exclude": "--exclude GLOB",
    "ignore_columns": "--ignore-column COLUMN",
    "keep_columns": "--keep-columns COLUMN,…",
    "drop_columns": "--drop-columns COLUMN,…",
    "use_ray": "--ray / --no-ray",
    "trust_remote_code": "--trust-remote-code / --no-trust-remote-code",
}


def shown_by(*command: str) -> list[str]:
    """The lines of a command's help."""
    ended = run_cli(*command, "--help", columns=80)
    assert ended.exit_code == 0, ended.err
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= 80
    return lines


def flowing(lines: list[str]) -> str:
    """Their words, without the panels' borders and line breaks."""
    return " ".join(" ".join(line.strip("│") for line in lines).split())


def description_of(setting: str) -> str:
    return " ".join((Config.model_fields[setting].description or "").split())


def test_all_commands_are_listed_with_what_they_do() -> None:
    text = flowing(shown_by())
    for name, docstring in DOCSTRINGS.items():
        assert f"{name} {' '.join(docstring.split(chr(10) * 2)[0].split())}" in text


@pytest.mark.parametrize("command", DOCSTRINGS)
def test_every_command_is_explained_and_fits_a_screen_or_is_in_panels(command: str) -> None:
    lines = shown_by(command)
    assert " ".join(DOCSTRINGS[command].split()) in flowing(lines)
    panels = sum(line.startswith("╭") for line in lines)
    assert len(lines) <= 40 or panels >= 4


@pytest.mark.parametrize("command", NEEDS)
def test_every_setting_has_a_flag_and_its_whole_description(command: str) -> None:
    lines = shown_by(command)
    flags, text = [line.strip("│ ") for line in lines], flowing(lines)
    explains_inputs_itself = command in ("check", "evaluate")
    for name in Config.model_fields:
        if name == "inputs" and explains_inputs_itself:
            continue
        usage = USAGE.get(name, f"--{name.replace('_', '-')}")
        assert any(f"{flag} ".startswith(f"{usage} ") for flag in flags), name
        assert description_of(name) in text, name


@pytest.mark.parametrize("command", NEEDS)
def test_model_inputs_and_output_come_first_and_are_marked_where_they_are_needed(
    command: str,
) -> None:
    text = flowing(shown_by(command))
    places = [text.index(description_of(name)) for name in ("model", "output")]
    assert max(places) < text.index("--config") < text.index("--task")
    for name in ("model", "inputs", "output"):
        is_marked = f"{description_of(name)} [required]" in text
        assert is_marked == (name in NEEDS[command]), name


def test_settings_stand_in_the_panel_of_their_role() -> None:
    text = flowing(shown_by("score"))
    panels = {text.index(f"─ {role.capitalize()}: "): role for role in Config.roles().values()}
    for name, role in Config.roles().items():
        if name not in NEEDS["score"]:
            panel = max(start for start in panels if start < text.index(description_of(name)))
            assert panels[panel] == role, name


def test_choices_and_defaults_are_shown() -> None:
    text = flowing(shown_by("score"))
    assert "[one of auto, hf, vllm, endpoint, fake; default: hf]" in text
    assert "[one of bfloat16, float32, float16]" in text
    assert "numbers in every layer. [default: 1]" in text
    assert "None" not in text


def test_brackets_are_shown_as_they_are() -> None:
    strange = typer.Typer()

    @strange.command(cls=Command)
    def run(
        flag: str = typer.Option("", help="As a[/INST] :smile: [bold]b[/bold]."),
    ) -> None:
        """Reads [/INST] and [math]."""

    with patch.dict(os.environ, COLUMNS="80"):
        shown = CliRunner().invoke(strange, ["--help"]).output
    assert "Reads [/INST] and [math]." in shown
    assert "As a[/INST] :smile: [bold]b[/bold]." in shown


def test_the_forms_that_the_help_shows_are_taken(tmp_path: Path) -> None:
    """--column and another flag were shown as mappings, which the command line refuses."""
    text = flowing(shown_by("nightly"))
    for flag, value, known in (
        ("--column", "chosen=better_answer", "no such model directory"),
        ("--store-option", "region=eu-central-1", "no such model directory"),
    ):
        assert f"`{flag} {value}`" in text
        needed = ("--model", tmp_path / "none", "--output", tmp_path / "out")
        ended = run_cli("nightly", tmp_path, *needed, flag, value)
        assert known in ended.error
