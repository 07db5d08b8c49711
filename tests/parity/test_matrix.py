"""Every family of reward models, on every scoring path, against a plain model and its formula.

The truth is in `families.py`: plain transformers, eager, one
sequence at a time, and the head written out from what is published.
"""

import gc
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from batch_scorer.backends.hf import HFBackend
from batch_scorer.backends.vllm import VLLMBackend
from batch_scorer.errors import ModelError, RowReason
from batch_scorer.models.adapter import LastToken
from batch_scorer.models.directory import inspect_model, read_model_files
from batch_scorer.models.families import ADAPTERS
from batch_scorer.models.registry import adapter_named, choose_adapter
from batch_scorer.records import Scores
from tests.parity.families import (
    EOT,
    EXTRA_0,
    FAMILIES,
    LLAMA_MARK,
    PLUS,
    SHEPHERD_TAG,
    Checkpoint,
    Family,
    replies,
    run,
)
from tests.parity.tiny_models import engine_settings, rms, tokenized

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4  # of the largest score in float32
BITE = 100  # tolerances that a mistake must move the scores by
BFLOAT16_FACTOR = 1.75
"""Times plain Hugging Face's own error in bfloat16 that ours may reach (docs/numerics.md)."""


EACH_HEAD = {"sequence_classifier-gemma2", "token_logit", "value_head_mlp", "starling",
             "qwen2_math_prm", "armorm", "ldl"}  # fmt: skip
"""One family for each kind of head: in vLLM, which takes seconds to start, these in bfloat16 and by
`make test`, all in float32 by `make slow`. Heads are applied by the same code for both engines."""


def vllm(model_dir: Path, **settings: Any) -> VLLMBackend:
    # vLLM collects garbage eight times at every start; among what the tests hold that is seconds.
    gc.freeze()
    return VLLMBackend(engine_settings(model_dir, max_tokens=512, **settings))


def packed(model_dir: Path, **settings: Any) -> HFBackend:
    # A budget that cuts every sequence: what is carried from batch to batch counts as well.
    return HFBackend(engine_settings(model_dir, **({"token_budget": 24} | settings)))


def padded(model_dir: Path, **settings: Any) -> HFBackend:
    return HFBackend(engine_settings(model_dir, attention="eager", token_budget=512, **settings))


PATHS: dict[str, Callable[..., Any]] = {"packed": packed, "padded": padded, "vllm": vllm}
"""Families name those that they take (`Family.paths`)."""


def make_backend(path: str, model_dir: Path, dtype: str = "float32") -> Any:
    return PATHS[path](model_dir, dtype=dtype)


def is_left_to_slow(family: Family, path: str) -> bool:
    return path == "vllm" and family.id not in EACH_HEAD


MATRIX = [
    pytest.param(
        family,
        path,
        id=f"{family.id}-{path}",
        marks=[pytest.mark.slow] if is_left_to_slow(family, path) else [],
    )
    for family in FAMILIES
    for path in PATHS
    if path in family.paths
]
EACH = [pytest.param(family, id=family.id) for family in FAMILIES]

