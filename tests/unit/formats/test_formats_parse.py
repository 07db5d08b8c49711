"""Every layout gives the conversations of its twin; what cannot be read is marked in its place."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_scorer import formats
from batch_scorer.errors import RowReason, ShardError
from batch_scorer.formats import columns_needed, columns_of, detect, read_json_table
from batch_scorer.formats.hh import cut
from batch_scorer.records import Conversation, Format, Layout, ParsedRows, RowError, TextStyle

FILES = Path(__file__).parents[2] / "data" / "formats"
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
MESSAGES = pa.list_(MESSAGE)


def read(name: str) -> pa.Table:
    path = FILES / name
    if path.suffix == ".parquet":
        return pq.read_table(path)
    table, errors = read_json_table(path.read_bytes(), name)
    assert errors == {}
    return table


def parse(table: pa.Table, layout: Layout) -> ParsedRows:
    return formats.parse(columns_of(table)[0], layout)


def layout_of(table: pa.Table) -> Layout:
    rows, _ = columns_of(table.slice(0, 32))
    return detect(table.schema, rows, format=None, columns={}, text_style=None)


def parse_file(name: str) -> ParsedRows:
    table = read(name)
    layout = layout_of(table)
    return parse(table.select(columns_needed(layout)), layout)


def rows_of(parsed: ParsedRows) -> list[list[Any]]:
    ends = parsed.row_offsets.tolist()
    return [parsed.sequences[a:b] for a, b in pairwise(ends)]


def pairs() -> list[list[Conversation]]:
    return [[row["chosen"], row["rejected"]] for row in read("skywork.parquet").to_pylist()]


def single_turn_pairs() -> list[list[Conversation]]:
    return [pair for pair in pairs() if len(pair[0]) == 2]


def unpaired() -> list[list[Conversation]]:
    return [[side] for pair in pairs() for side in pair]


def rollouts() -> list[list[Conversation]]:
    return [
        [[*row["prompt"], assistant(response)] for response in row["responses"]]
        for row in read("rollouts-wide.parquet").to_pylist()
    ]


def flat_rollouts() -> list[list[Conversation]]:
    return [[one] for group in rollouts() for one in group]


def best_of_n() -> list[list[Conversation]]:
    return [
        [[user(row["prompt"]), assistant(text)] for text in row["chosen"] + row["rejected"]]
        for row in read("best-of-n-like.parquet").to_pylist()
    ]


TWINS: dict[str, Callable[[], list[list[Conversation]]]] = {
    "best-of-n-like.parquet": best_of_n,
    "hh-raw.jsonl": pairs,
    "hh-raw.jsonl.gz": pairs,
    "hh-raw.parquet": pairs,
    "messages-no-source.parquet": pairs,
    "prompt-chosen-rejected-messages.jsonl": pairs,
    "prompt-chosen-rejected-messages.parquet": pairs,
    "prompt-chosen-rejected-text.jsonl": pairs,
    "prompt-chosen-rejected-text.parquet": pairs,
    "rewardbench-like.parquet": single_turn_pairs,
    "rollouts-full-conversations.jsonl": rollouts,
    "rollouts-instruction-output.json": flat_rollouts,
    "rollouts-long.parquet": flat_rollouts,
    "rollouts-messages-completions.jsonl": rollouts,
    "rollouts-wide-text-prompt.jsonl": rollouts,
    "rollouts-wide.parquet": rollouts,
    "sharegpt-ranking.json": pairs,
    "skywork-large-types.parquet": pairs,
    "skywork-role-first.parquet": pairs,
    "skywork.jsonl": pairs,
    "skywork.parquet": pairs,
    "ultrafeedback-binarized-like.parquet": pairs,
    "unpaired-labels.jsonl": unpaired,
}


def user(content: str | None) -> Any:
    return {"role": "user", "content": content}


def assistant(content: str | None) -> Any:
    return {"role": "assistant", "content": content}


def parse_one(format: Format, style: TextStyle | None = None, **columns: Any) -> ParsedRows:
    """One row; a pa.Array of one item as a value says the column's type."""
    arrays = {
        name: value if isinstance(value, pa.Array) else pa.array([value])
        for name, value in columns.items()
    }
    return parse(pa.table(arrays), Layout(format, {name: name for name in columns}, style))


