from pathlib import Path
from typing import Any

import pytest

from batch_scorer.config import Config, load_config, load_partial_config
from batch_scorer.errors import ConfigError

NEEDED: dict[str, Any] = {"model": "m", "inputs": ("in",), "output": "out"}


def test_every_field_says_what_it_may_change_and_why() -> None:
    assert set(Config.roles()) == set(Config.model_fields)
    assert set(Config.roles().values()) == {"scores", "layout", "runtime"}
    for name, field in Config.model_fields.items():
        assert field.description, name


def test_a_yaml_file_and_arguments_give_the_same_config(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: m\ninputs: in\noutput: out\nmax_tokens: 100\ntoken_budget: 7\n")
    assert load_config(file) == load_config(**NEEDED, max_tokens=100, token_budget=7)


def test_arguments_go_on_top_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: m\ninputs: [in]\noutput: out\nmax_tokens: 100\n")
    assert load_config(file, max_tokens=50, dtype=None).max_tokens == 50


def test_an_unknown_setting_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: m\ninputs: [in]\noutput: out\ntoken_buget: 100\n")
    with pytest.raises(ConfigError, match="unknown setting `token_buget`; did you mean `token_bu"):
        load_config(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "`model` is needed"),
        ({"model": ""}, "model: .*at least 1 character"),
        ({"output": ""}, "output: .*at least 1 character"),
        ({"inputs": ()}, "inputs: .*at least 1 item"),
        ({"dtype": "int8"}, "dtype: .*'bfloat16', 'float32' or 'float16'.*'int8'"),
        ({"shard_rows": 0}, "shard_rows: .*greater than 0.*got 0"),
        ({"over_length": "cut"}, "over_length: .*'mark', 'error', .* or 'truncate_right'"),
        ({"store_options": {"aws_secret_access_key": "x"}}, "credentials are not settings"),
        ({"backend": "fake", "compile": True}, "compile: the fake .* set backend: hf or vllm"),
        (
            {"backend": "auto", "attention": "sdpa", "quantization": "fp8"},
            "attention and quantization: no backend takes them together",
        ),
        ({"attention": "sdpa", "compile": True}, "compile: only packed batches"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(**{**NEEDED, **settings})


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a\n- b\n", "expected `setting: value` lines"), ("a: [", "not readable as YAML")],
)
def test_a_file_that_is_no_settings_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(file)
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path / "missing.yaml")
    file.write_bytes(b"\xff\xfe\x00PAR1")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(file)


def test_a_partial_config_holds_what_was_given_and_nothing_else() -> None:
    partial = load_partial_config(inputs="in", max_tokens=100)
    assert (partial.model, partial.inputs, partial.output) == ("", ("in",), "")
    assert partial.max_tokens == 100
    assert partial.model_fields_set == {"inputs", "max_tokens"}


@pytest.mark.parametrize("given", [{}, {"inputs": []}, {"inputs": None, "model": "m"}])
def test_a_partial_config_names_what_is_needed_all_the_same(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\A`inputs` is needed\Z"):
        load_partial_config(needs=("inputs",), **given)
    with pytest.raises(ConfigError) as refused:
        load_partial_config(needs=("inputs",), **given, shard_rows=0, modle="m")
    assert len(str(refused.value).splitlines()) == 3


def test_a_partial_config_is_completed_or_names_what_is_missing() -> None:
    whole = load_partial_config(**NEEDED, columns={"chosen": "a"}).complete()
    assert type(whole) is Config
    assert whole == load_config(**NEEDED, columns={"chosen": "a"})
    with pytest.raises(ConfigError, match=r"\A`output` is needed\Z"):
        load_partial_config(model="m", inputs="in").complete()


def test_only_scores_settings_are_asked_for_the_fingerprint() -> None:
    scores = load_config(**NEEDED).with_role("scores")
    assert "over_length" in scores
    assert not {"workers", "token_budget", "output", "shard_rows"} & set(scores)