Built = Callable[[Family], Checkpoint]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The checkpoint of a family, built once."""
    known: dict[str, Checkpoint] = {}

    def checkpoint(family: Family) -> Checkpoint:
        if family.id not in known:
            known[family.id] = family.build(tmp_path_factory.mktemp(family.id) / family.directory)
        return known[family.id]

    return checkpoint


def row(name: str) -> Family:
    return next(family for family in FAMILIES if family.id == name)


def table(rows: list[np.ndarray], family: Family) -> np.ndarray:
    """[S, 1 + A], or all steps one after the other as [K, 1]."""
    return np.concatenate(rows)[:, None] if family.has_steps else np.stack(rows)


def given(scores: Scores, family: Family) -> np.ndarray:
    assert scores.errors == {}
    if family.has_steps:
        assert scores.step_values is not None
        return scores.step_values[:, None]
    return scores.values


# Every family on every scoring path


@pytest.mark.parametrize(("family", "path"), MATRIX)
def test_scores_are_those_of_the_plain_model(family: Family, path: str, built: Built) -> None:
    """T-MLP, T-NEMO, T-ARMO-1 and all their kind: score and attributes of every sequence."""
    checkpoint = built(family)
    expected = table(checkpoint.reference, family)
    with closing(make_backend(path, checkpoint.model_dir)) as backend:
        scores = backend.score(tokenized(checkpoint.sequences))
    scale = np.abs(expected).max(axis=0)
    assert expected[:, 0].std() > 0.1 * scale[0], "nothing to tell apart"
    np.testing.assert_array_less(
        np.abs(given(scores, family) - expected), np.broadcast_to(TOLERANCE * scale, expected.shape)
    )


@pytest.mark.parametrize(
    ("family", "path"),
    [case for case in MATRIX if not is_left_to_slow(*case.values)],
)
def test_bfloat16_is_no_further_from_float32_than_plain_hugging_face(
    family: Family, path: str, built: Built
) -> None:
    checkpoint = built(family)
    exact = table(checkpoint.reference, family)[:, 0]
    plain = table(checkpoint.bfloat16_reference, family)[:, 0]
    with closing(make_backend(path, checkpoint.model_dir, "bfloat16")) as backend:
        scores = given(backend.score(tokenized(checkpoint.sequences)), family)[:, 0]
    assert 0 < rms(scores - exact) <= BFLOAT16_FACTOR * rms(plain - exact)


@pytest.mark.parametrize("family", EACH)
def test_each_trap_moves_the_reference(family: Family, built: Built) -> None:
    """Else parity would prove nothing about it."""
    checkpoint = built(family)
    expected = table(checkpoint.reference, family)
    scale = np.abs(expected).max(axis=0)
    assert checkpoint.traps
    for name, trap in checkpoint.traps.items():
        wrong = table(run(trap.body or checkpoint.body, trap.formula, checkpoint.sequences), family)
        columns = wrong.shape[1]  # some traps know of no attributes
        moved = np.abs(wrong - expected[:, :columns]) / scale[:columns]
        assert moved.max() > BITE * TOLERANCE, name


@pytest.mark.parametrize("family", EACH)
def test_the_family_is_found_from_the_files(family: Family, built: Built) -> None:
    files = read_model_files(built(family).model_dir)
    assert choose_adapter(files).name == family.adapter


def test_every_family_that_scores_has_a_row() -> None:
    covered = {family.adapter for family in FAMILIES}
    elsewhere = {"implicit_reward", "judge"}  # test_implicit.py, test_judges.py
    assert {adapter.name for adapter in ADAPTERS if not adapter.refused} == covered | elsewhere


# One forward pass


@pytest.mark.parametrize("name", ["qwen2_math_prm", "rlhflow_prm", "math_shepherd", "armorm"])
def test_a_sequence_goes_through_the_model_once_however_much_is_read_of_it(
    name: str, built: Built
) -> None:
    checkpoint = built(row(name))
    rows = tokenized(checkpoint.sequences)
    backend = packed(checkpoint.model_dir, token_budget=rows.num_tokens)
    tokens: list[int] = []
    backend._model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    scores = backend.score(rows)
    assert tokens == [scores.effort.computed_tokens]
    assert scores.effort.computed_tokens + scores.effort.shared_tokens == rows.num_tokens
    assert scores.effort.num_batches == 1
    assert sum(len(values) for values in checkpoint.reference) > len(checkpoint.sequences)


# Process reward models


@pytest.mark.parametrize(
    ("name", "tag"), [("qwen2_math_prm", EXTRA_0), ("math_shepherd", SHEPHERD_TAG)]
)
@pytest.mark.parametrize("path", ["packed", "padded"])
def test_as_many_step_scores_as_tags(name: str, tag: int, path: str, built: Built) -> None:
    """T-PRM-1: also where a step itself holds the tag, and where an answer has none at all."""
    sequences = [[7, tag], [7, 8, tag, tag, 9, tag], [7, 8, 9], [5, tag, 4, tag]]
    backend = make_backend(path, built(row(name)).model_dir)
    scores = backend.score(tokenized(sequences))
    assert scores.step_values is not None and scores.step_offsets is not None
    assert np.diff(scores.step_offsets).tolist() == [1, 3, 0, 2]
    assert ((scores.step_values > 0) & (scores.step_values < 1)).all()
    assert {index: error.reason for index, error in scores.errors.items()} == {
        2: RowReason.NO_STEPS
    }
    assert np.isnan(scores.values[:, 0]).tolist() == [False, False, True, False]
    assert scores.values[1, 0] == scores.step_values[1:4].min()


def test_a_plus_in_the_text_is_no_step(built: Built) -> None:
    """RLHFlow's sign is the most common of all in an answer about sums."""
    checkpoint = built(row("rlhflow_prm"))
    assert all(ids.count(PLUS) >= 2 * len(replies(ids)) for ids in checkpoint.sequences)
    scores = make_backend("packed", checkpoint.model_dir).score(tokenized(checkpoint.sequences))
    assert scores.step_offsets is not None
    steps = [len(replies(ids)) for ids in checkpoint.sequences]
    assert np.diff(scores.step_offsets).tolist() == steps
    mean = [values.mean() for values in checkpoint.reference]
    np.testing.assert_allclose(scores.values[:, 0], mean, rtol=0, atol=TOLERANCE)


# What is read, and by which head


