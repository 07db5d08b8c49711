"""What vLLM writes for a judge is what plain Hugging Face writes, and depends on the question
alone."""

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from batch_scorer.backends import vllm_engine
from batch_scorer.backends.base import EngineDied, EngineSettings
from batch_scorer.backends.replies import CLOSE, OPEN
from batch_scorer.backends.vllm_generation import VLLMGenerationBackend
from batch_scorer.errors import ConfigError, ModelError, RowReason
from batch_scorer.judges.page import Page
from batch_scorer.models.tokenizer import load_tokenizer
from batch_scorer.records import Reply, Scores, TokenizedRows
from batch_scorer.shard import score_shard, score_shards
from tests.helpers.adapters import peft_adapter
from tests.helpers.language_models import (
    BROKEN,
    END,
    VOCABULARY,
    embedded_language_model,
    plain_reply,
    random_language_model,
    scripted_language_model,
)
from tests.helpers.tiny import tiny_tokenizer
from tests.parity.tiny_models import Sequences, engine_settings, tokenized

pytestmark = pytest.mark.usefixtures("one_thread")

Start = Callable[..., VLLMGenerationBackend]

NOISE = 1e-3
"""Far above float32's: two logits that are closer may change places."""
MAX_TOKENS = 24
LONGEST = 160
WORDS = 260
"""The tokens before are single bytes, which need not be whole characters."""
SHARED = list(range(WORDS, WORDS + 100))  # three whole blocks of the prefix cache


def questions(count: int, *, seed: int = 0) -> Sequences:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, count)
    return [random.integers(WORDS, VOCABULARY, length).tolist() for length in lengths]


QUESTIONS: Sequences = [*questions(14), *([*SHARED, 270 + n, 280 + n] for n in range(4))]


def page(
    *, begins: str = "", mode: str = "pointwise", json: bool = False, **generation: Any
) -> Page:
    verdict: dict[str, Any] = {"by": "pattern", "pattern": "(A|B)", "choices": {"A": 1, "B": 0}}
    if json:
        verdict = {"by": "json", "low": 1, "high": 5}
    return Page.model_validate(
        {
            "about": "which one",
            "mode": mode,
            "messages": [{"role": "user", "content": "{{ response }}"}],
            "begins": begins,
            "verdict": verdict,
            "generation": generation,
        }
    )


def asked(
    sequences: Sequences, seeds: list[int] | None = None, verdicts: list[int] | None = None
) -> TokenizedRows:
    rows = tokenized(sequences)
    rows.seeds = np.array(seeds or [0] * len(sequences), dtype=np.int64)
    rows.verdicts = np.array(verdicts or [1] * len(sequences), dtype=np.int64)
    return rows


def replies(scores: Scores) -> list[Reply]:
    assert scores.replies is not None
    found = [reply for reply in scores.replies if reply is not None]
    assert len(found) == len(scores.replies)
    return found


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start an engine, or hand out the one that runs if it is the same; one at a time."""
    running: dict[str, Any] = {}

    def end() -> None:
        if running:
            running.pop("backend").close()
            running.clear()

    def backend(model_dir: Path, asked_by: Page, **settings: Any) -> VLLMGenerationBackend:
        wanted = (model_dir, asked_by, settings)
        if running.get("wanted") != wanted:
            end()
            settings = {"max_tokens": LONGEST, "tokenizer_dir": model_dir, **settings}
            gc.freeze()  # vLLM collects garbage eight times at every start
            engine = VLLMGenerationBackend(engine_settings(model_dir, judge=asked_by, **settings))
            running.update(wanted=wanted, backend=engine)
        return running["backend"]

    yield backend
    end()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    random_language_model(directory, breaks=True, max_position_embeddings=512)
    return directory


def agree(model: Any, directory: Path, sequences: Sequences, found: list[Reply], most: int) -> int:
    """How many tokens plain Hugging Face writes, after comparing the replies with them."""
    tokenizer = load_tokenizer(directory)
    compared = 0
    for prompt, reply in zip(sequences, found, strict=True):
        ids, is_all = plain_reply(model, prompt, most, [END], noise=NOISE)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if is_all:
            assert reply.text == text
        else:  # the last character may lack bytes
            assert reply.text.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        compared += len(ids)
    return compared


# On one Llama. These share an engine, so they stand together.

GREEDY = page(max_tokens=MAX_TOKENS)


def test_replies_are_those_of_plain_hugging_face(llama: Path, start: Start) -> None:
    scores = start(llama, GREEDY).score(asked(QUESTIONS))
    assert scores.errors == {}
    assert scores.values.shape == (len(QUESTIONS), 0) and scores.values.dtype == np.float32
    model = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    found = replies(scores)
    assert agree(model, llama, QUESTIONS, found, MAX_TOKENS) > 0.9 * MAX_TOKENS * len(QUESTIONS)
    assert len({reply.text for reply in found}) == len(QUESTIONS)


def test_a_reply_depends_on_its_question_alone(llama: Path, start: Start) -> None:
    """Not on the order of the questions, on what is asked beside it, or on the shards' cut."""
    backend = start(llama, GREEDY)
    whole = replies(backend.score(asked(QUESTIONS)))
    order = np.random.default_rng(1).permutation(len(QUESTIONS)).tolist()
    shuffled = replies(backend.score(asked([QUESTIONS[i] for i in order])))
    assert shuffled == [whole[i] for i in order]
    for first, stop in [(0, 1), (1, 7), (7, len(QUESTIONS))]:
        assert replies(backend.score(asked(QUESTIONS[first:stop]))) == whole[first:stop]
    assert replies(backend.score(asked([*questions(9, seed=5), *QUESTIONS])))[9:] == whole


