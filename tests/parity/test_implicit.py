"""Implicit rewards are those of TRL's DPO trainer, from plain language models, one row at a time.

Legend: n tokens of a sequence, V vocabulary.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from batch_scorer.backends.base import EngineSettings, ImplicitReward
from batch_scorer.backends.hf import HFBackend
from batch_scorer.backends.plain import plain_scores
from batch_scorer.config import load_config
from batch_scorer.errors import ConfigError, ModelError, RowReason
from batch_scorer.models.cost import model_cost
from batch_scorer.models.directory import read_model_files
from batch_scorer.models.families import implicit
from batch_scorer.models.registry import adapter_named
from batch_scorer.records import TokenizedRows
from batch_scorer.render.tokens import Encoder
from batch_scorer.runs.derive import derive, look_at_model, look_at_models
from tests.helpers.adapters import peft_adapter
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet
from tests.helpers.language_models import SHAPE, TRAPS, VOCABULARY, random_language_model
from tests.helpers.tiny import tiny_tokenizer
from tests.parity.tiny_models import engine_settings, tokenized

pytestmark = pytest.mark.usefixtures("one_thread")

BETA = 0.25
TOLERANCE = 1e-5  # of the largest log probability in float32
Models = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Policy and reference of a kind, built once."""
    root = tmp_path_factory.mktemp("implicit")

    def built(kind: str) -> tuple[Path, Path]:
        policy, reference = root / kind / "policy", root / kind / "reference"
        if not policy.exists():
            random_language_model(policy, kind, seed=1)
            random_language_model(reference, kind, seed=2)
        return policy, reference

    return built


def answered(sequences: list[tuple[list[int], list[int]]]) -> TokenizedRows:
    """Rows of (prompt, answer)."""
    starts = np.array([len(prompt) for prompt, _ in sequences], np.int32)
    return replace(tokenized([p + a for p, a in sequences]), answer_starts=starts)


def some_sequences() -> list[tuple[list[int], list[int]]]:
    """Answers to shared prompts, that share beginnings, and equal ids cut at other places."""
    random = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return [int(token) for token in random.integers(4, VOCABULARY, count)]

    found = []
    for _ in range(4):
        prompt, opening = ids(random.integers(1, 30)), ids(6)
        found += [(prompt, opening + ids(random.integers(1, 30))) for _ in range(3)]
        found.append((prompt + opening[:3], found[-1][1][3:]))
    return [*found, found[0], (ids(1), ids(1))]


def trl_log_probs(model_dir: Path, rows: TokenizedRows) -> np.ndarray:
    """float64[S], as TRL 1.16's trainer has them."""
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    return log_probs_of(model.eval(), rows)


@torch.inference_mode()
def log_probs_of(model: Any, rows: TokenizedRows) -> np.ndarray:
    """Labels shifted by one, those of the prompt masked, the rest added up
    (`DPOTrainer._compute_loss`)."""
    sums = []
    assert rows.answer_starts is not None
    bounds = rows.sequence_offsets
    for start, stop, border in zip(bounds[:-1], bounds[1:], rows.answer_starts, strict=True):
        ids = torch.from_numpy(rows.token_ids[start:stop]).long()[None]
        completion_mask = torch.arange(ids.shape[1])[None] >= int(border)
        labels = ids.masked_fill(~completion_mask, -100)[:, 1:]
        logits = model(input_ids=ids).logits[:, :-1]  # [1, n - 1, V]
        log_probs = -torch.nn.functional.cross_entropy(
            logits[0].double(), labels[0], ignore_index=-100, reduction="none"
        )
        sums.append(log_probs.sum().item())
    return np.array(sums)


def expected(policy: Path, reference: Path, rows: TokenizedRows) -> np.ndarray:
    """[S, 3]: the reward that TRL logs as rewards/chosen, and both log probabilities."""
    logps, ref_logps = (trl_log_probs(each, rows) for each in (policy, reference))
    return np.stack([BETA * (logps - ref_logps), logps, ref_logps], axis=1)


