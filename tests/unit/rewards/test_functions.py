"""How a reward function is found, and what tells it from another one."""

import sys
from pathlib import Path
from typing import Any

import pytest

from batch_scorer.config import load_partial_config
from batch_scorer.errors import ConfigError
from batch_scorer.rewards.functions import SHIPPED, Reward, find_rewards
from tests.helpers.reward_file import reward_file


def found(function: str, **more: Any) -> Reward:
    (reward,) = find_rewards(
        load_partial_config(rewards={"own": {"function": function, **more} if more else function})
    )
    return reward


def refused(function: str, **more: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        found(function, **more)
    return str(raised.value)


def test_a_function_in_a_file_is_carried_with_its_source(tmp_path: Path) -> None:
    file = reward_file(tmp_path)
    reward = found(f"{file}:named")
    assert reward.source == file.read_bytes()
    assert reward.function == "own_rewards.py:named"
    assert reward.columns == {"answer": "answer"}
    assert reward.asks_for == ("responses",)


def test_another_folder_is_the_same_function_and_another_source_is_not(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    here, there = (reward_file(folder) for folder in (tmp_path, tmp_path / "elsewhere"))
    assert found(f"{here}:length").identity == found(f"{there}:length").identity
    there.write_text(f"{there.read_text()}\n# changed\n")
    assert found(f"{here}:length").digest != found(f"{there}:length").digest
    assert found(f"{here}:length").identity != found(f"{here}:slow").identity


def test_a_parameter_with_a_default_is_filled_from_the_rows_where_settings_say_so(
    tmp_path: Path,
) -> None:
    function = f"{reward_file(tmp_path)}:turns"
    assert found(function).columns == {}
    assert found(function, columns={"factor": "weight"}).columns == {"factor": "weight"}
    given = found(function, arguments={"factor": 2})
    assert (given.columns, given.arguments) == ({}, {"factor": 2})


def test_what_is_wrong_with_a_function_is_said(tmp_path: Path) -> None:
    file = reward_file(tmp_path)
    begins = f"rewards: own: {file}:"
    assert refused(f"{file}:lenght") == f"{begins}lenght: own_rewards.py has no 'lenght'"
    assert refused(f"{file}:os") == f"{begins}os: os is no function"
    assert "takes no limit; its parameters are responses" in refused(
        f"{file}:length", arguments={"limit": 3}
    )
    assert refused(f"{tmp_path}/none.py:f").endswith("not readable: No such file or directory")
    assert "there is no module 'no_such_module'" in refused("no_such_module:f")
    assert ", ".join(SHIPPED) in refused("lenght")
    assert "has no file" in refused("sys:exit")
    (tmp_path / "broken.py").write_text("import no_such_module\ndef f(responses): ...\n")
    assert "ModuleNotFoundError: No module named 'no_such_module'" in refused(
        f"{tmp_path}/broken.py:f"
    )
    (tmp_path / "leaves.py").write_text("import os\nos._exit(5)\n")
    assert "the process that loads it ended with exit code 5" in refused(f"{tmp_path}/leaves.py:f")
    (tmp_path / "places.py").write_text("def f(responses, /): ...\n")
    assert "responses can only be given by place" in refused(f"{tmp_path}/places.py:f")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"function": "length", "arguments": {"responses": []}}, "so leave it out"),
        ({"function": "length", "arguments": {"a": 1}, "columns": {"a": "b"}}, "and a column"),
        ({"function": "length", "timeout_s": 0}, "greater than 0"),
        ({"function": "length", "tries": 1}, "unknown setting `rewards.own.tries`"),
        ({"arguments": {}}, "`rewards.own.function` is needed"),
    ],
)
def test_wrong_settings_are_refused(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_partial_config(rewards={"own": entry})


@pytest.mark.parametrize("name", ["", "a b", "1st", "score", "scores_of_mine", "a-b"])
def test_a_name_that_cannot_begin_a_column_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot begin a column's name"):
        load_partial_config(rewards={name: "length"})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mean", "what all models have together"),
        ("z", "what all models have together"),
        ("rank", "what all models have together"),
        ("helpful", "a model has columns of that name"),
        ("helpful_score_of_mine", "a model has columns of that name"),
        ("mean_scores", "a model has columns of that name"),
    ],
)
def test_a_name_of_models_columns_is_refused(name: str, said: str) -> None:
    models = {"helpful": "/models/a", "safety": "/models/b"}
    with pytest.raises(ConfigError, match=f"rewards: '{name}'.*{said}"):
        load_partial_config(model=models, rewards={name: "length"})
    assert load_partial_config(model=models, rewards={"help": "length"}).rewards


def test_a_module_is_covered_by_its_file_and_a_package_by_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("from own_package.inner import f\n")
    (package / "inner.py").write_text("def f(responses): ...\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    from batch_scorer import quarantine

    monkeypatch.setattr(quarantine, "_template", None)  # a new one knows the path
    module, whole = found("own_package.inner:f"), found("own_package:f")
    assert module.source is None
    assert module.function == "own_package.inner:f"
    (package / "__init__.py").write_text("from own_package.inner import f  # changed\n")
    assert found("own_package.inner:f").digest == module.digest
    assert found("own_package:f").digest != whole.digest
    (package / "inner.py").write_text("def f(responses): return []\n")
    assert found("own_package.inner:f").digest != module.digest


def test_versions_that_a_module_names_are_covered(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def f(responses): ...\n")
    plain = found(f"{file}:f")
    file.write_text("VERSIONS_OF = ('numpy', 'no-such-library')\ndef f(responses): ...\n")
    assert found(f"{file}:f").digest != plain.digest


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "math"])
def test_a_shipped_function_is_known_by_its_name(name: str) -> None:
    reward = found(name)
    assert reward.function == f"batch_scorer.rewards.{name}:reward"
