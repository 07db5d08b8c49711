"""LoRA adapters: where the base is found, what is refused, and what a run records.

That the merged model scores as PEFT's is in `tests/parity/test_lora.py`.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from batch_scorer.backends.plain_tokenizer import PlainTokenizer
from batch_scorer.config import Config, load_config
from batch_scorer.errors import BatchScorerError, ConfigError, ModelError
from batch_scorer.models.adapter import Prompt
from batch_scorer.models.directory import find_base, inspect_model, with_reference
from batch_scorer.records import ParsedRows
from batch_scorer.render import renderer_of
from batch_scorer.runs.derive import derive, look_at_model, look_at_models
from tests.helpers.adapters import peft_adapter
from tests.helpers.in_process import run_cli

Tensors = dict[str, torch.Tensor]

Q = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model in `base`, and in `lora` an adapter of it that holds the score head."""
    root = tmp_path_factory.mktemp("lora")
    shutil.copytree(tiny_model, root / "base")
    weights = load_file(root / "base" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, root / "base" / "model.safetensors", metadata={"format": "pt"})
    change_json(root / "base" / "config.json", architectures=["LlamaForCausalLM"])
    model = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=1)
    targets = ["q_proj", "v_proj"]
    peft_adapter(model, root / "lora", base=str(root / "base"), target_modules=targets)
    return root


@pytest.fixture
def lora(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "lora", tmp_path / "lora"))


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(lora: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(lora / WEIGHTS)
    change(tensors)
    save_file(tensors, lora / WEIGHTS)


def configured(lora: Path, **settings: Any) -> Config:
    return load_config(model=str(lora), inputs=("in",), output="out", **settings)


def refused(lora: Path, **settings: Any) -> str:
    with pytest.raises(BatchScorerError) as refusal:
        look_at_model(configured(lora, **settings))
    assert refusal.value.exit_code == 2
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# The base


def test_the_adapters_config_names_the_base(lora: Path, made: Path) -> None:
    assert find_base(lora) == made / "base"
    facts = look_at_model(configured(lora))
    assert (facts.path, facts.lora_dir) == (made / "base", lora)
    assert (facts.adapter, facts.architecture) == (
        "sequence_classifier",
        "LlamaForSequenceClassification",
    )


def test_a_base_may_lie_relative_to_the_adapter(lora: Path, made: Path) -> None:
    shutil.copytree(made / "base", lora.parent / "beside")
    change_json(lora / CONFIG, base_model_name_or_path="../beside")
    base = find_base(lora)
    assert base is not None and base.samefile(lora.parent / "beside")


def test_a_setting_names_another_base(lora: Path, made: Path) -> None:
    change_json(lora / CONFIG, base_model_name_or_path="org/gone")
    assert "its base: org/gone: " in (said := refused(lora)) and "--base-model" in said
    assert look_at_model(configured(lora, base_model=str(made / "base"))).path == made / "base"
    change_json(lora / CONFIG, base_model_name_or_path=None)
    assert "does not name its base; name it: --base-model" in refused(lora)


def test_a_base_without_an_adapter_is_a_mistake(made: Path) -> None:
    with pytest.raises(ConfigError, match=r"base_model: .* is no LoRA adapter"):
        look_at_model(configured(made / "base", base_model=str(made / "base")))


def test_an_adapter_of_an_adapter_is_refused(lora: Path, made: Path) -> None:
    change_json(lora / CONFIG, base_model_name_or_path=str(made / "lora"))
    assert "is a LoRA adapter too" in refused(lora)


def test_base_and_adapter_in_one_folder_are_the_adapters_model(lora: Path, made: Path) -> None:
    shutil.copytree(made / "base", lora, dirs_exist_ok=True)
    change_json(lora / CONFIG, base_model_name_or_path="org/gone")
    facts = look_at_model(configured(lora))
    assert facts.path == facts.lora_dir == lora
    assert any("LoRA adapter: 4 tensors" in line for line in facts.changes)


def test_a_base_belongs_to_one_of_several_models(lora: Path, made: Path, tiny_model: Path) -> None:
    own = {"model": str(lora), "base_model": str(made / "base")}
    members = look_at_models(
        load_config(model={"a": own, "b": str(tiny_model)}, inputs=("in",), output="out")
    )
    assert [member.model.lora_dir for member in members.values()] == [lora, None]


def test_a_quantised_base_is_refused(lora: Path, made: Path) -> None:
    base = shutil.copytree(made / "base", lora.parent / "base")
    for method in ("bitsandbytes", "fp8"):  # of which only the second could be read at all
        change_json(base / "config.json", quantization_config={"quant_method": method})
        said = refused(lora, base_model=str(base))
        assert f"is quantised ({method}); name the checkpoint" in said and "--base-model" in said


def test_a_trainers_state_is_no_base(lora: Path, made: Path) -> None:
    shutil.copy(made / "base" / "config.json", lora)
    save_file({"step": torch.ones(1)}, lora / "optimizer.safetensors")
    assert find_base(lora) == made / "base"


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "an adapter of type IA3"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "sets target_parameters"),
        ({"trainable_token_indices": [1]}, "sets trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication"),
        ({"use_qalora": True}, "sets use_qalora"),
        ({"alora_invocation_tokens": [1, 2]}, "sets alora_invocation_tokens"),
        ({"of_the_future": True}, "sets of_the_future, which is not known here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa"),
        ({"bias": "some"}, "no such bias is known: some"),
        ({"r": 0}, "r is 0; it must be a number above 0"),
        ({"alpha_pattern": {"q_proj": None}}, "lora_alpha is None"),
        ({"r": 8}, r"lora_A of model.layers.\d.* is \[4, 64\], and \[8, 64\] would"),
        ({"use_dora": True}, "lacks lora_magnitude_vector"),
        ({"target_modules": ["q_proj", "k_proj"]}, "k_proj is a target, and .* no tensors"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_supported_is_named(
    changes: dict[str, Any], said: str, lora: Path
) -> None:
    change_json(lora / CONFIG, **changes)
    with pytest.raises(ModelError, match=said):
        look_at_model(configured(lora))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "layers.0.self_attn.q_proj lacks lora_B"),
        (
            lambda t: [t.pop(f"{Q}.lora_{side}.weight") for side in "AB"],
            "q_proj is a target, and model.layers.0.self_attn.q_proj.weight has no tensors",
        ),
        (
            lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(128)}),
            "has lora_magnitude_vector, which its config does not ask for",
        ),
        (lambda t: t.update({f"{Q}.lora_E": torch.ones(4)}), "it changes .*q_proj.lora_E"),
        (lambda t: t.update({"elsewhere.weight": torch.ones(4)}), "it changes elsewhere.weight"),
        (
            lambda t: t.update({f"{Q.replace('.0.', '.7.')}.lora_A.weight": torch.ones(4, 64)}),
            "it changes model.layers.7.self_attn.q_proj.weight, which the base does not have",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32)}),
            r"is \[4, 32\], and \[4, 64\] would fit a base of \[128, 64\] and rank 4",
        ),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}),
            r"model.norm.weight is \[32\], and \[64\] in the base",
        ),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(0)}), "ZeRO-3"),
        (lambda t: t.update({f"module.{Q}.lora_A.weight": torch.ones(4, 64)}), "is there twice"),
        (
            lambda t: t.update(
                {name.replace(".model.layers.", ".layers."): u.clone() for name, u in t.items()}
            ),
            "q_proj.weight is changed twice",
        ),
        (
            lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(128)}),
            "gets a bias that its layer has no place for",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[Tensors], object], said: str, lora: Path
) -> None:
    change_tensors(lora, change)
    with pytest.raises(ModelError, match=said):
        look_at_model(configured(lora))


