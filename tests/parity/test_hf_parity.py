"""Every scoring path of the hf backend gives plain Hugging Face's scores, one row at a time."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaModel,
)

from batch_scorer.backends.hf import HFBackend
from batch_scorer.backends.hf_loader import max_sequence_length
from batch_scorer.backends.memory import GROW_AFTER
from batch_scorer.backends.plain import plain_scores
from batch_scorer.errors import ConfigError, MissingExtraError, ModelError, RowReason
from tests.parity.tiny_models import (
    DECODERS,
    ENCODERS,
    GQA,
    PAD,
    SHAPE,
    TOLERANCE,
    VOCABULARY,
    ModelDir,
    build_model,
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

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_flash_attn = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="needs the flash-attn package"
)
SEQUENCES = [*random_sequences(24), [7], [8, 9], list(range(3, 131))]
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]


def make_backend(model_dir: Path, **settings: Any) -> HFBackend:
    return HFBackend(engine_settings(model_dir, **({"token_budget": 256} | settings)))


# Parity


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_scores_are_those_of_plain_hugging_face(
    name: str, device: str, model_dir: ModelDir
) -> None:
    reference = reference_scores(load_reference(model_dir(name)), SEQUENCES)
    backend = make_backend(model_dir(name), device=device)
    scores = backend.score(tokenized(SEQUENCES))
    assert scores.errors == {}
    assert reference.std() > 1
    np.testing.assert_allclose(scores.values, reference, rtol=0, atol=TOLERANCE)
    assert (backend.provenance["attention"] == "batch_scorer_packed") == (name in DECODERS)


@pytest.mark.parametrize(
    ("name", "trap"),
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 4096}),
        ("mistral", {"sliding_window": None}),
        ("modernbert", {"local_attention": 4096}),
    ],
)
def test_the_traps_change_the_reference(
    name: str, trap: dict[str, Any], model_dir: ModelDir
) -> None:
    """Else parity above would prove nothing about softcap and window."""
    reference = reference_scores(load_reference(model_dir(name)), SEQUENCES)
    trapped = reference_scores(load_reference(model_dir(name), **trap), SEQUENCES)
    assert np.abs(trapped - reference).max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_scores_are_those_of_plain_hugging_face(
    name: str, attention: str, model_dir: ModelDir
) -> None:
    if (name, attention) == ("gemma2", "sdpa"):
        with pytest.raises(ModelError, match="attn_logit_softcapping"):
            make_backend(model_dir(name), attention=attention)
        return
    reference = reference_scores(load_reference(model_dir(name)), SEQUENCES)
    scores = make_backend(model_dir(name), attention=attention).score(tokenized(SEQUENCES))
    np.testing.assert_allclose(scores.values, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_order_of_rows_and_token_budget_do_not_move_scores(name: str, model_dir: ModelDir) -> None:
    first = make_backend(model_dir(name)).score(tokenized(SEQUENCES)).values
    order = np.random.default_rng(1).permutation(len(SEQUENCES))
    shuffled = tokenized([SEQUENCES[index] for index in order])
    for token_budget in (64, 1000, None):
        backend = make_backend(model_dir(name), token_budget=token_budget)
        values = backend.score(shuffled).values
        np.testing.assert_allclose(values, first[order], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", DECODERS)
def test_bfloat16_is_no_further_from_float32_than_plain_hugging_face(
    name: str, device: str, model_dir: ModelDir
) -> None:
    """docs/numerics.md derives the factor."""
    sequences = random_sequences(96, seed=2)
    exact = reference_scores(load_reference(model_dir(name)), sequences)
    plain = reference_scores(load_reference(model_dir(name), "bfloat16").to(device), sequences)
    backend = make_backend(model_dir(name), dtype="bfloat16", device=device)
    scores = backend.score(tokenized(sequences))
    assert rms(scores.values - exact) <= 1.5 * rms(plain - exact)


@pytest.mark.gpu
@needs_cuda
@needs_flash_attn
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_flash_attention_2_is_as_close_as_packed(name: str, model_dir: ModelDir) -> None:
    sequences = random_sequences(96, seed=2)
    exact = reference_scores(load_reference(model_dir(name)), sequences)
    plain = reference_scores(load_reference(model_dir(name), "bfloat16").to("cuda"), sequences)
    backend = make_backend(
        model_dir(name), dtype="bfloat16", device="cuda", attention="flash_attention_2"
    )
    scores = backend.score(tokenized(sequences))
    assert rms(scores.values - exact) <= 1.5 * rms(plain - exact)


def test_a_head_with_bias(tmp_path: Path) -> None:
    build_model("llama", tmp_path)
    change_weights(tmp_path, lambda weights: weights | {"score.bias": torch.tensor([0.75])})
    values = make_backend(tmp_path).score(tokenized(SEQUENCES)).values
    reference = reference_scores(load_reference(tmp_path), SEQUENCES)  # which has no bias
    np.testing.assert_allclose(values, reference + 0.75, rtol=0, atol=TOLERANCE)


def test_a_score_head_beside_the_config_of_a_causal_model(tmp_path: Path) -> None:
    """As LLaMA-Factory and merged adapters leave it."""
    build_model("llama", tmp_path)
    reference = reference_scores(load_reference(tmp_path), SEQUENCES)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    scores = make_backend(tmp_path).score(tokenized(SEQUENCES))
    np.testing.assert_allclose(scores.values, reference, rtol=0, atol=TOLERANCE)


def test_gemma_2_looks_beyond_its_window_in_every_other_layer(
    model_dir: ModelDir, tmp_path: Path
) -> None:
    """T-GEM-2: a far token counts through the full-attention layers, and through them alone."""
    sequence = random_sequences(1, longest=40, seed=3)[0]
    sequence = (sequence * 40)[:40]  # the window is 16
    changed = [sequence[0] + 1, *sequence[1:]]
    alternating = make_backend(model_dir("gemma2")).score(tokenized([sequence, changed])).values
    assert abs(alternating[0, 0] - alternating[1, 0]) > 1e-2
    shutil.copytree(model_dir("gemma2"), tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, layer_types=["sliding_attention"] * 4, sliding_window=8)
    local = make_backend(tmp_path).score(tokenized([sequence, changed])).values
    # Four layers of windows of 8 reach 4 x 7 tokens back.
    assert abs(local[0, 0] - local[1, 0]) < 1e-5
    assert abs(local[0, 0] - alternating[0, 0]) > 1e-2


@torch.inference_mode()
def test_a_pair_has_token_types(tmp_path: Path) -> None:
    """T-ENC: 0 for the question and its separator, 1 for the answer."""
    build_model("bert", tmp_path)
    separator = 4
    change_config(tmp_path, sep_token_id=separator)
    question, answer = [3, 9, 8, 7, separator], [11, 12, 13, separator]
    longer = [3, 5, separator, *range(20, 60), separator]
    values = make_backend(tmp_path).score(tokenized([question + answer, longer])).values
    model = load_reference(tmp_path)
    ids = torch.tensor([question + answer])
    types = torch.tensor([[0] * len(question) + [1] * len(answer)])
    expected = model(input_ids=ids, token_type_ids=types).logits.numpy()
    np.testing.assert_allclose(values[:1], expected, rtol=0, atol=TOLERANCE)
    assert np.abs(model(input_ids=ids).logits.numpy() - expected).max() > 0.05


# Pooling


@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_a_sequence_that_ends_in_the_pad_id_is_pooled_where_transformers_pools(
    attention: str, model_dir: ModelDir
) -> None:
    """T-POOL-1: at the last token that is not padding, and never mid-text."""
    sequences = [[*ids[:3], PAD, *ids[3:], PAD] for ids in SEQUENCES]
    model = load_reference(model_dir("llama"))
    reference = reference_scores(model, sequences)
    model.config.pad_token_id = None  # one sequence at a time, so this pools the very last token
    assert np.abs(reference_scores(model, sequences) - reference).max() > 0.1
    scores = make_backend(model_dir("llama"), attention=attention).score(tokenized(sequences))
    np.testing.assert_allclose(scores.values, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("pad_token_id", [None, -1, 10**6])
def test_a_useless_pad_id_does_not_matter(
    pad_token_id: int | None, model_dir: ModelDir, tmp_path: Path
) -> None:
    shutil.copytree(model_dir("qwen2"), tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, pad_token_id=pad_token_id)
    reference = make_backend(model_dir("qwen2")).score(tokenized(SEQUENCES)).values
    values = make_backend(tmp_path, attention="eager").score(tokenized(SEQUENCES)).values
    np.testing.assert_allclose(values, reference, rtol=0, atol=TOLERANCE)


def test_the_head_sees_pooled_positions_only_in_float32(model_dir: ModelDir) -> None:
    backend = make_backend(model_dir("llama"), dtype="bfloat16")
    seen: list[torch.Tensor] = []
    head = backend._readout._head
    head.register_forward_hook(lambda _, inputs, output: seen.extend((*inputs, output)))
    backend.score(tokenized(SEQUENCES))
    assert sum(len(tensor) for tensor in seen) == 2 * len(SEQUENCES)
    assert {tensor.dtype for tensor in seen} == {torch.float32}


# Batches and memory


def shared_sequences() -> list[list[int]]:
    """Three prompts with eight answers each, two of them equal, under one system prompt."""
    system, *prompts = random_sequences(4, seed=3)
    answers = [ids[:20] for ids in random_sequences(7, seed=4)]
    return [
        [*system[:30], *prompt[:40], number, *ids]
        for number, prompt in enumerate(prompts)
        for ids in [*answers, answers[0]]
    ]


def count_forwards(backend: HFBackend) -> list[int]:
    """Tokens of each forward of the body from now on, padding included."""
    sizes: list[int] = []
    backend._model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return sizes


@pytest.mark.parametrize("budget", [64, 100, 4096])
def test_no_prefix_is_computed_twice_and_nothing_is_padded(
    budget: int, model_dir: ModelDir
) -> None:
    """What stands for speed in a test, where clocks may not."""
    sequences = shared_sequences()
    unique = {tuple(ids[: end + 1]) for ids in sequences for end in range(len(ids))}
    distinct = {tuple(ids) for ids in sequences}
    backend = make_backend(model_dir("llama"), token_budget=budget)
    sizes, heads = count_forwards(backend), []
    backend._readout._head.register_forward_hook(
        lambda _, inputs, output: heads.append(len(output))
    )
    scores = backend.score(tokenized(sequences))
    assert scores.effort.computed_tokens == sum(sizes) == len(unique)
    assert scores.effort.shared_tokens == sum(map(len, distinct)) - len(unique)
    assert scores.effort.attended_pairs == sum(map(len, unique))
    assert scores.effort.padding_tokens == scores.effort.oom_splits == 0
    assert scores.effort.num_batches == len(sizes) == -(-len(unique) // budget)
    assert sum(heads) == len(sequences)
    reference = reference_scores(load_reference(model_dir("llama")), sequences)
    np.testing.assert_allclose(scores.values, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_do_not_depend_on_budget_order_or_company(
    name: str, dtype: str, model_dir: ModelDir
) -> None:
    sequences = [*shared_sequences(), *SEQUENCES]
    order = np.random.default_rng(1).permutation(len(sequences))
    whole = make_backend(model_dir(name), dtype=dtype, token_budget=10_000)
    values = whole.score(tokenized(sequences)).values
    small = make_backend(model_dir(name), dtype=dtype, token_budget=37)
    shuffled = small.score(tokenized([sequences[index] for index in order])).values
    if dtype == "float32":
        np.testing.assert_allclose(shuffled, values[order], rtol=0, atol=TOLERANCE)
        return
    # Other sizes of products are rounded in another order, which costs far less than bfloat16 does:
    # 2 to 3 % of its error on a Xeon with AMX.
    exact = make_backend(model_dir(name), dtype="float32").score(tokenized(sequences)).values
    of_order, of_dtype = shuffled - values[order], values - exact
    assert np.sqrt(np.mean(of_order**2)) < 0.1 * np.sqrt(np.mean(of_dtype**2))


@pytest.mark.slow
def test_compiled_layers_give_the_same_scores(model_dir: ModelDir) -> None:
    """Gemma-2: softcap, and two kinds of layers."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")
    backend = make_backend(model_dir("gemma2"), compile=True)
    assert backend.provenance["compiled"] is True
    sequences = shared_sequences()
    values = backend.score(tokenized(sequences)).values
    reference = reference_scores(load_reference(model_dir("gemma2")), sequences)
    np.testing.assert_allclose(values, reference, rtol=0, atol=TOLERANCE)


