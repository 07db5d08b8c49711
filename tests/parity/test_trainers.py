"""Folders as trainers write them, against the score that the trainer itself reads.

Each builder saves a tiny model as its trainer does and gives back the trainer's own reading, on
transformers' classes as they are (docs/models.md).
"""

import gc
import json
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    PreTrainedModel,
)

from batch_scorer.backends.hf import HFBackend
from batch_scorer.backends.plain import plain_scores
from batch_scorer.backends.vllm import VLLMBackend
from batch_scorer.errors import ModelError
from batch_scorer.models.directory import read_model_files
from batch_scorer.models.fit import check_fit
from batch_scorer.models.registry import choose_adapter, mismatch_of
from tests.parity.tiny_models import change_weights, engine_settings, random_sequences, tokenized

pytestmark = pytest.mark.usefixtures("one_thread")

Reading = Callable[[list[int]], float]
"""Token ids → the score that the trainer reads."""

SEQUENCES = random_sequences(8, longest=40)
TOLERANCE = 1e-4
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def config(**entries: Any) -> LlamaConfig:
    torch.manual_seed(0)
    return LlamaConfig(
        **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"max_position_embeddings": 256, "pad_token_id": 0, **entries},
    )


def sharpened(model: PreTrainedModel, head: nn.Module) -> PreTrainedModel:
    """Peaked attention, and scores that spread."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8)
        head.weight.normal_(std=0.3)
        if getattr(head, "bias", None) is not None:
            head.bias.fill_(1.5)
    return model.eval()


def ids_of(ids: list[int]) -> Tensor:
    return torch.tensor([ids])


def classifier(folder: Path, **saving: Any) -> Reading:
    """What AutoModelForSequenceClassification reads."""
    model = AutoModelForSequenceClassification.from_config(config(num_labels=1))
    sharpened(model, model.score).save_pretrained(folder, **saving)
    return lambda ids: model(ids_of(ids)).logits[0, 0].item()


def openrlhf(folder: Path, name: str, **entries: Any) -> Reading:
    """A head called by its value_head_prefix, without a bias, at the last token."""

    class RewardModel(LlamaPreTrainedModel):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model = LlamaModel(config)
            setattr(self, name, nn.Linear(config.hidden_size, 1, bias=False))
            self.post_init()

    model = RewardModel(config(**entries))
    head = getattr(model, name)
    sharpened(model, head).save_pretrained(folder)

    def reading(ids: list[int]) -> float:
        score = head(model.model(ids_of(ids)).last_hidden_state)[0, -1, 0]
        return float((score - entries.get("mean", 0)) / entries.get("std", 1))

    return reading


def verl(folder: Path) -> Reading:
    """A token classifier, read at the last place that the attention mask has."""
    model = AutoModelForTokenClassification.from_config(config(num_labels=1))
    sharpened(model, model.score).save_pretrained(folder)
    return lambda ids: model(ids_of(ids)).logits[0, -1, 0].item()


def value_head(folder: Path, file: str) -> Reading:
    """TRL's value head on the language model's last hidden state, stored beside it."""
    model = LlamaForCausalLM(config())
    head = nn.Linear(64, 1)
    sharpened(model, head).save_pretrained(folder)
    tensors = {f"v_head.summary.{name}": t for name, t in head.state_dict().items()}
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file(tensors, folder / file, metadata={"format": "pt"})

    def reading(ids: list[int]) -> float:
        states = model(ids_of(ids), output_hidden_states=True).hidden_states[-1]
        return float(head(states)[0, -1, 0])

    return reading


def causal_config(folder: Path) -> Reading:
    reading = classifier(folder)
    stored = json.loads((folder / "config.json").read_text())
    stored["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(stored))
    return reading


def wrapped(folder: Path, wrap: Callable[[str], str]) -> Reading:
    reading = classifier(folder)
    change_weights(folder, lambda old: {wrap(name): tensor for name, tensor in old.items()})
    return reading


LAYOUTS: dict[str, tuple[str, Callable[[Path], Reading]]] = {
    "TRL": ("sequence_classifier", classifier),
    "TRL, compiled": ("sequence_classifier", lambda f: wrapped(f, "_orig_mod.{}".format)),
    "OpenRLHF": ("openrlhf", lambda f: openrlhf(f, "score")),
    "OpenRLHF, value_head": ("openrlhf_value_head", lambda f: openrlhf(f, "value_head")),
    "OpenRLHF, normalised": ("openrlhf", lambda f: openrlhf(f, "score", mean=1.25, std=2.5)),
    "verl": ("token_classifier", verl),
    "LLaMA-Factory": ("value_head", lambda f: value_head(f, "value_head.safetensors")),
    "LLaMA-Factory, bin": ("value_head", lambda f: value_head(f, "value_head.bin")),
    "LLaMA-Factory, score": ("sequence_classifier", causal_config),
    "ms-swift": ("sequence_classifier", classifier),
    "ms-swift, PPO": ("value_head", lambda f: value_head(f, "value_head.safetensors")),
    "axolotl": ("sequence_classifier", classifier),
    "axolotl, FSDP": (
        "sequence_classifier",
        lambda f: wrapped(f, lambda name: name.replace("layers.", "layers._fsdp_wrapped_module.")),
    ),
    "open-instruct": ("sequence_classifier", classifier),
    "open-instruct, DDP": (
        "sequence_classifier",
        lambda f: wrapped(f, lambda name: f"module.{name.replace('model.', 'model._orig_mod.')}"),
    ),
    "NeMo and Megatron, exported": (
        "sequence_classifier",
        lambda f: classifier(f, max_shard_size="100KB"),
    ),
}


@torch.inference_mode()
def own_scores(reading: Reading) -> np.ndarray:
    scores = np.array([reading(ids) for ids in SEQUENCES], dtype=np.float32)
    assert scores.std() > 0.1 * np.abs(scores).max(), "nothing to tell apart"
    return scores


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trainers_folder_gives_the_trainers_own_scores(layout: str, tmp_path: Path) -> None:
    family, build = LAYOUTS[layout]
    expected = own_scores(build(tmp_path))
    files = read_model_files(tmp_path)
    adapter = choose_adapter(files)
    assert adapter.name == family
    check_fit(files, adapter, embeds=False, trust_remote_code=False)
    settings = engine_settings(tmp_path)
    with closing(HFBackend(settings)) as backend:
        packed = backend.score(tokenized(SEQUENCES))
    assert packed.errors == {}
    plain = plain_scores(settings, tokenized(SEQUENCES))  # the gate's reference
    for scores in (packed, plain):
        np.testing.assert_allclose(scores.values[:, 0], expected, rtol=0, atol=TOLERANCE)


def test_every_layout_of_the_page_is_built_here_and_the_other_way_round() -> None:
    section = PAGE.read_text().split("\n## What each trainer writes\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \|.*\| `(\w+)` \|$", section, re.MULTILINE)
    assert sorted(rows) == sorted((layout, family) for layout, (family, _) in LAYOUTS.items())


def test_both_engines_read_one_model_from_wrapped_shards_and_a_head_beside_them(
    tmp_path: Path,
) -> None:
    expected = own_scores(value_head(tmp_path, "value_head.safetensors"))
    weights = load_file(tmp_path / "model.safetensors")
    names = sorted(weights)
    for number, part in enumerate((names[:9], names[9:]), start=1):
        save_file(
            {f"module._orig_mod.{name}": weights[name] for name in part},
            tmp_path / f"model-{number:05}-of-00002.safetensors",
            metadata={"format": "pt"},
        )
    (tmp_path / "model.safetensors").unlink()
    gc.freeze()  # vLLM collects garbage eight times at every start
    settings = engine_settings(tmp_path, max_tokens=256)
    for engine in (HFBackend, VLLMBackend):
        with closing(engine(settings)) as backend:
            values = backend.score(tokenized(SEQUENCES)).values
        np.testing.assert_allclose(values[:, 0], expected, rtol=0, atol=TOLERANCE)


def test_a_bias_of_a_sequence_classifier_is_in_the_gates_reference(tmp_path: Path) -> None:
    """transformers' own classifiers have none, and would drop it silently."""
    reading = classifier(tmp_path)
    change_weights(tmp_path, lambda old: old | {"score.bias": torch.tensor([0.75])})
    plain = plain_scores(engine_settings(tmp_path), tokenized(SEQUENCES)).values[:, 0]
    np.testing.assert_allclose(plain, own_scores(reading) + 0.75, rtol=0, atol=TOLERANCE)


def test_a_causal_models_config_beside_a_score_head_is_told(tmp_path: Path) -> None:
    causal_config(tmp_path)
    files = read_model_files(tmp_path)
    (change,) = mismatch_of(files, choose_adapter(files))
    assert "the config names LlamaForCausalLM, and the weights hold score.weight" in change


def test_a_value_head_file_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    value_head(tmp_path, "value_head.bin")
    stored = torch.load(tmp_path / "value_head.bin", weights_only=True)
    change_weights(tmp_path, lambda old: old | stored)
    with closing(HFBackend(engine_settings(tmp_path))):
        pass
    change_weights(tmp_path, lambda old: old | {"v_head.summary.bias": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"value_head\.bin: v_head\.summary\.bias has other val"):
        HFBackend(engine_settings(tmp_path))