def test_an_adapter_needs_weights_that_run_no_code(lora: Path) -> None:
    (lora / WEIGHTS).unlink()
    assert "without weights" in refused(lora)
    torch.save({"run": print}, lora / "adapter_model.bin")
    assert "adapter_model.bin: not a file of tensors" in refused(lora)


def test_a_pickled_adapter_with_nan_is_refused_by_tensor(lora: Path) -> None:
    """The digest looks for it in safetensors only."""
    tensors = load_file(lora / WEIGHTS)
    (lora / WEIGHTS).unlink()
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name][0, 0] = float("nan")
    torch.save(tensors, lora / "adapter_model.bin")
    assert f"{name} holds NaN" in refused(lora)


def test_an_adapter_that_is_its_own_reference_is_named(lora: Path) -> None:
    facts = look_at_model(configured(lora))
    with pytest.raises(ModelError, match=f"^{re.escape(str(lora))}: the reference model is the"):
        with_reference(facts, facts)


# Heads


@pytest.mark.parametrize(
    ("task", "beside", "said"),
    [
        ("CAUSAL_LM", {}, "the trained one is lost; train again with task_type SEQ_CLS"),
        ("SEQ_CLS", {}, "PEFT should have saved it"),
        (None, {"normalize_reward": False}, "OpenRLHF's LoRA exports left it out"),
    ],
)
def test_a_lost_head_is_told_with_its_cause(
    task: str | None, beside: dict[str, Any], said: str, lora: Path, made: Path
) -> None:
    change_json(lora / CONFIG, task_type=task)
    if beside:
        shutil.copy(made / "base" / "config.json", lora)
        change_json(lora / "config.json", **beside)
    head = load_file(lora / WEIGHTS)["base_model.model.score.weight"]
    change_tensors(lora, lambda tensors: tensors.pop("base_model.model.score.weight"))
    assert said in refused(lora)
    # OpenRLHF's targets take in the head, whose own weights are then nowhere.
    pair = {"lora_A": torch.ones(4, head.shape[1]), "lora_B": torch.ones(1, 4)}
    pair = {f"base_model.model.score.{part}.weight": tensor for part, tensor in pair.items()}
    change_tensors(lora, lambda tensors: tensors.update(pair))
    assert said in (line := refused(lora)) and "score.weight" in line


