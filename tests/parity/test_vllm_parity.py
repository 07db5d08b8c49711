"""The vllm backend gives the scores of plain Hugging Face, one row at a time."""

import gc
import importlib.util
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from batch_scorer.backends import vllm_engine
from batch_scorer.backends.base import EngineDied
from batch_scorer.backends.plain import plain_scores
from batch_scorer.backends.vllm import VLLMBackend, plan_requests
from batch_scorer.backends.vllm_engine import BLOCK_SIZE, check_version, require_vllm
from batch_scorer.errors import ConfigError, MissingExtraError, ModelError, RowReason
from batch_scorer.models.adapter import Adapter, MarkAndLast, StepTokens
from batch_scorer.models.registry import EMBEDDING, adapter_named
from batch_scorer.records import Embedding
from tests.helpers.adapters import peft_adapter
from tests.parity.tiny_models import (
    GQA,
    PAD,
    SHAPE,
    TOLERANCE,
    VOCABULARY,
    ModelDir,
    Sequences,
    change_config,
    change_weights,
    engine_settings,
    load_reference,
    random_sequences,
    reference_scores,
    rms,
    tokenized,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Start = Callable[..., VLLMBackend]

MAX_TOKENS = 160
SHARED = list(range(50, 150))  # three whole blocks of the prefix cache
SEQUENCES: Sequences = [
    *random_sequences(24),
    [7],
    [8, 9],
    list(range(3, 131)),
    *([*SHARED, token, token + 1] for token in range(10, 14)),
]
STOCK = adapter_named("sequence_classifier")
STEP, MARK = 5, (6, 7)


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start an engine, or hand out the one that runs if it is the same; one at a time."""
    running: dict[str, Any] = {}

    def end() -> None:
        if running:
            running.pop("backend").close()
            running.clear()

    def backend(model_dir: Path, adapter: Adapter = STOCK, **settings: Any) -> VLLMBackend:
        asked = (model_dir, adapter.name, settings)
        if running.get("asked") != asked:
            end()
            settings = {"adapter": adapter, "max_tokens": MAX_TOKENS, **settings}
            gc.freeze()  # vLLM collects garbage eight times at every start
            engine = VLLMBackend(engine_settings(model_dir, **settings))
            running.update(asked=asked, backend=engine)
        return running["backend"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        yield backend
        end()


@pytest.fixture
def limit_cache(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Room for so many blocks of the tiny Llama's keys and values, in engines that start now."""

    def limit(blocks: int) -> None:
        monkeypatch.delenv(vllm_engine.CPU_KV_CACHE_VARIABLE, raising=False)
        layers, heads, size = 4, GQA["num_key_value_heads"], GQA["head_dim"]
        per_block = BLOCK_SIZE["cpu"] * 2 * layers * heads * size * torch.float32.itemsize
        monkeypatch.setattr(vllm_engine, "CPU_KV_CACHE_BYTES", blocks * per_block)

    return limit


def plain(model_dir: Path, sequences: Sequences, adapter: Adapter = STOCK, **settings: Any) -> Any:
    """Plain Hugging Face: eager, one sequence at a time."""
    return plain_scores(
        engine_settings(model_dir, adapter=adapter, **settings), tokenized(sequences)
    )


# Parity


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "mistral", "llama"])
def test_scores_are_those_of_plain_hugging_face(
    name: str, model_dir: ModelDir, start: Start
) -> None:
    """T-VLLM-1: raw, without a sigmoid. T-GEM-1 for gemma2, whose softcap test_hf_parity.py
    shows to bite, as it does mistral's window."""
    reference = plain(model_dir(name), SEQUENCES).values
    scores = start(model_dir(name)).score(tokenized(SEQUENCES))
    assert scores.errors == {}
    np.testing.assert_allclose(scores.values, reference, rtol=0, atol=TOLERANCE)


def test_a_lora_adapter_scores_as_in_peft(
    model_dir: ModelDir, start: Start, tmp_path: Path
) -> None:
    base = model_dir("llama")
    config = {"target_modules": "all-linear", "use_rslora": True, "modules_to_save": ["norm"]}
    model = peft_adapter(load_reference(base), tmp_path, base=str(base), **config)
    reference = reference_scores(model, SEQUENCES)
    scores = start(base, lora_dir=tmp_path).score(tokenized(SEQUENCES))
    assert scores.errors == {}
    np.testing.assert_allclose(scores.values, reference, rtol=0, atol=TOLERANCE * reference.std())
    assert np.abs(reference - plain(base, SEQUENCES).values).max() > reference.std() / 10
    assert reference.min() < -1 and reference.max() > 2