def settings_for(
    policy: Path, reference: Path | None, *, length_normalize: bool = False, **settings: Any
) -> EngineSettings:
    made = engine_settings(policy, adapter=adapter_named("implicit_reward"), **settings)
    other = None if reference is None else replace(made, model_dir=reference)
    return replace(made, implicit=ImplicitReward(BETA, length_normalize, other))


PATHS = {
    # Budgets that cut every sequence: what is carried from batch to batch counts as well.
    "packed": {"token_budget": 24},
    "padded": {"attention": "eager", "token_budget": 256},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", TRAPS)
def test_scores_are_those_of_two_plain_language_models(
    kind: str, path: str, models: Models
) -> None:
    policy, reference = models(kind)
    rows = answered(some_sequences())
    wanted = expected(policy, reference, rows)
    with closing(HFBackend(settings_for(policy, reference, **PATHS[path]))) as backend:
        scores = backend.score(rows)
    assert scores.errors == {} and backend.num_outputs == 3
    scale = np.abs(wanted[:, 1]).max()
    assert wanted[:, 0].std() > 100 * TOLERANCE * scale, "nothing to tell apart"
    np.testing.assert_allclose(scores.values, wanted, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_what_a_model_does_to_its_logits_moves_the_scores(kind: str, models: Models) -> None:
    """Else parity would prove nothing about it."""
    policy, _ = models(kind)
    rows = answered(some_sequences())
    with closing(HFBackend(settings_for(policy, None))) as backend:
        right = backend.score(rows).values[:, 1]
        assert backend._readout is not None and isinstance(backend._readout._head, torch.nn.Module)
        head: Any = backend._readout._head
        head.logits.softcap, head.logits.scale = 0.0, 1.0
        wrong = backend.score(rows).values[:, 1]
    assert np.abs(wrong - right).max() > 100 * TOLERANCE * np.abs(right).max()


@pytest.mark.parametrize("target", ["down_proj", "embed_tokens"])
def test_a_policy_may_be_an_adapter_of_its_reference(
    target: str, models: Models, tmp_path: Path
) -> None:
    _, base = models("qwen2")  # whose head is tied to the embedding
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    policy = peft_adapter(
        model, tmp_path, base=str(base), task_type="CAUSAL_LM", target_modules=[target]
    )
    rows = answered(some_sequences())
    logps, ref_logps = log_probs_of(policy, rows), trl_log_probs(base, rows)
    wanted = np.stack([BETA * (logps - ref_logps), logps, ref_logps], axis=1)
    tolerance = TOLERANCE * np.abs(logps).max()
    assert np.abs(wanted[:, 0]).max() > 20 * tolerance
    settings = settings_for(base, base, lora_dir=tmp_path)
    assert settings.implicit is not None and settings.implicit.reference is not None
    alone = replace(settings.implicit.reference, lora_dir=None)
    settings = replace(settings, implicit=replace(settings.implicit, reference=alone))
    for scores in (HFBackend(settings).score(rows), plain_scores(settings, rows)):
        np.testing.assert_allclose(scores.values, wanted, rtol=0, atol=tolerance)


def test_per_token_without_a_reference_and_the_other_way_round(models: Models) -> None:
    policy, reference = models("llama")
    rows = answered(some_sequences())
    assert rows.answer_starts is not None
    tokens = rows.lengths - rows.answer_starts
    wanted = expected(policy, reference, rows)

    def scored(*places: Path | None, **settings: Any) -> np.ndarray:
        with closing(HFBackend(settings_for(*places, **settings))) as backend:  # type: ignore[arg-type]
            return backend.score(rows).values

    mean = scored(policy, reference, length_normalize=True)
    np.testing.assert_allclose(mean[:, 0], wanted[:, 0] / tokens, rtol=0, atol=1e-3)
    np.testing.assert_allclose(mean[:, 1:], wanted[:, 1:], rtol=1e-4)
    alone = scored(policy, None)
    np.testing.assert_allclose(alone, wanted[:, [1, 1]] * [BETA, 1], rtol=1e-4)
    exchanged = scored(reference, policy)
    np.testing.assert_allclose(exchanged[:, 0], -wanted[:, 0], rtol=0, atol=1e-2)


def test_the_gates_reference_is_a_plain_language_model(models: Models) -> None:
    policy, reference = models("gemma2")
    rows = answered(some_sequences())
    settings = settings_for(policy, reference, length_normalize=True)
    assert rows.answer_starts is not None
    wanted = expected(policy, reference, rows)
    wanted[:, 0] /= rows.lengths - rows.answer_starts
    np.testing.assert_allclose(plain_scores(settings, rows).values, wanted, rtol=0, atol=1e-3)
    rounded = plain_scores(replace(settings, dtype="bfloat16"), rows).values
    assert 0 < np.abs(rounded - wanted)[:, 1].max() < 0.05 * np.abs(wanted[:, 1]).max()


def test_both_models_run_over_one_trie_and_what_is_shared_counts_once(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, reference = models("llama")
    rows = answered(some_sequences())
    with closing(HFBackend(settings_for(policy, reference, token_budget=64))) as backend:
        assert backend._reference is not None
        seen: list[list[torch.Tensor]] = []
        for each in (backend, backend._reference):
            batches: list[torch.Tensor] = []
            each._model.base_model.register_forward_pre_hook(
                lambda _, args, kwargs, batches=batches: batches.append(kwargs["input_ids"][0]),
                with_kwargs=True,
            )
            seen.append(batches)
        effort = backend.score(rows).effort
    first, second = (torch.cat(batches).tolist() for batches in seen)
    assert first == second and len(first) == effort.computed_tokens < rows.num_tokens
    assert [len(b) for b in seen[0]] == [len(b) for b in seen[1]]
    assert effort.num_batches == len(seen[0]) + len(seen[1])


def test_logits_are_taken_in_blocks(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = models("llama")
    rows = answered(some_sequences())
    with closing(HFBackend(settings_for(policy, reference))) as backend:
        whole = backend.score(rows).values
        monkeypatch.setattr(implicit, "_LOGITS_AT_ONCE", 5 * VOCABULARY)
        sizes: list[int] = []
        head: Any = backend._readout._head  # type: ignore[union-attr]
        head.logits.register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
        np.testing.assert_allclose(backend.score(rows).values, whole, rtol=1e-5)
    assert max(sizes) == 5


def test_a_sequence_that_only_one_model_can_read_is_marked(models: Models, tmp_path: Path) -> None:
    policy, _ = models("llama")
    small = tmp_path / "small"
    shutil.copytree(policy, small)
    file = small / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 16}))
    rows = answered([([5, 6], [7, 8]), ([9] * 10, [10] * 10)])
    with closing(HFBackend(settings_for(policy, small))) as backend:
        scores = backend.score(rows)
    assert {place: error.reason for place, error in scores.errors.items()} == {
        1: RowReason.TOO_LONG
    }
    assert np.isnan(scores.values[1]).all() and scores.values[0, 0] == 0


# The whole program


def implicit_flags(policy: Path, reference: Path | str) -> list[str]:
    return [
        "--model", str(policy), "--adapter", "implicit_reward", "--reference-model",
        str(reference), "--beta", str(BETA), "--dtype", "float32", "--no-ray", "--json",
    ]  # fmt: skip


def trl_rows(policy: Path, conversations: list[list[dict[str, str]]]) -> TokenizedRows:
    """Prompt and answer as TRL's trainer cuts them: where the ids of prompt and whole part."""
    tokenizer = AutoTokenizer.from_pretrained(policy)

    def ids(messages: list[dict[str, str]], **more: Any) -> list[int]:
        found: list[int] = tokenizer.apply_chat_template(messages, return_dict=True, **more)[
            "input_ids"
        ]
        return found

    cut = []
    for conversation in conversations:
        prompt, whole = ids(conversation[:-1], add_generation_prompt=True), ids(conversation)
        border = next(i for i in range(len(whole)) if whole[: i + 1] != prompt[: i + 1])
        assert border == len(prompt)
        cut.append((whole[:border], whole[border:]))
    return answered(cut)


def test_pairs_are_scored_as_trl_would_and_verified(models: Models, tmp_path: Path) -> None:
    policy, reference = models("llama")
    table = pairs(12)
    (tmp_path / "pairs.parquet").write_bytes(parquet(table))
    ended = run_cli(
        "score", tmp_path / "pairs.parquet", "--output", tmp_path / "out",
        *implicit_flags(policy, reference),
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    assert ended.json["parity"]["agrees"] and ended.json["rows_scored"] == 12
    assert run_cli("verify", tmp_path / "out").exit_code == 0
    scored = pq.read_table(tmp_path / "out" / "pairs.parquet")
    for side in ("chosen", "rejected"):
        wanted = expected(policy, reference, trl_rows(policy, table[side].to_pylist()))
        got = np.column_stack(
            [scored[f"score_{side}"].to_numpy(), np.array(scored[f"rewards_{side}"].to_pylist())]
        )
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)
        field = scored.schema.field(f"rewards_{side}")
        assert json.loads(field.metadata[b"batch_scorer.attributes"]) == [
            "policy_logp",
            "reference_logp",
        ]
    # The same command again scores nothing, another reference is another job.
    again = run_cli(
        "score", tmp_path / "pairs.parquet", "--output", tmp_path / "out",
        *implicit_flags(policy, "none"),
    )  # fmt: skip
    assert again.exit_code == 2 and "reference:" in again.error


def test_token_ids_with_a_prompt_of_their_own_are_scored(models: Models, tmp_path: Path) -> None:
    policy, _ = models("llama")
    rows = {"prompt": [[5, 6, 7], [8]], "response": [[9, 10], [11, 12, 13]]}
    pq.write_table(pa.table(rows), tmp_path / "ids.parquet")
    ended = run_cli(
        "score", tmp_path / "ids.parquet", "--output", tmp_path / "out",
        *implicit_flags(policy, "none"), "--length-normalize",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    scored = pq.read_table(tmp_path / "out" / "ids.parquet")
    logps = trl_log_probs(policy, answered([([5, 6, 7], [9, 10]), ([8], [11, 12, 13])]))
    np.testing.assert_allclose(np.array(scored["rewards"].to_pylist())[:, 0], logps, rtol=1e-4)
    np.testing.assert_allclose(scored["score"].to_numpy(), BETA * logps / [2, 3], rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "flags"),
    [({"input_ids": [[5, 6, 7]]}, []), ({"text": ["some text"]}, ["--format", "text"])],
)
def test_rows_that_do_not_show_the_answer_are_refused(
    rows: dict[str, Any], flags: list[str], models: Models, tmp_path: Path
) -> None:
    policy, reference = models("llama")
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    ended = run_cli(
        "score", tmp_path / "rows.parquet", "--output", tmp_path / "out",
        *implicit_flags(policy, reference), *flags,
    )  # fmt: skip
    assert ended.exit_code == 2
    assert "do not show where it begins" in ended.error
    assert not list((tmp_path / "out").rglob("*.json"))


# Settings and models that are refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "implicit_reward"}, "reference_model: an implicit reward needs the model"),
        ({"reference_model": "m"}, "reference_model: only for implicit rewards"),
        ({"beta": 0.2}, "beta: only for implicit rewards"),
        ({"adapter": "implicit_reward", "reference_model": "none", "beta": 0}, "beta: "),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(model="m", inputs=("in",), output="out", **settings)


def test_two_models_that_do_not_belong_together_are_refused(models: Models, tmp_path: Path) -> None:
    policy, reference = models("llama")

    def look(other: Path, **settings: Any) -> Any:
        return look_at_model(
            load_config(
                model=str(policy), inputs=("in",), output="out", adapter="implicit_reward",
                reference_model=str(other), **settings,
            )
        )  # fmt: skip

    with pytest.raises(ModelError, match="is the model itself"):
        look(policy)
    other = tmp_path / "other"
    shutil.copytree(reference, other)
    file = other / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["model"]["vocab"].pop("Ġthe")
    file.write_text(json.dumps(stored))
    with pytest.raises(ModelError, match=r"tokenizer.json: not the vocabulary of .*'Ġthe' is no"):
        look(other)
    broken = tmp_path / "broken"
    shutil.copytree(reference, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"rope_parameters": []}))
    with pytest.raises(ModelError, match=str(broken)):
        look(broken)
    facts = look(reference)
    assert facts.reference.digest != facts.digest
    both = [model_cost(read_model_files(d), adapter_named("implicit_reward")) for d in
            (policy, reference)]  # fmt: skip
    assert facts.cost.flops(7, 5) == sum(cost.flops(7, 5) for cost in both if cost)
    assert facts.attributes == ("policy_logp", "reference_logp")
    ended = run_cli(
        "check", "--backend", "vllm", *implicit_flags(policy, reference)[:-1],
    )  # fmt: skip
    assert ended.exit_code == 2 and "implicit_reward models do not run on vllm" in ended.error


