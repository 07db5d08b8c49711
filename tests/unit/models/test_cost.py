"""Against hand arithmetic on published shapes: the matrices of a layer, layers, two per weight."""

from pathlib import Path
from typing import Any

import pytest

from batch_scorer.models.adapter import ModelFiles
from batch_scorer.models.cost import ModelCost, model_cost
from batch_scorer.models.directory import inspect_model
from batch_scorer.models.registry import adapter_named

Shapes = dict[str, list[int]]


def cost(shapes: Shapes, adapter: str = "sequence_classifier", **config: Any) -> ModelCost | None:
    files = ModelFiles(Path("/nowhere"), "a/model", config, shapes)
    return model_cost(files, adapter_named(adapter))


def attention(layer: str, hidden: int, heads: int, kv_heads: int, head_dim: int) -> Shapes:
    return {
        f"{layer}.input_layernorm.weight": [hidden],
        f"{layer}.self_attn.q_proj.weight": [heads * head_dim, hidden],
        f"{layer}.self_attn.q_proj.bias": [heads * head_dim],
        f"{layer}.self_attn.k_proj.weight": [kv_heads * head_dim, hidden],
        f"{layer}.self_attn.v_proj.weight": [kv_heads * head_dim, hidden],
        f"{layer}.self_attn.o_proj.weight": [hidden, heads * head_dim],
    }


def gated(layer: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{layer}.gate_proj.weight": [inner, hidden],
        f"{layer}.up_proj.weight": [inner, hidden],
        f"{layer}.down_proj.weight": [hidden, inner],
    }


def decoder(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, vocab: int
) -> Shapes:
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "score.weight": [1, hidden]}
    for layer in (f"model.layers.{number}" for number in range(layers)):
        shapes |= attention(layer, hidden, heads, kv_heads, head_dim)
        shapes |= gated(f"{layer}.mlp", hidden, inner)
    return shapes


def test_llama() -> None:
    shapes = decoder(32, 4096, 14336, 32, 8, 128, vocab=128256)
    shapes["lm_head.weight"] = [128256, 4096]
    found = cost(shapes, num_hidden_layers=32, num_attention_heads=32, hidden_size=4096)
    # 16,777,216 q and o, 4,194,304 k and v, 3 times 58,720,256: 218,103,808 a layer.
    assert found == ModelCost(flops_per_token=13_958_643_712, flops_per_pair=524_288)
    assert found.flops(1000, 500_500) == 13_958_643_712_000 + 262_406_144_000


def test_gemma_2_whose_heads_are_not_as_wide_as_the_model() -> None:
    shapes = decoder(46, 4608, 36864, 32, 16, 128, vocab=256000)
    settings: Any = {"num_hidden_layers": 46, "num_attention_heads": 32, "hidden_size": 4608}
    # 3 times 18,874,368 in attention, 3 times 169,869,312: 566,231,040 a layer.
    assert cost(shapes, head_dim=128, **settings) == ModelCost(52_093_255_680, 753_664)


def test_qwen_3_with_norms_in_its_heads() -> None:
    shapes = decoder(28, 1024, 3072, 16, 8, 128, vocab=151936)
    shapes |= {f"model.layers.{n}.self_attn.q_norm.weight": [128] for n in range(28)}
    settings: Any = {"num_hidden_layers": 28, "num_attention_heads": 16, "hidden_size": 1024}
    # 3 times 2,097,152 in attention, 3 times 3,145,728: 15,728,640 a layer.
    assert cost(shapes, head_dim=128, **settings) == ModelCost(880_803_840, 229_376)


@pytest.mark.parametrize("stacked", [False, True])
def test_of_routed_experts_those_count_that_a_token_is_sent_to(stacked: bool) -> None:
    """Mixtral 8x7B: 2 of 8 experts, one tensor for each or one for all."""
    shapes: Shapes = {"model.embed_tokens.weight": [32000, 4096]}
    for layer in (f"model.layers.{number}" for number in range(32)):
        shapes |= attention(layer, 4096, 32, 8, 128)
        shapes[f"{layer}.mlp.gate.weight"] = [8, 4096]
        if stacked:
            shapes[f"{layer}.mlp.experts.gate_up_proj"] = [8, 4096, 2 * 14336]
            shapes[f"{layer}.mlp.experts.down_proj"] = [8, 14336, 4096]
        else:
            for expert in range(8):
                shapes |= gated(f"{layer}.mlp.experts.{expert}", 4096, 14336)
    settings: Any = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}
    found = cost(shapes, num_local_experts=8, num_experts_per_tok=2, **settings)
    # 41,943,040 in attention, 32,768 in the router, 2 times 176,160,768: 394,297,344 a layer.
    assert found == ModelCost(25_235_030_016, 524_288)
    assert cost(shapes, **settings) is None  # how many are used is not said


def test_a_shared_expert_counts_whole() -> None:
    shapes: Shapes = {}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= attention(layer, 8, 2, 2, 4)  # 4 * 64
        shapes |= gated(f"{layer}.mlp.shared_expert", 8, 16)  # 3 * 128
        for expert in range(4):
            shapes |= gated(f"{layer}.mlp.experts.{expert}", 8, 2)  # 3 * 16
    found = cost(
        shapes, num_hidden_layers=2, num_attention_heads=2, hidden_size=8,
        num_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    assert found == ModelCost(2 * 2 * (256 + 384 + 48), 4 * 2 * 4 * 2)


def test_an_encoder_without_its_embeddings_and_head() -> None:
    """DeBERTa-v3-base."""
    shapes = {
        "deberta.embeddings.word_embeddings.weight": [128100, 768],
        "deberta.encoder.rel_embeddings.weight": [512, 768],
        "pooler.dense.weight": [768, 768],
        "classifier.weight": [1, 768],
    }
    for layer in (f"deberta.encoder.layer.{number}" for number in range(12)):
        for name in ("query_proj", "key_proj", "value_proj"):
            shapes[f"{layer}.attention.self.{name}.weight"] = [768, 768]
        shapes[f"{layer}.attention.output.dense.weight"] = [768, 768]
        shapes[f"{layer}.intermediate.dense.weight"] = [3072, 768]
        shapes[f"{layer}.output.dense.weight"] = [768, 3072]
    found = cost(shapes, "encoder", num_hidden_layers=12, num_attention_heads=12, hidden_size=768)
    # 4 times 589,824 in attention, 2 times 2,359,296: 7,077,888 a layer.
    assert found == ModelCost(169_869_312, 36_864)


def test_layers_that_the_config_leaves_out_are_not_counted() -> None:
    settings: Any = {"num_attention_heads": 9, "hidden_size": 576, "head_dim": 64}
    shapes = decoder(30, 576, 1536, 9, 3, 64, vocab=49152)
    assert cost(shapes, num_hidden_layers=12, **settings) == ModelCost(12 * 3_538_944 * 2, 27_648)


def test_what_config_and_weights_do_not_tell_is_not_known() -> None:
    shapes = decoder(2, 8, 16, 2, 2, 4, vocab=32)
    assert cost(shapes, num_hidden_layers=2, hidden_size=8) is None
    packed = {name.replace(".weight", ".qweight"): shape for name, shape in shapes.items()}
    settings: Any = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}
    assert cost(packed, **settings) is None


def test_a_checkpoint_on_disk(tiny_model: Path) -> None:
    # A layer: 4 matrices of attention with 24,576 weights, 3 of 8,192.
    assert inspect_model(tiny_model, with_digest=False).cost == ModelCost(2 * 2 * 49_152, 1_024)
