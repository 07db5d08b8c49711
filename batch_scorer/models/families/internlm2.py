"""InternLM2-reward: InternLM2's body is Llama's under other names, read at a reward token."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from batch_scorer.models.adapter import Adapter, Body, LastToken, ModelConfig, Prompt, Reference
from batch_scorer.models.families.heads import linear_head

_NAMES = {
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_REMOTE = ("architectures", "auto_map", "model_type", "bias", "attn_implementation")


def _config(config: ModelConfig) -> dict[str, Any]:
    entries = {name: value for name, value in config.items() if name not in _REMOTE}
    return entries | {"attention_bias": bool(config.get("bias", False)), "mlp_bias": False}


def _tensors(name: str, tensor: Tensor, config: ModelConfig) -> Iterable[tuple[str, Tensor]]:
    if ".wqkv." in name:
        # Row groups of one KV head: its queries, then its key, then its value.
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        size = config["hidden_size"] // heads
        rest = tensor.shape[1:]
        groups = tensor.view(kv_heads, heads // kv_heads + 2, size, *rest)
        parts = {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}
        for letter, part in parts.items():
            renamed = name.replace("attention.wqkv", f"self_attn.{letter}_proj")
            yield renamed, part.reshape(-1, *rest).contiguous()
        return
    for old, new in _NAMES.items():
        name = name.replace(f".{old}.", f".{new}.")
    yield name, tensor


ADAPTERS = (
    Adapter(
        name="internlm2_reward",
        summary="InternLM2 with `v_head`, read at a reward token after the conversation",
        architectures=("InternLM2ForRewardModel",),
        head={"v_head.weight": (1, None)},
        unused=("output.*",),
        build_head=linear_head("v_head"),
        pooling=LastToken(must_be="reward_token_id"),
        reads="the reward token (the config's reward_token_id), added after the conversation",
        body=Body(model_type="llama", config=_config, tensors=_tensors),
        prompt=Prompt(suffix_id_of="reward_token_id"),
        models=("internlm/internlm2-1_8b-reward, -7b-reward, -20b-reward",),
        references=(
            Reference(
                "internlm/internlm2-20b-reward", "demo, first chat", 0.767578125, "model card"
            ),
            Reference(
                "internlm/internlm2-20b-reward", "demo, second chat", -2.22265625, "model card"
            ),
        ),
        traps=(
            "without the reward token the score is read at another token, and looks plausible",
            "queries, keys and values are fused, one group of rows for each KV head",
        ),
    ),
)
