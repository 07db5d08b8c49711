import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from batch_scorer.config import load_config
from batch_scorer.errors import ModelError
from batch_scorer.models.directory import find_model, inspect_model, with_reference
from batch_scorer.render import max_tokens_of
from batch_scorer.runs.derive import look_at_model


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def _change_config(model: Path, **changes: object) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_good_directory_is_described(model: Path) -> None:
    facts = inspect_model(find_model(str(model)))
    assert facts.architecture == "LlamaForSequenceClassification"
    assert facts.max_tokens == 4096
    assert inspect_model(model).digest == facts.digest


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_any_changed_byte_is_another_model(model: Path, name: str) -> None:
    before = inspect_model(model).digest
    data = bytearray((model / name).read_bytes())
    data[-3] ^= 1
    if name == "config.json":
        _change_config(model, rms_norm_eps=1e-3)
    else:
        (model / name).write_bytes(data)
    assert inspect_model(model).digest != before


def test_the_tokenizer_may_lower_the_limit(model: Path) -> None:
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 512}))
    facts = inspect_model(model)
    assert (facts.max_tokens, facts.positions) == (512, 4096)


@pytest.mark.parametrize(("asked", "most"), [(None, 512), (100, 100), (1024, 1024), (9000, 4096)])
def test_a_setting_goes_before_the_tokenizers_limit(
    model: Path, asked: int | None, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit is often a leftover of training; the positions are what the model can read."""
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 512}))
    config = load_config(model=str(model), inputs=("in",), output="out", max_tokens=asked)
    assert max_tokens_of(config, look_at_model(config)) == most
    assert ("4096 positions" in caplog.text) == (asked == 9000)


def test_a_causal_model_has_no_head(model: Path) -> None:
    _change_config(model, architectures=["LlamaForCausalLM"])
    tensors = load_file(model / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match="no score head: the config names LlamaForCausalLM"):
        inspect_model(model)


def test_a_head_that_is_not_in_the_weights_is_refused(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if name != "score.weight"},
        model / "model.safetensors",
    )
    with pytest.raises(ModelError, match="contain no score head"):
        inspect_model(model)


def test_a_head_with_several_outputs_is_refused(model: Path) -> None:
    import torch

    weights = load_file(model / "model.safetensors")
    save_file({**weights, "score.weight": torch.zeros(5, 64)}, model / "model.safetensors")
    with pytest.raises(ModelError, match="5 outputs"):
        inspect_model(model)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantised_weights_are_refused_before_anything_is_loaded(model: Path, method: str) -> None:
    _change_config(model, quantization_config={"quant_method": method})
    for embeds in (False, True):
        with pytest.raises(ModelError, match=rf"quantised \({method}\)"):
            inspect_model(model, embeds=embeds)


@pytest.mark.parametrize("name", ["score.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_tensor_without_values_is_named(model: Path, name: str) -> None:
    """As DeepSpeed's ZeRO-3 leaves them."""
    import torch

    tensors = load_file(model / "model.safetensors")
    assert name in tensors
    save_file(tensors | {name: torch.empty(0)}, model / "model.safetensors")
    with pytest.raises(ModelError, match=f"{re.escape(name)} is there without values"):
        inspect_model(model)


def test_a_damaged_file_is_named(model: Path) -> None:
    file = model / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="incomplete download"):
        inspect_model(model)
    file.write_bytes(whole[:6])
    with pytest.raises(ModelError, match="cut off"):
        inspect_model(model)


def test_pickled_weights_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pytorch_model.bin: pickled weights can run code"):
        inspect_model(model)


def test_what_is_no_model_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config.json"):
        inspect_model(tmp_path)
    with pytest.raises(ModelError, match="no such model directory"):
        find_model(str(tmp_path / "missing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        find_model(str(tmp_path / "file"))


def _with_token(model: Path, place: int) -> None:
    """Its tokenizer with one token more."""
    file = model / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["added_tokens"].append({**stored["added_tokens"][0], "id": place, "content": "<new>"})
    file.write_text(json.dumps(stored))


def test_a_policy_may_have_tokens_behind_its_references(model: Path, tiny_model: Path) -> None:
    _with_token(model, 384)
    policy, reference = (inspect_model(each, with_digest=False) for each in (model, tiny_model))
    both = with_reference(policy, reference)
    assert both.vocab_size == 384 < policy.vocab_size
    assert both.doubts == (
        "1 tokens, from id 384 on, are not in both models' tokenizers: rows that have them are "
        "marked bad_token_id",
    )
    assert with_reference(reference, policy).vocab_size == 384
    alike = with_reference(reference, inspect_model(tiny_model, with_digest=False))
    assert (alike.vocab_size, alike.doubts) == (512, ())


def test_a_token_in_the_midst_is_another_vocabulary(model: Path, tiny_model: Path) -> None:
    _with_token(model, 300)
    policy, reference = (inspect_model(each, with_digest=False) for each in (model, tiny_model))
    with pytest.raises(ModelError, match="'<new>' is no token here, 300 there"):
        with_reference(policy, reference)


def test_what_was_done_to_the_files_is_no_warning(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(model / "model.safetensors")
    renamed = {f"module.{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, model / "model.safetensors", metadata={"format": "pt"})
    _change_config(model, architectures=["LlamaForCausalLM"])
    config = load_config(model=str(model), inputs="in", output="out", backend="fake")
    with caplog.at_level("INFO", "batch_scorer"):
        facts = look_at_model(config, with_weights=False)
    said = {record.getMessage(): record.levelname for record in caplog.records}
    (change,), (doubt,) = facts.changes, facts.doubts
    assert "the wrapper's name module." in change and said[f"{model}: {change}"] == "INFO"
    assert "names LlamaForCausalLM" in doubt and said[f"{model}: {doubt}"] == "WARNING"