def reason_of(parsed: ParsedRows) -> RowReason | None:
    return parsed.row_errors[0].reason if parsed.row_errors else None


def conversation(*messages: Any) -> pa.Array:
    return pa.array([list(messages)], MESSAGES)


def test_no_format_file_is_left_out() -> None:
    assert {path.name for path in FILES.iterdir()} == set(TWINS)


@pytest.mark.parametrize("name", TWINS)
def test_file_gives_the_conversations_of_its_twin(name: str) -> None:
    parsed = parse_file(name)
    assert parsed.row_errors == {}
    assert rows_of(parsed) == TWINS[name]()


def test_many_chunks_and_a_slice_read_like_one_table() -> None:
    table = read("skywork-large-types.parquet")
    layout = Layout(Format.PREFERENCE_PAIR, {"chosen": "chosen", "rejected": "rejected"})
    chunked = pa.concat_tables([table.slice(0, 5), table.slice(5, 0), table.slice(5)])
    assert parse(chunked, layout).sequences == parse(table, layout).sequences
    assert rows_of(parse(chunked.slice(3, 7), layout)) == pairs()[3:10]


def test_a_table_without_rows_gives_none() -> None:
    table = read("rollouts-wide.parquet").slice(0, 0)
    layout = layout_of(table)
    parsed = parse(table, layout)
    assert (parsed.num_rows, parsed.sequences, parsed.row_offsets.tolist()) == (0, [], [0])


def test_unread_columns_may_have_any_type() -> None:
    table = read("skywork.parquet").append_column("extra", pa.array([{"a": [1]}] * 48))
    layout = layout_of(table)
    assert rows_of(parse(table, layout)) == pairs()


# Strings.


@pytest.mark.parametrize(
    "dtype",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())],
)
def test_every_string_type_is_text(dtype: pa.DataType) -> None:
    text = pa.array(["hi"]).cast(dtype)
    parsed = parse_one(Format.ROLLOUT, TextStyle.PLAIN, prompt=text, response=text)
    assert parsed.sequences == [[user("hi"), assistant("hi")]]


def test_plain_text_is_not_trimmed() -> None:
    parsed = parse_one(Format.ROLLOUT, TextStyle.PLAIN, prompt=" a\n", response="\n b ")
    assert parsed.sequences == [[user(" a\n"), assistant("\n b ")]]


def test_rendered_text_stays_text_and_follows_its_prompt() -> None:
    alone = parse_one(Format.TEXT, TextStyle.RENDERED, text="<s>[INST] hi [/INST] ho</s>")
    assert alone.sequences == ["<s>[INST] hi [/INST] ho</s>"]
    pair = parse_one(
        Format.PREFERENCE_PAIR, TextStyle.RENDERED, prompt="<s>q", chosen="a", rejected=" b"
    )
    assert pair.sequences == ["<s>qa", "<s>q b"]


# HH dialogue text.

TURN = st.text(min_size=1).map(str.strip).filter(lambda text: text != "")


@given(st.lists(st.tuples(TURN, TURN), min_size=1))
def test_joined_hh_dialogue_is_cut_where_it_was_joined(turns: list[tuple[str, str]]) -> None:
    messages = [message for q, a in turns for message in (user(q), assistant(a))]
    marks = {"user": "Human", "assistant": "Assistant"}
    text = "".join(f"\n\n{marks[m['role']]}: {m['content']}" for m in messages)
    assert cut(text, "chosen") == messages


def test_bare_turn_words_inside_a_message_are_not_cut() -> None:
    text = "\n\nHuman: say Human: or\nAssistant: now\n\nAssistant: Human: Assistant: ok"
    assert cut(text, "chosen") == [
        user("say Human: or\nAssistant: now"),
        assistant("Human: Assistant: ok"),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no marks at all", RowReason.BAD_STRUCTURE),
        ("before\n\nHuman: q\n\nAssistant: a", RowReason.BAD_STRUCTURE),
        ("\n\nAssistant: a\n\nHuman: q\n\nAssistant: a", RowReason.BAD_STRUCTURE),
        ("\n\nHuman: q\n\nHuman: r\n\nAssistant: a", RowReason.BAD_STRUCTURE),
        ("\n\nHuman: q", RowReason.BAD_STRUCTURE),
        ("\n\nHuman: q\n\nAssistant:", RowReason.EMPTY),
        ("\n\nHuman:\n\nAssistant: a", RowReason.EMPTY),
    ],
)
def test_hh_text_that_is_no_dialogue_is_marked(text: str, reason: RowReason) -> None:
    assert reason_of(parse_one(Format.CONVERSATION, TextStyle.HH, messages=text)) == reason