def test_compile_is_refused_where_nothing_would_be_compiled(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="does not run packed"):
        make_backend(model_dir("llama"), attention="eager", compile=True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler"):
        make_backend(model_dir("llama"), compile=True)


def test_lanes_give_the_same_scores_side_by_side(model_dir: ModelDir) -> None:
    sequences = [*shared_sequences(), *SEQUENCES]
    alone = make_backend(model_dir("llama"), token_budget=64).score(tokenized(sequences))
    torch.set_num_threads(2)
    try:
        backend = make_backend(model_dir("llama"), token_budget=64)
        assert backend.provenance["lanes"] == 2
        scores = backend.score(tokenized(sequences))
        assert torch.get_num_threads() == 2
        backend.close()
    finally:
        torch.set_num_threads(1)
    np.testing.assert_allclose(scores.values, alone.values, rtol=0, atol=TOLERANCE)
    again = scores.effort.computed_tokens - alone.effort.computed_tokens
    assert 0 <= again <= max(map(len, sequences))
    assert scores.effort.shared_tokens == alone.effort.shared_tokens - again


def test_the_reference_runs_sequences_side_by_side_which_keep_apart_what_they_remember(
    tmp_path: Path,
) -> None:
    """With longrope a model takes other frequencies for long sequences, and remembers them."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 16,
        "long_factor": [4.0 + place for place in range(16)],
    }
    build_model("llama", tmp_path / "model", rope_parameters=rope)
    sequences = random_sequences(24, longest=120)
    model = load_reference(tmp_path / "model")
    expected = reference_scores(model, sequences)
    torch.set_num_threads(2)
    try:
        found = plain_scores(engine_settings(tmp_path / "model"), tokenized(sequences)).values
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    plain = load_reference(tmp_path / "model", rope_parameters=rope | {"long_factor": [1.0] * 16})
    assert np.abs(reference_scores(plain, sequences) - expected).max() > 100 * TOLERANCE


def test_rectangles_hold_what_the_budget_allows(model_dir: ModelDir) -> None:
    backend = make_backend(model_dir("llama"), attention="eager")
    sizes = count_forwards(backend)
    rows = tokenized(SEQUENCES)
    effort = backend.score(rows).effort
    assert len(sizes) == effort.num_batches > 1 and max(sizes) <= 256
    assert effort.computed_tokens == rows.num_tokens
    assert sum(sizes) == effort.computed_tokens + effort.padding_tokens
    assert effort.attended_pairs == (rows.lengths * (rows.lengths + 1) // 2).sum()
    assert effort.shared_tokens == effort.oom_splits == 0


def test_no_mask_of_the_packed_row_is_made(model_dir: ModelDir) -> None:
    class LargestSquare(TorchDispatchMode):
        side = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.ndim > 1:
                self.side = max(self.side, min(output.shape[-2:]))
            return output

    sequences = [[first, *range(3, 102)] for first in range(10)]
    backend = make_backend(model_dir("llama"), token_budget=1000)
    with LargestSquare() as largest:
        scores = backend.score(tokenized(sequences))
    assert scores.effort.num_batches == 1
    # Hidden states are [1000, 128] at most; a mask or scores of the row would be [1000, 1000].
    assert largest.side <= 128


def raise_above(tokens: int, error: type[Exception], message: str = "") -> Callable[..., None]:
    def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() > tokens:
            raise error(message)

    return hook


@pytest.mark.parametrize("attention", ["packed", "eager"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory"),
        (MemoryError, ""),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
)
def test_a_batch_that_does_not_fit_is_halved(
    attention: str, error: type[Exception], message: str, model_dir: ModelDir
) -> None:
    backend = make_backend(model_dir("llama"), attention=attention)
    whole = backend.score(tokenized(SEQUENCES))
    hook = raise_above(150, error, message)
    backend._model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    halved = backend.score(tokenized(SEQUENCES))
    np.testing.assert_allclose(halved.values, whole.values, rtol=0, atol=TOLERANCE)
    assert halved.errors == {}
    assert halved.effort.oom_splits == 1, "the smaller budget was not remembered"
    assert halved.effort.computed_tokens == whole.effort.computed_tokens
    assert halved.effort.num_batches > whole.effort.num_batches


def test_a_budget_that_was_halved_grows_back(model_dir: ModelDir) -> None:
    backend = make_backend(model_dir("llama"), token_budget=64)
    hook = raise_above(50, torch.OutOfMemoryError)
    handle = backend._model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    assert backend.score(tokenized(SEQUENCES)).effort.oom_splits > 0
    handle.remove()
    sizes = count_forwards(backend)
    while not sizes or max(sizes) < 64:
        assert len(sizes) < 3 * GROW_AFTER
        assert backend.score(tokenized(SEQUENCES)).effort.oom_splits == 0


@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_a_sequence_that_does_not_fit_alone_is_marked_and_the_others_scored(
    attention: str, model_dir: ModelDir
) -> None:
    backend = make_backend(model_dir("llama"), attention=attention)
    sequences = [*SEQUENCES, [*SEQUENCES[0][:40], 5], SEQUENCES[-1][:70], SEQUENCES[-1]]
    whole = backend.score(tokenized(sequences)).values

    def too_deep(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids", torch.arange(kwargs["input_ids"].shape[1]))
        if int(positions.max()) >= 100:
            raise torch.OutOfMemoryError

    backend._model.base_model.register_forward_pre_hook(too_deep, with_kwargs=True)
    scores = backend.score(tokenized(sequences))
    too_large = {index for index, ids in enumerate(sequences) if len(ids) > 100}
    assert len(too_large) > 1
    assert {error.reason for error in scores.errors.values()} == {RowReason.OUT_OF_MEMORY}
    assert set(scores.errors) == too_large
    assert np.isnan(scores.values[sorted(too_large)]).all()
    others = sorted(set(range(len(sequences))) - too_large)
    np.testing.assert_allclose(scores.values[others], whole[others], rtol=0, atol=TOLERANCE)


def test_other_errors_of_a_forward_rise(model_dir: ModelDir) -> None:
    backend = make_backend(model_dir("llama"))
    hook = raise_above(0, RuntimeError, "shapes cannot be multiplied")
    backend._model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        backend.score(tokenized(SEQUENCES))


# Rows that cannot be scored


@pytest.mark.parametrize("attention", ["packed", "eager"])
def test_sequences_that_must_not_reach_the_model_are_marked(
    attention: str, model_dir: ModelDir
) -> None:
    backend = make_backend(model_dir("llama"), attention=attention)
    bad = [[5, VOCABULARY, 6], [-1], [], [9] * 257, [3, 4]]
    scores = backend.score(tokenized([*bad, *SEQUENCES]))
    assert {index: error.reason for index, error in scores.errors.items()} == {
        0: RowReason.BAD_TOKEN_ID,
        1: RowReason.BAD_TOKEN_ID,
        2: RowReason.EMPTY,
        3: RowReason.TOO_LONG,
    }
    assert np.isnan(scores.values[:4]).all()
    expected = make_backend(model_dir("llama")).score(tokenized([bad[4], *SEQUENCES])).values
    np.testing.assert_allclose(scores.values[4:], expected, rtol=0, atol=TOLERANCE)


def test_a_shard_without_anything_to_score(model_dir: ModelDir) -> None:
    backend = make_backend(model_dir("llama"))
    assert backend.score(tokenized([])).values.shape == (0, 1)
    scores = backend.score(tokenized([[]]))
    assert np.isnan(scores.values).all()
    assert scores.effort.num_batches == 0


def test_a_score_that_is_no_number_is_marked(model_dir: ModelDir) -> None:
    backend = make_backend(model_dir("llama"))
    poison = 300

    def break_poison(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == poison)[..., None], float("nan"))

    backend._model.get_input_embeddings().register_forward_hook(break_poison)
    sequences = [[3, 4], [3, poison], [5]]
    want = make_backend(model_dir("llama")).score(tokenized(sequences)).values
    scores = backend.score(tokenized(sequences))
    np.testing.assert_allclose(scores.values[[0, 2]], want[[0, 2]], rtol=0, atol=TOLERANCE)
    assert {index: error.reason for index, error in scores.errors.items()} == {
        1: RowReason.NON_FINITE_SCORE
    }
    assert np.isnan(scores.values[:, 0]).tolist() == [False, True, False]


# Models and settings that cannot give true scores


def test_a_causal_lm_is_refused(tmp_path: Path) -> None:
    LlamaForCausalLM(AutoConfig.for_model("llama", **(SHAPE | GQA))).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the config names LlamaForCausalLM"):
        make_backend(tmp_path)


def test_a_missing_head_is_refused_by_name(model_dir: ModelDir, tmp_path: Path) -> None:
    shutil.copytree(model_dir("llama"), tmp_path, dirs_exist_ok=True)
    change_weights(tmp_path, lambda old: {n: t for n, t in old.items() if n != "score.weight"})
    with pytest.raises(ModelError, match=r"score\.weight"):
        make_backend(tmp_path)


def test_the_head_in_the_weights_counts_and_not_the_labels_in_the_config(
    model_dir: ModelDir, tmp_path: Path
) -> None:
    """T-HEAD-2: a config without num_labels means 2 to transformers; Skywork's leave it out."""
    shutil.copytree(model_dir("llama"), tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    values = make_backend(tmp_path).score(tokenized(SEQUENCES)).values
    reference = reference_scores(load_reference(model_dir("llama")), SEQUENCES)
    np.testing.assert_allclose(values, reference, rtol=0, atol=TOLERANCE)


def test_a_head_with_two_outputs_is_refused(tmp_path: Path) -> None:
    """T-HEAD-2"""
    config = AutoConfig.for_model("llama", **(SHAPE | GQA | {"num_labels": 2}))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the head has 2 outputs"):
        make_backend(tmp_path)


def test_weights_without_a_place_are_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    shutil.copytree(model_dir("llama"), tmp_path, dirs_exist_ok=True)
    change_weights(tmp_path, lambda weights: weights | {"gate.weight": torch.ones(2)})
    with pytest.raises(ModelError, match=r"nothing in the model takes gate\.weight"):
        make_backend(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"attention": "sdpa"}, "attn_logit_softcapping"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_settings_that_gemma_2_does_not_bear_are_refused(
    settings: dict[str, str], named: str, model_dir: ModelDir
) -> None:
    with pytest.raises(ModelError, match=named):
        make_backend(model_dir("gemma2"), **settings)


def test_layers_that_carry_state_along_the_row_are_not_packed(tmp_path: Path) -> None:
    """Qwen3-Next has linear attention; packed, a sequence would read its neighbour's state."""
    config = AutoConfig.for_model("qwen3_next", **(SHAPE | GQA | {"num_experts": 4}))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="linear_attention"):
        make_backend(tmp_path)


def test_a_neighbour_that_leaks_is_found_at_load(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward
    # What a short convolution does: every token also reads the one before it.
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x + x.roll(1, dims=1)))
    with pytest.raises(ModelError, match="see each other"):
        make_backend(model_dir("llama"))


