"""A prompt is in a sequence once, whether it stands beside the answers, in them, or both."""

import json

import pyarrow as pa
import pytest

from batch_scorer.errors import RowReason
from batch_scorer.formats import describe
from batch_scorer.records import RowError, TextStyle
from tests.unit.formats.tables import (
    assistant,
    found,
    parsed,
    reasons,
    refused,
    sequences,
    system,
    user,
)

RENDERED = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
DIALOGUE = [user("q"), assistant("a")]


def test_the_prompt_is_cut_off_plain_answers_that_repeat_it() -> None:
    table = pa.table(
        {
            "prompt": ["What is it? "] * 4,
            "chosen": ["What is it? A fox.", "What is it?\nTwo.", " What is it?", "Another."],
            "rejected": ["What is it?  Lazy.", "What is it? 3", "What is it? x", "What is it? y"],
        }
    )
    layout = found(table)
    assert describe(layout) == (
        "preference pairs (plain text in chosen, rejected; prompt inside, cut off by prompt)"
    )
    rows = parsed(table)
    answers = [
        one[-1]["content"] if isinstance(one, list) else one.reason for one in rows.sequences
    ]
    expected = ["A fox.", "Lazy.", "Two.", "3", RowReason.EMPTY, "x", RowReason.BAD_STRUCTURE, "y"]
    assert answers == expected
    assert rows.sequences[0] == [user("What is it? "), assistant("A fox.")]
    apart = sequences(table, named={"prompt": "prompt"})
    assert apart[0] == [user("What is it? "), assistant("What is it? A fox.")]


def test_a_few_answers_that_begin_with_their_prompt_are_kept_whole() -> None:
    table = pa.table({"prompt": ["Hi"] * 3, "responses": [["Hi there", "Ho"], ["Ha"], ["Hi"]]})
    assert not found(table).prompt_inside
    assert sequences(table)[0] == [user("Hi"), assistant("Hi there")]
    most = pa.table({"prompt": ["Hi"] * 2, "responses": [["Hi there", "Hi, you"], ["Hi, he"]]})
    assert [one[-1]["content"] for one in sequences(most)] == ["there", ", you", ", he"]


def test_plain_answers_that_hold_their_prompt_elsewhere_are_refused() -> None:
    row = {"prompt": "What is it about?", "response": "Q: What is it about?\nA: A fox."}
    assert "--column prompt=prompt" in refused(row)
    apart = [user(row["prompt"]), assistant(row["response"])]
    assert sequences(row, named={"prompt": "prompt"}) == [apart]
    assert sequences(row, style=TextStyle.RENDERED) == [row["response"]]
    short = {"prompt": "What is it?", "response": "Q: What is it? A: A fox."}
    assert sequences(short) == [[user(short["prompt"]), assistant(short["response"])]]


def test_rendered_answers_that_contain_their_prompt_are_whole() -> None:
    whole = {"prompt": "What is it?", "response": RENDERED + "A fox.<|im_end|>"}
    layout = found(whole)
    assert (layout.text_style, "prompt" in layout.columns) == (TextStyle.RENDERED, False)
    assert sequences(whole) == [whole["response"]]
    table = pa.table(
        {"prompt": ["What is it?"] * 40, "response": [whole["response"]] * 39 + ["A fox."]}
    )
    assert reasons(parsed(table))[38:] == [None, RowReason.BAD_STRUCTURE]
    ids = pa.table({"prompt": [[1, 2]] * 40, "response": [[1, 2, 3]] * 39 + [[3, 4, 5]]})
    assert reasons(parsed(ids))[38:] == [None, RowReason.BAD_STRUCTURE]


@pytest.mark.parametrize(
    "begin", ["<s>", "<bos>", "[INST] ", "<start_of_turn>", "<\uff5cUser\uff5c>"]
)
def test_a_rendered_prompt_is_followed_by_its_answer(begin: str) -> None:
    row = {"prompt": f"{begin}q", "response": "A fox.<|im_end|>"}
    assert sequences(row) == [f"{begin}qA fox.<|im_end|>"]
    verl = {"input": f"{begin}q", "output": "A fox.", "gts": "1"}
    assert "--column prompt" in refused(verl)
    assert sequences(verl, named={"prompt": "input"}) == [f"{begin}qA fox."]