def test_sdpa_would_be_seen(model_dir: ModelDir) -> None:
    """T-GEM-1: the attention that drops Gemma-2's softcap gives other scores."""
    reference = plain(model_dir("gemma2"), SEQUENCES).values
    sdpa = AutoModelForSequenceClassification.from_pretrained(
        model_dir("gemma2"), attn_implementation="sdpa"
    )
    trapped = reference_scores(sdpa.eval(), SEQUENCES)
    assert np.abs(trapped - reference).max() > 100 * TOLERANCE


# On one Llama. These share an engine, so they stand together.


def test_a_sequence_that_ends_in_the_pad_id_is_pooled_where_transformers_pools(
    model_dir: ModelDir, start: Start
) -> None:
    """T-POOL-1: vLLM itself reads the last token whatever it is."""
    sequences = [[*ids[:3], PAD, *ids[3:], PAD] for ids in SEQUENCES]
    reference = plain(model_dir("llama"), sequences).values
    model = load_reference(model_dir("llama"))
    model.config.pad_token_id = None
    assert np.abs(reference_scores(model, sequences) - reference).max() > 0.1
    values = start(model_dir("llama")).score(tokenized(sequences)).values
    np.testing.assert_allclose(values, reference, rtol=0, atol=TOLERANCE)


def test_order_of_rows_does_not_move_scores(model_dir: ModelDir, start: Start) -> None:
    backend = start(model_dir("llama"))
    values = backend.score(tokenized(SEQUENCES)).values
    order = np.random.default_rng(1).permutation(len(SEQUENCES))
    shuffled = backend.score(tokenized([SEQUENCES[index] for index in order])).values
    np.testing.assert_allclose(shuffled, values[order], rtol=0, atol=TOLERANCE)


def test_equal_sequences_are_computed_once(model_dir: ModelDir, start: Start) -> None:
    once = start(model_dir("llama")).score(tokenized([[3, 4, 5], [9]]))
    thrice = start(model_dir("llama")).score(tokenized([[3, 4, 5], [9], [3, 4, 5], [3, 4, 5]]))
    assert once.effort.computed_tokens == thrice.effort.computed_tokens == 4
    assert (thrice.values[[2, 3]] == thrice.values[0]).all()
    np.testing.assert_allclose(thrice.values, once.values[[0, 1, 0, 0]], rtol=0, atol=TOLERANCE)