def test_a_layer_that_hands_no_keyword_arguments_down_runs_packed_too(tmp_path: Path) -> None:
    config = AutoConfig.for_model("nemotron", **(SHAPE | {"num_key_value_heads": 2}))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    scores = make_backend(tmp_path).score(tokenized(SEQUENCES))
    reference = reference_scores(load_reference(tmp_path), SEQUENCES)
    np.testing.assert_allclose(scores.values, reference, rtol=0, atol=TOLERANCE)


def test_rounded_rotary_frequencies_are_refused(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later .to(dtype) rounds them, an error that grows with the position."""
    load = LlamaModel.from_pretrained

    def load_and_cast(*args: Any, **kwargs: Any) -> Any:
        model, report = load(*args, **kwargs)
        return model.to(torch.bfloat16), report

    monkeypatch.setattr(LlamaModel, "from_pretrained", load_and_cast)
    with pytest.raises(ModelError, match="inv_freq"):
        make_backend(model_dir("llama"), dtype="bfloat16")


def test_no_model_no_cuda_no_flash_attn(model_dir: ModelDir, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config"):
        make_backend(tmp_path / "nothing")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="CUDA"):
            make_backend(model_dir("llama"), device="cuda")
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(MissingExtraError, match="flash-attn"):
            make_backend(model_dir("llama"), dtype="bfloat16", attention="flash_attention_2")


def test_roberta_holds_fewer_tokens_than_positions(tmp_path: Path) -> None:
    """Its positions start after the padding index: the last two of the config do not exist."""
    config = AutoConfig.for_model("roberta", **(SHAPE | {"pad_token_id": 1}))
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert max_sequence_length(model) == 254
    model.save_pretrained(tmp_path)
    scores = make_backend(tmp_path).score(tokenized([[9] * 254, [9] * 255]))
    assert {index: error.reason for index, error in scores.errors.items()} == {
        1: RowReason.TOO_LONG
    }


def test_provenance_says_what_did_the_work(model_dir: ModelDir) -> None:
    backend = make_backend(model_dir("gemma2"))
    assert backend.provenance["attention_kernel"] == "blocks"
    assert backend.provenance["model_class"] == "Gemma2Model"
    assert backend.provenance["token_budget"] == 256
    assert json.loads(json.dumps(backend.provenance)) == backend.provenance
    backend.close()


def test_a_head_stored_in_float32_is_not_rounded_with_the_body(tmp_path: Path) -> None:
    build_model("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    stored = weights.pop("score.weight").float() + 1e-4
    body = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file({**body, "score.weight": stored}, tmp_path / "model.safetensors", {"format": "pt"})
    backend = make_backend(tmp_path, dtype="bfloat16")
    assert backend._readout is not None and backend._readout._head is not None
    assert torch.equal(backend._readout._head.score.weight, stored)
    assert not torch.equal(stored.to(torch.bfloat16).float(), stored)
