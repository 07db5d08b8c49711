"""The gate in front of a judge that writes: what vLLM writes is compared with plain Hugging Face,
token by token, and an engine with another model, prompt or sampling is refused."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from batch_scorer.backends.base import WritingBackend
from batch_scorer.backends.plain_answers import plain_gaps, plain_greedy
from batch_scorer.backends.registry import make_backend, settings_of
from batch_scorer.backends.replies import Writer
from batch_scorer.backends.vllm_generation import VLLMGenerationBackend
from batch_scorer.config import load_config
from batch_scorer.errors import ParityError
from batch_scorer.job import Job, Member
from batch_scorer.judges.page import Generation
from batch_scorer.parity import Sample, choose_sample, gate, proven_backend
from batch_scorer.parity.replies import (
    ComparedReply,
    WrittenReference,
    clear_stretches,
    compare_replies,
    compute_written,
    tokens_written,
)
from batch_scorer.runs.derive import derive, look_at_model, plan_for
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet
from tests.helpers.language_models import VOCABULARY, random_language_model

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_TOKENS = 12  # the page's
PAGE = """
about: A test.
mode: pairwise
messages:
  - role: user
    content: "{{ fence }}\\n{{ prompt }}|{{ response_a }}|{{ response_b }}\\n{{ fence }}"
verdict: {by: pattern, pattern: "([AB])", choices: {A: 1, B: 0}}
generation: {max_tokens: 12, temperature: 0.8, stop: [e, a], retries: 0}
"""
"""Its stop texts end nearly every reply at once, and it samples: the gate may do neither."""


def job_of(folder: Path, model: Path, **settings: Any) -> tuple[Job, Sample]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "page.yaml").write_text(PAGE)
    (folder / "pairs.parquet").write_bytes(parquet(pairs(5)))
    config = load_config(
        model=str(model), inputs=(str(folder / "pairs.parquet"),), output=str(folder / "out"),
        task="judge", judge=str(folder / "page.yaml"), backend="vllm", device="cpu",
        use_ray=False, max_tokens=900, **{"dtype": "float32", **settings},
    )  # fmt: skip
    facts = look_at_model(config)
    job = derive(config, facts)
    sample = choose_sample(job, plan_for(config, {"": Member(config, facts)}).shards)
    assert sample is not None
    return job, sample


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its own settings would sample, punish repetitions and end early."""
    directory = random_language_model(tmp_path_factory.mktemp("gate") / "model")
    own = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=2.0,
        repetition_penalty=1.5,
        eos_token_id=list(range(300, VOCABULARY)),
    )
    own.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def asked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Sample]:
    return job_of(tmp_path_factory.mktemp("asked"), model)


@pytest.fixture(scope="module")
def reference(asked: tuple[Job, Sample]) -> WrittenReference:
    found = compute_written(*asked)
    assert isinstance(found, WrittenReference)
    return found


@pytest.fixture(scope="module")
def engine(asked: tuple[Job, Sample]) -> Iterator[VLLMGenerationBackend]:
    backend = make_backend(asked[0])
    assert isinstance(backend, VLLMGenerationBackend)
    with closing(backend):
        yield backend


class Changed:
    """A sound engine whose answers, or what it is asked, are changed."""

    num_outputs = 0

    def __init__(self, engine: WritingBackend, **changes: Any) -> None:
        self.provenance: dict[str, Any] = {}
        self._engine, self._changes = engine, changes

    def score(self, rows: Any) -> Any:
        raise AssertionError("the gate asks for tokens only")

    def close(self) -> None:
        """The engine is another test's, too."""

    def greedy(self, rows: Any, max_tokens: int) -> list[list[int] | None]:
        rows = self._changes.get("rows", lambda rows: rows)(rows)
        written = self._engine.greedy(rows, max_tokens)
        changed: list[list[int] | None] = self._changes.get("ids", lambda ids: ids)(written)
        return changed


# What plain Hugging Face writes


