"""Job files: the published schema knows them, and what is wrong in one is said in a line."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from batch_scorer.config import load_config
from batch_scorer.errors import ConfigError

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / "docs" / "job.schema.json").read_text())
JOB: dict[str, Any] = {"model": "/models/m", "inputs": ["in/"], "output": "out/"}
MISSING = "(missing)"


def is_in_schema(job: dict[str, Any]) -> bool:
    return bool(jsonschema.Draft202012Validator(SCHEMA).is_valid(job))


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


# Those that tell an editor so; the other files beside them are for kubectl.
JOB_FILES = [file for file in ROOT.glob("jobs/*.yaml") if "job.schema.json" in file.read_text()]


@pytest.mark.parametrize("file", JOB_FILES, ids=lambda file: file.name)
def test_our_job_files_are_in_the_schema_and_load(file: Path) -> None:
    assert is_in_schema(yaml.safe_load(file.read_text()))
    assert load_config(file).model


def test_there_are_job_files() -> None:
    assert {"score-pairs.yaml", "nightly.yaml"} <= {file.name for file in JOB_FILES}


@pytest.mark.parametrize(
    "job",
    [
        {"inputs": "one/"},
        {"max_tokens": None, "device": None},
        {"columns": {"chosen": "better"}, "over_length": "truncate_left"},
        {"backend": "vllm", "quantization": "fp8", "tensor_parallel": 2},
        {"task": "embed", "embedding_pooling": "mean", "normalize": True},
        {"store_options": {"region": "eu-central-1", "allow_http": "true"}},
        {"lease_s": 5, "use_ray": False},
    ],
)
def test_what_loads_is_in_the_schema(job: dict[str, Any]) -> None:
    load_config(**JOB | job)
    assert is_in_schema(JOB | job)


WRONG_BY_ITSELF: list[tuple[dict[str, Any], str]] = [
    ({"token_buget": 100}, "unknown setting `token_buget`; did you mean `token_budget`?"),
    ({"token-budget": 100}, "unknown setting `token-budget`; did you mean `token_budget`?"),
    ({"Model": "m"}, "unknown setting `Model`; did you mean `model`?"),
    ({"learning_rate": 0.1}, "unknown setting `learning_rate`"),
    ({"model": 5}, "model: a model, or a mapping of names to models (got 5)"),
    ({"inputs": []}, "inputs: Tuple should have at least 1 item after validation, not 0"),
    ({"inputs": 5}, "inputs: Input should be a valid tuple (got 5)"),
    ({"inputs": ["a", 1]}, "inputs: Input should be a valid string (got 1)"),
    ({"task": "rate"}, "task: Input should be 'score', 'embed' or 'judge' (got 'rate')"),
    ({"format": "pairs"}, "format: Input should be 'preference_pair', "),
    ({"columns": "chosen=a"}, "columns: Input should be a valid dictionary (got 'chosen=a')"),
    ({"columns": {"chosen": 3}}, "columns.chosen: Input should be a valid string (got 3)"),
    ({"text_style": "loud"}, "text_style: Input should be "),
    ({"max_tokens": 0}, "max_tokens: Input should be greater than 0 (got 0)"),
    ({"max_tokens": "many"}, "max_tokens: Input should be a valid integer, "),
    ({"max_tokens": 1.5}, "max_tokens: Input should be a valid integer, "),
    ({"over_length": "cut"}, "over_length: Input should be 'mark', 'error', 'truncate_left', "),
    ({"backend": "sglang"}, "backend: Input should be 'auto', 'hf', 'vllm', 'endpoint' or 'fake'"),
    ({"dtype": "int8"}, "dtype: Input should be 'bfloat16', 'float32' or 'float16' (got 'int8')"),
    ({"attention": "fast"}, "attention: Input should be 'packed', 'flash_attention_2', "),
    ({"step_aggregation": "sum"}, "step_aggregation: Input should be 'min', 'last', "),
    ({"embedding_pooling": "max"}, "embedding_pooling: Input should be 'last', 'mean' or 'cls'"),
    ({"trust_remote_code": "maybe"}, "trust_remote_code: Input should be a valid boolean, "),
    ({"shard_rows": -1}, "shard_rows: Input should be greater than 0 (got -1)"),
    ({"shard_tokens": None}, "shard_tokens: Input should be a valid integer (got None)"),
    ({"device": "tpu"}, "device: Input should be 'cpu' or 'cuda' (got 'tpu')"),
    ({"workers": 0}, "workers: a number above 0, or a range such as 1..64 (got 0)"),
    ({"parity_check": "skip"}, "parity_check: Input should be 'stop', 'warn' or 'off'"),
    ({"lease_s": 0}, "lease_s: Input should be greater than 0 (got 0)"),
    ({"store_options": {"region": 5}}, "store_options.region: Input should be a valid string"),
]
WRONG_TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"model": MISSING}, "`model` is needed"),
    ({"inputs": MISSING}, "`inputs` is needed"),
    ({"output": MISSING}, "`output` is needed"),
    ({"quantization": "fp8"}, "quantization: the hf backend does not take it; set backend: vllm"),
    ({"tensor_parallel": 2}, "tensor_parallel: the hf backend does not take it; set backend: vllm"),
    ({"pipeline_parallel": 2}, "pipeline_parallel: the hf backend does not take it; set backend"),
    (
        {"backend": "vllm", "attention": "sdpa"},
        "attention: the vllm backend does not take it; set backend: hf",
    ),
    ({"normalize": True}, "normalize: only where task is embed"),
    ({"task": "embed", "adapter": "x"}, "adapter: only where task is score"),
    ({"task": "embed", "backend": "fake"}, "backend: fake makes scores; leave task out"),
    (
        {"store_options": {"aws_secret_access_key": "x"}},
        "store_options.aws_secret_access_key: credentials are not settings",
    ),
]


def wrong(job: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (JOB | job).items() if value is not MISSING}


def said_of(job: dict[str, Any], tmp_path: Path) -> str:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    return str(refused.value)


@pytest.mark.parametrize(("job", "message"), WRONG_BY_ITSELF, ids=lambda part: str(part)[:40])
def test_a_wrong_setting_is_named_and_is_not_in_the_schema(
    job: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in said_of(wrong(job), tmp_path)
    assert not is_in_schema(wrong(job))


@pytest.mark.parametrize(("job", "message"), WRONG_TOGETHER, ids=lambda part: str(part)[:40])
def test_settings_that_do_not_go_together_are_named(
    job: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in said_of(wrong(job), tmp_path)


def test_every_wrong_setting_of_a_file_is_named_at_once(tmp_path: Path) -> None:
    said = said_of(wrong({"dtype": "int8", "workers": 0, "modell": "m"}), tmp_path)
    assert len(said.splitlines()) == 3
