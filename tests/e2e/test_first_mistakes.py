"""First-time mistakes: each ends with one clear line on stderr and exit code 2."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from batch_scorer.errors import ShardReason
from cluster.local.seaweed import S3Server
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet
from tests.helpers.program import Ended, Program
from tests.helpers.tiny import tiny_tokenizer
from tests.parity import tiny_models

pytestmark = pytest.mark.e2e


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(parquet(pairs(3)))
    return folder


@pytest.fixture(scope="module")
def headless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model without a score head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("headless")
    tiny_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def score(model: object, inputs: object, output: object, *flags: object) -> Ended:
    return run_cli(
        "score", "--model", model, inputs, "--output", output, "--no-ray", "--dtype", "float32",
        *flags,
    )  # fmt: skip


def assert_one_line(ended: Ended, *parts: object) -> None:
    assert ended.exit_code == 2, ended.err
    lines = ended.error.splitlines()
    assert len(lines) == 1, ended.err
    for part in parts:
        assert str(part) in lines[0]


def test_an_input_that_is_not_there(tiny_model: Path, tmp_path: Path) -> None:
    for missing in (tmp_path / "nothing", tmp_path / "nothing.parquet", tmp_path / "*.parquet"):
        ended = score(tiny_model, missing, tmp_path / "out")
        assert_one_line(ended, missing)


def test_an_input_folder_without_data(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "notes.txt").write_text("nothing to score")
    assert_one_line(score(tiny_model, folder, tmp_path / "out"), folder, ".parquet")
    ended = score(tiny_model, folder / "notes.txt", tmp_path / "out")
    assert_one_line(ended, "notes.txt", "unknown file type", ".parquet")


def test_an_input_bucket_that_is_not_there(s3: S3Server, tiny_model: Path, tmp_path: Path) -> None:
    flags = [part for k, v in s3.options.items() for part in ("--store-option", f"{k}={v}")]
    ended = score(tiny_model, "s3://no-such-bucket/in", tmp_path / "out", *flags)
    assert_one_line(ended, "s3://no-such-bucket: no such bucket")


def test_a_model_that_is_not_there(inputs: Path, tmp_path: Path) -> None:
    ended = score(tmp_path / "nothing", inputs, tmp_path / "out")
    assert_one_line(ended, tmp_path / "nothing", "no such model directory")
    ended = score(inputs, inputs, tmp_path / "out")
    assert_one_line(ended, inputs, "config.json")


def test_a_model_without_a_score_head(headless_model: Path, inputs: Path, tmp_path: Path) -> None:
    ended = score(headless_model, inputs, tmp_path / "out")
    assert_one_line(ended, headless_model, "no score head", "LlamaForCausalLM")
    assert not list(tmp_path.glob("out/**/*.parquet"))


def test_a_model_whose_head_is_not_in_the_weights(
    headless_model: Path, inputs: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(headless_model, tmp_path / "renamed"))
    config = model / "config.json"
    config.write_text(config.read_text().replace("ForCausalLM", "ForSequenceClassification"))
    ended = score(model, inputs, tmp_path / "out")
    assert_one_line(ended, model, "the weights contain no score head")


def test_an_incomplete_model(tiny_model: Path, inputs: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "cut"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert_one_line(score(model, inputs, tmp_path / "out"), weights, "incomplete download")
    for file in model.glob("tokenizer*"):
        file.unlink()
    shutil.copy(tiny_model / "model.safetensors", weights)
    assert_one_line(score(model, inputs, tmp_path / "out"), model, "tokenizer")


def test_a_model_with_a_shard_of_its_weights_missing(
    tiny_model: Path, inputs: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    (model / "model.safetensors").rename(model / first)
    index = {"weight_map": {"a": first, "b": second}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    ended = score(model, inputs, tmp_path / "out")
    assert_one_line(ended, "incomplete download", second)


def test_a_tokenizer_of_another_model(tiny_model: Path, inputs: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    weights = load_file(model / "model.safetensors")
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][:100].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert_one_line(score(model, inputs, tmp_path / "out"), "do not belong together")


def test_a_template_that_refuses_the_rows(tiny_model: Path, inputs: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    # Good for the probes, and for no row of the input, which all start with a number.
    template = (model / "chat_template.jinja").read_text()
    refusal = (
        "{% if messages[0]['content'][0] in '0123456789' %}"
        "{{ raise_exception('no numbers here') }}{% endif %}"
    )
    (model / "chat_template.jinja").write_text(refusal + template)
    ended = score(model, inputs, tmp_path / "out")
    assert_one_line(ended, "refuses all of the first rows", "no numbers here")
    assert not list((tmp_path / "out").glob("*.parquet"))


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (("--attention", "sdpa"), "attn_logit_softcapping"),
        (("--dtype", "float16"), "float16 overflows"),
    ],
)
def test_what_gemma_2_cannot_bear(
    flags: tuple[str, str], cause: str, inputs: Path, tmp_path: Path
) -> None:
    """T-GEM-1, T-GEM-3: refused before any shard is scored."""
    tiny_models.build_model("gemma2", tmp_path / "model", vocab_size=512)
    tiny_tokenizer(tmp_path / "model")
    assert_one_line(score(tmp_path / "model", inputs, tmp_path / "out", *flags), cause)
    assert not list((tmp_path / "out").glob("*.parquet"))


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (("--quantization", "fp8"), "set backend: vllm"),
        (("--backend", "vllm", "--attention", "eager"), "set backend: hf"),
        (("--normalize",), "only where task is embed"),
        (("--step-aggregation", "mean"), "give no step scores"),
        (("--task", "embed", "--adapter", "armorm"), "only where task is score"),
        (("--adapter", "armour"), "known are"),
    ],
)
def test_settings_without_effect(
    flags: tuple[str, ...], cause: str, tiny_model: Path, inputs: Path, tmp_path: Path
) -> None:
    assert_one_line(score(tiny_model, inputs, tmp_path / "out", *flags), cause)


def test_an_output_that_cannot_be_written(tiny_model: Path, inputs: Path, tmp_path: Path) -> None:
    # Permissions do not bind root, but nobody can make a folder below a file.
    (tmp_path / "file").write_text("in the way")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        assert_one_line(score(tiny_model, inputs, output), output)


def test_an_output_that_is_the_input(tiny_model: Path, inputs: Path) -> None:
    assert_one_line(score(tiny_model, inputs, inputs), "is the input folder")


def test_a_bucket_that_refuses_the_key(
    s3: S3Server, tiny_model: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    flags = [part for k, v in s3.options.items() for part in ("--store-option", f"{k}={v}")]
    output = s3.url("refused/out")
    assert_one_line(score(tiny_model, inputs, output, *flags), output, "no permission")
    source = s3.url("refused/in")
    assert_one_line(score(tiny_model, source, tmp_path / "out", *flags), source, "no permission")


def test_an_output_with_files_of_others_in_the_way(
    tiny_model: Path, inputs: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "out" / "a.parquet"
    foreign.parent.mkdir()
    foreign.write_bytes(parquet(pairs(2, start=90)))
    before = foreign.read_bytes()
    ended = score(tiny_model, inputs, foreign.parent, "--backend", "fake", "--json")
    assert ended.exit_code == 3
    (failed,) = ended.json["failed"]
    assert failed["reason"] == ShardReason.OBJECT_IN_THE_WAY
    assert str(foreign) in failed["detail"]
    assert foreign.read_bytes() == before


def test_an_output_that_belongs_to_another_run(
    tiny_model: Path, inputs: Path, tmp_path: Path
) -> None:
    assert score(tiny_model, inputs, tmp_path / "out", "--backend", "fake").exit_code == 0
    ended = score(tiny_model, inputs, tmp_path / "out")
    assert ended.exit_code == 2
    first, *differences = ended.error.splitlines()
    assert str(tmp_path / "out") in first and "belongs to another run" in first
    assert [line.strip() for line in differences] == ["backend: fake there, hf here"]


def test_an_unknown_setting_gets_a_suggestion(inputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("modle: somewhere\nshard_row: 5\n")
    ended = run_cli("score", "--config", file, inputs, "--model", "m", "--output", "o")
    assert ended.exit_code == 2
    assert ended.error.splitlines() == [
        "unknown setting `modle`; did you mean `model`?",
        "unknown setting `shard_row`; did you mean `shard_rows`?",
    ]


def test_a_setting_that_is_missing_or_impossible(inputs: Path, tmp_path: Path) -> None:
    assert_one_line(run_cli("score", inputs, "--model", "m"), "`output` is needed")
    ended = run_cli("score", inputs, "--model", "m", "--output", "o", "--shard-rows", 0)
    assert_one_line(ended, "shard_rows", "greater than 0", "got 0")
    ended = run_cli("score", inputs, "--model", "m", "--output", "o", "--dtype", "int8")
    assert_one_line(ended, "dtype", "bfloat16", "int8")
    ended = run_cli("score", "--config", tmp_path / "no.yaml", inputs)
    assert_one_line(ended, "no config file", tmp_path / "no.yaml")
    ended = run_cli(
        "score", inputs, "--model", "m", "--output", "o", "--store-option", "aws_token=1"
    )
    assert_one_line(ended, "store_options.aws_token", "AWS_SESSION_TOKEN")


def test_a_flag_that_does_not_exist_is_named(inputs: Path) -> None:
    ended = run_cli("score", inputs, "--modle", "m")
    assert ended.exit_code == 2
    assert "--modle" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize("command", ["score", pytest.param("check", marks=pytest.mark.slow)])
def test_an_extra_that_is_not_installed_is_named_by_the_worker_on_ray(
    command: str, program: Program, tiny_model: Path, inputs: Path, tmp_path: Path
) -> None:
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("flash-attn is installed")
    ended = program.run(
        command, "--model", tiny_model, inputs, "--output", tmp_path / "out",
        "--attention", "flash_attention_2",
    )  # fmt: skip
    assert_one_line(ended, "flash-attn", "pip install")


def test_a_ray_cluster_that_is_not_there(
    program: Program, tiny_model: Path, inputs: Path, tmp_path: Path
) -> None:
    running = program.start(
        "score", "--model", tiny_model, inputs, "--output", tmp_path / "out",
        "--ray-address", "127.0.0.1:1",
    )  # fmt: skip
    assert_one_line(running.wait(timeout_s=90), "127.0.0.1:1")
