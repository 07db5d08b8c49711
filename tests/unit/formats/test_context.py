"""What stands beside prompt and response is read, refused at planning, or marks its row."""

import json
from typing import Any

import pyarrow as pa
import pytest

from batch_scorer.errors import RowReason
from batch_scorer.formats import describe
from batch_scorer.records import TextStyle
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

DIALOGUE = [user("q"), assistant("a")]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("name", ["system_prompt", "system_message"])
def test_a_system_prompt_becomes_the_first_message_once(name: str) -> None:
    expected = [system("Be brief."), *DIALOGUE]
    assert sequences({"prompt": "q", "response": "a", name: "Be brief."}) == [expected]
    assert sequences({"messages": DIALOGUE, name: "Be brief."}) == [expected]
    assert sequences({"messages": expected, name: "Be brief. "}) == [expected]
    assert sequences({"messages": DIALOGUE, name: " "}) == [DIALOGUE]
    pair = {"chosen": DIALOGUE, "rejected": DIALOGUE, name: "Be brief."}
    assert sequences(pair) == [expected, expected]
    other = parsed({"messages": [system("Be long."), *DIALOGUE], name: "Be brief."})
    assert reasons(other) == [RowReason.BAD_STRUCTURE]


@pytest.mark.parametrize(
    "value", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]], ids=["list", "text", "texts"]
)
def test_tools_are_arguments_of_the_row(value: Any) -> None:
    rows = parsed({"messages": DIALOGUE, "tools": value})
    assert rows.sequences == [DIALOGUE]
    assert rows.arguments == {0: {"tools": [TOOL]}}


def test_rows_have_their_own_arguments_or_none() -> None:
    documents = pa.array([[{"title": "t", "text": "x"}], None, []])
    given = pa.array(['{"enable_thinking": false, "x": null}', "", None])
    table = pa.table(
        {"messages": [DIALOGUE] * 3, "documents": documents, "chat_template_kwargs": given}
    )
    arguments = {"enable_thinking": False, "x": None, "documents": [{"title": "t", "text": "x"}]}
    assert parsed(table).arguments == {0: arguments}


def test_an_argument_that_is_given_twice_marks_its_row() -> None:
    row = {"messages": DIALOGUE, "tools": [TOOL], "chat_template_kwargs": {"tools": [TOOL]}}
    assert reasons(parsed(row)) == [RowReason.BAD_STRUCTURE]


@pytest.mark.parametrize("value", ["no JSON", '{"name": "f"}'])
def test_tools_that_are_no_list_of_objects_are_refused_or_marked(value: str) -> None:
    assert "--ignore-column tools" in refused({"messages": DIALOGUE, "tools": value})
    table = pa.table({"messages": [DIALOGUE] * 40, "tools": [None] * 39 + [value]})
    assert reasons(parsed(table))[38:] == [
        None, RowReason.MALFORMED_JSON if value == "no JSON" else RowReason.BAD_STRUCTURE,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "history", [[["old q", "old a"]], [user("old q"), assistant("old a")]], ids=["pairs", "turns"]
)
def test_the_history_comes_before_the_prompt_once(history: Any) -> None:
    expected = [user("old q"), assistant("old a"), *DIALOGUE]
    assert sequences({"prompt": "q", "response": "a", "history": history}) == [expected]
    prompt = expected[:-1]
    assert sequences({"prompt": prompt, "response": "a", "history": history}) == [expected]
    whole = [system("s"), *expected]
    row = {"prompt": "q", "response": "a", "history": history, "system_prompt": "s"}
    assert sequences(row) == [whole]


def test_an_input_continues_the_instruction_where_it_is_named() -> None:
    table = pa.table(
        {"instruction": ["Say it.", "Say it."], "input": ["fox", ""], "output": ["a", "a"]}
    )
    assert sequences(table, named={"input": "input"}) == [
        [user("Say it.\nfox"), assistant("a")],
        [user("Say it."), assistant("a")],
    ]


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"instruction": "q", "output": "a"}, "input"),
        ({"prompt": "q", "response": "a"}, "system"),
        ({"messages": DIALOGUE}, "context"),
        ({"messages": DIALOGUE}, "functions"),
        ({"messages": DIALOGUE}, "history"),
        ({"chosen": DIALOGUE, "rejected": DIALOGUE}, "images"),
    ],
)
def test_a_column_that_is_not_read_is_refused_wherever_it_holds_something(
    columns: dict[str, Any], name: str
) -> None:
    message = refused({**columns, name: "x"})
    assert f"column {name} " in message and f"--ignore-column {name}" in message
    assert "(row 0)" in message
    one = found({**columns, name: "x"}, ignore=(name,))
    assert name not in one.watched and name not in one.columns.values()
    # Files often begin with rows that leave it empty: those that do not are marked.
    last = pa.array([""] * 399 + ["x"])
    table = pa.table({key: pa.array([value] * 400) for key, value in columns.items()})
    media = name == "images"
    reason = RowReason.UNSUPPORTED_MEDIA if media else RowReason.CONTEXT_NOT_READ
    assert reasons(parsed(table.append_column(name, last)))[398:] == [None, reason]