def test_more_questions_than_the_engine_holds_at_once(
    llama: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = start(llama, GREEDY).score(asked(QUESTIONS))
    monkeypatch.setattr(vllm_engine, "MAX_SEQUENCES", 3)
    few = start(llama, GREEDY).score(asked(QUESTIONS))
    assert few.replies == whole.replies
    assert few.effort.num_batches > len(QUESTIONS) // 3 * MAX_TOKENS * 0.9


def test_equal_questions_are_asked_once(llama: Path, start: Start) -> None:
    """Without a temperature the seed does not matter."""
    backend = start(llama, GREEDY)
    once = backend.score(asked([[300, 301], [310]]))
    thrice = backend.score(asked([[300, 301], [310], [300, 301], [300, 301]], seeds=[1, 2, 3, 4]))
    assert replies(thrice) == [replies(once)[i] for i in (0, 1, 0, 0)]
    assert thrice.effort.generated_tokens == once.effort.generated_tokens
    assert thrice.effort.computed_tokens == once.effort.computed_tokens == 3


def test_questions_of_several_shards_keep_the_engine_full(
    llama: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at a time: the last ones of a shard leave no place empty."""
    backend = start(llama, GREEDY)
    monkeypatch.setattr(vllm_engine, "MAX_SEQUENCES", 3)
    shards = [asked(QUESTIONS[first : first + 2]) for first in range(0, 12, 2)]
    alone = [score_shard(rows, backend) for rows in shards]
    together = score_shards(shards, backend)
    assert [one.scores.replies for one in together] == [one.scores.replies for one in alone]
    steps = sum(one.scores.effort.num_batches for one in alone)
    assert steps >= 6 * MAX_TOKENS
    assert sum(one.scores.effort.num_batches for one in together) < 0.75 * steps


def test_the_effort_is_counted(llama: Path, start: Start) -> None:
    """Prompts in full, and what they share once; and all that was written."""
    backend = start(llama, GREEDY)
    backend._engine.clear_cache()
    scores = backend.score(asked(QUESTIONS))
    effort = scores.effort
    assert effort.computed_tokens + effort.shared_tokens == sum(map(len, QUESTIONS))
    assert effort.shared_tokens == 3 * 96
    assert effort.generated_tokens == sum(reply.generated_tokens for reply in replies(scores))
    assert MAX_TOKENS <= effort.num_batches <= MAX_TOKENS + 2


def test_questions_that_must_not_reach_the_model_are_marked(llama: Path, start: Start) -> None:
    bad = [[5, VOCABULARY, 6], [-1], [], [299] * (LONGEST + 1), [299] * LONGEST]
    scores = start(llama, GREEDY).score(asked([*bad, *QUESTIONS[:2]]))
    assert {index: error.reason for index, error in scores.errors.items()} == {
        0: RowReason.BAD_TOKEN_ID,
        1: RowReason.BAD_TOKEN_ID,
        2: RowReason.EMPTY,
        3: RowReason.TOO_LONG,
    }
    assert scores.replies is not None
    assert [reply is None for reply in scores.replies] == [True] * 4 + [False] * 3
    longest = scores.replies[4]
    assert longest is not None and longest.generated_tokens == MAX_TOKENS


def test_what_is_no_number_is_an_error_of_its_question_alone(llama: Path, start: Start) -> None:
    backend = start(llama, GREEDY)
    whole = replies(backend.score(asked(QUESTIONS)))
    broken = [*SHARED[:40], BROKEN, *SHARED[40:]]
    found = replies(backend.score(asked([*QUESTIONS[:9], broken, *QUESTIONS[9:]])))
    assert (found[9].ended, found[9].text) == ("error", "")
    assert [*found[:9], *found[10:]] == whole
    assert replies(backend.score(asked(QUESTIONS))) == whole


def test_nothing_to_ask(llama: Path, start: Start) -> None:
    backend = start(llama, GREEDY)
    assert backend.score(asked([])).replies == []
    assert backend.score(asked([[]])).replies == [None]


def test_provenance_says_what_wrote(llama: Path, start: Start) -> None:
    provenance = start(llama, GREEDY).provenance
    assert provenance["backend"] == "vllm"
    assert provenance["model_class"] == "LlamaForCausalLM"
    assert provenance["task"] == "generate"
    assert provenance["prefix_caching"] is True
    assert provenance["guided"] is None
    assert provenance["end_ids"] == [END]
    assert provenance["sampling"]["max_tokens"] == MAX_TOKENS
    assert json.loads(json.dumps(provenance)) == provenance


def test_an_engine_that_stops_half_way_is_no_error_of_a_row(
    llama: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this engine."""
    backend = start(llama, GREEDY)

    def get_output(core: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("vllm.v1.engine.core_client.InprocClient.get_output", get_output)
    with pytest.raises(EngineDied, match="illegal memory access"):
        backend.score(asked(QUESTIONS))


# Other models


def test_a_tied_head_and_an_adapter_in_several_files(tmp_path: Path, start: Start) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora"
    random_language_model(base, "qwen2", num_attention_heads=2)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model.save_pretrained(base, max_shard_size="100KB")
    (base / "model.safetensors").unlink()
    assert len([*base.glob("*.safetensors")]) > 2
    adapted = peft_adapter(
        model, lora, base=str(base), task_type="CAUSAL_LM", target_modules="all-linear"
    )
    backend = start(base, page(max_tokens=8), lora_dir=lora)
    found = replies(backend.score(asked(QUESTIONS)))
    assert agree(adapted, base, QUESTIONS, found, 8) > 0.8 * 8 * len(QUESTIONS)
    with adapted.disable_adapter(), pytest.raises(AssertionError):
        agree(adapted, base, QUESTIONS, found, 8)


def test_a_model_without_a_head_is_refused(llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama).model.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    settings = engine_settings(tmp_path, judge=GREEDY, tokenizer_dir=tmp_path, max_tokens=LONGEST)
    with pytest.raises(ModelError, match="lm_head"):
        VLLMGenerationBackend(settings)


def test_a_page_that_leaves_no_room_for_questions_is_refused(llama: Path) -> None:
    settings = EngineSettings(llama, dtype="float32", device="cpu", tokenizer_dir=llama)
    with pytest.raises(ConfigError, match="512"):
        VLLMGenerationBackend(replace(settings, judge=page(max_tokens=512)))
    with pytest.raises(ConfigError, match="temperature"):
        VLLMGenerationBackend(replace(settings, judge=page(max_tokens=9, temperature=3)))


# Seeds


def test_a_seed_makes_a_reply_its_own(llama: Path, start: Start) -> None:
    """Equal seeds, equal replies, whatever is asked beside them; other seeds, others."""
    backend = start(llama, page(max_tokens=8, temperature=1.0, top_p=0.9))
    prompts = QUESTIONS[:6]
    first = replies(backend.score(asked(prompts, seeds=[7] * 6)))
    alone = [replies(backend.score(asked([ids], seeds=[7])))[0] for ids in prompts]
    assert alone == first
    rows = asked([*prompts, prompts[0], *prompts[::-1]], seeds=[8, 9, 8, 9, 8, 9, -3, *[7] * 6])
    scores = backend.score(rows)
    found = replies(scores)
    assert found[7:] == first[::-1]
    assert all(a.text != b.text for a, b in zip(found[:6], first, strict=True))
    assert len({found[0].text, found[6].text, first[0].text}) == 3
    twice = backend.score(asked([prompts[0]] * 3, seeds=[7, 7, 8]))
    assert replies(twice) == [first[0], first[0], found[0]]
    assert twice.effort.generated_tokens == sum(r.generated_tokens for r in replies(twice)[1:])


# A judge whose every next token is given


def scripted(directory: Path, *scripts: list[str], otherwise: str = "s") -> Callable[[str], int]:
    """Make a judge that writes the tokens of a script one after the other, and `otherwise` behind
    all others; returns the tokens' ids."""
    tiny_tokenizer(directory)
    tokenizer = load_tokenizer(directory)
    tokenizer.add_tokens([OPEN, CLOSE])
    tokenizer.save_pretrained(directory)

    def id_of(token: str) -> int:
        (found,) = tokenizer.encode(token, add_special_tokens=False)
        assert isinstance(found, int)
        return found

    follows = {id_of(a): id_of(b) for script in scripts for a, b in pairwise(script)}
    assert len(follows) == sum(len(script) - 1 for script in scripts), "two followers"
    scripted_language_model(directory, follows, id_of(otherwise))
    return id_of


def test_the_parts_of_a_reply(tmp_path: Path, start: Start) -> None:
    """A block within its budget, an answer within another, a stop text, and the verdict."""
    end = "<|im_end|>"
    id_of = scripted(
        tmp_path,
        ["a", OPEN, "b", "c", CLOSE, "d", "e", "!"],
        ["\n", *"klmnopqrs"],
        ["f", "g", "h", end],
        ["t", *"uvwxyz"],
        [":", "A", end],
    )
    asked_by = page(thinking_tokens=8, max_tokens=6, stop=["!"], closing=":", verdict_tokens=2)
    backend = start(tmp_path, asked_by)
    prompts = [["5", "a"], ["5", OPEN, "\n"], ["5", "f"], ["5", "t"]]
    scores = backend.score(asked([[id_of(token) for token in prompt] for prompt in prompts]))
    thought, open_block, short, cut = replies(scores)
    assert thought == Reply("de:A", "stop", reasoning="bc", generated_tokens=4 + 3 + 2)
    assert open_block == Reply("", "length", reasoning="klmnopqr", generated_tokens=8)
    assert short == Reply("gh:A", "stop", generated_tokens=1 + 3 + 2)
    assert cut == Reply("uvwxyz:A", "stop", generated_tokens=1 + 6 + 2)
    assert scores.effort.generated_tokens == sum(r.generated_tokens for r in replies(scores))
    assert scores.errors == {}


def test_a_reply_is_held_to_the_schema_of_its_verdicts(tmp_path: Path, start: Start) -> None:
    """But not its think block. Without a schema the judge would write quotation marks only."""
    id_of = scripted(tmp_path, ["a", OPEN, "b", CLOSE], otherwise='"')
    backend = start(tmp_path, page(json=True, mode="listwise", thinking_tokens=8, max_tokens=60))
    assert backend.provenance["guided"] == "xgrammar"
    thinks, answers = [id_of("5"), id_of("a")], [id_of("5"), id_of("c")]
    found = replies(backend.score(asked([answers, answers, thinks], verdicts=[2, 3, 2])))
    assert [reply.ended for reply in found] == ["stop"] * 3
    assert [reply.reasoning for reply in found] == ["", "", "b"]
    counts = []
    for reply in found:
        written = json.loads(reply.text)
        assert written.keys() == {"reasoning", "verdict"}
        assert set(written["verdict"]) <= {1, 2, 3, 4, 5}
        counts.append(len(written["verdict"]))
    assert counts == [2, 3, 2]


def test_an_object_that_the_page_begins_is_written_freely(tmp_path: Path, start: Start) -> None:
    id_of = scripted(tmp_path, ["a", *'"b', "}", "<|im_end|>"])
    backend = start(tmp_path, page(json=True, begins='{"verdict": "a', max_tokens=60))
    assert backend.provenance["guided"] is None
    tokenizer = load_tokenizer(tmp_path)
    prompt = [id_of("x"), *tokenizer.encode('{"verdict": "a', add_special_tokens=False)]
    (reply,) = replies(backend.score(asked([prompt])))
    assert reply.text == '{"verdict": "a"b}'


# SmolLM2

CHATS = [
    "Name three colours.",
    "What is 2 + 2? Answer in one word.",
    "Which is better, tea or coffee? Say why in two sentences.",
    "Grade the answer from 1 to 5. Question: Where is Paris? Answer: In France.",
    "Grade the answer from 1 to 5. Question: Where is Paris? Answer: In Spain.",
]


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded_language_model(tmp_path_factory.mktemp("smollm"))


def chats(directory: Path) -> Sequences:
    tokenizer = load_tokenizer(directory)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": chat}], add_generation_prompt=True, return_dict=False
        )
        for chat in CHATS
    ]


@pytest.mark.slow
def test_a_real_model_writes_what_plain_hugging_face_writes(smollm: Path, start: Start) -> None:
    prompts = chats(smollm)
    found = replies(start(smollm, page(max_tokens=30), max_tokens=500).score(asked(prompts)))
    tokenizer = load_tokenizer(smollm)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm, dtype="float32")
    compared = 0
    for prompt, reply in zip(prompts, found, strict=True):
        ids, is_all = plain_reply(model, prompt, 30, [2], noise=NOISE)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert reply.text == text if is_all else reply.text.startswith(text)
        compared += len(ids)
    assert compared > 50
    assert "red" in found[0].text.lower()


@pytest.mark.slow
def test_a_real_model_is_held_to_a_schema(smollm: Path, start: Start) -> None:
    asked_by = page(json=True, max_tokens=150)
    scores = start(smollm, asked_by, max_tokens=500).score(asked(chats(smollm)))
    done = [json.loads(r.text) for r in replies(scores) if r.ended == "stop"]
    assert len(done) >= 3
    assert all(reply["verdict"] in range(1, 6) for reply in done)
    assert any(reply["reasoning"] for reply in done)
