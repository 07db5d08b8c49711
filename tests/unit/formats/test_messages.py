"""Messages reach the template with every field that the row has, and no other."""

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_scorer.errors import RowReason
from batch_scorer.formats.kinds import is_assistant, role_alias
from batch_scorer.formats.messages import text_of
from tests.unit.formats.tables import assistant, parsed, reasons, sequences, user

CALL = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
TEXT_CALL = {"type": "function", "id": "c2", "function": {"name": "f", "arguments": '{"n": null}'}}
WITH_TOOLS = [
    {"role": "developer", "content": "Be brief."},
    user("Weather?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "f"},
    {"role": "assistant", "content": "Sunny.", "reasoning_content": "The tool said so."},
    user("Thanks"),
    {"role": "assistant", "content": "", "thinking": "Polite.", "mood": {"happy": True}},
]
PARTS = assistant([{"type": "text", "text": "a"}])


def through_parquet(rows: dict[str, list[Any]]) -> pa.Table:
    file = io.BytesIO()
    pq.write_table(pa.table(rows), file)
    return pq.read_table(file)


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip)
NEW_FIELDS = {
    "name": TEXT,
    "reasoning_content": TEXT,
    "weight": st.integers(0, 1),
    "extra": st.dictionaries(st.sampled_from(["a", "b"]), TEXT, min_size=1),
}
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "days"]), TEXT, min_size=1)
CALLS = st.lists(st.fixed_dictionaries({"name": TEXT, "arguments": ARGUMENTS}), min_size=1)


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    """A message with some of the fields that others may have."""
    role = draw(st.sampled_from(["system", "user", "assistant", "tool", "observation"]))
    message = {"role": role, "content": draw(TEXT)}
    message |= draw(st.fixed_dictionaries({}, optional=NEW_FIELDS))
    if role == "assistant" and draw(st.booleans()):
        message |= {"content": None, "tool_calls": draw(CALLS)}
    return message


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(messages(), min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_conversation_comes_out_of_a_file_as_it_went_in(talks: list[list[Any]]) -> None:
    whole = [[user("q"), *talk, assistant("a")] for talk in talks]
    assert sequences(through_parquet({"messages": whole})) == whole


def json_column(values: list[Any]) -> pa.Array:
    texts = pa.array([json.dumps(value) for value in values], pa.string())
    return pa.ExtensionArray.from_storage(pa.json_(pa.string()), texts)


def test_every_field_is_kept_and_no_key_of_another_message_is_added() -> None:
    (found,) = sequences(through_parquet({"messages": [WITH_TOOLS]}))
    # Parquet cannot tell a null content from one that is not there.
    assert found == WITH_TOOLS


def test_arguments_as_text_stay_text() -> None:
    messages = [user("q"), {"role": "assistant", "content": None, "tool_calls": [TEXT_CALL]}]
    assert sequences({"messages": messages}) == [messages]


def test_the_json_type_keeps_its_explicit_nulls() -> None:
    messages = [user("q"), {"role": "assistant", "content": "a", "name": None}]
    table = pa.table({"messages": json_column([messages])})
    assert sequences(table) == [messages]


def test_pairs_beside_a_prompt_of_text_may_be_of_the_json_type() -> None:
    chosen, rejected = [user("q"), assistant("4")], [user("q"), assistant("fox")]
    table = pa.table(
        {"prompt": ["q"], "chosen": json_column([chosen]), "rejected": json_column([rejected])}
    )
    assert sequences(table) == [chosen, rejected]


def test_values_of_one_json_column_may_differ_in_type() -> None:
    table = pa.table({"prompt": json_column(["q", [user("q")], 3]), "response": ["a"] * 3})
    rows = parsed(table)
    assert rows.sequences == [[user("q"), assistant("a")]] * 2
    assert reasons(rows) == [None, None, RowReason.BAD_STRUCTURE]


def test_maps_are_messages_too() -> None:
    items = [[("role", "user"), ("content", "q")], [("role", "assistant"), ("content", "a")]]
    column = pa.array([items], pa.list_(pa.map_(pa.string(), pa.string())))
    table = pa.table({"chosen": column, "rejected": column})
    assert sequences(table) == [[user("q"), assistant("a")]] * 2


def test_parts_of_text_stay_parts() -> None:
    def part(text: str) -> list[dict[str, Any]]:
        return [{"type": "text", "text": text, "image": None}]

    type = pa.struct([(name, pa.string()) for name in ("type", "text", "image")])
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(type))]))
    chosen = pa.array([[user(part("q")), assistant(part("a"))]], message)
    table = pa.table({"conversation_a": chosen, "conversation_b": chosen})
    named = {"chosen": "conversation_a", "rejected": "conversation_b"}
    bare = [user([{"type": "text", "text": "q"}]), assistant([{"type": "text", "text": "a"}])]
    assert sequences(table, named=named) == [bare, bare]
    assert text_of(user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])) == "a\nb"


@pytest.mark.parametrize(
    ("messages", "name"),
    [
        ([user([{"type": "image_url", "image_url": {"url": "x"}}]), PARTS], "image_url"),
        ([user([{"type": "text", "text": "q", "image": b"png"}]), PARTS], "image"),
        ([{**user("look"), "images": ["x.png"]}, assistant("a")], "images"),
    ],
)
def test_media_in_a_message_are_refused_by_name(messages: list[Any], name: str) -> None:
    rows = parsed({"messages": messages})
    assert reasons(rows) == [RowReason.UNSUPPORTED_MEDIA]
    assert f"a message of messages holds {name}:" in rows.row_errors[0].detail


@pytest.mark.parametrize("result", [{"temperature": 3}, [{"id": 1}, {"id": 2}], 42])
def test_a_tool_may_give_any_json_value(result: Any) -> None:
    messages = [user("q"), {"role": "tool", "content": result}, assistant("a")]
    table = pa.table({"messages": json_column([messages])})
    assert sequences(table) == [messages]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user({"a": 1}), assistant("a")], RowReason.BAD_STRUCTURE),
        ([user("q"), assistant(3)], RowReason.BAD_STRUCTURE),
        ([user("q"), assistant([{"type": "text"}])], RowReason.BAD_STRUCTURE),
        ([user(["q"]), assistant("a")], RowReason.BAD_STRUCTURE),
        ([user("q"), assistant([{"type": "text", "text": " "}])], RowReason.EMPTY),
        ([user("q"), "a"], RowReason.BAD_STRUCTURE),
        ([{"role": 3, "content": "q"}, assistant("a")], RowReason.UNKNOWN_ROLE),
    ],
)
def test_what_is_no_message_is_marked(messages: list[Any], reason: RowReason) -> None:
    good = [user("q"), assistant("a")]
    table = pa.table({"messages": json_column([good, good, messages])})
    assert reasons(parsed(table)) == [None, None, reason]


def test_aliases_say_who_speaks_without_renaming_anybody() -> None:
    assert [role_alias(role) for role in ("GPT", "developer", "ipython", "narrator")] == [
        "assistant", "system", "tool", "narrator",
    ]  # fmt: skip
    assert is_assistant("Model") and not is_assistant("user")
    messages = [user("q"), {"role": "model", "content": "a"}]
    assert sequences({"messages": messages}) == [messages]