@torch.inference_mode()
def by_hand(model_dir: Path, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """The most probable tokens and the gaps to the next ones, without a cache, in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    ids, gaps = list(prompt), []
    for _ in range(count):
        best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
        ids.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
    return ids[len(prompt) :], gaps


def test_the_reference_is_the_most_probable_tokens_without_an_end(
    model: Path, asked: tuple[Job, Sample], reference: WrittenReference
) -> None:
    rows = asked[1].rows
    assert len(reference.ids) == rows.num_sequences == 10
    prompts = np.split(rows.token_ids, rows.sequence_offsets[1:-1])
    for place in (0, 3, 9):
        ids, gaps = by_hand(model, prompts[place].tolist(), MAX_TOKENS)
        assert reference.ids[place] == ids
        np.testing.assert_allclose(reference.gaps[place], gaps, rtol=0, atol=1e-3)
    assert max(map(max, reference.gaps)) > 100 * reference.noise > 0


def test_gaps_are_those_behind_the_same_tokens(asked: tuple[Job, Sample]) -> None:
    job, sample = asked
    greedy = plain_greedy(settings_of(job), sample.rows, 5)
    again = plain_gaps(settings_of(job), sample.rows, greedy)
    np.testing.assert_allclose(again, greedy.gaps, rtol=0, atol=1e-3)
    rounded = plain_gaps(replace(settings_of(job), dtype="bfloat16"), sample.rows, greedy)
    assert 1e-2 < np.abs(rounded - greedy.gaps).max() < 0.5 * greedy.spread


@pytest.mark.parametrize(
    ("questions", "generation", "tokens"),
    [
        (1, Generation(), 24),
        (20, Generation(), 19),
        (1000, Generation(), 8),
        (1, Generation(max_tokens=2), 2),
        (1, Generation(max_tokens=2, thinking_tokens=9), 11),
    ],
)
def test_tokens_are_as_many_as_the_page_has_room_for(
    questions: int, generation: Generation, tokens: int
) -> None:
    assert tokens_written(questions, generation) == tokens


# The engine


def test_a_sound_engine_agrees(
    asked: tuple[Job, Sample], reference: WrittenReference, engine: VLLMGenerationBackend
) -> None:
    job, sample = asked
    report = compare_replies(job, sample, reference, engine)
    assert report.agrees, report.problems
    assert [reply.name for reply in report.compared] == list(sample.names)
    assert [reply.tokens for reply in report.compared] == sample.rows.lengths.tolist()
    assert report.tokens_written == 10 * MAX_TOKENS
    assert report.tokens_compared > 0.9 * report.tokens_written
    assert json.loads(json.dumps(report.to_json()))["agrees"]


def shorter(rows: Any) -> Any:
    """The prompts without their first tokens."""
    offsets = rows.sequence_offsets
    keep = np.ones(rows.num_tokens, bool)
    keep[offsets[:-1]] = False
    return replace(
        rows,
        token_ids=rows.token_ids[keep],
        sequence_offsets=offsets - np.arange(len(offsets)),
    )


def exchanged(ids: Any) -> Any:
    """Each question's tokens for the next one's."""
    return ids[1:] + ids[:1]


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": shorter},
        {"ids": exchanged},
        {"ids": lambda ids: [written[1:] for written in ids]},
        {"ids": lambda ids: [*ids[:-1], ids[-1][:1]]},
        {"ids": lambda ids: [*ids[:-1], []]},
    ],
    ids=["a shorter prompt", "replies exchanged", "a token lost", "an end", "no token at all"],
)
def test_an_engine_that_writes_something_else_is_refused(
    changes: dict[str, Any],
    asked: tuple[Job, Sample],
    reference: WrittenReference,
    engine: VLLMGenerationBackend,
) -> None:
    job, sample = asked
    report = compare_replies(job, sample, reference, Changed(engine, **changes))
    assert not report.agrees
    with pytest.raises(ParityError):
        report.require()


def test_an_engine_that_samples_is_refused(
    asked: tuple[Job, Sample],
    reference: WrittenReference,
    engine: VLLMGenerationBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warm = Generation(max_tokens=MAX_TOKENS, temperature=1.0)
    monkeypatch.setattr(Writer, "greedy", lambda self, count: self.with_generation(warm))
    assert not compare_replies(*asked, reference, engine).agrees


def test_questions_that_the_engine_does_not_take_are_not_compared(
    asked: tuple[Job, Sample], reference: WrittenReference, engine: VLLMGenerationBackend
) -> None:
    job, sample = asked
    some = Changed(engine, ids=lambda ids: [None, *ids[1:]])
    report = compare_replies(job, sample, reference, some)
    assert report.agrees
    assert report.compared[0] == ComparedReply(
        sample.names[0], int(sample.rows.lengths[0]), 0, None
    )
    none = Changed(engine, ids=lambda ids: [None] * len(ids))
    assert not compare_replies(job, sample, reference, none).agrees


def test_a_token_that_rounding_may_change_is_not_compared(
    asked: tuple[Job, Sample], reference: WrittenReference, engine: VLLMGenerationBackend
) -> None:
    """Those before it and behind it are."""
    job, sample = asked
    whole = compare_replies(job, sample, reference, engine)
    for gap in (0.9 * reference.noise, float("nan")):
        close = replace(reference, gaps=[[*gaps[:2], gap, *gaps[3:]] for gaps in reference.gaps])
        report = compare_replies(job, sample, close, engine)
        assert report.agrees and report.tokens_compared == whole.tokens_compared - 10
    ids = [[*written[:2], written[2] ^ 1, *written[3:]] for written in reference.ids]
    assert not compare_replies(job, sample, replace(reference, ids=ids), engine).agrees
    report = compare_replies(job, sample, replace(close, ids=ids), engine)
    places = {reply.differs_at for reply in report.compared} - {None}
    assert places and places <= set(range(3, MAX_TOKENS))
    nothing = compare_replies(job, sample, replace(reference, noise=float("inf")), engine)
    assert nothing.tokens_compared == 0 and not nothing.agrees


def test_other_weights_are_refused_or_warned_of(
    asked: tuple[Job, Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job, sample = asked
    other = random_language_model(tmp_path / "other", seed=1)

    def make(job: Job) -> WritingBackend:
        return VLLMGenerationBackend(replace(settings_of(job), model_dir=other))

    warned = replace(job, config=job.config.model_copy(update={"parity_check": "warn"}))
    with closing(proven_backend(warned, lambda: sample, make)) as backend:
        report = backend.provenance["parity"]
        assert not report["agrees"] and report["tokens_compared"] > 0
        assert sum(reply["differs_at"] is not None for reply in report["compared"]) > 5
        assert isinstance(backend, WritingBackend)
        with pytest.raises(ParityError):
            proven_backend(job, lambda: sample, lambda _: Changed(backend))


@pytest.mark.parametrize(
    ("gaps", "stretches"),
    [
        ([], []),
        ([0.1], []),
        ([1.0], [(0, 1)]),
        ([1, 2, 3], [(0, 3)]),
        ([0.9, 2, 3, float("nan"), 0, 1, 0.5], [(1, 3), (5, 6)]),
        ([2, 0, 2], [(0, 1), (2, 3)]),
    ],
)
def test_stretches_that_rounding_cannot_change(
    gaps: list[float], stretches: list[tuple[int, int]]
) -> None:
    assert clear_stretches(gaps, 1.0) == stretches


def test_half_precision_may_round_as_much_as_plain_hugging_face(
    model: Path, tmp_path: Path, reference: WrittenReference
) -> None:
    job, sample = job_of(tmp_path, model, dtype="bfloat16")
    found = compute_written(job, sample)
    assert isinstance(found, WrittenReference)
    assert found.dtype == "float32" and found.ids == reference.ids
    assert found.noise > 10 * reference.noise
    with closing(make_backend(job)) as backend:
        assert isinstance(backend, WritingBackend)
        report = compare_replies(job, sample, found, backend)
        assert report.agrees, report.problems
        assert report.tokens_compared > 10
        other = Changed(backend, rows=shorter)
        assert not compare_replies(job, sample, found, other).agrees


# The command line


def test_score_proves_the_judge_and_check_shows_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sample = job_of(tmp_path, model)
    given = (
        "--task", "judge", "--judge", tmp_path / "page.yaml", "--backend", "vllm", "--no-ray",
        "--model", model, tmp_path / "pairs.parquet", "--dtype", "float32", "--device", "cpu",
        "--max-tokens", 900,
    )  # fmt: skip
    out = tmp_path / "out"
    first = run_cli("score", *given, "--output", out, "--json")
    assert first.exit_code == 0, first.err
    parity = first.json["parity"]
    assert parity["agrees"] and parity["tokens_compared"] > 0.9 * 10 * MAX_TOKENS
    assert parity["rows_compared"] == 5
    (kept,) = out.glob("_batch_scorer/parity/*.json")
    assert json.loads(kept.read_text())["ids"]
    (shard,) = out.glob("*.parquet")
    shard.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(gate, "compute_written", lambda *_: pytest.fail("computed again"))
        again = run_cli("score", *given, "--output", out)
    assert again.exit_code == 0, again.err
    assert f"agrees on 10 questions ({parity['tokens_compared']} tokens)" in again.out
    checked = run_cli("check", *given)
    assert checked.exit_code == 0, checked.err
    assert f"{parity['tokens_compared']} of {parity['tokens_written']} written" in checked.out
    for name in sample.names:
        assert name in checked.out