# The record


def test_both_digests_are_in_the_fingerprint(lora: Path, made: Path) -> None:
    base = shutil.copytree(made / "base", lora.parent / "base")
    before = inspect_model(lora, base=base)
    assert before.digest != before.base_digest
    change_tensors(lora, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4, 64)}))
    other_adapter = inspect_model(lora, base=base)
    change_json(base / "config.json", rms_norm_eps=1e-3)
    other_base = inspect_model(lora, base=base)
    assert len({before.digest, other_adapter.digest, other_base.digest}) == 3
    assert before.base_digest == other_adapter.base_digest != other_base.base_digest
    config = configured(lora, base_model=str(base), device="cpu")
    parts = derive(config, look_at_model(config)).fingerprint.parts
    assert (parts["model"], parts["base"]) == (other_base.digest, other_base.base_digest)
    whole = derive(config, look_at_model(configured(made / "lora"))).fingerprint.parts
    assert whole["base"] == before.base_digest


@pytest.mark.parametrize("is_own", [False, True])
def test_the_tokenizer_is_the_adapters_if_it_has_one(is_own: bool, lora: Path, made: Path) -> None:
    if is_own:
        tokenizer = AutoTokenizer.from_pretrained(made / "base")
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "<|im_end|>", " (adapter)<|im_end|>"
        )
        tokenizer.save_pretrained(lora)
    config = configured(lora, device="cpu")
    job = derive(config, facts := look_at_model(config))
    assert facts.tokenizer_path == (lora if is_own else made / "base")
    assert job.probe is not None
    assert ("(adapter)" in job.probe.texts[0]) == is_own


def test_a_suffix_token_is_named_in_the_bases_config(lora: Path, made: Path) -> None:
    AutoTokenizer.from_pretrained(made / "base").save_pretrained(lora)
    facts = look_at_model(configured(lora))
    facts = replace(facts, prompt=Prompt(suffix_id_of="pad_token_id"))
    talk = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]
    parsed = ParsedRows([talk], np.array([0, 1]))
    ids = renderer_of(configured(lora), facts).tokenize(parsed).token_ids.tolist()
    plain = PlainTokenizer(facts.tokenizer_path, facts.prompt, config_dir=facts.path)
    assert ids[-1] == 0 and plain.token_ids(talk, {}).ids == ids


def test_an_embedding_needs_to_be_told_how_it_is_read(lora: Path) -> None:
    """sentence-transformers' files may lie with the adapter or with the base."""
    config = configured(lora, task="embed", device="cpu")
    with pytest.raises(ConfigError, match="embedding_pooling: needed for a LoRA adapter"):
        derive(config, look_at_model(config))
    config = configured(lora, task="embed", embedding_pooling="last", device="cpu")
    assert derive(config, look_at_model(config)).embedding is not None


def test_the_command_line_scores_the_adapters_model(lora: Path, made: Path, tmp_path: Path) -> None:
    """Also from a folder with the base beside the adapter, which was scored without it once."""
    both = Path(shutil.copytree(made / "base", tmp_path / "both"))
    shutil.copytree(lora, both, dirs_exist_ok=True)
    talk = [{"role": "user", "content": "A cup of tea?"}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    ids = tokenizer.apply_chat_template(talk, tokenize=True, return_tensors="pt")["input_ids"]
    model = AutoModelForSequenceClassification.from_pretrained(made / "base", num_labels=1)
    with torch.inference_mode():
        wanted = PeftModel.from_pretrained(model, lora).eval()(input_ids=ids).logits.item()
    flags = ["--no-ray", "--device", "cpu", "--dtype", "float32", "--json"]
    for number, model_flags in enumerate([[lora], [lora, "--base-model", made / "base"], [both]]):
        out = tmp_path / f"out{number}"
        ended = run_cli(
            "score", tmp_path / "in.jsonl", "--model", *model_flags, "--output", out, *flags
        )
        assert ended.exit_code == 0, ended.err
        (score,) = pq.read_table(next(out.glob("*.parquet")))["score"].to_pylist()
        np.testing.assert_allclose(score, wanted, rtol=1e-4)
    checked = run_cli("check", lora, tmp_path / "in.jsonl", *flags)
    assert checked.exit_code == 0, checked.err
    found = checked.json["model"]
    assert found["base_model"] == str(made / "base")
    assert "LoRA adapter: 4 tensors merged in float32, rank 4, alpha 8" in found["model_changes"]