def test_hh_reply_is_one_message_even_with_marks_in_it() -> None:
    parsed = parse_one(
        Format.ROLLOUT,
        TextStyle.HH,
        prompt="\n\nHuman: q\n\nAssistant: a\n\nHuman: r \n\nAssistant: ",
        response=" s\n\nHuman: made up\n\nAssistant: t",
    )
    last = assistant("s\n\nHuman: made up\n\nAssistant: t")
    assert parsed.sequences == [[user("q"), assistant("a"), user("r"), last]]


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("\n\nHuman: q", "a"),
        ("\n\nHuman: q\n\nAssistant: a", "b"),
        ("q", "a"),
        ("\n\nHuman: q\n\nAssistant:", "\n\nHuman: q\n\nAssistant: a"),
    ],
)
def test_hh_prompt_that_leaves_no_room_for_the_reply_is_marked(prompt: str, response: str) -> None:
    parsed = parse_one(Format.ROLLOUT, TextStyle.HH, prompt=prompt, response=response)
    assert reason_of(parsed) == RowReason.BAD_STRUCTURE


def test_hh_text_among_plain_prompts_is_marked() -> None:
    prompt = "\n\nHuman: q\n\nAssistant:"
    parsed = parse_one(Format.ROLLOUT, TextStyle.PLAIN, prompt=prompt, response="a")
    assert reason_of(parsed) == RowReason.BAD_STRUCTURE


# Messages.


@pytest.mark.parametrize("role", ["observation", "ipython", "developer", "SYSTEM", "narrator"])
def test_roles_stay_as_the_row_has_them(role: str) -> None:
    messages = [{"role": role, "content": "x"}, user("q"), {"role": "Assistant", "content": "a"}]
    assert parse_one(Format.CONVERSATION, messages=messages).sequences == [messages]


@pytest.mark.parametrize(
    ("raw", "role"),
    [("human", "user"), ("GPT", "assistant"), ("observation", "tool"), ("function_call", None)],
)
def test_roles_of_sharegpt_get_their_usual_names(raw: str, role: str | None) -> None:
    messages = [
        {"from": "human", "value": "q", "weight": 1},
        {"from": raw, "value": "x", "weight": 0},
        {"from": "gpt", "value": "a", "weight": 1},
    ]
    (found,) = parse_one(Format.CONVERSATION, messages=messages).sequences
    assert found == [
        {"role": "user", "content": "q", "weight": 1},
        {"role": role or raw, "content": "x", "weight": 0},
        {"role": "assistant", "content": "a", "weight": 1},
    ]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (pa.array([None], MESSAGES), RowReason.NULL_VALUE),
        (conversation(), RowReason.EMPTY),
        (conversation(user("q"), None, assistant("a")), RowReason.NULL_VALUE),
        (conversation(user(None), assistant("a")), RowReason.NULL_VALUE),
        (conversation({"role": None, "content": "q"}, assistant("a")), RowReason.NULL_VALUE),
        (conversation({"role": "narrator", "content": "q"}), RowReason.BAD_STRUCTURE),
        (conversation({"role": "", "content": "q"}), RowReason.UNKNOWN_ROLE),
        (conversation(user("q"), assistant(" \n")), RowReason.EMPTY),
        (conversation(user(""), assistant("a")), RowReason.EMPTY),
        (conversation(user("q")), RowReason.BAD_STRUCTURE),
        (conversation(assistant("a")), RowReason.BAD_STRUCTURE),
    ],
)
def test_messages_that_cannot_be_scored_are_marked(messages: pa.Array, reason: RowReason) -> None:
    parsed = parse_one(Format.CONVERSATION, messages=messages)
    assert reason_of(parsed) == reason
    assert parsed.sequences == []
    assert "messages" in parsed.row_errors[0].detail