def test_the_gate_reads_the_end_of_the_prompt_and_so_the_same_for_all_its_answers(
    built: Built,
) -> None:
    """T-ARMO-2: in a conversation of two turns, the last assistant header counts."""
    prompt = [1, 9, *LLAMA_MARK, 11, 12, EOT, 13, 14, *LLAMA_MARK]
    answers = [[20, EOT], [21, 22, 23, EOT], [*range(30, 50), EOT]]
    backend = make_backend("packed", built(row("armorm")).model_dir)
    seen: list[np.ndarray] = []
    backend._readout._head.gate[-1].register_forward_hook(
        lambda _, inputs, output: seen.append(output.numpy())
    )
    backend.score(tokenized([prompt + answer for answer in answers]))
    logits = np.concatenate(seen)
    assert len(logits) == len(answers)
    np.testing.assert_allclose(
        logits, np.broadcast_to(logits[0], logits.shape), rtol=1e-5, atol=1e-5
    )
    other = backend.score(tokenized([[*prompt[:2], 10, *prompt[3:], *answers[0]]]))
    assert other.errors == {}  # the first header is broken, the last is whole
    assert not np.allclose(seen[-1], logits[0], atol=1e-3)


@pytest.mark.parametrize("name", ["armorm", "armorm-gemma2", "qrm"])
@pytest.mark.parametrize("path", ["packed", "padded"])
def test_a_prompt_without_its_end_is_marked_and_the_others_scored(
    name: str, path: str, built: Built
) -> None:
    """T-ARMO-3: cut off on the left, or a text that never had an assistant."""
    checkpoint = built(row(name))
    sequences = [*checkpoint.sequences[:2], [5, 6, 7], *checkpoint.sequences[2:4]]
    scores = make_backend(path, checkpoint.model_dir).score(tokenized(sequences))
    assert {index: error.reason for index, error in scores.errors.items()} == {2: RowReason.NO_MARK}
    assert np.isnan(scores.values[2]).all()
    expected = table(checkpoint.reference[:4], row(name))
    np.testing.assert_allclose(scores.values[[0, 1, 3, 4]], expected, atol=1e-3)


@pytest.mark.parametrize("name", ["armorm", "qrm", "inf_orm", "starling"])
def test_a_pad_id_in_the_text_is_not_where_it_is_read(name: str, built: Built) -> None:
    """T-ARMO-4: ports with remote code read before the first pad id, so that with the end of
    turn as pad chosen and rejected get the prompt's score, both the same one."""
    checkpoint = built(row(name))
    pad = checkpoint.body.config.pad_token_id
    assert all(pad in ids[:-1] for ids in checkpoint.sequences)
    first, second = checkpoint.sequences[0], [*checkpoint.sequences[0]]
    second[-2] = 33
    scores = make_backend("packed", checkpoint.model_dir).score(tokenized([first, second])).values
    assert abs(scores[0, 0] - scores[1, 0]) > BITE * TOLERANCE


@pytest.mark.parametrize("name", ["internlm2_reward", "worldpm"])
def test_the_score_is_read_at_the_end_token_or_not_at_all(name: str, built: Built) -> None:
    """T-INTERN: absent, once, and also within the text."""
    checkpoint = built(row(name))
    end = checkpoint.sequences[0][-1]
    sequences = [[5, 6, 7], [5, 6, 7, end], [5, end, 7, end], [5, 6, end, 7]]
    scores = make_backend("packed", checkpoint.model_dir).score(tokenized(sequences))
    assert {index: error.reason for index, error in scores.errors.items()} == {
        0: RowReason.NO_MARK,
        3: RowReason.NO_MARK,
    }
    expected = np.stack(run(checkpoint.body, checkpoint.formula, [sequences[1], sequences[2]]))
    np.testing.assert_allclose(scores.values[[1, 2]], expected, atol=1e-3)


def test_an_adapter_that_needs_an_end_token_puts_it_there() -> None:
    for adapter in ADAPTERS:
        if isinstance(adapter.pooling, LastToken) and adapter.pooling.must_be:
            assert adapter.prompt.suffix_id_of == adapter.pooling.must_be