def test_rendered_answers_beside_another_prompt_are_refused() -> None:
    row = {"prompt": "What else?", "response": RENDERED + "A fox."}
    assert "--text-style" in refused(row)
    assert sequences(row, style=TextStyle.PLAIN) == [
        [user("What else?"), assistant(row["response"])]
    ]


def test_whole_dialogues_without_the_system_message_of_their_prompt_are_refused() -> None:
    prompt = [system("Be brief."), user("q")]
    row = {"prompt": prompt, "chosen": DIALOGUE, "rejected": DIALOGUE}
    assert "--ignore-column prompt" in refused(row)
    assert sequences(row, ignore=("prompt",)) == [DIALOGUE, DIALOGUE]
    whole = [*prompt, assistant("a")]
    assert sequences({"prompt": prompt, "chosen": whole, "rejected": whole}) == [whole, whole]
    table = pa.table(
        {
            "prompt": [prompt[1:]] * 39 + [prompt],
            "chosen": [DIALOGUE] * 39 + [whole],
            "rejected": [DIALOGUE] * 40,
        }
    )
    assert found(table).repeated == "prompt"
    last = parsed(table).sequences[-2:]
    assert last[0] == whole
    assert isinstance(last[1], RowError) and last[1].reason == RowReason.CONTEXT_NOT_READ


def test_whole_dialogues_without_the_earlier_turns_of_their_prompt_are_refused() -> None:
    """As where an answer was stored with the last question only."""
    prompt = [user("first"), assistant("hm"), user("q")]
    row = {"prompt": prompt, "chosen": DIALOGUE, "rejected": DIALOGUE}
    assert "'first'" in refused(row)
    assert sequences(row, ignore=("prompt",)) == [DIALOGUE, DIALOGUE]
    parts = [{"role": "user", "content": [{"type": "text", "text": " q\n"}]}]
    assert sequences({**row, "prompt": parts}) == [DIALOGUE, DIALOGUE]
    table = pa.table(
        {
            "prompt": [prompt[2:]] * 39 + [prompt],
            "chosen": [DIALOGUE] * 40,
            "rejected": [DIALOGUE] * 40,
        }
    )
    (marked,) = parsed(table).row_errors.items()
    assert marked[0] == 39 and marked[1].reason == RowReason.CONTEXT_NOT_READ
    assert "'first'" in marked[1].detail


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_messages_in_writing_are_read_as_messages(write: type[str]) -> None:
    chosen, rejected = DIALOGUE, [user("q"), assistant('it\'s "b"\n')]
    row = {"prompt": "q", "chosen": write(chosen), "rejected": write(rejected)}
    layout = found(row)
    assert layout.encoded == ("chosen", "rejected")
    line = "preference pairs (messages in writing in chosen, rejected; prompt inside)"
    assert describe(layout) == line
    assert sequences(row) == [chosen, rejected]
    named = [{"name": "Ann", **user("q")}, assistant("a")]
    assert sequences({"text": write(named)}) == [named]
    replies = {"prompt": write([user("q")]), "responses": [write([assistant("a")])]}
    assert sequences(replies) == [DIALOGUE]
    group = {"prompt": "q", "responses": write([[assistant("a")], [assistant("b")]])}
    assert sequences(group) == [DIALOGUE, [user("q"), assistant("b")]]


def test_a_text_that_spells_messages_is_a_conversation() -> None:
    layout = found({"text": json.dumps(DIALOGUE)})
    assert describe(layout) == "conversations (messages in writing in text)"
    assert sequences({"text": json.dumps(DIALOGUE)}) == [DIALOGUE]


def test_a_row_whose_writing_cannot_be_read_is_marked() -> None:
    good = json.dumps(DIALOGUE)
    table = pa.table({"messages": [good, good, good[:-3], " ", None, "3"]})
    # `messages` of text is no conversation unless most of it spells one.
    assert reasons(parsed(table)) == [
        None,
        None,
        RowReason.MALFORMED_JSON,
        RowReason.EMPTY,
        RowReason.NULL_VALUE,
        RowReason.BAD_STRUCTURE,
    ]


def test_writing_that_cannot_be_read_is_refused() -> None:
    numpy = "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]"
    row = {"prompt": "q", "chosen": numpy, "rejected": numpy}
    assert "write them as lists of messages" in refused(row)
    assert sequences(row, style=TextStyle.PLAIN)[0] == [user("q"), assistant(numpy)]