def test_empty_system_message_is_kept() -> None:
    messages = [{"role": "system", "content": ""}, user("q"), assistant("a")]
    assert parse_one(Format.CONVERSATION, messages=messages).sequences == [messages]


def test_an_answer_may_be_a_tool_call_or_a_thought_alone() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": '{"x": null}'}}]
    for field, value in {"tool_calls": calls, "reasoning_content": "hm", "thinking": "hm"}.items():
        answer = {"role": "assistant", "content": None, field: value}
        parsed = parse_one(Format.CONVERSATION, messages=[user("q"), answer])
        assert parsed.sequences == [[user("q"), answer]]
    silent = {"role": "assistant", "content": None, "tool_calls": []}
    parsed = parse_one(Format.CONVERSATION, messages=[user("q"), silent])
    assert reason_of(parsed) == RowReason.NULL_VALUE


@pytest.mark.parametrize(
    ("prompt", "reply"),
    [
        ([user("q")], [user("q"), assistant("a")]),  # whole dialogue: the prompt would come twice
        ([user("q"), assistant("a")], [assistant("b")]),
    ],
)
def test_prompt_and_reply_that_do_not_join_are_marked(prompt: Any, reply: Any) -> None:
    parsed = parse_one(Format.ROLLOUT, prompt=prompt, response=reply)
    assert reason_of(parsed) == RowReason.BAD_STRUCTURE


JUNK_MESSAGES = st.none() | st.lists(
    st.none()
    | st.fixed_dictionaries(
        {
            "role": st.none() | st.sampled_from(["user", "assistant", "human", "system", "x", ""]),
            "content": st.none() | st.sampled_from(["", " ", "hello"]),
        }
    ),
    max_size=4,
)


@settings(max_examples=200)
@given(st.lists(st.tuples(JUNK_MESSAGES, JUNK_MESSAGES), max_size=6))
def test_messages_with_nulls_anywhere_are_parsed_or_marked(rows: list[tuple[Any, Any]]) -> None:
    table = pa.table(
        {
            "chosen": pa.array([chosen for chosen, _ in rows], MESSAGES),
            "rejected": pa.array([rejected for _, rejected in rows], MESSAGES),
        }
    )
    layout = Layout(Format.PREFERENCE_PAIR, {"chosen": "chosen", "rejected": "rejected"})
    parsed = parse(table, layout)
    found = rows_of(parsed)
    assert len(found) == len(rows) == parsed.num_rows
    for row, sequences in enumerate(found):
        assert (len(sequences), row in parsed.row_errors) in {(2, False), (0, True)}
        for sequence in sequences:
            assert isinstance(sequence, RowError) or sequence[-1]["role"] == "assistant"


# Groups and pairs.


def test_one_bad_side_of_a_pair_leaves_the_other() -> None:
    parsed = parse_one(
        Format.PREFERENCE_PAIR,
        TextStyle.PLAIN,
        prompt="q",
        chosen="a",
        rejected=pa.array([None], pa.string()),
    )
    good, bad = parsed.sequences
    assert good == [user("q"), assistant("a")]
    assert bad == RowError(RowReason.NULL_VALUE, "rejected is null")
    assert parsed.row_errors == {}


def test_pair_with_two_bad_sides_is_a_row_error() -> None:
    parsed = parse_one(
        Format.PREFERENCE_PAIR,
        TextStyle.PLAIN,
        prompt="q",
        chosen="",
        rejected=pa.array([None], pa.string()),
    )
    assert parsed.row_errors == {0: RowError(RowReason.EMPTY, "chosen is empty")}
    assert parsed.row_offsets.tolist() == [0, 0]


