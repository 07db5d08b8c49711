"""Which family a model is of: by its config, its tensors, its name; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from batch_scorer.errors import ConfigError, ModelError
from batch_scorer.models.adapter import Adapter, ModelFiles, output_entries
from batch_scorer.models.families import ADAPTERS
from batch_scorer.models.families.attribute_regression import HELPSTEER, NEMOTRON_4
from batch_scorer.models.registry import (
    EMBEDDING,
    HEAD_FILES,
    adapter_named,
    adapters,
    choose_adapter,
    mismatch_of,
)

H = 64
BODY = {"model.embed_tokens.weight": [320, H], "model.norm.weight": [H]}
LM_HEAD = {"lm_head.weight": [320, H]}
SCORE = {"score.weight": [1, H]}
TWO_LAYERS = {
    "score.0.weight": [H, H],
    "score.0.bias": [H],
    "score.2.weight": [1, H],
    "score.2.bias": [1],
}
VALUE_MLP = {
    "v_head.summary.0.weight": [32, H],
    "v_head.summary.0.bias": [32],
    "v_head.summary.2.weight": [1, 32],
    "v_head.summary.2.bias": [1],
}
URM = {
    "score.weight": [10, H],
    **{f"weights.fc.{i}.weight": [H, H] for i in (0, 2, 4)},
    **{f"weights.fc.{i}.bias": [H] for i in (0, 2, 4)},
}
GATED = {
    "regression_layer.weight": [19, H],
    "reward_transform_matrix": [19, 19],
    "gating.logit_scale": [1],
}
ARMORM = GATED | {
    f"gating.layers.{i}.{part}": shape
    for i in range(4)
    for part, shape in (("weight", [8, 8]), ("bias", [8]))
}
QRM = GATED | {
    "regression_layer.weight": [95, H],
    "gating.layers.9.weight": [19, 8],
    "gating.layers.9.bias": [19],
    **{f"gating.layers.{i}.weight": [8, 8] for i in (0, 3, 6)},
    **{
        f"gating.layers.{i}.{part}": [8]
        for i in (2, 5, 8)
        for part in ("weight", "bias", "running_mean", "running_var")
    },
}
PAIRRM = {
    "head_layer.1.weight": [H, 2 * H],
    "head_layer.1.bias": [H],
    "head_layer.4.weight": [1, H],
    "head_layer.4.bias": [1],
}
CLASSIFIER = "LlamaForSequenceClassification"


def files(
    architecture: str,
    shapes: dict[str, list[int]],
    *,
    name: str = "model",
    path: Path = Path("/nowhere"),
    **config: Any,
) -> ModelFiles:
    return ModelFiles(path, name, {"architectures": [architecture], **config}, BODY | shapes)


def labels(*names: str) -> dict[str, str]:
    return {str(i): name for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (files(CLASSIFIER, SCORE), "sequence_classifier"),
        (files("Qwen3ForSequenceClassification", SCORE), "sequence_classifier"),
        # As LLaMA-Factory and merged adapters leave it.
        (files("LlamaForCausalLM", LM_HEAD | SCORE), "sequence_classifier"),
        # Stock architecture, other tensors.
        (files(CLASSIFIER, TWO_LAYERS), "inf_orm"),
        (files(CLASSIFIER, URM), "urm"),
        (files(CLASSIFIER, {"v_head.weight": [1, H]}), "starling"),
        (files(CLASSIFIER, {"v_head.weight": [1, H]}, name="Starling-RM-34B"), "starling_34b"),
        (files("LlamaForCausalLM", LM_HEAD | {"v_head.summary.weight": [1, H]}), "value_head"),
        (files("LlamaForCausalLM", LM_HEAD | VALUE_MLP), "value_head_mlp"),
        (files("LlamaForRewardModelWithGating", ARMORM), "armorm"),
        (files("LlamaForRewardModelWithGating", QRM), "qrm"),
        # Same tensors, another architecture, config or name.
        (files("INFORMForSequenceClassification", TWO_LAYERS), "inf_orm"),
        (files("Qwen2ForRewardModel", TWO_LAYERS), "qwen2_math_rm"),
        (files("Qwen2ForRewardModel", TWO_LAYERS, name="Qwen/WorldPM-72B"), "worldpm"),
        (files("RewardModel", SCORE), "openrlhf"),
        (files("RewardModel", {"value_head.weight": [1, H]}), "openrlhf_value_head"),
        (files("EurusRewardModel", {"regression_head.weight": [1, H]}), "eurus"),
        (files("LlamaRewardModel", {"regression_head.weight": [1, H]}), "ultrarm"),
        (files("InternLM2ForRewardModel", {"v_head.weight": [1, H]}), "internlm2_reward"),
        (files("LlamaForScore", {"score_head.weight": [1, H]}), "beaver_reward"),
        (
            files("LlamaForScore", {"score_head.weight": [1, H]}, score_type="cost"),
            "beaver_cost",
        ),
        (
            files(CLASSIFIER, {"score.weight": [9, H]}, id2label=labels(*NEMOTRON_4)),
            "nemotron4_attributes",
        ),
        (
            files(
                CLASSIFIER,
                {"score.weight": [5, H]},
                name="llama3-70b-steerlm-rm",
                id2label=labels(*HELPSTEER),
            ),
            "steerlm_attributes",
        ),
        # A language model, told apart by its name only.
        (
            files("LlamaForCausalLM", LM_HEAD, name="nvidia/Llama-3.3-Nemotron-70B-Reward"),
            "token_logit",
        ),
        (files("Qwen2ForCausalLM", {}, name="Qwen-3-Nemotron-32B-Reward"), "token_logit"),
        (
            files("LlamaForCausalLM", LM_HEAD, name="RLHFlow/Llama3.1-8B-PRM-Deepseek-Data"),
            "rlhflow_prm",
        ),
        (
            files("MistralForCausalLM", LM_HEAD, name="peiyi9979/math-shepherd-mistral-7b-prm"),
            "math_shepherd",
        ),
        (
            files("LlamaForCausalLM", LM_HEAD, name="Llama-3.3-Nemotron-70B-Reward-Principle"),
            "nemotron_principle",
        ),
        (
            files("LlamaForCausalLM", LM_HEAD, name="RLHFlow/pair-preference-model-LLaMA3-8B"),
            "pair_preference",
        ),
        (
            files("InternLM2ForRewardModel", {"v_head.weight": [1, H]}, name="internlm/POLAR-7B"),
            "polar",
        ),
        (files("DebertaV2PairRM", PAIRRM, name="llm-blender/PairRM-hf"), "pairrm"),
        # As verl trains them.
        (files("Qwen2ForTokenClassification", SCORE | {"score.bias": [1]}), "token_classifier"),
        # Several outputs of the user's own.
        (
            files(CLASSIFIER, {"score.weight": [5, H]}, id2label=labels(*HELPSTEER)),
            "named_outputs",
        ),
        (
            files(CLASSIFIER, {"score.weight": [2, H]}, id2label=labels("kind", "short")),
            "named_outputs",
        ),
        (files(CLASSIFIER, SCORE, id2label=labels("kind", "short")), "sequence_classifier"),
        # Encoders score themselves.
        (
            files(
                "DebertaV2ForSequenceClassification",
                {"classifier.weight": [1, H]},
                id2label=labels("reward"),
            ),
            "encoder",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value.architecture,
)
def test_the_family_is_told_by_config_tensors_and_name(found: ModelFiles, expected: str) -> None:
    assert choose_adapter(found).name == expected


def test_a_family_that_is_asked_for_is_taken() -> None:
    plain = files("LlamaForCausalLM", LM_HEAD)
    assert choose_adapter(plain, "token_logit").name == "token_logit"
    assert choose_adapter(files("LlamaForCausalLM", {}), "token_logit").name == "token_logit"
    five = files(CLASSIFIER, {"score.weight": [5, H]}, id2label=labels(*HELPSTEER))
    assert choose_adapter(five, "steerlm_attributes").name == "steerlm_attributes"
    assert adapter_named("embedding") is EMBEDDING
    with pytest.raises(ConfigError, match=r"no `skywork`; known are .*armorm"):
        adapter_named("skywork")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            files("LlamaForCausalLM", LM_HEAD),
            "no score head: the config names LlamaForCausalLM.*--adapter token_logit",
        ),
        (files("LlamaModel", {}), "no score head: the config names LlamaModel"),
        (files("SomethingElse", {}), "no score head: the config names SomethingElse"),
        (files(CLASSIFIER, {}), r"contain no score head \(no tensor score\.weight\)"),
        (
            files("EurusRewardModel", LM_HEAD),
            r"contain no score head \(no tensor regression_head\.weight\)",
        ),
        (
            files("InternLM2ForRewardModel", {}),
            r"contain no score head \(no tensor v_head\.weight\)",
        ),
        (
            files(CLASSIFIER, {"score.weight": [5, H]}),
            "the head has 5 outputs, a scalar reward model has 1",
        ),
        (
            files(CLASSIFIER, {"score.weight": [5, H]}, id2label=labels("LABEL_0", "LABEL_1")),
            "--output-names a,b,… names them",
        ),
        (
            files(CLASSIFIER, {"score.weight": [5, H]}, id2label=labels("kind", "short")),
            "the head has 5 outputs, and there are 2 names: kind, short",
        ),
        (
            files(CLASSIFIER, {"score.weight": [2, H]}, id2label=labels("kind", "kind")),
            "two outputs have one name",
        ),
        (
            files("BertForSequenceClassification", {"classifier.weight": [2, H]}),
            "the head has 2 outputs",
        ),
    ],
)
def test_a_model_without_a_usable_head_is_refused(found: ModelFiles, message: str) -> None:
    """T-HEAD-1, T-HEAD-2"""
    with pytest.raises(ModelError, match=message):
        choose_adapter(found)


@pytest.mark.parametrize(
    ("name", "architecture", "why"),
    [
        ("llm-blender/PairRM", "unknown", "use llm-blender/PairRM-hf"),
        ("llm-blender/PairRM", "LlamaForCausalLM", "use llm-blender/PairRM-hf"),
        ("stanfordnlp/SteamSHP-flan-t5-xl", "T5ForConditionalGeneration", "not known here"),
        ("RLHFlow/pair-preference-model-gemma", "GemmaForCausalLM", "not known here"),
    ],
)
def test_pairwise_models_are_refused_for_what_they_are(
    name: str, architecture: str, why: str
) -> None:
    """T-PAIRONLY: also where they hold a tensor that would pass for a head."""
    with pytest.raises(ModelError, match=f"a pairwise model .*{why}"):
        choose_adapter(files(architecture, LM_HEAD | SCORE, name=name))


def test_judges_and_vision_models_are_refused_for_what_they_are() -> None:
    judge = files("LlamaForCausalLM", LM_HEAD, name="nvidia/Llama-3_3-Nemotron-Super-49B-GenRM")
    with pytest.raises(ModelError, match="a generative judge"):
        choose_adapter(judge)
    with pytest.raises(ModelError, match="images"):
        choose_adapter(files("Qwen2_5_VLForConditionalGeneration", {"v_head.weight": [1, H]}))


# Token ids that an adapter relies on


def with_tokenizer(directory: Path, vocabulary: dict[str, int], added: dict[str, int]) -> Path:
    tokens = [{"content": token, "id": i} for token, i in added.items()]
    stored = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": tokens}
    (directory / "tokenizer.json").write_text(json.dumps(stored))
    return directory


LLAMA_TOKENS = {"+": 10, "-": 12, "assistant": 78191, "ĊĊ": 271}
LLAMA_ADDED = {"<|start_header_id|>": 128006, "<|end_header_id|>": 128007}


def prm(path: Path) -> ModelFiles:
    name = "RLHFlow/Llama3.1-8B-PRM"
    return files("LlamaForCausalLM", LM_HEAD, name=name, path=path, model_type="llama")


def test_ids_that_a_family_relies_on_are_held_to_the_tokenizer(tmp_path: Path) -> None:
    assert choose_adapter(prm(tmp_path)).name == "rlhflow_prm"  # no tokenizer.json to look at
    with_tokenizer(tmp_path, LLAMA_TOKENS, LLAMA_ADDED)
    assert choose_adapter(prm(tmp_path)).name == "rlhflow_prm"
    with_tokenizer(tmp_path, LLAMA_TOKENS | {"+": 11}, LLAMA_ADDED)
    with pytest.raises(ModelError, match=r"'\+' is 11, and rlhflow_prm was written .* is 10"):
        choose_adapter(prm(tmp_path))
    with_tokenizer(tmp_path, LLAMA_TOKENS, {})
    with pytest.raises(ModelError, match=r"'<\|start_header_id\|>' is no token"):
        choose_adapter(prm(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not readable"):
        choose_adapter(prm(tmp_path))


def test_pieces_of_a_unigram_vocabulary_count_from_zero(tmp_path: Path) -> None:
    pieces = [[f"piece{i}", 0.0] for i in range(649)]
    pieces[387], pieces[648] = ["▁-", -1.0], ["▁+", -1.0]
    stored = {"model": {"type": "Unigram", "vocab": pieces}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    name = "math-shepherd-mistral-7b-prm"
    found = files("MistralForCausalLM", LM_HEAD, name=name, path=tmp_path, model_type="mistral")
    assert choose_adapter(found).name == "math_shepherd"


# The table itself


def test_names_are_unique_and_every_family_is_described() -> None:
    names = [adapter.name for adapter in ADAPTERS]
    assert len(set(names)) == len(names)
    for adapter in ADAPTERS:
        assert adapter.summary and adapter.models, adapter.name
        assert adapter.refused or adapter.engines[0] == "hf", adapter.name


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_an_adapter_does_not_contradict_itself(adapter: Adapter) -> None:
    assert bool(adapter.head) == (adapter.build_head is not None)
    assert set(adapter.tied) <= set(adapter.head)
    if adapter.head_rows:
        assert all(len(shape) == 2 for shape in adapter.head.values())
    for prefix in adapter.head_files.values():
        assert any(name.startswith(prefix) for name in adapter.head)
    assert (adapter.prompt.steps is not None) == (adapter.step_aggregation is not None)
    assert not any(adapter.is_body_tensor(name) for name in adapter.head)


def test_what_neither_body_nor_head_reads_belongs_to_none() -> None:
    adapter = adapter_named("value_head")
    assert adapter.is_head_tensor("v_head.summary.bias")
    assert adapter.is_body_tensor("model.norm.weight")
    assert not adapter.is_body_tensor("lm_head.weight")
    assert not adapter.is_head_tensor("lm_head.weight")


# Outputs of the user's own


def test_names_and_weights_of_the_settings_are_held_to_the_head() -> None:
    three = {"score.weight": [3, H]}
    entries = output_entries(("a", "b", "c"), {"a": 1.0})
    found = choose_adapter(files(CLASSIFIER, three, **entries), "named_outputs")
    assert found.attributes(entries) == ("a", "b", "c")
    assert found.has_score(entries) and not found.has_score(output_entries(("a", "b", "c"), {}))
    assert (found.num_outputs(entries), found.num_outputs(output_entries("abc", {}))) == (4, 3)
    with pytest.raises(ModelError, match="3 outputs, and there are 2 names: a, b"):
        choose_adapter(files(CLASSIFIER, three, **output_entries("ab", {})), "named_outputs")
    with pytest.raises(ConfigError, match="no output is named d; there are a, b, c"):
        wrong = output_entries("abc", {"a": 1.0, "d": 0.5})
        choose_adapter(files(CLASSIFIER, three, **wrong), "named_outputs")
    with pytest.raises(ModelError, match="no names for them"):
        choose_adapter(files(CLASSIFIER, three, **output_entries("", {"a": 1})), "named_outputs")
    with pytest.raises(ConfigError, match="has one output, which is the score"):
        choose_adapter(files(CLASSIFIER, SCORE, **output_entries("a", {})), "named_outputs")


def test_a_config_without_the_head_that_the_weights_have_is_told() -> None:
    found = files("LlamaForCausalLM", LM_HEAD | SCORE)
    (change,) = mismatch_of(found, choose_adapter(found))
    assert change == (
        "the config names LlamaForCausalLM, and the weights hold score.weight: scored as "
        "sequence_classifier"
    )
    stock = files(CLASSIFIER, SCORE)
    assert mismatch_of(stock, choose_adapter(stock)) == ()


def test_the_files_that_may_hold_a_head_are_fetched() -> None:
    assert {file for adapter in adapters() for file in adapter.head_files} == {*HEAD_FILES}