def test_more_rows_than_the_engine_holds_at_once(
    model_dir: ModelDir, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = start(model_dir("llama")).score(tokenized(SEQUENCES)).values
    monkeypatch.setattr(vllm_engine, "MAX_SEQUENCES", 2)
    scores = start(model_dir("llama")).score(tokenized(SEQUENCES))
    assert scores.effort.num_batches > len(SEQUENCES) // 4
    np.testing.assert_allclose(scores.values, whole, rtol=0, atol=TOLERANCE)


def test_sequences_that_must_not_reach_the_model_are_marked(
    model_dir: ModelDir, start: Start
) -> None:
    bad = [[5, VOCABULARY, 6], [-1], [], [9] * (MAX_TOKENS + 1), [3, 4]]
    scores = start(model_dir("llama")).score(tokenized([*bad, *SEQUENCES]))
    assert {index: error.reason for index, error in scores.errors.items()} == {
        0: RowReason.BAD_TOKEN_ID,
        1: RowReason.BAD_TOKEN_ID,
        2: RowReason.EMPTY,
        3: RowReason.TOO_LONG,
    }
    assert np.isnan(scores.values[:4]).all()
    reference = plain(model_dir("llama"), [bad[4], *SEQUENCES]).values
    np.testing.assert_allclose(scores.values[4:], reference, rtol=0, atol=TOLERANCE)


def test_a_shard_without_anything_to_score(model_dir: ModelDir, start: Start) -> None:
    backend = start(model_dir("llama"))
    assert backend.score(tokenized([])).values.shape == (0, 1)
    assert np.isnan(backend.score(tokenized([[]])).values).all()


def test_provenance_says_what_did_the_work(model_dir: ModelDir, start: Start) -> None:
    provenance = start(model_dir("llama")).provenance
    assert provenance["backend"] == "vllm"
    assert provenance["model_class"] == "LlamaForCausalLM"
    assert provenance["task"] == "embed"
    assert provenance["head_dtype"] == provenance["dtype"] == "float32"
    assert provenance["attention"] == ["CPU_ATTN"]
    assert provenance["prefix_caching"] is True
    assert provenance["block_size"] == BLOCK_SIZE["cpu"] == 32
    assert provenance["enforce_eager"] is True
    json.dumps(provenance)


def test_torch_keeps_its_threads(model_dir: ModelDir, start: Start) -> None:
    """vLLM's CPU worker replaces torch.set_num_threads in the whole process."""
    start(model_dir("llama"))
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_an_engine_that_stops_half_way_is_no_error_of_a_row(
    model_dir: ModelDir, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = start(model_dir("llama"))

    def get_output(core: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("vllm.v1.engine.core_client.InprocClient.get_output", get_output)
    with pytest.raises(EngineDied, match="illegal memory access"):
        backend.score(tokenized(SEQUENCES))
    # What it still holds must not be taken for the rows of the next shard.
    monkeypatch.undo()
    with pytest.raises(EngineDied):
        backend.score(tokenized(SEQUENCES))


# Other engines on the same Llama


def test_each_step_is_full_and_every_whole_block_of_a_prefix_is_shared(
    model_dir: ModelDir,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    limit_cache: Callable[[int], None],
) -> None:
    """Also between sequences of one step, and in a cache that holds a fraction of them. The tokens
    of the steps are the scheduler's own: what the effort says was computed, was."""
    limit_cache(24)
    backend = start(model_dir("llama"), token_budget=128)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, VOCABULARY, length).tolist() for length in range(20, 116, 8)]
    answers = [random.integers(3, VOCABULARY, length).tolist() for length in range(1, 41)]
    sequences = [prompts[index % 12] + answer for index, answer in enumerate(answers)]
    sequences += [sequences[0] + answer for answer in answers[:9]]  # prompt, answer, and more
    sequences = [sequences[index] for index in random.permutation(len(sequences))]
    backend._engine.clear_cache()
    steps: list[int] = []
    scheduler = backend._engine._engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule

    def watched(*arguments: Any) -> Any:
        step = schedule(*arguments)
        steps.append(step.total_num_scheduled_tokens)
        return step

    monkeypatch.setattr(scheduler, "schedule", watched)
    effort = backend.score(tokenized(sequences)).effort
    assert effort.shared_tokens == shareable_tokens(sequences) > 20 * BLOCK_SIZE["cpu"]
    assert effort.computed_tokens == sum(map(len, sequences)) - effort.shared_tokens == sum(steps)
    assert effort.num_batches == len(steps) > 10
    assert set(steps[:-1]) == {128}


def shareable_tokens(sequences: Sequences) -> int:
    """What a cache of whole blocks saves at most, each sequence asked after those that sort before
    it. The last token of a sequence is always computed."""
    size, shared = BLOCK_SIZE["cpu"], 0
    computed: set[tuple[int, ...]] = set()
    for ids in sorted(sequences):
        prefixes = [tuple(ids[:stop]) for stop in range(size, len(ids) + 1, size)]
        known = [prefix for prefix in prefixes if prefix in computed and len(prefix) < len(ids)]
        shared += max(map(len, known), default=0)
        computed.update(prefixes)
    return shared


def test_the_prefix_cache_does_not_move_scores(model_dir: ModelDir, start: Start) -> None:
    """T-PREFIX: ten responses to one prompt, cache on and off, are plain Hugging Face's."""
    sequences = [[*SHARED, *ids[:40]] for ids in random_sequences(10, seed=5)]
    reference = plain(model_dir("llama"), sequences).values
    cached = start(model_dir("llama"), token_budget=128).score(tokenized(sequences))
    computed = start(model_dir("llama"), prefix_caching=False).score(tokenized(sequences))
    assert cached.effort.shared_tokens > 0
    assert computed.effort.shared_tokens == 0
    np.testing.assert_allclose(cached.values, reference, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(computed.values, reference, rtol=0, atol=TOLERANCE)


def test_bfloat16_is_about_as_far_from_float32_as_plain_hugging_face(
    model_dir: ModelDir, start: Start
) -> None:
    """docs/numerics.md derives the factor."""
    sequences = random_sequences(96, seed=2)
    exact = plain(model_dir("llama"), sequences).values
    rounded = plain(model_dir("llama"), sequences, dtype="bfloat16").values
    values = start(model_dir("llama"), dtype="bfloat16").score(tokenized(sequences)).values
    assert rms(values - exact) <= 1.5 * rms(rounded - exact)


# Heads and bodies that vLLM does not know


def classifier(name: str, model_dir: Path) -> Any:
    """A random model whose heads are as large as its config implies, as Qwen2 and InternLM2 need
    it: their classes in vLLM know no `head_dim`."""
    torch.manual_seed(1)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(name, **(SHAPE | heads))
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        model.score.weight.mul_(20)
    model.eval().save_pretrained(model_dir)
    return model


def test_a_two_layer_head_is_ours(start: Start, tmp_path: Path) -> None:
    """T-VLLM-2: vLLM has a Qwen2ForRewardModel of its own, which scores all tokens or none."""
    body = classifier("qwen2", tmp_path).base_model
    layers = {"score.0": torch.nn.Linear(64, 64), "score.2": torch.nn.Linear(64, 1)}
    head = {
        f"{name}.{part}": getattr(layer, part).data * (10 if name == "score.2" else 1)
        for name, layer in layers.items()
        for part in ("weight", "bias")
    }
    change_weights(
        tmp_path, lambda old: {n: t for n, t in old.items() if n != "score.weight"} | head
    )
    change_config(tmp_path, architectures=["Qwen2ForRewardModel"])
    values = start(tmp_path, adapter_named("qwen2_math_rm")).score(tokenized(SEQUENCES)).values
    with torch.inference_mode():
        last = torch.cat([body(torch.tensor([ids]))[0][:, -1] for ids in SEQUENCES])
        hidden = torch.relu(last @ head["score.0.weight"].T + head["score.0.bias"])
        expected = hidden @ head["score.2.weight"].T + head["score.2.bias"]
    assert expected.std() > 0.5
    np.testing.assert_allclose(values, expected, rtol=0, atol=TOLERANCE)


def test_a_head_that_reads_two_tokens(model_dir: ModelDir, start: Start, tmp_path: Path) -> None:
    shutil.copytree(model_dir("llama"), tmp_path, dirs_exist_ok=True)
    torch.manual_seed(2)
    sizes = [64, 16, 16, 16, 19]
    head = {
        "regression_layer.weight": torch.randn(19, 64),
        "reward_transform_matrix": torch.randn(19, 19),
        "gating.logit_scale": torch.ones(1),
    }
    for index, (columns, rows) in enumerate(itertools.pairwise(sizes)):
        head[f"gating.layers.{index}.weight"] = torch.randn(rows, columns)
        head[f"gating.layers.{index}.bias"] = torch.randn(rows)
    change_weights(
        tmp_path, lambda old: {n: t for n, t in old.items() if n != "score.weight"} | head
    )
    change_config(tmp_path, architectures=["LlamaForRewardModelWithGating"])
    adapter = replace(adapter_named("armorm"), pooling=MarkAndLast({"llama": MARK}))
    sequences = [[*ids, *MARK, *ids[:9]] for ids in random_sequences(12, longest=90)]
    sequences.append([3, 4])  # without the mark
    reference = plain(tmp_path, sequences, adapter)
    scores = start(tmp_path, adapter).score(tokenized(sequences))
    assert scores.values.shape == (len(sequences), 20)
    assert {i: e.reason for i, e in scores.errors.items()} == {12: RowReason.NO_MARK}
    np.testing.assert_allclose(scores.values, reference.values, rtol=1e-4, atol=1e-3)
    assert scores.effort.shared_tokens > 0  # the prompt of the mark is a prefix of the whole


def test_a_step_head_reads_every_step_from_one_forward(
    model_dir: ModelDir, start: Start, tmp_path: Path
) -> None:
    shutil.copytree(model_dir("llama"), tmp_path, dirs_exist_ok=True)
    torch.manual_seed(3)
    head = {
        "score.0.weight": torch.randn(64, 64) / 8,
        "score.0.bias": torch.randn(64),
        "score.2.weight": torch.randn(2, 64),
        "score.2.bias": torch.randn(2),
    }
    change_weights(
        tmp_path, lambda old: {n: t for n, t in old.items() if n != "score.weight"} | head
    )
    change_config(tmp_path, architectures=["Qwen2ForProcessRewardModel"])
    adapter = replace(adapter_named("qwen2_math_prm"), pooling=StepTokens(STEP))
    steps = [[token if token != STEP else STEP + 1 for token in ids] for ids in SEQUENCES]
    sequences = [[*ids[:20], STEP, *ids[20:40], STEP, *ids[40:], STEP] for ids in steps]
    sequences += [[3, 4], sequences[0]]  # without a step, and one a second time
    reference = plain(tmp_path, sequences, adapter)
    scores = start(tmp_path, adapter).score(tokenized(sequences))
    assert {i: e.reason for i, e in scores.errors.items()} == {len(steps): RowReason.NO_STEPS}
    np.testing.assert_array_equal(scores.step_offsets, reference.step_offsets)
    np.testing.assert_allclose(scores.step_values, reference.step_values, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(scores.values, reference.values, rtol=0, atol=TOLERANCE)
    # One forward for each distinct sequence that has steps, however many.
    assert scores.effort.computed_tokens == sum(map(len, sequences[: len(steps)]))
    assert np.std(scores.step_values) > 0.05


def test_every_token_has_a_score(model_dir: ModelDir, start: Start) -> None:
    sequences = [*SEQUENCES, SEQUENCES[0], []]  # one a second time, and one without tokens
    scores = start(model_dir("llama"), token_scores=True).score(tokenized(sequences))
    assert {i: e.reason for i, e in scores.errors.items()} == {len(sequences) - 1: RowReason.EMPTY}
    model = load_reference(model_dir("llama"))
    with torch.inference_mode():
        expected = [
            model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, :, 0]
            for ids in sequences[:-1]
        ]
    assert scores.step_values is not None and scores.step_offsets is not None
    assert np.diff(scores.step_offsets).tolist() == [len(ids) for ids in sequences]
    np.testing.assert_allclose(scores.step_values, torch.cat(expected), rtol=0, atol=5 * TOLERANCE)
    last = [values[-1] for values in expected]
    np.testing.assert_allclose(scores.values[:-1, 0], last, rtol=0, atol=TOLERANCE)


def test_a_body_under_other_names(start: Start, tmp_path: Path) -> None:
    """InternLM2 is Llama with fused and renamed weights, and no architecture of transformers."""
    llama = classifier("llama", tmp_path)
    change_weights(tmp_path, as_internlm2)
    change_config(
        tmp_path,
        architectures=["InternLM2ForRewardModel"],
        model_type="internlm2",
        bias=False,
        reward_token_id=STEP,
    )
    sequences = [[*ids, STEP] for ids in SEQUENCES]
    reference = reference_scores(llama, sequences)
    values = start(tmp_path, adapter_named("internlm2_reward")).score(tokenized(sequences)).values
    assert reference.std() > 0.5
    np.testing.assert_allclose(values, reference, rtol=0, atol=TOLERANCE)


def as_internlm2(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With one KV head, its queries, key and value simply lie one after the other."""
    names = {
        "embed_tokens": "tok_embeddings",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "score": "v_head",
    }
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if ".q_proj" in name:
            parts = [tensor, *(weights[name.replace(".q_", part)] for part in (".k_", ".v_"))]
            renamed[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(parts)
        elif ".k_proj" not in name and ".v_proj" not in name:
            for old, new in names.items():
                name = name.replace(old, new)
            renamed[name] = tensor
    return renamed


# Embeddings


@pytest.mark.parametrize("embedding", [Embedding("last", True), Embedding("mean", False)])
def test_embeddings_are_those_of_plain_hugging_face(
    embedding: Embedding, model_dir: ModelDir, start: Start
) -> None:
    reference = plain(model_dir("qwen3"), SEQUENCES, EMBEDDING, embedding=embedding).values
    backend = start(model_dir("qwen3"), EMBEDDING, embedding=embedding)
    scores = backend.score(tokenized(SEQUENCES))
    assert scores.values.shape == (len(SEQUENCES), 64)
    np.testing.assert_allclose(scores.values, reference, rtol=0, atol=TOLERANCE)


# What cannot give true scores


def test_a_cache_too_small_for_the_longest_sequence_is_refused(
    model_dir: ModelDir, start: Start, limit_cache: Callable[[int], None]
) -> None:
    limit_cache(4)
    with pytest.raises(ModelError, match=r"max_tokens \(160\) take.*VLLM_CPU_KVCACHE_SPACE"):
        start(model_dir("llama"))


def test_a_score_that_is_no_number_is_marked_and_spoils_no_other(
    model_dir: ModelDir, start: Start, tmp_path: Path, limit_cache: Callable[[int], None]
) -> None:
    """vLLM 0.32 hands its infinities and NaNs on to whoever gets the cache's block next: with 12
    blocks, they are reused all the time."""
    limit_cache(12)
    shutil.copytree(model_dir("llama"), tmp_path, dirs_exist_ok=True)
    poison = 300

    def poisoned(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["model.embed_tokens.weight"][poison] = float("inf")
        return weights

    change_weights(tmp_path, poisoned)
    clean = [[token for token in ids if token != poison] or [3] for ids in random_sequences(40)]
    reference = plain(model_dir("llama"), clean).values
    backend = start(tmp_path, token_budget=256)
    assert backend.provenance["kv_cache_blocks"] == 12
    broken = list(range(1, 40, 3))
    sequences = [[poison] * 30 + ids if i in broken else ids for i, ids in enumerate(clean)]
    scores = backend.score(tokenized(sequences))
    assert {index: error.reason for index, error in scores.errors.items()} == dict.fromkeys(
        broken, RowReason.NON_FINITE_SCORE
    )
    whole = sorted(set(range(40)) - set(broken))
    np.testing.assert_allclose(scores.values[whole], reference[whole], rtol=0, atol=TOLERANCE)
    values = backend.score(tokenized(clean)).values  # the next shard
    np.testing.assert_allclose(values, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("lost", "missing"),
    [("mlp.down_proj", r"1\.mlp\.down_proj"), ("self_attn.k_proj", r"1.*\.qkv")],
)
def test_a_weight_that_is_not_there_is_refused(
    lost: str, missing: str, model_dir: ModelDir, start: Start, tmp_path: Path
) -> None:
    """vLLM 0.32 starts without it, and computes with what lies in memory."""
    shutil.copytree(model_dir("llama"), tmp_path, dirs_exist_ok=True)
    name = f"model.layers.1.{lost}.weight"
    change_weights(tmp_path, lambda old: {n: t for n, t in old.items() if n != name})
    with pytest.raises(ModelError, match=f"lacks weights.*{missing}"):
        start(tmp_path)


def test_normalised_hidden_states_are_refused(
    model_dir: ModelDir, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    def normalising(**settings: Any) -> Any:
        return parameters(**(settings | {"use_activation": True}))

    parameters = vllm.PoolingParams
    monkeypatch.setattr(vllm, "PoolingParams", normalising)
    with pytest.raises(ModelError, match="normalises"):
        start(model_dir("llama"), token_budget=64)


def test_attention_that_vllm_has_no_kernel_for_is_found_at_the_start(
    model_dir: ModelDir, start: Start
) -> None:
    """gpt2 here has heads of 16."""
    with pytest.raises(ModelError, match="head_dim=16"):
        start(model_dir("gpt2"))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gemma2", {"dtype": "float16"}, "float16 overflows"),
        ("bert", {"adapter": adapter_named("encoder")}, "set backend to hf"),
        (
            "bert",
            {"adapter": EMBEDDING, "embedding": Embedding("cls", False)},
            "no decoder for bert",
        ),
        ("llama", {"quantization": "fp8"}, "fp8 needs a GPU"),
        ("llama", {"device": "cuda"}, "device is cuda"),
    ],
)
def test_settings_that_vllm_does_not_bear_are_refused(
    name: str, settings: dict[str, Any], message: str, model_dir: ModelDir, start: Start
) -> None:
    with pytest.raises((ModelError, ConfigError), match=message):
        start(model_dir(name), **settings)


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'batch-scorer\[vllm\]'"):
        require_vllm("cpu")


def test_an_old_vllm_is_refused_and_a_new_one_tried(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MissingExtraError, match=r"needs vLLM 0\.32, and 0\.9\.1 is installed"):
        check_version("0.9.1")
    check_version("0.32.0+cpu")
    assert not caplog.records
    check_version("0.33.0rc1")
    assert "untested" in caplog.text


# Which requests


def test_requests_are_distinct_and_neighbours_share_their_prefixes() -> None:
    rows = tokenized([[5, 6, 7], [5, 300], [5, 6], [5, 6, 7]])
    sequences, stops = np.array([0, 0, 1, 2, 3]), np.array([2, 3, 2, 2, 3])
    requests = plan_requests(rows, sequences, stops)
    ids = [np.frombuffer(prompt, ">i4").tolist() for prompt in requests.prompts]
    assert ids == [[5, 6], [5, 6, 7], [5, 300]]
    assert requests.serving.tolist() == [0, 1, 2, 0, 1]
