"""A LoRA adapter and its base score as PEFT's own forward does; vLLM's part is in
`test_vllm_parity.py`."""

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from batch_scorer.backends.hf import HFBackend
from batch_scorer.backends.linear import ReorderedLinear
from batch_scorer.backends.plain import plain_scores
from batch_scorer.models.directory import find_base, inspect_model, read_model_files
from batch_scorer.models.registry import adapter_named
from batch_scorer.models.weights import body_tensors
from tests.helpers.adapters import peft_adapter
from tests.parity.tiny_models import (
    ENCODERS,
    MODEL_CONFIGS,
    TOLERANCE,
    VOCABULARY,
    engine_settings,
    random_sequences,
    reference_scores,
    tokenized,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCES = random_sequences(6, longest=40)
BITE = 1000  # tolerances by which the adapter moves the scores
QUERIES = {"target_modules": ["q_proj", "v_proj"]}
ALL = {"target_modules": "all-linear"}


@dataclass(frozen=True)
class Case:
    """`has_head`: the base is a classifier already. `said` is part of what is recorded."""

    model: str
    config: dict[str, Any]
    has_head: bool = False
    said: str = "rank 4, alpha 8"


CASES = {
    "every matrix": Case("llama", ALL),
    "rank-stabilised": Case("qwen2", ALL | {"use_rslora": True}, said="rank-stabilised"),
    "dora": Case("llama", ALL | {"use_dora": True}, said="DoRA"),
    "dora in gpt2": Case("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "fan_in_fan_out": Case(
        "gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
    ),
    "patterns": Case(
        "llama",
        QUERIES | {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_.*": 3}},
        said="rank 2, alpha 8",
    ),
    "embeddings": Case("gemma2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings with dora": Case("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "modules_to_save": Case("llama", QUERIES | {"modules_to_save": ["embed_tokens", "norm"]}),
    "all biases": Case("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "biases of targets": Case("qwen2", QUERIES | {"bias": "lora_only"}),
    "lora_bias": Case("qwen2", QUERIES | {"lora_bias": True}),
    "one layer": Case("llama", QUERIES | {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "a regular expression": Case("llama", {"target_modules": r".*\.1\..*(up|down)_proj"}),
    "head of the base": Case("llama", QUERIES | {"task_type": None}, has_head=True),
    "target is the head": Case(
        "llama", {"target_modules": ["v_proj", "score"], "task_type": None}, has_head=True
    ),
    "an encoder with a new head": Case("modernbert", {"target_modules": ["Wqkv", "Wo"]}),
    "an encoder": Case("bert", {"target_modules": ["query", "dense"]}, has_head=True),
}


def write_base(kind: str, path: Path, *, has_head: bool = True, **shape: Any) -> None:
    """A random model of two layers, whose attention is peaked."""
    torch.manual_seed(0)
    shape = MODEL_CONFIGS[kind] | {"num_hidden_layers": 2, "n_layer": 2} | shape
    config = AutoConfig.for_model(kind, **shape)
    without = AutoModelForMaskedLM if kind in ENCODERS else AutoModelForCausalLM
    model = (AutoModelForSequenceClassification if has_head else without).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(path)


def classifier(path: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, attn_implementation="eager"
    )


def adapted(tmp_path: Path, case: Case) -> tuple[Path, Path]:
    """The folders of a base and of its adapter."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    write_base(case.model, base, has_head=case.has_head)
    peft_adapter(classifier(base), lora, base=str(base), **case.config)
    return base, lora


def engine_scores(base: Path, lora: Path | None, **settings: Any) -> np.ndarray:
    with closing(HFBackend(engine_settings(base, lora_dir=lora, **settings))) as backend:
        scores = backend.score(tokenized(SEQUENCES))
    assert scores.errors == {}
    return scores.values


def loaded_by_peft(base: Path, lora: Path) -> PeftModel:
    return PeftModel.from_pretrained(classifier(base), lora).eval()


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_peft(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, lora = adapted(tmp_path, case)
    reference = reference_scores(loaded_by_peft(base, lora), SEQUENCES)
    scores = engine_scores(base, lora)
    np.testing.assert_allclose(scores, reference, rtol=0, atol=TOLERANCE * reference.std())
    bare = loaded_by_peft(base, lora)
    with bare.disable_adapter():
        moved = np.abs(reference - reference_scores(bare, SEQUENCES)).max()
    assert moved > BITE * TOLERANCE * reference.std(), "the adapter does not matter"
    facts = inspect_model(lora, base=find_base(lora))
    assert facts.architecture.endswith("ForSequenceClassification")
    assert any(case.said in line for line in facts.changes), facts.changes
    base_has_language_head = "lm_head.weight" in load_file(base / "model.safetensors")
    left_out = "not in the model that was trained: lm_head.weight" in facts.changes
    assert left_out == base_has_language_head


def test_the_references_weights_are_merged_too(tmp_path: Path) -> None:
    """Else the gate would find the engine wrong, or let one through that forgot the adapter."""
    base, lora = adapted(tmp_path, CASES["every matrix"])
    reference = reference_scores(loaded_by_peft(base, lora), SEQUENCES)
    settings = engine_settings(base, lora_dir=lora)
    scores = plain_scores(settings, tokenized(SEQUENCES)).values
    np.testing.assert_allclose(scores, reference, rtol=0, atol=TOLERANCE * reference.std())


def test_weights_are_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    write_base("llama", base)
    model = classifier(base).bfloat16()
    model.save_pretrained(base)
    peft_adapter(model, lora, base=str(base), **ALL)
    merged = PeftModel.from_pretrained(classifier(base).float(), lora).float().merge_and_unload()
    exact = merged.state_dict()
    files = read_model_files(base, lora_dir=lora)
    tensors = dict(body_tensors(files, adapter_named("sequence_classifier")))
    with closing(HFBackend(engine_settings(base, lora_dir=lora, dtype="bfloat16"))) as backend:
        in_engine = backend._model.state_dict() | {
            f"{name}.weight": module.weight.to_dense()
            for name, module in backend._model.named_modules()
            if isinstance(module, ReorderedLinear)
        }
    for name, tensor in tensors.items():
        changed = name in files.deltas
        assert tensor.dtype == (torch.float32 if changed else torch.bfloat16), name
        torch.testing.assert_close(tensor.float(), exact[name], rtol=0, atol=1e-6)
        assert torch.equal(in_engine[name.removeprefix("model.")], tensor.bfloat16()), name


def test_an_enlarged_vocabulary_comes_from_the_adapter(tmp_path: Path) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    write_base("llama", base)
    model = classifier(base)
    model.resize_token_embeddings(VOCABULARY + 2)
    wrapped = peft_adapter(model, lora, base=str(base), **QUERIES)
    sequences = [[5, VOCABULARY, 7], [VOCABULARY + 1], [3, 4]]
    reference = reference_scores(wrapped, sequences)
    with closing(HFBackend(engine_settings(base, lora_dir=lora))) as backend:
        scores = backend.score(tokenized(sequences))
    assert scores.errors == {}
    np.testing.assert_allclose(scores.values, reference, rtol=0, atol=TOLERANCE * reference.std())
    assert inspect_model(lora, base=base).vocab_size == VOCABULARY + 2


@pytest.mark.parametrize("stays_tied", [False, True])
def test_a_tied_language_head_has_the_embeddings_change_only_where_peft_ties_it(
    stays_tied: bool, tmp_path: Path
) -> None:
    """PEFT adds to the embedding only, and a head that is tied to it goes without, by default."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    write_base("llama", base, has_head=False, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    config = {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens", "q_proj"]}
    config["ensure_weight_tying"] = stays_tied
    wrapped = peft_adapter(model, lora, base=str(base), **config)
    with torch.inference_mode():
        logits = [wrapped(input_ids=torch.tensor([ids])).logits[:, -1, :1] for ids in SEQUENCES]
    reference = torch.cat(logits).numpy()
    scores = engine_scores(base, lora, adapter=adapter_named("token_logit"))
    np.testing.assert_allclose(scores, reference, rtol=0, atol=TOLERANCE * reference.std())


# What trainers write


def test_llama_factorys_value_head_lies_beside_the_adapter(tmp_path: Path) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    write_base("qwen2", base, has_head=False)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    wrapped = peft_adapter(model, lora, base=str(base), task_type="CAUSAL_LM", **ALL)
    head = {"v_head.summary.weight": torch.randn(1, 64), "v_head.summary.bias": torch.randn(1)}
    with torch.inference_mode():
        states = [
            wrapped(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
            for ids in SEQUENCES
        ]
    last = torch.cat([state[:, -1] for state in states])
    weight, bias = head.values()
    reference = (last @ weight.T + bias).numpy()
    save_file(head, lora / "value_head.safetensors")
    scores = engine_scores(base, lora)
    np.testing.assert_allclose(scores, reference, rtol=0, atol=TOLERANCE * reference.std())
    assert inspect_model(lora, base=base).adapter == "value_head"
    (lora / "value_head.safetensors").unlink()
    torch.save(head, lora / "value_head.bin")
    np.testing.assert_allclose(engine_scores(base, lora), scores, rtol=1e-5)


def test_openrlhfs_adapter_is_pickled_and_its_config_normalises(tmp_path: Path) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    write_base("llama", base, has_head=False)
    config = {"task_type": None, "modules_to_save": ["score"], **QUERIES}
    wrapped = peft_adapter(classifier(base), lora, base=str(base), **config)
    reference = (reference_scores(wrapped, SEQUENCES) - 0.5) / 2
    stored = load_file(lora / "adapter_model.safetensors")
    (lora / "adapter_model.safetensors").unlink()
    torch.save(stored, lora / "adapter_model.bin")
    beside = json.loads((base / "config.json").read_text())
    beside |= {"normalize_reward": True, "mean": [0.5], "std": [2.0]}
    (lora / "config.json").write_text(json.dumps(beside))
    scores = engine_scores(base, lora)
    np.testing.assert_allclose(scores[:, :1], reference, rtol=0, atol=TOLERANCE * reference.std())
    assert inspect_model(lora, base=base).adapter == "openrlhf"


@pytest.mark.parametrize("layout", ["FSDP", "old PEFT", "bare body"])
def test_names_of_other_versions_lead_to_the_same_tensors(layout: str, tmp_path: Path) -> None:
    base, lora = adapted(tmp_path, CASES["every matrix"])
    scores = engine_scores(base, lora)
    file = lora / "adapter_model.safetensors"
    stored = load_file(file)
    if layout == "FSDP":
        stored = {
            name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."): tensor
            for name, tensor in stored.items()
        }
    elif layout == "old PEFT":
        head = "base_model.model.score."
        kept = stored.pop(f"{head}weight")
        stored |= {f"{head}modules_to_save.weight": kept, f"{head}original_module.weight": kept * 2}
        stored = {name.replace("lora_A", "lora_A.default"): t for name, t in stored.items()}
    else:
        weights = load_file(base / "model.safetensors")
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, file)
    np.testing.assert_allclose(engine_scores(base, lora), scores, rtol=1e-5)


def test_transformers_road_through_peft_agrees(tmp_path: Path) -> None:
    """`AutoPeftModelForSequenceClassification` is how TRL's users load what it saved."""
    base, lora = adapted(tmp_path, CASES["every matrix"])
    model = AutoPeftModelForSequenceClassification.from_pretrained(lora, num_labels=1).eval()
    reference = reference_scores(model, SEQUENCES)
    scores = engine_scores(base, lora)
    np.testing.assert_allclose(scores, reference, rtol=0, atol=TOLERANCE * reference.std())
