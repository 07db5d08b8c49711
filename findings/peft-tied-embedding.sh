#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.19.0): LoRA on a tied embedding changes one of the two uses of it.
#
# Expected: with tie_word_embeddings the embedding and the language head are one matrix, so an adapter
#   that changes `embed_tokens` changes the logits as it changes the embedding.
# Seen: PEFT wraps the embedding's module; the head multiplies by the matrix without the adapter. So no
#   model with tied weights gives the adapter's logits: the sum in the place of the tied matrix gives
#   others.
# Output seen: head without the adapter: off by 0.0e+00 of the logits' spread
#   head with it, as tied weights: off by 1.7e+01
# Why it matters here: batch_scorer/models/lora.py gives the head a matrix of its own before it merges
#   such an adapter (`_untie`), for token-logit models and implicit rewards.
#
# Needs Python 3.11; takes a minute or two. Exits with 0 while this is so, and with 1 when it has
# changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.19.0 peft==0.21.2 accelerate==1.15.0
"$folder/venv/bin/python" - 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
base = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=True)).eval()
assert base.lm_head.weight is base.model.embed_tokens.weight
plain = copy.deepcopy(base)
config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["embed_tokens"])
adapted = get_peft_model(base, config).eval()
layer = adapted.base_model.model.model.embed_tokens
with torch.no_grad():
    layer.lora_embedding_A["default"].normal_(std=0.1)  # zeros at the beginning
    layer.lora_embedding_B["default"].normal_(std=0.1)
    ids = torch.arange(5, 25)[None]
    seen = adapted(input_ids=ids).logits
    merged = plain.model.embed_tokens.weight + layer.get_delta_weight("default")

    def logits(head: torch.Tensor) -> torch.Tensor:
        states = plain.model(inputs_embeds=merged[ids]).last_hidden_state
        return states @ head.T

    apart, tied = logits(plain.lm_head.weight), logits(merged)


def error(other: torch.Tensor) -> float:
    """As a share of the spread of the logits."""
    return float((other - seen).abs().max() / seen.std())


print(f"head without the adapter: off by {error(apart):.1e} of the logits' spread")
print(f"head with it, as tied weights: off by {error(tied):.1e}")
assert error(apart) < 1e-4 and error(tied) > 0.05
PYTHON
