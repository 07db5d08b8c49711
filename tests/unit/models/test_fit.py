"""Tensors without a place and parameters without a tensor, told from headers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, BertConfig, BertForSequenceClassification

from batch_scorer.errors import ModelError
from batch_scorer.models.directory import read_model_files
from batch_scorer.models.fit import check_fit, check_head
from batch_scorer.models.registry import EMBEDDING, choose_adapter
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet

Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(model: Path, how: Callable[[Tensors], Tensors]) -> None:
    file = model / "model.safetensors"
    save_file(how(load_file(file)), file)


def change_config(model: Path, **entries: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def check(model: Path, adapter: str | None = None, *, embeds: bool = False) -> None:
    files = read_model_files(model)
    chosen = EMBEDDING if embeds else choose_adapter(files, adapter)
    check_fit(files, chosen, embeds=embeds, trust_remote_code=False)


def test_a_parameter_that_nobody_filled_is_named_before_the_output_is_claimed(
    model: Path, tmp_path: Path
) -> None:
    change(model, lambda old: {name: t for name, t in old.items() if name != UP})
    inputs = tmp_path / "in.parquet"
    inputs.write_bytes(parquet(pairs(3)))
    ended = run_cli("score", "--model", model, inputs, "--output", tmp_path / "out", "--no-ray")
    assert ended.exit_code == 2
    assert "lacks weights of LlamaModel" in ended.err and "layers.1.mlp.up_proj" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_nobody_took_is_named(model: Path) -> None:
    extra = {"model.layers.1.mlp.gate2.weight": torch.ones(2, 2)}
    change(model, lambda old: old | extra)
    with pytest.raises(ModelError, match=r"nothing in the model takes .*layers\.1\.mlp\.gate2"):
        check(model)
    with pytest.raises(ModelError, match=r"nothing in the model takes .*layers\.1\.mlp\.gate2"):
        check(model, embeds=True)


def test_a_tensor_of_another_shape_is_named(model: Path) -> None:
    change(model, lambda old: old | {UP: torch.ones(7, 64)})
    with pytest.raises(ModelError, match=r"up_proj\.weight is \[7, 64\], .* expects \[128, 64\]"):
        check(model)


def test_of_many_names_the_first_are_told(model: Path) -> None:
    change(model, lambda old: {name: t for name, t in old.items() if "layers.1" not in name})
    with pytest.raises(ModelError, match=r"layers\.1.* and \d more$"):
        check(model)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "lm_head.weight",
        "v_head.summary.weight",
        "model.embeddings.position_ids",
        "mtp.layers.0.norm.weight",
    ],
)
def test_what_no_score_depends_on_may_be_left_over(name: str, model: Path) -> None:
    change(model, lambda old: old | {name: torch.ones(2, 2)})
    check(model)
    check(model, embeds=True)


def test_an_embedding_takes_the_body_out_of_whatever_it_was_trained_in(model: Path) -> None:
    change(model, lambda old: old | {"reward_gate.0.weight": torch.ones(2, 2)})
    check(model, embeds=True)
    with pytest.raises(ModelError, match="nothing in the model takes reward_gate"):
        check(model)


MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
}


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_that_transformers_fuses_fit_as_they_are_stored(
    model_type: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(
        model_type,
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
        **MIXTURES[model_type],
        architectures=["MixtralForSequenceClassification"],
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    change_config(tmp_path, architectures=["MixtralForSequenceClassification"])
    change(tmp_path, lambda old: old | {"score.weight": torch.ones(1, 32)})
    stored = [name for name in load_file(tmp_path / "model.safetensors") if ".experts.3." in name]
    assert stored
    check(tmp_path)
    change(tmp_path, lambda old: {n: t for n, t in old.items() if n != stored[0]})
    with pytest.raises(ModelError, match="experts"):
        check(tmp_path)


@pytest.mark.parametrize("entries", [{"tie_word_embeddings": False}, {}])
def test_logits_that_nothing_is_tied_to_are_refused(entries: dict[str, Any], model: Path) -> None:
    """Id 0 is mostly the pad token, whose embedding is zero: every score would be 0.0. A Llama's
    config that does not say so is not tied."""
    change(model, lambda old: {name: t for name, t in old.items() if name != "score.weight"})
    change_config(model, architectures=["LlamaForCausalLM"])
    file = model / "config.json"
    config = json.loads(file.read_text())
    config.pop("tie_word_embeddings", None)
    file.write_text(json.dumps(config | entries))
    with pytest.raises(ModelError, match=r"lack lm_head\.weight, .*tie_word_embeddings"):
        check(model, "token_logit")
    change_config(model, tie_word_embeddings=True)
    check(model, "token_logit")
    change(model, lambda old: old | {"lm_head.weight": torch.ones(512, 64)})
    change_config(model, tie_word_embeddings=False)
    check(model, "token_logit")


def test_a_pad_token_beyond_the_embedding_is_never_looked_for(model: Path, tmp_path: Path) -> None:
    change_config(model, pad_token_id=512)  # as where a token was added, and the model not resized
    inputs = tmp_path / "in.parquet"
    inputs.write_bytes(parquet(pairs(3)))
    command = ("score", "--model", model, inputs, "--output", tmp_path / "out", "--no-ray")
    ended = run_cli(*command, "--backend", "hf")  # the gate compares with plain Hugging Face
    assert ended.exit_code == 0, ended.err


ROW, BIAS = torch.ones(1, 64), torch.zeros(1)
BESIDE = "value_head.bin"


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"weight": ROW[:, :60], "bias": BIAS}, "v_head.summary.weight is [1, 60]"),
        ({"weight": ROW.expand(2, 64), "bias": BIAS.expand(2)}, "the head has 2 outputs"),
        ({"weight": ROW * float("nan"), "bias": BIAS}, "NaN"),
        ({"weight": ROW * 0, "bias": BIAS + 1}, "all zeros"),
        ({"bias": BIAS}, "lacks v_head.summary.weight"),
        ({"weight": ROW, "at": Path("/")}, "it is damaged or holds code"),
        (None, BESIDE),
    ],
)
def test_a_head_beside_the_weights_is_looked_at_before_the_output_is_claimed(
    stored: dict[str, Any] | None, message: str, model: Path, tmp_path: Path
) -> None:
    change(model, lambda old: {name: t for name, t in old.items() if name != "score.weight"})
    change_config(model, architectures=["LlamaForCausalLM"])
    if stored is None:
        (model / BESIDE).write_bytes(b"")
    else:
        named = {f"v_head.summary.{name}": tensor for name, tensor in stored.items()}
        torch.save(named, model / BESIDE)
    inputs = tmp_path / "in.parquet"
    inputs.write_bytes(parquet(pairs(3)))
    ended = run_cli("score", "--model", model, inputs, "--output", tmp_path / "out", "--no-ray")
    assert ended.exit_code == 2
    (line,) = ended.error.splitlines()
    assert message in line and str(model) in line
    assert not (tmp_path / "out").exists()


def test_an_encoders_head_of_zeros_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=1
    )
    encoder = BertForSequenceClassification(config)
    encoder.save_pretrained(tmp_path)
    files = read_model_files(tmp_path)
    check_head(files, choose_adapter(files))
    change(tmp_path, lambda old: old | {"classifier.weight": torch.zeros(1, 64)})
    files = read_model_files(tmp_path)
    with pytest.raises(ModelError, match=r"classifier\.weight of the head is all zeros"):
        check_head(files, choose_adapter(files))
