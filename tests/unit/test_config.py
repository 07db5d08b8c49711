import os
from pathlib import Path
from typing import Any

import pytest

from batch_scorer.config import Config, completed, load_config, load_partial_config
from batch_scorer.errors import ConfigError
from batch_scorer.storage import Store

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
        ({"model": ""}, "model: a model, or a mapping of names to models"),
        ({"output": ""}, "output: .*at least 1 character"),
        ({"inputs": ()}, "inputs: .*at least 1 item"),
        ({"dtype": "int8"}, "dtype: .*'bfloat16', 'float32' or 'float16'.*'int8'"),
        ({"shard_rows": 0}, "shard_rows: .*greater than 0.*got 0"),
        ({"over_length": "cut"}, "over_length: .*'mark', 'error', .* or 'truncate_right'"),
        ({"store_options": {"regoin": "x"}}, "store_options.regoin: .* did you mean `region`"),
        ({"backend": "fake", "compile": True}, "compile: the fake .* set backend: hf or vllm"),
        (
            {
                "backend": "endpoint",
                "task": "judge",
                "judge": "helpful",
                "endpoint": "http://host/v1",
                "workers": 2,
            },
            "workers: one worker asks the server, so that the limits are those of the job",
        ),
        ({"workers": "0"}, r"workers: a number above 0, or a range such as 1\.\.64 \(got '0'\)"),
        ({"workers": True}, "workers: a number above 0, .*got True"),
        ({"workers": "1..2..3"}, "workers: a number above 0, .*got '1..2..3'"),
        ({"workers": "4..2"}, r"workers: a range begins with its smaller number: 2\.\.4 \(got"),
        (
            {"backend": "auto", "attention": "sdpa", "quantization": "fp8"},
            "attention and quantization: no backend takes them together",
        ),
        ({"attention": "sdpa", "compile": True}, "compile: only packed batches"),
        ({"attention": "sdpa", "precision": "int8"}, "precision: only packed batches"),
        ({"precision": "int8", "invariant": True}, "precision: products in 8 bits"),
        ({"compile": True, "invariant": True}, "compile: compiled layers are not proven invariant"),
        ({"backend": "fake", "invariant": True}, "invariant: the fake .* set backend: hf or vllm"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(**{**NEEDED, **settings})


@pytest.mark.parametrize(
    ("given", "recorded", "bounds"),
    [
        (None, None, None),
        (3, 3, (3, 3)),
        ("3", 3, (3, 3)),  # as a flag
        ("3..3", 3, (3, 3)),
        ("1..64", "1..64", (1, 64)),
    ],
)
def test_workers_are_a_number_or_a_range(
    given: int | str | None, recorded: int | str | None, bounds: tuple[int, int] | None
) -> None:
    config = load_config(**NEEDED, workers=given)
    assert config.with_role("runtime")["workers"] == recorded
    assert config.worker_bounds == bounds


def test_a_range_of_workers_is_written_in_yaml_without_quotes(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("workers: 1..64\n")
    assert load_config(file, **NEEDED).worker_bounds == (1, 64)


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
    whole = completed(load_partial_config(**NEEDED, columns={"chosen": "a"}))
    assert type(whole) is Config
    assert whole == load_config(**NEEDED, columns={"chosen": "a"})
    with pytest.raises(ConfigError, match=r"\A`output` is needed\Z"):
        completed(load_partial_config(model="m", inputs="in"))


def test_only_scores_settings_are_asked_for_the_fingerprint() -> None:
    scores = load_config(**NEEDED).with_role("scores")
    assert "over_length" in scores
    assert not {"workers", "token_budget", "output", "shard_rows"} & set(scores)


def test_token_scores_need_an_engine_and_a_head_that_have_them() -> None:
    assert load_config(**NEEDED, token_scores=True, backend="auto").token_scores
    with pytest.raises(ConfigError, match="token_scores: the fake backend does not take it"):
        load_config(**NEEDED, token_scores=True, backend="fake")
    with pytest.raises(ConfigError, match="token_scores: only where task is score"):
        load_config(**NEEDED, token_scores=True, task="embed")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: a\nmodel: b\n", "`model` is there twice.*line 1"),
        ("columns: {chosen: a, chosen: b}", "`chosen` is there twice"),
        ("k: &a x\nl: [" + "*a, " * 21 + "]", "more than 20 aliases"),
        ("template_arguments: &a {x: *a}", "stands inside of what it stands for"),
        ("model: !!python/name:os.system x", "tags are not read"),
        ("model: !!str x", "tags are not read"),
        ("model: a\n---\nmodel: b", "not readable as YAML: .*another document"),
        ("[a, b]", "expected `setting: value` lines, got list"),
        ("just text", "expected `setting: value` lines, got str"),
        ("1: 2", "1 is no setting's name"),
        ("? [a]\n: b", "not readable as YAML"),
        ("limit: " + "9" * 5000, "not readable as YAML: .*4300 digits"),
        ("template_date: 2026-99-99", "not readable as YAML: month must be"),
        ("columns: " + "[" * 2000, "not readable as YAML"),
        ("model: a\x00b", "not readable as YAML"),
        ("#" * (1 << 20) + "\nmodel: a", "at most 1,048,576 bytes"),
        ("template_arguments: {day: 2026-11-28}", "template_arguments: not JSON .* quote a date"),
        ("template_arguments: {x: .nan}", "template_arguments: not JSON values"),
        ("template_arguments: [1]", "template_arguments: .*valid dictionary"),
        ("columns: {chosen: [1]}", "columns.chosen: .*valid string"),
        ("keep_columns: {a: 1}", "keep_columns: "),
        ("limit: " + "9" * 4000, "limit: "),
        ("system_prompt: [" + "x, " * 500 + "]", "system_prompt: .{1,400}$"),
    ],
)
def test_odd_yaml_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(file, **NEEDED)
    assert "\n" not in str(refused.value)


def test_a_few_aliases_are_read(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("inputs: [&place in]\noutput: out\nmodel: *place\n")
    assert load_config(file).model == "in"


def test_a_folder_is_no_config_file_and_a_pipe_is_one(tmp_path: Path) -> None:
    """Shells give `<(...)` as a pipe."""
    with pytest.raises(ConfigError, match="not a file"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path / "a\x00b")
    reading, writing = os.pipe()
    os.write(writing, b"{model: m, inputs: [i], output: o}")
    os.close(writing)
    assert load_config(Path(f"/dev/fd/{reading}")).model == "m"
    os.close(reading)


@pytest.mark.parametrize("path", ["", " ", "a\x00b", "a\nb", "a\x1bb", "a\udcffb"])
@pytest.mark.parametrize(
    "name", ["model", "inputs", "output", "exclude", "chat_template", "base_model"]
)
def test_a_path_that_cannot_be_named_is_refused(name: str, path: str) -> None:
    value = {"inputs": (path,), "exclude": (path,)}.get(name, path)
    with pytest.raises(ConfigError, match=rf"\A{name}[^\n]*\Z"):
        load_config(**{**NEEDED, name: value})
    if name in ("model", "base_model"):
        own = {"model": "m", name: path}
        with pytest.raises(ConfigError, match=r"\Amodel: [^\n]*\Z"):
            load_config(**{**NEEDED, "model": {"b": own}})
    if path.strip():
        with pytest.raises(ConfigError, match="not a path or URL"):
            Store(path, {})
