"""How many floating-point operations a model takes, from its config and the shapes of its weights.

A multiplication and an addition are two operations. Per token, every weight of the layers'
matrices is multiplied and added once; per pair of a query and a key, every layer takes
2 * heads * head_dim for the product of the two, and as much again for the weighted sum of the
values. This is the forward part of the count in PaLM (Chowdhery et al. 2022, arXiv 2204.02311,
appendix B) and in Kaplan et al. 2020 (arXiv 2001.08361, table 1), with the pairs that a causal
mask leaves counted one by one instead of the whole square. Not counted, as there: embedding
tables, norms, activations, softmax; and the score head, which reads a token or two of a sequence
(for an implicit reward, the vocabulary's head at the answer's tokens).
"""

import re
from dataclasses import dataclass
from math import prod

from batch_scorer.models.adapter import Adapter, ModelConfig, ModelFiles

HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model", "dim")
"""Config entries for the body's width."""

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
_ROUTED_EXPERT = ".experts."
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Config entries for the experts of a mixture."""
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token")


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Floating-point operations per token in the linear layers, and per pair of a query and a key
    in all layers' attention."""

    flops_per_token: float
    flops_per_pair: float

    def flops(self, tokens: float, pairs: float) -> float:
        """Operations for `tokens` tokens that attend to `pairs` pairs."""
        return tokens * self.flops_per_token + pairs * self.flops_per_pair

    def plus(self, other: "ModelCost") -> "ModelCost":
        """That of two models which the same tokens go through."""
        return ModelCost(
            self.flops_per_token + other.flops_per_token,
            self.flops_per_pair + other.flops_per_pair,
        )


def model_cost(files: ModelFiles, adapter: Adapter) -> ModelCost | None:
    """The body's cost; None where config or weights do not determine it.

    Matrices in numbered layers count, so embedding tables and heads do not. Of routed experts
    only the share counts that a token is sent to. Sliding windows are not considered, nor the
    position products in DeBERTa's attention; a layer that is applied several times (ALBERT)
    counts once.
    """
    config = files.config
    layers, heads = _entry(config, _LAYERS), _entry(config, _HEADS)
    head_dim = config.get("head_dim")
    if not head_dim and heads:
        head_dim = (_entry(config, HIDDEN_SIZES) or 0) // heads
    if not layers or not heads or not head_dim:
        return None
    dense = routed = 0
    for name, shape in files.shapes.items():
        number = _LAYER_NUMBER.search(name)
        if number is None or int(number[1]) >= layers or not adapter.is_body_tensor(name):
            continue
        is_matrix = len(shape) == 2 and name.endswith(".weight")
        if _ROUTED_EXPERT in name:
            is_stack = len(shape) == 3  # all experts of a layer in one tensor
            routed += prod(shape) if is_matrix or is_stack else 0
        elif is_matrix:
            dense += prod(shape)
    if not dense:  # quantised into tensors of other names
        return None
    used = 0.0
    if routed:
        experts, per_token = _entry(config, EXPERTS), _entry(config, _EXPERTS_PER_TOKEN)
        if not experts or not per_token:
            return None
        used = per_token / experts
    return ModelCost(
        flops_per_token=2.0 * (dense + routed * used),
        flops_per_pair=4.0 * heads * head_dim * layers,
    )


def _entry(config: ModelConfig, names: tuple[str, ...]) -> int | None:
    """The first of these entries that the config has."""
    value = next((config[name] for name in names if config.get(name)), None)
    return None if value is None else int(value)