def test_one_null_response_among_many_keeps_its_place() -> None:
    parsed = parse_one(
        Format.ROLLOUT_GROUP, TextStyle.PLAIN, prompt="q", responses=["a", None, " ", "b"]
    )
    reasons = [s.reason if isinstance(s, RowError) else None for s in parsed.sequences]
    assert reasons == [None, RowReason.NULL_VALUE, RowReason.EMPTY, None]
    assert parsed.row_offsets.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("prompt", "responses", "reason"),
    [
        ("q", None, RowReason.NULL_VALUE),
        ("q", [], RowReason.EMPTY),
        ("q", [None, None], RowReason.NULL_VALUE),
        (None, ["a"], RowReason.NULL_VALUE),
        (" ", ["a"], RowReason.EMPTY),
    ],
)
def test_group_without_prompt_or_responses_is_a_row_error(
    prompt: str | None, responses: list[str | None] | None, reason: RowReason
) -> None:
    parsed = parse_one(
        Format.ROLLOUT_GROUP,
        TextStyle.PLAIN,
        prompt=pa.array([prompt], pa.string()),
        responses=pa.array([responses], pa.list_(pa.string())),
    )
    assert reason_of(parsed) == reason
    assert parsed.row_offsets.tolist() == [0, 0]


def test_best_of_n_may_lack_wrong_responses_but_not_all() -> None:
    lists = pa.list_(pa.string())
    table = pa.table(
        {
            "prompt": ["q", "q"],
            "chosen": pa.array([["a"], []], lists),
            "rejected": pa.array([[], []], lists),
        }
    )
    names = {name: name for name in table.column_names}
    parsed = parse(table, Layout(Format.BEST_OF_N, names, TextStyle.PLAIN))
    assert rows_of(parsed) == [[[user("q"), assistant("a")]], []]
    assert parsed.row_errors[1].reason == RowReason.EMPTY


def test_a_column_of_nulls_without_a_type_is_marked() -> None:
    parsed = parse_one(
        Format.ROLLOUT_GROUP, TextStyle.PLAIN, prompt="q", responses=pa.array([None], pa.null())
    )
    assert reason_of(parsed) == RowReason.NULL_VALUE


# Token ids.


@pytest.mark.parametrize(
    "dtype",
    [
        pa.list_(pa.int64()),
        pa.large_list(pa.int32()),
        pa.list_(pa.uint16()),
        pa.list_(pa.uint64()),
        pa.list_(pa.int16(), 3),
    ],
)
def test_token_ids_are_taken_as_they_are(dtype: pa.DataType) -> None:
    parsed = parse_one(Format.TOKEN_IDS, token_ids=pa.array([[1, 2, 3]], dtype))
    assert parsed.sequences == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([1, -1], RowReason.BAD_TOKEN_ID),
        ([1, None], RowReason.BAD_TOKEN_ID),
        ([2**31], RowReason.BAD_TOKEN_ID),
        ([], RowReason.EMPTY),
        (None, RowReason.NULL_VALUE),
    ],
)
def test_impossible_token_ids_are_marked(ids: list[int | None] | None, reason: RowReason) -> None:
    parsed = parse_one(Format.TOKEN_IDS, token_ids=pa.array([ids], pa.list_(pa.int64())))
    assert reason_of(parsed) == reason


def test_pairs_and_groups_of_token_ids_follow_their_prompt() -> None:
    pair = parse_one(Format.PREFERENCE_PAIR, prompt=[1], chosen=[2, 3], rejected=[4])
    assert pair.sequences == [[1, 2, 3], [1, 4]]
    group = parse_one(Format.ROLLOUT_GROUP, responses=[[1, 2], [3]])
    assert group.sequences == [[1, 2], [3]]


# Tables that do not have what their layout says.


@pytest.mark.parametrize("column", [pa.array([1]), pa.array([[1.5]])])
@pytest.mark.parametrize("format", [Format.PREFERENCE_PAIR, Format.BEST_OF_N])
def test_values_that_are_no_part_of_a_sequence_are_marked(format: Format, column: pa.Array) -> None:
    parsed = parse_one(format, chosen=column, rejected=column)
    assert reason_of(parsed) == RowReason.BAD_STRUCTURE
    assert "chosen is" in parsed.row_errors[0].detail


def test_missing_column_fails_the_shard() -> None:
    with pytest.raises(ShardError, match="no column 'messages'"):
        parse(pa.table({"a": [1]}), Layout(Format.CONVERSATION, {"messages": "messages"}))
