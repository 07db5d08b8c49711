"""With `invariant` a sequence's score has the same bits whatever is scored beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batch_scorer.backends import packed
from batch_scorer.backends.hf import HFBackend
from batch_scorer.backends.memory import TokenBudget
from batch_scorer.backends.vllm import VLLMBackend
from batch_scorer.errors import ConfigError, ModelError
from batch_scorer.models.registry import EMBEDDING
from batch_scorer.records import Embedding
from tests.parity.tiny_models import (
    MODEL_CONFIGS,
    TOLERANCE,
    ModelDir,
    Sequences,
    build_model,
    change_config,
    engine_settings,
    load_reference,
    random_sequences,
    reference_scores,
    tokenized,
)

DECODERS = ["llama", "gemma2", "qwen3"]
DTYPES = ["float32", "bfloat16"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
REGROUPINGS = [12, pytest.param(400, marks=pytest.mark.slow)]
"""Of each model in each dtype."""


def pool() -> Sequences:
    """Sequences that share nothing, a prompt with answers of all lengths, and lengths at which
    blocks end."""
    prompt, other, *answers = random_sequences(14, longest=60, seed=5)
    return [
        *random_sequences(12, longest=200, seed=6),
        *([*prompt, *answer] for answer in answers),
        *([*prompt, *other, token] for token in (7, 8)),
        prompt,
        *(list(range(3, 3 + length)) for length in (1, 2, 31, 32, 33, 64, 65, 128)),
    ]


POOL = pool()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(backend: HFBackend, sequences: Sequences) -> np.ndarray:
    """int32[S], the bits of the scores."""
    scores = backend.score(tokenized(sequences))
    assert not scores.errors
    return scores.values[:, 0].view(np.int32)


def regroupings(count: int) -> Iterator[tuple[np.ndarray, int]]:
    """Some of the pool's sequences, in some order, several perhaps twice; and a token budget."""
    random = np.random.default_rng(0)
    for _ in range(count):
        budget = int(random.choice([40, 130, 333, 1024]))
        chosen = random.integers(0, len(POOL), random.integers(1, 5 if budget == 40 else 20))
        yield chosen, budget


def moved(backends: list[HFBackend], count: int) -> int:
    """How many scores of so many regroupings have other bits than alone on the first backend."""
    alone = np.array([bits(backends[0], [sequence])[0] for sequence in POOL])
    different = 0
    for number, (chosen, budget) in enumerate(regroupings(count)):
        backend = backends[number % len(backends)]
        assert backend._packed is not None
        backend._packed.budget = TokenBudget(budget)
        got = bits(backend, [POOL[index] for index in chosen])
        different += int((got != alone[chosen]).sum())
    return different


def backends(model_dir: Path, **settings: Any) -> Iterator[HFBackend]:
    """One with a thread, one with two."""
    for count in (1, 2):
        with threads(count):
            yield HFBackend(engine_settings(model_dir, **settings))


@pytest.mark.parametrize("count", REGROUPINGS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECODERS)
def test_no_bit_depends_on_company_order_budget_or_threads(
    name: str, dtype: str, device: str, count: int, model_dir: ModelDir
) -> None:
    made = [*backends(model_dir(name), dtype=dtype, device=device, invariant=True)]
    assert moved(made, count) == 0
    for backend in made:
        backend.close()


@pytest.mark.parametrize("name", DECODERS)
def test_without_it_bits_depend_on_company(name: str, model_dir: ModelDir) -> None:
    """Else the test above could not fail."""
    made = [*backends(model_dir(name))]
    assert moved(made, 12) > 0
    for backend in made:
        backend.close()


@pytest.mark.parametrize("name", DECODERS)
def test_the_scores_are_those_of_plain_hugging_face(name: str, model_dir: ModelDir) -> None:
    reference = reference_scores(load_reference(model_dir(name)), POOL)
    backend = HFBackend(engine_settings(model_dir(name), invariant=True))
    scores = backend.score(tokenized(POOL))
    np.testing.assert_allclose(scores.values, reference, rtol=0, atol=TOLERANCE)
    effort = scores.effort
    rows = packed.INVARIANT_ROWS["cpu"]
    assert effort.computed_tokens + effort.padding_tokens == rows * effort.num_batches