@pytest.mark.parametrize("path", ["packed", "padded"])
@pytest.mark.parametrize(
    "name", ["sequence_classifier", "armorm", "oasst_pythia-mean", "qwen2_math_prm", "qrm"]
)
def test_neighbours_do_not_move_a_score(name: str, path: str, built: Built) -> None:
    """T-POOL-2, T-BN: alone, beside longer sequences, and in another order."""
    family, checkpoint = row(name), built(row(name))
    backend = make_backend(path, checkpoint.model_dir)
    sequences = checkpoint.sequences[:6]
    together = given(backend.score(tokenized(sequences)), family)
    alone = [given(backend.score(tokenized([ids])), family) for ids in sequences]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=1e-4)
    backwards = [given(backend.score(tokenized(sequences[::-1])), family)]
    if not family.has_steps:
        np.testing.assert_allclose(together, backwards[0][::-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", [pytest.param(f, id=f.id) for f in FAMILIES if f.has_head])
def test_heads_stay_float32_under_a_bfloat16_body(family: Family, built: Built) -> None:
    """T-DTYPE"""
    backend = make_backend("packed", built(family).model_dir, "bfloat16")
    head = backend._readout._head
    kept = [t for t in (*head.parameters(), *head.buffers()) if t.is_floating_point()]
    assert kept and {tensor.dtype for tensor in kept} == {torch.float32}
    assert not head.training
    assert backend._model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "rows"), [("token_logit", 1), ("token_logit-tied", 1), ("rlhflow_prm", 2)]
)
def test_of_a_vocabulary_only_the_rows_that_count_are_kept(
    name: str, rows: int, built: Built
) -> None:
    """T-NEMO: a float32 copy of a whole lm_head would be gigabytes."""
    backend = make_backend("packed", built(row(name)).model_dir)
    assert sum(t.numel() for t in backend._readout._head.parameters()) == rows * 64


def test_a_cost_prefers_what_is_cheaper_and_stays_visible(built: Built) -> None:
    """T-COST: a pair's margin has the sign that a reward's has."""
    checkpoint = built(row("beaver_cost"))
    scores = make_backend("packed", checkpoint.model_dir).score(tokenized(checkpoint.sequences))
    score, cost = scores.values.T
    np.testing.assert_array_equal(score, -cost)
    ours = adapter_named("beaver_cost")
    assert ours.attributes({}) == ("cost",)
    chosen, rejected = np.argsort(cost)[:16], np.argsort(cost)[16:]
    accuracy = np.mean(score[chosen] > score[rejected])
    assert accuracy == 1.0 and np.mean(cost[chosen] > cost[rejected]) == 0.0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["helpfulness", "correctness", "coherence", "complexity", "verbosity"], 3.3156),
        (["verbosity", "complexity", "helpfulness", "coherence", "correctness"], 3.3156),
    ],
)
def test_attributes_are_weighted_by_name(names: list[str], expected: float) -> None:
    """T-LIN: the example on Nemotron-4-340B-Reward's card, neither clamped nor rounded."""
    card = {
        "helpfulness": 1.6172,
        "correctness": 1.6484,
        "coherence": 3.3125,
        "complexity": 0.5469,
        "verbosity": 0.5156,
    }
    config = {"id2label": {str(i): name for i, name in enumerate(names)}}
    build = adapter_named("nemotron4_attributes").build_head
    assert build is not None
    head = build({"score.weight": torch.eye(5)}, config)
    values = torch.tensor([card[name] for name in names])
    outputs = head(values.view(1, 1, 5))[0]
    assert outputs[0].item() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(outputs[1:], values)
    negative = head(torch.full((1, 1, 5), -0.3))[0]
    assert torch.equal(negative[1:], torch.full((5,), -0.3))


# Models whose head is not there


@pytest.mark.parametrize(
    "name", ["sequence_classifier", "value_head", "armorm", "internlm2_reward", "ldl", "eurus"]
)
def test_a_head_that_is_not_in_the_checkpoint_is_refused(
    name: str, built: Built, tmp_path: Path
) -> None:
    """T-HEAD-1: it would be random."""
    shutil.copytree(built(row(name)).model_dir, tmp_path, dirs_exist_ok=True)
    adapter = adapter_named(row(name).adapter)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if key not in adapter.head}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    for file in adapter.head_files:
        (tmp_path / file).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="no score head"):
        make_backend("packed", tmp_path)


def test_a_head_file_that_is_more_than_tensors_is_not_opened(built: Built, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return print, ("ran",)

    shutil.copytree(built(row("ldl")).model_dir, tmp_path, dirs_exist_ok=True)
    torch.save({"network.0.weight": Code()}, tmp_path / "gating_layer.pt")
    with pytest.raises(ModelError, match="not a file of tensors"):
        make_backend("packed", tmp_path)


def test_a_head_file_without_its_tensors_is_refused_by_name(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built(row("ldl")).model_dir, tmp_path, dirs_exist_ok=True)
    torch.save({"network.0.weight": torch.zeros(48, 64)}, tmp_path / "gating_layer.pt")
    with pytest.raises(ModelError, match=r"the head lacks gating_layer\.network\.3\.weight"):
        make_backend("packed", tmp_path)


def test_a_changed_head_file_is_another_model(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built(row("ldl")).model_dir, tmp_path, dirs_exist_ok=True)
    before = inspect_model(tmp_path).digest
    data = bytearray((tmp_path / "gating_layer.pt").read_bytes())
    data[-1] ^= 1
    (tmp_path / "gating_layer.pt").write_bytes(data)
    assert inspect_model(tmp_path).digest != before
