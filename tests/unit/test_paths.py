"""Paths in settings: the home folder, variables, and `Path` where text is taken."""

from pathlib import Path

import pytest

from batch_scorer.config import expanded, load_config
from batch_scorer.errors import ConfigError


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "s3://bkt")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("~", "/home/me"),
        ("~/a", "/home/me/a"),
        ("a/~", "a/~"),
        ("~backup.parquet", "~backup.parquet"),
        ("${DATA}/a/${DATA}", "s3://bkt/a/s3://bkt"),
        ("$${DATA}", "${DATA}"),
        ("$DATA", "$DATA"),
        ("ORG/NAME@main", "ORG/NAME@main"),
    ],
)
def test_a_path_is_expanded_once(given: str, used: str) -> None:
    assert expanded(given) == used


@pytest.mark.parametrize("name", ["${UNSET}", "${}"])
def test_a_variable_that_is_not_set_is_an_error_which_names_the_setting(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^model: .*no variable"):
        load_config(model=f"{name}/m", inputs="a", output="b")


def test_every_path_of_a_file_and_of_python_is_expanded(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: ~/m\nbase_model: ~/b\ninputs: [~/a, '${DATA}/b']\noutput: ~/o\n"
        "chat_template: ~/t.jinja\n"
    )
    for config in (
        load_config(str(file)),
        load_config(file),
        load_config(
            model=Path("~/m"),
            base_model=Path("~/b"),
            inputs=[Path("~/a"), "${DATA}/b"],
            output=Path("~/o"),
            chat_template=Path("~/t.jinja"),
        ),
    ):
        assert (config.model, config.base_model) == ("/home/me/m", "/home/me/b")
        assert config.inputs == ("/home/me/a", "s3://bkt/b")
        assert (config.output, config.chat_template) == ("/home/me/o", "/home/me/t.jinja")


def test_paths_among_the_settings_of_one_of_several_models_are_expanded() -> None:
    own = {"model": Path("~/b"), "chat_template": "${DATA}/t.jinja", "system_prompt": "~/ ${x}"}
    config = load_config(model={"a": "~/a", "b": own}, inputs="in", output="out")
    a, b = config.members.values()
    assert (a.model, b.model, b.chat_template) == ("/home/me/a", "/home/me/b", "s3://bkt/t.jinja")
    assert b.system_prompt == "~/ ${x}"


def test_one_path_is_one_input() -> None:
    assert load_config(model="m", inputs=Path("a"), output="b").inputs == ("a",)


def test_a_credential_from_a_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "https://me:secret@host")
    with pytest.raises(ConfigError, match="password") as refused:
        load_config(model="m", inputs="a", output="${DATA}/x")
    assert "secret@" not in str(refused.value)


@pytest.mark.parametrize("spelled", ["off", "'off'", "OFF"])
def test_off_is_read_as_the_docs_spell_it(spelled: str, tmp_path: Path) -> None:
    """YAML 1.1 reads it as false."""
    file = tmp_path / "job.yaml"
    file.write_text(f"model: m\ninputs: a\noutput: b\nparity_check: {spelled}\nuse_ray: off\n")
    config = load_config(file)
    assert (config.parity_check, config.use_ray) == ("off", False)