@pytest.mark.parametrize(
    "asked",
    [
        {"token_scores": True},
        *(
            {"embedding": Embedding(which, True), "adapter": EMBEDDING}
            for which in ("mean", "last")
        ),
    ],
    ids=["token scores", "mean", "last"],
)
def test_what_is_read_otherwise_has_the_same_bits_too(
    asked: dict[str, Any], model_dir: ModelDir
) -> None:
    settings = engine_settings(model_dir("llama"), invariant=True, token_budget=150, **asked)
    backend = HFBackend(settings)
    together = backend.score(tokenized(POOL))
    for number, sequence in enumerate(POOL):
        alone = backend.score(tokenized([sequence]))
        assert alone.values.tobytes() == together.values[number].tobytes()
        if alone.step_values is not None:
            assert together.step_values is not None and together.step_offsets is not None
            start, stop = together.step_offsets[number : number + 2]
            assert alone.step_values.tobytes() == together.step_values[start:stop].tobytes()


def test_a_machine_on_which_bits_depend_on_company_is_refused(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check at load sees the attention of the default."""
    monkeypatch.setattr(packed, "choose_kernel", lambda *_, **__: "blocks")
    with pytest.raises(ModelError, match="last bits of LlamaModel"):
        HFBackend(engine_settings(model_dir("llama"), invariant=True))


@pytest.mark.parametrize("name", ["bert", "mixtral"])
def test_what_is_padded_runs_one_sequence_at_a_time(name: str, model_dir: ModelDir) -> None:
    settings = engine_settings(model_dir(name), attention="eager", invariant=True)
    backend = HFBackend(settings)
    sequences = POOL[:12]
    together = backend.score(tokenized(sequences))
    assert together.effort.num_batches == len(sequences)
    assert together.effort.padding_tokens == 0
    alone = [bits(backend, [sequence])[0] for sequence in sequences]
    assert together.values[:, 0].view(np.int32).tolist() == alone


def test_experts_are_not_packed(model_dir: ModelDir) -> None:
    with pytest.raises(ModelError, match=r"an expert's products.*attention to eager"):
        HFBackend(engine_settings(model_dir("mixtral"), invariant=True))


@pytest.mark.parametrize(
    ("kind", "attention", "message"),
    [
        ("longrope", "packed", "longest sequence.*attention to eager"),
        ("dynamic", "packed", "earlier sequences"),
        ("dynamic", "eager", "earlier sequences"),
    ],
)
def test_frequencies_that_depend_on_company_are_refused(
    kind: str, attention: str, message: str, tmp_path: Path
) -> None:
    build_model("llama", tmp_path)
    half = MODEL_CONFIGS["llama"]["head_dim"] // 2
    factors = {"long_factor": [1.0] * half, "short_factor": [1.0] * half}
    change_config(
        tmp_path,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
            **(factors if kind == "longrope" else {}),
        },
    )
    with pytest.raises(ModelError, match=message):
        HFBackend(engine_settings(tmp_path, attention=attention, invariant=True))


def test_vllm_has_no_such_mode_on_a_cpu(model_dir: ModelDir) -> None:
    with pytest.raises(ConfigError, match="needs a GPU; on the CPU set backend to hf"):
        VLLMBackend(engine_settings(model_dir("llama"), invariant=True, max_tokens=160))


@pytest.mark.gpu
@needs_cuda
def test_vllms_own_mode_is_chosen_on_a_gpu(model_dir: ModelDir) -> None:
    settings = engine_settings(
        model_dir("llama"), device="cuda", dtype="bfloat16", invariant=True, max_tokens=256
    )
    backend = VLLMBackend(settings)
    together = backend.score(tokenized(POOL)).values[:, 0].view(np.int32)
    backend._engine.clear_cache()
    alone = [backend.score(tokenized([ids])).values[0, 0].view(np.int32) for ids in POOL]
    backend.close()
    assert together.tolist() == [int(value) for value in alone]
