"""What ends the parts of a reply and what is text, decided without an engine: the tokens are those
of a real tokenizer, handed over as an engine would."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from batch_scorer.backends.replies import (
    CLOSE,
    OPEN,
    Decoder,
    Thinking,
    Writer,
    end_ids,
    seed_of,
    split_thinking,
)
from batch_scorer.judges.page import Page, may_guide
from batch_scorer.models.tokenizer import load_tokenizer
from batch_scorer.records import Reply
from tests.helpers.tiny import tiny_tokenizer

END = 3  # <|im_end|>
QUESTION = "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its think marks are several tokens each."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its think marks are special tokens."""
    directory = tmp_path_factory.mktemp("marked")
    tiny_tokenizer(directory)
    tokenizer = load_tokenizer(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": [OPEN, CLOSE]})
    return tokenizer


def page(*, begins: str = "", by: str = "pattern", **generation: Any) -> Page:
    reads = {"pattern": "(A|B)", "choices": {"A": 1, "B": 0}} if by == "pattern" else {}
    return Page.model_validate(
        {
            "about": "which one",
            "mode": "pointwise",
            "messages": [{"role": "user", "content": "{{ response }}"}],
            "begins": begins,
            "verdict": {"by": by, "choices": {"A": 1, "B": 0}, **reads},
            "generation": generation,
        }
    )


def writer(tokenizer: Any, asked: Page) -> Writer:
    return Writer(asked, tokenizer, [END])


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def write(
    tokenizer: Any, asked: Page, *texts: str, prompt: str = QUESTION
) -> tuple[Reply, list[tuple[str, int]]]:
    """The reply of a judge that would go on for a part with each text and then end, and what it was
    asked for: the text of each prompt, and the most tokens."""
    prompt_ids = ids_of(tokenizer, prompt + asked.begins)
    writing = writer(tokenizer, asked).begin(prompt_ids, None)
    parts = []
    for text in texts:
        part = writing.part
        assert part is not None, "more was written than asked for"
        assert part.prompt_ids[: len(prompt_ids)] == prompt_ids
        parts.append((tokenizer.decode(part.prompt_ids[len(prompt_ids) :]), part.max_tokens))
        ids = [*ids_of(tokenizer, text), END]
        over = False
        for count, token_id in enumerate(ids, start=1):
            if over := writing.take([token_id]):
                break
            if token_id == END or count == part.max_tokens:
                writing.finish("stop" if token_id == END else "length")
                over = True
                break
        assert over
    assert writing.part is None and writing.reply is not None
    return writing.reply, parts


# Text


@pytest.mark.parametrize(
    ("begun", "written", "expected"),
    [
        ("", "It is A.", Thinking("", "", 0)),
        ("", "<think>one</think>\n\nA", Thinking("one", "", 18)),
        ("", "\n <think>one</think>A", Thinking("one", "", 20)),
        ("", "<think>one", Thinking("one", "", None)),
        ("", "<think>one</think>A<think>two", Thinking("one", "", 18)),
        ("", "It opens <think>.", Thinking("", "", 0)),
        ("<think>", "\none</think>A", Thinking("\none", "", 12)),
        ("<think>", "\none", Thinking("\none", "", None)),
        ("<think>Well,", " one</think>A", Thinking("Well, one", "", 12)),
        ("<think>\n\n</think>\n\n", "A", Thinking("\n\n", "\n\n", 0)),
        ("<think></think>It is ", "<think>no</think>A", Thinking("no", "It is ", 17)),
        ("It is ", "A", Thinking("", "It is ", 0)),
        ("It is ", "<think>A", Thinking("A", "It is ", None)),
    ],
)
def test_a_think_block_is_split_off(begun: str, written: str, expected: Thinking) -> None:
    assert split_thinking(begun, written) == expected


@given(st.text("<think>/ a\n"), st.text("<think>/ a\n"))
def test_an_answer_is_the_end_of_what_was_written(begun: str, written: str) -> None:
    found = split_thinking(begun, written)
    assert begun.endswith(found.begun)
    if found.start is None:
        assert CLOSE not in found.reasoning and OPEN in begun + written
    else:
        assert 0 <= found.start <= len(written)
        thought = written[: found.start]
        assert thought == "" or thought.endswith(CLOSE)


def test_a_text_is_decoded_where_it_stands(tokenizer: Any) -> None:
    decoder = Decoder(tokenizer, ())
    ids = ids_of(tokenizer, "the answer <|im_end|>is 42")
    assert decoder.text(ids) == "the answer is 42"
    assert Decoder(tokenizer, ["<|im_end|>"]).text(ids) == "the answer <|im_end|>is 42"
    words = Tokenizer(models.WordLevel({"▁It": 0, "▁is": 1, "▁A": 2}, unk_token="▁A"))
    words.decoder = decoders.Metaspace()  # drops the blank of the first token
    make: Any = PreTrainedTokenizerFast
    decoder = Decoder(make(tokenizer_object=words), ())
    assert decoder.text([0, 1, 2]) == "It is A"
    assert decoder.text([1, 2], after=[0]) == " is A"


def test_a_closing_is_encoded_where_it_stands(tokenizer: Any) -> None:
    """Sentencepiece's tokenizers put a blank before a text; behind the critique there is none."""
    letters = Tokenizer(models.BPE({"▁": 0, "\n": 1, "S": 2, "o": 3, ":": 4}, []))
    letters.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    make: Any = PreTrainedTokenizerFast
    blank = make(tokenizer_object=letters)
    assert ids_of(blank, "So:") == [0, 2, 3, 4]
    assert writer(blank, page()).encode("So:") == [2, 3, 4]
    assert writer(blank, page()).encode("\nSo:") == [1, 2, 3, 4]
    for text in (" So: ", "\n\nSo:", "So", ""):
        assert writer(tokenizer, page()).encode(text) == ids_of(tokenizer, text)


def test_the_ends_are_those_of_all_files(tokenizer: Any, tmp_path: Path) -> None:
    config = SimpleNamespace(eos_token_id=[7, 9])
    assert end_ids(tmp_path, config, tokenizer) == [END, 7, 9]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 11}))
    assert end_ids(tmp_path, config, tokenizer) == [END, 7, 9, 11]


