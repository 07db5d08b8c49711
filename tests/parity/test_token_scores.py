"""A score for every token, packed and padded, against the plain model's head at every token.

vLLM's are in `test_vllm_parity.py`.
"""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batch_scorer.backends.hf import HFBackend
from batch_scorer.backends.packing import build_trie
from batch_scorer.errors import RowReason
from batch_scorer.models.families import ADAPTERS
from batch_scorer.models.registry import adapter_named
from batch_scorer.parity.gate import errors_of
from batch_scorer.records import Outputs, Scores
from tests.parity.families import FAMILIES, PAD, Checkpoint, ends_in_pad
from tests.parity.tiny_models import Sequences, change_weights, engine_settings, tokenized

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4  # of the largest score in float32


def hf(model_dir: Path, **settings: Any) -> HFBackend:
    return HFBackend(engine_settings(model_dir, token_scores=True, **settings))


PATHS: dict[str, Callable[[Path], Any]] = {
    # A budget that cuts every sequence: what is carried from batch to batch counts as well.
    "packed": lambda model_dir: hf(model_dir, token_budget=24),
    "padded": lambda model_dir: hf(model_dir, attention="eager", token_budget=256),
}


def build(name: str, model_dir: Path) -> Checkpoint:
    return next(family for family in FAMILIES if family.id == name).build(model_dir)


@torch.inference_mode()
def at_every_token(checkpoint: Checkpoint, sequences: Sequences) -> list[np.ndarray]:
    """Of each sequence float32[n, 1 + A]: the formula, as if each token were the last."""
    found = []
    for ids in sequences:
        hidden = checkpoint.body(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        ends = range(1, len(ids) + 1)
        found.append(torch.stack([checkpoint.formula(hidden[:e], ids[:e]) for e in ends]).numpy())
    return found


def check(scores: Scores, sequences: Sequences, expected: list[np.ndarray]) -> None:
    assert scores.errors == {}
    assert scores.step_values is not None and scores.step_offsets is not None
    assert scores.step_values.dtype == np.float32
    assert np.diff(scores.step_offsets).tolist() == [len(ids) for ids in sequences]
    every = np.concatenate([values[:, 0] for values in expected])
    assert every.std() > 0.1 * np.abs(every).max(), "nothing to tell apart"
    atol = TOLERANCE * np.abs(every).max()
    np.testing.assert_allclose(scores.step_values, every, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("sequence_classifier", "packed"),
        ("value_head", "packed"),
        ("value_head", "padded"),
        ("value_head_mlp", "packed"),
        ("openrlhf", "packed"),
        ("openrlhf", "padded"),
        ("beaver_cost", "packed"),
    ],
)
def test_token_scores_are_what_the_head_gives_at_every_token(
    name: str, path: str, tmp_path: Path
) -> None:
    checkpoint = build(name, tmp_path / "model")
    sequences = checkpoint.sequences[:12]
    # A common beginning, a sequence that is the beginning of another, and one a second time.
    sequences += [[*sequences[0], 9, 10], [*sequences[0], 11], sequences[0][:5], sequences[1]]
    expected = at_every_token(checkpoint, sequences)
    with closing(PATHS[path](tmp_path / "model")) as backend:
        scores = backend.score(tokenized(sequences))
    check(scores, sequences, expected)
    # The score, and what comes beside it, are as without the setting: those of the last token.
    last = np.stack([values[-1] for values in expected])
    atol = TOLERANCE * np.abs(last).max()
    np.testing.assert_allclose(scores.values, last, rtol=0, atol=atol)
    assert scores.step_offsets is not None and scores.step_values is not None
    ends = scores.step_values[scores.step_offsets[1:] - 1]
    np.testing.assert_allclose(ends, scores.values[:, 0], rtol=0, atol=atol)


def test_the_score_is_read_where_it_is_without_the_setting(tmp_path: Path) -> None:
    """A stock classifier whose text ends in its pad id is read one token earlier."""
    checkpoint = build("sequence_classifier", tmp_path / "model")
    sequences = ends_in_pad()[:8]
    assert all(ids[-1] == PAD != ids[-2] for ids in sequences)
    with closing(hf(tmp_path / "model")) as backend:
        scores = backend.score(tokenized(sequences))
    expected = at_every_token(checkpoint, sequences)
    check(scores, sequences, expected)
    before = np.stack([values[-2] for values in expected])
    np.testing.assert_allclose(scores.values, before, rtol=0, atol=1e-3)


def test_a_shared_prefix_is_read_once_and_no_state_is_kept(tmp_path: Path) -> None:
    """Of a sequence with a thousand siblings the states would be held a thousand times."""
    checkpoint = build("value_head", tmp_path / "model")
    prompt = max(checkpoint.sequences, key=len)
    rows = tokenized([[*prompt, token] for token in range(10, 60)])
    read: list[int] = []
    with closing(hf(tmp_path / "model", token_budget=32)) as backend:
        head = backend._readout._head
        head.register_forward_hook(lambda module, given, made: read.append(len(made)))
        backend.score(rows)
    assert sum(read) == build_trie(rows).num_tokens
    assert max(read) <= 32


def test_a_sequence_with_one_bad_token_has_neither_score_nor_list(tmp_path: Path) -> None:
    checkpoint = build("value_head", tmp_path / "model")

    def spoil(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["model.embed_tokens.weight"][250] = float("inf")
        return weights

    change_weights(tmp_path / "model", spoil)
    sound, broken = [3, 4, 5, 6], [3, 4, 250, 6]
    with closing(hf(tmp_path / "model")) as backend:
        scores = backend.score(tokenized([sound, broken, []]))
    assert {i: e.reason for i, e in scores.errors.items()} == {
        1: RowReason.NON_FINITE_SCORE,
        2: RowReason.EMPTY,
    }
    assert np.isnan(scores.values[1:]).all()
    assert scores.step_values is not None
    expected = at_every_token(checkpoint, [sound])[0][:, 0]
    np.testing.assert_allclose(scores.step_values[:4], expected, rtol=0, atol=1e-3)


def test_families_that_read_one_last_token_give_them() -> None:
    """Not those with steps or means, with a gate on the prompt, or with a token of their own."""
    giving = {adapter.name for adapter in ADAPTERS if adapter.reads_any_token}
    assert {"sequence_classifier", "value_head", "value_head_mlp", "openrlhf"} <= giving
    assert not giving & {
        *("armorm", "qrm", "worldpm", "internlm2_reward", "token_logit"),
        *("oasst_pythia", "qwen2_math_prm", "math_shepherd", "encoder"),
    }
    assert not adapter_named("embedding").reads_any_token


def test_the_gate_compares_all_tokens_of_a_sequence_as_one() -> None:
    """By their rms: one token of many may be rounded far, and a list that is shifted is seen."""
    random = np.random.default_rng(0)
    tokens = random.normal(size=400).astype(np.float32)
    values = np.array([[tokens[199]], [tokens[399]]], dtype=np.float32)
    offsets = np.array([0, 200, 400])
    exact = Scores(values, step_values=tokens, step_offsets=offsets)

    def errors(changed: np.ndarray) -> np.ndarray:
        scores = Scores(values, step_values=changed, step_offsets=offsets)
        return errors_of(exact, scores, Outputs(tokens=True))

    rounded = tokens.copy()
    rounded[7] += 0.2
    np.testing.assert_allclose(errors(rounded), [0.2 / 200**0.5 / tokens.std(), 0], rtol=1e-3)
    assert errors(np.roll(tokens, 1)).min() > 1
