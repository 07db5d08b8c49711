"""Tiny random language models, with a tokenizer and a template, whose logits each have a trap."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.tiny import TEMPLATE, tiny_tokenizer
from tests.parity.tiny_models import QUERY_KEY_GAIN

VOCABULARY = 512
ASKING = TEMPLATE + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
TRAPS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}
"""What each does to its logits, or where it keeps the last layer."""


def language_model(directory: Path, kind: str = "llama", seed: int = 0) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(ASKING)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **(SHAPE | TRAPS[kind]))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(QUERY_KEY_GAIN.get(kind, 8.0))
        model.get_output_embeddings().weight.mul_(20)  # tied ones, too
    model.save_pretrained(directory)
    return directory