def test_each_part_has_a_seed_of_its_own() -> None:
    seeds = {seed_of(seed, part) for seed in (0, 1, 2**63 - 1, -1) for part in range(3)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)


# One part


def test_a_reply_is_the_text_before_the_end(tokenizer: Any) -> None:
    reply, parts = write(tokenizer, page(max_tokens=50), " It is A. ")
    assert (reply.text, reply.ended, reply.reasoning) == (" It is A. ", "stop", "")
    assert reply.generated_tokens == len(ids_of(tokenizer, " It is A. ")) + 1
    assert parts == [("", 50)]


def test_a_reply_that_is_cut(tokenizer: Any) -> None:
    reply, _ = write(tokenizer, page(max_tokens=3), "The quick brown fox jumps")
    assert reply.ended == "length"
    assert reply.generated_tokens == 3
    assert "The quick brown fox jumps".startswith(reply.text)


def test_what_the_page_begins_is_part_of_the_text(tokenizer: Any) -> None:
    reply, _ = write(tokenizer, page(begins="Verdict: "), "A")
    assert reply.text == "Verdict: A"


@pytest.mark.parametrize("text", ["It is A.\n\nEND more", "It is A.\n\nEND", "It is A.\n\nENDING"])
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(tokenizer: Any, text: str) -> None:
    reply, _ = write(tokenizer, page(stop=["\n\nEND", "never"]), text)
    assert (reply.text, reply.ended) == ("It is A.", "stop")
    assert reply.generated_tokens == len(ids_of(tokenizer, "It is A.\n\nEND"))


def test_a_stop_text_may_be_a_character_of_several_tokens(tokenizer: Any) -> None:
    assert len(ids_of(tokenizer, "。")) == 3
    reply, _ = write(tokenizer, page(stop=["。"], max_tokens=20), "It is A。 More")
    assert (reply.text, reply.ended) == ("It is A", "stop")
    assert reply.generated_tokens == len(ids_of(tokenizer, "It is A。"))