@pytest.mark.parametrize(
    ("shift", "problem"), [(-1, "a part of the prompt is in it"), (1, "a part of it is lost")]
)
def test_the_gate_sees_an_answer_that_begins_elsewhere(
    shift: int, problem: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both engines would read the same wrong tokens."""
    policy, _ = models("llama")
    (tmp_path / "pairs.parquet").write_bytes(parquet(pairs(4)))
    encode = Encoder.encode_answer

    def elsewhere(self: Encoder, text: str, border: int) -> tuple[Any, int | None]:
        ids, start = encode(self, text, border)
        return ids, None if start is None else start + shift

    monkeypatch.setattr(Encoder, "encode_answer", elsewhere)
    ended = run_cli(
        "check", tmp_path / "pairs.parquet", *implicit_flags(policy, "none")[:-1]
    )  # fmt: skip
    assert ended.exit_code == 2 and problem in ended.error


def test_models_beside_a_policy_are_no_policies(models: Models, tiny_model: Path) -> None:
    policy, reference = models("llama")
    own = {"model": str(policy), "adapter": "implicit_reward", "beta": 1}
    both = {"a": own | {"reference_model": str(reference)}, "b": str(tiny_model)}
    members = look_at_models(load_config(model=both, inputs=("in",), output="out"))
    a, b = members.values()
    assert a.model.reference is not None and b.model.reference is None
    assert b.model.adapter == "sequence_classifier" and b.config.beta == 0.1


def test_a_reference_that_cannot_be_packed_is_run_padded_and_refused_if_packed_is_asked_for(
    models: Models, tmp_path: Path
) -> None:
    policy, _ = models("llama")
    tiny_tokenizer(tmp_path)
    layers = {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **(SHAPE | layers)))
    model.save_pretrained(tmp_path)
    settings: dict[str, Any] = {
        "model": str(policy), "inputs": ("in",), "output": "out", "adapter": "implicit_reward",
        "reference_model": str(tmp_path), "use_ray": False,
    }  # fmt: skip
    config = load_config(**settings)
    facts = look_at_model(config)
    assert derive(config, facts).attention == "eager"
    with pytest.raises(ModelError, match=rf"{tmp_path}: Lfm2Model cannot be packed"):
        derive(load_config(**settings, attention="packed"), facts)
