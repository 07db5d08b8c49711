"""Tiny random models whose traps bite, and the reference for every scoring path.

The reference is plain Hugging Face: eager attention, one sequence at a time, no padding.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from batch_scorer.backends.base import EngineSettings
from batch_scorer.records import TokenizedRows

VOCABULARY, PAD, EOS = 320, 0, 2
Sequences = list[list[int]]
ModelDir = Callable[[str], Path]
"""The directory of a tiny model by its name in `MODEL_CONFIGS`: the fixture `model_dir`."""
Weights = dict[str, torch.Tensor]

TOLERANCE = 1e-4
"""In float32. Seen at a score std of 2: 1.4e-5 with Hugging Face, 3e-5 with vLLM."""

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "num_labels": 1,
}
GQA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 32}
MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SHAPE | GQA,
    "qwen2": SHAPE | GQA,
    "qwen3": SHAPE | GQA,
    "gemma2": SHAPE
    | GQA
    | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 50.0, "sliding_window": 16},
    "mistral": SHAPE | GQA | {"sliding_window": 16},
    "mixtral": SHAPE | GQA | {"num_local_experts": 4},
    "gpt2": SHAPE | {"n_layer": 4},  # learned absolute positions
    "bert": SHAPE,
    "modernbert": SHAPE | {"local_attention": 16, "global_attn_every_n_layers": 2},
    "deberta-v2": SHAPE
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
}
DECODERS = ["llama", "qwen2", "qwen3", "gemma2", "mistral", "gpt2"]
ENCODERS = ["bert", "modernbert", "deberta-v2"]

QUERY_KEY_GAIN = {"gemma2": 50.0, "deberta-v2": 4.0}
"""Random attention is nearly flat: a dropped softcap, window or mask would change nothing.
Queries and keys are scaled by this (8 where none is named) until it does; the tests prove it."""
SCORE_STD = 2.0


def random_sequences(num: int, *, longest: int = 120, seed: int = 0) -> Sequences:
    """Sequences of 1 to `longest` tokens without special ids: every scoring path pools alike."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, num)
    return [random.integers(3, VOCABULARY, length).tolist() for length in lengths]


def tokenized(sequences: Sequences) -> TokenizedRows:
    """One row per sequence."""
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
    return TokenizedRows(
        token_ids=np.array([token for ids in sequences for token in ids], dtype=np.int32),
        sequence_offsets=offsets,
        row_offsets=np.arange(len(offsets), dtype=np.int64),
        truncated_tokens=np.zeros(len(sequences), dtype=np.int32),
        sequence_errors={},
        row_errors={},
    )


def load_reference(model_dir: Path, dtype: str = "float32", **config: Any) -> PreTrainedModel:
    """Plain transformers with eager attention, in evaluation mode; `config` overrides what the
    directory says."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), attn_implementation="eager", **config
    )
    return model


@torch.inference_mode()
def reference_scores(model: PreTrainedModel, sequences: Sequences) -> np.ndarray:
    """float32[S, O], one sequence at a time."""
    logits = [model(input_ids=torch.tensor([ids], device=model.device)).logits for ids in sequences]
    return torch.cat(logits).float().cpu().numpy()


def build_model(name: str, model_dir: Path, **shape: Any) -> None:
    """A random model with peaked attention and scores of standard deviation `SCORE_STD`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(MODEL_CONFIGS[name] | shape))
    made: Any = AutoModelForSequenceClassification.from_config
    model = made(config, attn_implementation="eager").eval()
    queries_and_keys = ("q_proj", "k_proj", "query", "key", "Wqkv", "c_attn")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part in parameter_name for part in queries_and_keys):
                parameter.mul_(QUERY_KEY_GAIN.get(name, 8.0))
        head = model.score if hasattr(model, "score") else model.classifier
        head.weight.mul_(SCORE_STD / reference_scores(model, random_sequences(64)).std())
    model.save_pretrained(model_dir)


def engine_settings(model_dir: Path, **settings: Any) -> EngineSettings:
    """In float32 on the CPU, unless `settings` say otherwise."""
    return EngineSettings(model_dir, **({"dtype": "float32", "device": "cpu"} | settings))


def change_weights(model_dir: Path, change: Callable[[Weights], Weights]) -> None:
    file = model_dir / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_config(model_dir: Path, **changes: Any) -> None:
    file = model_dir / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(errors**2)))