def test_a_stop_text_may_be_a_special_token(tokenizer: Any) -> None:
    reply, _ = write(tokenizer, page(stop=["<|im_start|>"]), "It is A.<|im_start|>user")
    assert (reply.text, reply.ended) == ("It is A.", "stop")


# Think blocks


@pytest.mark.parametrize("which", ["tokenizer", "marked"])
@pytest.mark.parametrize("thinking_tokens", [0, 60])
def test_a_block_that_is_closed_is_reasoning(
    which: str, thinking_tokens: int, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(which)
    asked = page(thinking_tokens=thinking_tokens, max_tokens=60)
    block, answer = "<think>\nThe fox? </think>", "\n\nIt is A."
    texts = [block, answer] if thinking_tokens else [block + answer]
    reply, parts = write(tokenizer, asked, *texts)
    assert (reply.text, reply.reasoning, reply.ended) == (answer, "\nThe fox? ", "stop")
    assert [tokens for _, tokens in parts] == [60] * len(texts)
    if thinking_tokens:
        assert parts[1][0] == block


@pytest.mark.parametrize("which", ["tokenizer", "marked"])
def test_a_block_that_the_template_opens(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(which)
    prompt = QUESTION + "<think>\n"
    asked = page(thinking_tokens=60)
    reply, _ = write(tokenizer, asked, "So.</think>", "A", prompt=prompt)
    assert (reply.text, reply.reasoning, reply.ended) == ("A", "So.", "stop")
    reply, _ = write(tokenizer, page(max_tokens=60), "So.</think>A", prompt=prompt)
    assert (reply.text, reply.reasoning) == ("A", "So.")


def test_a_block_that_the_page_begins(tokenizer: Any) -> None:
    asked = page(begins="<think>\nStep 1:", thinking_tokens=60)
    reply, _ = write(tokenizer, asked, " So.</think>", "A")
    assert (reply.text, reply.reasoning) == ("A", "\nStep 1: So.")
    closed = page(begins="<think></think>It is ", thinking_tokens=60)
    reply, parts = write(tokenizer, closed, "A")
    assert (reply.text, len(parts)) == ("It is A", 1)


@pytest.mark.parametrize("which", ["tokenizer", "marked"])
@pytest.mark.parametrize("opened", ["", "<think>"])
def test_a_block_beyond_its_budget_leaves_no_verdict(
    which: str, opened: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(which)
    begin = "" if opened else "<think>"
    budget = len(ids_of(tokenizer, begin)) + 4
    asked = page(thinking_tokens=budget, closing="C:")
    reply, parts = write(
        tokenizer, asked, begin + "The quick brown fox A</think>A", prompt=QUESTION + opened
    )
    assert (reply.text, reply.ended, reply.generated_tokens) == ("", "length", budget)
    assert reply.reasoning and "The quick brown fox".startswith(reply.reasoning)
    assert len(parts) == 1


@pytest.mark.parametrize("thinking_tokens", [0, 60])
def test_a_block_that_the_judge_leaves_open_is_no_verdict(
    tokenizer: Any, thinking_tokens: int
) -> None:
    asked = page(thinking_tokens=thinking_tokens, max_tokens=60, closing="C:", stop=["fox"])
    reply, parts = write(tokenizer, asked, "<think>It is A, fox.")
    assert (reply.text, reply.reasoning, reply.ended) == ("", "It is A, fox.", "stop")
    assert len(parts) == 1


def test_a_judge_that_does_not_think_answers_within_the_budget_of_answers(tokenizer: Any) -> None:
    asked = page(thinking_tokens=2, max_tokens=50)
    reply, parts = write(tokenizer, asked, "It is A.", "It is A.")
    assert (reply.text, reply.reasoning, reply.ended) == ("It is A.", "", "stop")
    assert parts == [("", 2), ("", 50)]


def test_a_mark_inside_of_the_question_opens_nothing(tokenizer: Any) -> None:
    prompt = "<|im_start|>user\nIs <think> so?<|im_end|>\n<|im_start|>assistant\n"
    reply, _ = write(tokenizer, page(), "A", prompt=prompt)
    assert (reply.text, reply.reasoning) == ("A", "")


# A closing


def test_the_verdict_stands_behind_the_closing(tokenizer: Any) -> None:
    asked = page(max_tokens=40, closing="\nVerdict: ", verdict_tokens=4)
    reply, parts = write(tokenizer, asked, "The fox is quick.", "A")
    assert (reply.text, reply.ended) == ("The fox is quick.\nVerdict: A", "stop")
    assert parts == [("", 40), ("The fox is quick.\nVerdict: ", 4)]


def test_a_critique_that_is_cut_still_gets_its_verdict(tokenizer: Any) -> None:
    asked = page(max_tokens=3, closing="\nVerdict: ", verdict_tokens=2)
    reply, parts = write(tokenizer, asked, "The quick brown fox jumps", "A")
    critique = tokenizer.decode(ids_of(tokenizer, "The quick brown fox jumps")[:3])
    assert (reply.text, reply.ended) == (critique + "\nVerdict: A", "stop")
    assert parts[1][0] == critique + "\nVerdict: "
    reply, _ = write(tokenizer, asked, "The quick brown fox jumps", "rests for a while")
    assert reply.ended == "length"


def test_the_closing_follows_what_stands_before_a_stop_text(tokenizer: Any) -> None:
    """Also where it begins inside of a token."""
    asked = page(max_tokens=60, closing=" So: ", stop=["wn fox"])
    reply, parts = write(tokenizer, asked, "The quick brown fox jumps", "A wn fox B")
    assert reply.text == "The quick bro So: A "
    assert parts[1][0] == "The quick bro So: "


def test_reasoning_critique_and_verdict(tokenizer: Any) -> None:
    asked = page(thinking_tokens=60, closing="\nVerdict: ", begins="", verdict_tokens=4)
    reply, parts = write(tokenizer, asked, "<think>Why?</think>", "So.", "B")
    assert (reply.text, reply.reasoning) == ("So.\nVerdict: B", "Why?")
    assert parts[2][0] == "<think>Why?</think>So.\nVerdict: "


def test_there_is_room_for_all_that_may_be_written(tokenizer: Any) -> None:
    asked = page(thinking_tokens=5, max_tokens=7, closing="\nVerdict: ", verdict_tokens=11)
    room = writer(tokenizer, asked).room_tokens
    assert room >= 5 + 7 + len(ids_of(tokenizer, "\nVerdict: ")) + 11
    assert writer(tokenizer, page(thinking_tokens=5, max_tokens=7)).room_tokens == 12


def test_a_schema_holds_the_part_with_the_verdict(tokenizer: Any) -> None:
    prompt = ids_of(tokenizer, QUESTION)
    alone = writer(tokenizer, page(by="json")).begin(prompt, "{}")
    assert alone.part is not None and alone.part.schema == "{}"
    closed = writer(tokenizer, page(by="json", closing="So: ", thinking_tokens=9))
    writing = closed.begin(prompt, "{}")
    schemas = []
    for text in ("<think></think>", "Why", '{"verdict": "A"}'):
        assert writing.part is not None
        schemas.append(writing.part.schema)
        if not writing.take(ids_of(tokenizer, text)):
            writing.finish("stop")
    assert schemas == [None, None, "{}"]


def test_an_object_that_the_page_begins_is_not_held_to_the_schema_of_a_whole_one() -> None:
    assert may_guide(page(by="json"))
    assert may_guide(page(by="json", begins="As JSON: "))
    assert not may_guide(page(by="json", begins='{"reasoning": "'))
    assert not may_guide(page(by="json", closing='\n{"verdict":'))
    assert not may_guide(page())


def test_a_request_that_fails_is_a_reply(tokenizer: Any) -> None:
    writing = writer(tokenizer, page()).begin(ids_of(tokenizer, QUESTION), None)
    writing.take([20, 21])
    writing.fail("no memory")
    assert writing.part is None
    assert writing.reply == Reply("", "error", generated_tokens=2, detail="no memory")
