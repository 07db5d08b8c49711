"""A judge by probability gives the probabilities of plain Hugging Face's language model, for
questions that are put together here with jinja2 and the tokenizer's own call."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from batch_scorer.backends.hf import HFBackend
from batch_scorer.backends.plain import plain_scores
from batch_scorer.backends.registry import make_backend, settings_of
from batch_scorer.config import load_config
from batch_scorer.errors import ConfigError, RowReason
from batch_scorer.job import Member
from batch_scorer.judges.page import load_page
from batch_scorer.models.registry import adapter_named
from batch_scorer.parity.gate import HALF_ALLOWANCE, MOST_ALLOWED, errors_of
from batch_scorer.records import Outputs, Scores
from batch_scorer.runs.derive import derive, look_at_model, plan_for
from batch_scorer.shard import read_shard, score_shard
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet
from tests.helpers.language_models import (
    TRAPS,
    next_token_probabilities,
    random_language_model,
)
from tests.parity.tiny_models import engine_settings, random_sequences, tokenized

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4

PAIRWISE = """
about: A test.
mode: pairwise
messages:
  - role: user
    content: "{{ fence }}\\n{{ prompt }}|{{ response_a }}|{{ response_b }}\\n{{ fence }} Which?"
verdict: {by: probability, choices: {A: 1, B: 0, C: 0.5}, least_mass: 0}
"""
RUBRIC = """
about: A test.
mode: rubric
messages:
  - role: user
    content: "{{ fence }}\\n{{ prompt }}\\n{{ response }}\\n{{ fence }}\\n{{ criterion }}"