def test_what_is_refused_can_be_named() -> None:
    row = {"prompt": "q", "response": "a", "system": "s"}
    assert "--column system=system" in refused(row)
    layout = found(row, named={"system": "system"})
    line = "rollouts (plain text in response; prompt in prompt; system in system)"
    assert describe(layout) == line
    assert sequences(row, named={"system": "system"}) == [[system("s"), *DIALOGUE]]
    functions = {"messages": DIALOGUE, "functions": [{"name": "f"}]}
    rows = parsed(functions, named={"tools": "functions"})
    assert rows.arguments == {0: {"tools": [{"name": "f"}]}}


def test_an_input_that_is_the_prompt_is_not_watched() -> None:
    row = {"input": "q", "output": "a"}
    assert found(row, named={"prompt": "input"}).watched == ()
    assert found({"input": [user("q")], "output": "a"}).columns["prompt"] == "input"


def test_a_context_that_is_the_prompt_of_whole_dialogues_is_not_watched() -> None:
    row = {"context": [user("q")], "chosen": DIALOGUE, "rejected": DIALOGUE}
    assert sequences(row) == [DIALOGUE, DIALOGUE]
    assert sequences({"context": [user("q")], "response": "a"}) == [DIALOGUE]


def test_context_of_text_that_is_rendered_already_is_in_the_text() -> None:
    row = {"text": "<|im_start|>user\nq<|im_end|>", "system": "s", "tools": "[]"}
    assert found(row).watched == ()
    message = refused(row, named={"system": "system"})
    assert "named for system, has no place" in message
    assert "images" in refused({**row, "images": "x.png"})


def test_a_named_column_that_cannot_be_read_is_refused() -> None:
    row = {"messages": DIALOGUE, "extra": 3}
    assert "named for system: extra is no text" in refused(row, named={"system": "extra"})


def test_a_context_column_is_ignored_by_name_and_not_by_an_empty_one() -> None:
    row = {"prompt": "q", "response": "a", "system": "s"}
    assert "--ignore-column system" in refused(row, named={"system": ""})


def test_two_system_prompts_are_refused() -> None:
    row = {"messages": DIALOGUE, "system_prompt": "s", "system_message": "s"}
    assert "could both be the system" in refused(row)
    assert found(row, ignore=("system_message",)).columns["system"] == "system_prompt"


def test_ignored_columns_are_no_fields_either() -> None:
    row = {"messages": DIALOGUE, "chosen": DIALOGUE, "rejected": DIALOGUE}
    layout = found(row, ignore=("chosen", "rejected"))
    assert layout.columns == {"messages": "messages"}
    hh = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    assert found({**hh, "system_prompt": "s"}).text_style is TextStyle.HH
    assert sequences({**hh, "system_prompt": "s"})[0] == [system("s"), *DIALOGUE]


# What a model judges the answers by


@pytest.mark.parametrize("name", ["principle", "criterion"])
@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Be brief.", "Be brief."),
        (user("Be brief."), "Be brief."),
        ([{"from": "human", "value": "Be brief."}, assistant("And kind.")], "Be brief.\nAnd kind."),
        (json.dumps([user("Be brief.")]), "Be brief."),
        ("['not', 'messages']", "['not', 'messages']"),
    ],
    ids=["text", "message", "messages", "messages-in-writing", "other-text"],
)
def test_a_principle_is_read_where_the_model_asks_for_one(name: str, value: Any, text: str) -> None:
    row = {"messages": DIALOGUE, name: value}
    rows = parsed(row, beside="principle")
    assert rows.sequences == [DIALOGUE]
    assert [message["content"] for message in rows.beside.values()] == [text]
    assert f"principle in {name}" in describe(found(row, beside="principle"))
    assert parsed(row).beside == {}
    assert parsed({"messages": DIALOGUE, "x": value}, named={"principle": "x"}).beside


def test_rows_without_a_reference_are_marked() -> None:
    given = pa.array(["4", None, " "])
    table = pa.table({"messages": [DIALOGUE] * 3, "reference": given})
    rows = parsed(table, beside="reference")
    assert reasons(rows) == [None, RowReason.NULL_VALUE, RowReason.EMPTY]
    assert list(rows.beside) == [0]
    assert reasons(parsed(table)) == [None] * 3
    turns = pa.table({"messages": [DIALOGUE] * 2, "reference": [DIALOGUE[1:], [assistant(" ")]]})
    assert reasons(parsed(turns, beside="reference")) == [None, RowReason.EMPTY]


def test_a_file_without_a_reference_is_refused_where_conversations_need_it() -> None:
    asked = "judges an answer by a reference, and no column holds one"
    assert asked in refused({"messages": DIALOGUE}, beside="reference")
    assert asked in refused({"messages": DIALOGUE, "reference": 4}, beside="reference")
    ignored = {"beside": "reference", "ignore": ("reference",)}
    assert asked in refused({"messages": DIALOGUE, "reference": "4"}, **ignored)
    assert found({"text": "<s>all of it"}, beside="reference").columns == {"text": "text"}
    ids = {"input_ids": [5, 6], "ground_truth": "It is."}
    assert "column ground_truth would not be read" in refused(ids, beside="reference")