verdict: {by: probability, choices: {A: 1, B: 0}, least_mass: 0}
"""

Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("judges")

    def built(kind: str) -> Path:
        return root / kind if (root / kind).exists() else random_language_model(root / kind, kind)

    return built


def page_at(folder: Path, text: str) -> Path:
    (folder / "page.yaml").write_text(text)
    return folder / "page.yaml"


@pytest.mark.parametrize(
    ("kind", "engine"),
    [*((kind, engine) for kind in TRAPS for engine in ("packed", "eager")), ("gemma2", "vllm")],
)
def test_choices_are_as_probable_as_in_plain_hugging_face(
    kind: str, engine: str, models: Models, tmp_path: Path
) -> None:
    sequences = random_sequences(12)
    wanted = next_token_probabilities(models(kind), sequences)
    choices = np.argsort(-wanted.std(axis=0))[:3]
    wanted = wanted[:, choices]
    assert wanted.std(axis=0).min() > 20 * TOLERANCE, "nothing to tell apart"
    page = load_page(str(page_at(tmp_path, PAIRWISE)))
    settings = engine_settings(
        models(kind), adapter=adapter_named("judge"), judge=page,
        verdict_ids=tuple(choices.tolist()),
    )  # fmt: skip
    rows = tokenized(sequences)
    if engine == "vllm":
        from batch_scorer.backends.vllm import VLLMBackend

        backend: Any = VLLMBackend(replace(settings, max_tokens=256))
    else:
        backend = HFBackend(replace(settings, attention=engine, token_budget=64))
    with closing(backend):
        scores = backend.score(rows)
    assert scores.errors == {}
    np.testing.assert_allclose(scores.values, wanted, rtol=0, atol=TOLERANCE)
    plain = plain_scores(settings, rows).values
    np.testing.assert_allclose(plain, wanted, rtol=0, atol=TOLERANCE / 10)


def test_the_gate_compares_logarithms_of_probabilities() -> None:
    """Choices that are about as probable in every row, as a small model's are, differ by less than
    bfloat16 rounds; twice as probable is another answer, however improbable it is."""
    exact = Scores(np.array([[0.055, 1e-6], [0.056, 1.1e-6]], np.float32))

    def errors(factor: float) -> np.ndarray:
        return errors_of(exact, Scores(exact.values * np.float32(factor)), Outputs(judge=("x",)))

    np.testing.assert_allclose(errors(1.03), np.log(1.03), rtol=1e-2)
    np.testing.assert_allclose(errors(2.0), np.log(2.0), rtol=1e-2)
    assert errors(1.03).max() < HALF_ALLOWANCE[0] < MOST_ALLOWED[0] < errors(2.0).min()


def by_hand(model_dir: Path, table: list[dict[str, Any]], text: str) -> list[tuple[float, float]]:
    """The grades of chosen and rejected, row by row."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "ABC"]
    found = []
    for row in table:
        (prompt, chosen), (_, rejected) = row["chosen"], row["rejected"]
        worths = []
        for a, b in ((chosen, rejected), (rejected, chosen)):
            question = jinja2.Template(text).render(
                prompt=prompt["content"], response_a=a["content"], response_b=b["content"],
                fence="```",
            )  # fmt: skip
            message = {"role": "user", "content": question}
            asked = tokenizer.apply_chat_template(
                [message], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            of_a, of_b, of_tie = next_token_probabilities(model_dir, [asked])[0, ids]
            worths.append((of_a + of_tie / 2) / (of_a + of_b + of_tie))
        grade = (worths[0] + 1 - worths[1]) / 2
        found.append((grade, 1 - grade))
    return found


@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_scores_are_those_of_questions_put_together_by_hand(
    backend: str, models: Models, tmp_path: Path
) -> None:
    table = pairs(5)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(parquet(table))
    text = "{{ fence }}\n{{ prompt }}|{{ response_a }}|{{ response_b }}\n{{ fence }} Which?"
    ended = run_cli(
        "score", "--task", "judge", "--judge", page_at(tmp_path, PAIRWISE), "--backend", backend,
        "--model", models("llama"), tmp_path / "in", "--output", tmp_path / "out", "--no-ray",
        "--dtype", "float32", "--device", "cpu", "--max-tokens", 1000, "--json",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    out = pq.read_table(tmp_path / "out" / "a.parquet")
    wanted = by_hand(models("llama"), table.to_pylist(), text)
    found = list(
        zip(out["score_chosen"].to_pylist(), out["score_rejected"].to_pylist(), strict=True)
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
    assert out["score_error"].null_count == out.num_rows
    for row in out.to_pylist():
        first, second = row["judgements"]
        assert (first["shown"], second["shown"]) == ([0, 1], [1, 0])
        agrees = (first["worths"][0] > 0.5) == (second["worths"][0] < 0.5)
        assert row["consistency"] == float(agrees)
        assert row["num_tokens_chosen"] == max(first["prompt_tokens"], second["prompt_tokens"])
    verified = run_cli("verify", tmp_path / "out")
    assert verified.exit_code == 0, verified.err


def test_criteria_and_answers_of_a_prompt_share_what_they_begin_with(
    models: Models, tmp_path: Path
) -> None:
    """Eight criteria for sixteen answers: each distinct prefix goes through the model once."""
    prompt = "What is the answer to this question? " * 8
    rows = [
        {
            "prompt": prompt,
            "responses": [f"I think that it is {n}. " * 4 for n in range(16)],
            "rubric": [f"The answer is number {n}." for n in range(8)],
        }
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(parquet(pa.Table.from_pylist(rows)))
    config = load_config(
        model=str(models("llama")), inputs=(str(tmp_path / "in"),), output=str(tmp_path / "out"),
        task="judge", judge=str(page_at(tmp_path, RUBRIC)), device="cpu", dtype="float32",
        use_ray=False,
    )  # fmt: skip
    model = look_at_model(config)
    job = derive(config, model)
    (shard,) = plan_for(config, {"": Member(config, model)}).shards
    (asked,) = read_shard(shard, [job]).rows
    assert asked.num_sequences == 16 * 8
    with closing(make_backend(job)) as backend:
        scored = score_shard(asked, backend, job.judging)
    distinct = {
        ids[:stop].tobytes()
        for ids in np.split(asked.token_ids, asked.sequence_offsets[1:-1])
        for stop in range(1, len(ids) + 1)
    }
    effort = scored.scores.effort
    assert effort.computed_tokens == len(distinct) < asked.num_tokens / 6
    assert effort.computed_tokens + effort.shared_tokens == asked.num_tokens
    assert len(scored.scores.values) == 16 and np.isfinite(scored.scores.values).all()
    values = plain_scores(settings_of(job), asked).values.astype(np.float64)
    worths = (values[:, 0] / values.sum(axis=1)).reshape(16, 8).mean(axis=1)
    np.testing.assert_allclose(scored.scores.values[:, 0], worths, rtol=0, atol=TOLERANCE)


def test_choices_that_are_improbable_are_no_verdict(models: Models, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.parquet").write_bytes(parquet(pairs(3)))
    text = PAIRWISE.replace("least_mass: 0", "least_mass: 0.99")
    ended = run_cli(
        "score", "--task", "judge", "--judge", page_at(tmp_path, text), "--model", models("llama"),
        tmp_path / "in", "--output", tmp_path / "out", "--no-ray", "--dtype", "float32", "--json",
    )  # fmt: skip
    assert ended.exit_code == 0 and ended.json["marked"] == {RowReason.NO_VERDICT.value: 3}
    out = pq.read_table(tmp_path / "out" / "a.parquet")
    assert out["score_chosen"].null_count == out["margin"].null_count == 3
    for judgement in out["judgements"].combine_chunks().flatten().to_pylist():
        assert judgement["worths"] is None and judgement["reason"] == RowReason.NO_VERDICT.value
        assert 0 < sum(judgement["probabilities"]) < 0.99


@pytest.mark.parametrize(("old", "new"), [("{A: 1,", "{Answer: 1,"), ("{A: 1,", "{'A B': 1,")])
def test_a_choice_of_several_tokens_is_refused(
    old: str, new: str, models: Models, tmp_path: Path
) -> None:
    page = page_at(tmp_path, PAIRWISE.replace(old, new))
    config = load_config(
        model=str(models("llama")), inputs=("x",), output="y", task="judge", judge=str(page),
        device="cpu",
    )  # fmt: skip
    with pytest.raises(ConfigError):
        derive(config, look_at_model(config))


def test_another_page_is_another_fingerprint(models: Models, tmp_path: Path) -> None:
    def digest(text: str, name: str) -> str:
        (tmp_path / name).write_text(text)
        config = load_config(
            model=str(models("llama")), inputs=("x",), output="y", task="judge",
            judge=str(tmp_path / name), device="cpu",
        )  # fmt: skip
        return derive(config, look_at_model(config)).fingerprint.digest

    first = digest(PAIRWISE, "a.yaml")
    assert digest(PAIRWISE.replace("A test.", "Another."), "b.yaml") == first
    for old, new in (
        ("Which?", "Who?"),
        ("0.5", "0.4"),
        ("mode: pairwise", "mode: pairwise\norders: one"),
    ):
        assert digest(PAIRWISE.replace(old, new), "c.yaml") != first


@pytest.mark.parametrize(
    "columns", [{"text": "<|im_start|>user\nhi<|im_end|>\n"}, {"input_ids": [1, 2]}]
)
def test_rows_that_are_no_conversations_are_refused_as_a_file(
    columns: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(pa.Table.from_pylist([columns] * 3)))
    config = load_config(
        model=str(models("llama")), inputs=(str(tmp_path / "a.parquet"),), output="y",
        task="judge", judge=str(page_at(tmp_path, PAIRWISE)),
    )  # fmt: skip
    with pytest.raises(Exception) as raised:
        plan_for(config, {"": Member(config, look_at_model(config))})
    assert "a judge reads conversations" in str(raised.value)
