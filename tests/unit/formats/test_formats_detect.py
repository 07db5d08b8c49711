"""What a schema and a few rows are taken for, and what is refused as unclear."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.formats import columns_needed, columns_of, describe, parse, read_json_table
from batch_scorer.records import Format, Layout, RowError, TextStyle
from tests.unit.formats.tables import found, refused

FILES = Path(__file__).parents[2] / "data" / "formats"
DIALOGUE = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PROMPT, REPLY = DIALOGUE[:1], DIALOGUE[1:]
HH = "\n\nHuman: q\n\nAssistant: a"
HH_PROMPT = "\n\nHuman: q\n\nAssistant:"

PAIRS = "preference pairs (messages in chosen, rejected; prompt inside)"
HH_PAIRS = "preference pairs (HH dialogue text in chosen, rejected; prompt inside)"
DESCRIPTIONS = {
    "best-of-n-like.parquet": "best-of-n rows (plain text in chosen, rejected; prompt in prompt)",
    "hh-raw.jsonl": HH_PAIRS,
    "hh-raw.jsonl.gz": HH_PAIRS,
    "hh-raw.parquet": HH_PAIRS,
    "messages-no-source.parquet": PAIRS,
    "prompt-chosen-rejected-messages.jsonl": PAIRS.replace("inside", "in prompt"),
    "prompt-chosen-rejected-messages.parquet": PAIRS.replace("inside", "in prompt"),
    "prompt-chosen-rejected-text.jsonl": HH_PAIRS.replace("inside", "in prompt"),
    "prompt-chosen-rejected-text.parquet": HH_PAIRS.replace("inside", "in prompt"),
    "rewardbench-like.parquet": (
        "preference pairs (plain text in chosen, rejected; prompt in prompt)"
    ),
    "rollouts-full-conversations.jsonl": (
        "rollout groups (messages in conversations; prompt inside)"
    ),
    "rollouts-instruction-output.json": "rollouts (plain text in output; prompt in instruction)",
    "rollouts-long.parquet": "rollouts (plain text in response; prompt in prompt)",
    "rollouts-messages-completions.jsonl": (
        "rollout groups (messages in completions; prompt in messages)"
    ),
    "rollouts-wide-text-prompt.jsonl": (
        "rollout groups (plain text in responses; prompt in prompt)"
    ),
    "rollouts-wide.parquet": "rollout groups (plain text in responses; prompt in prompt)",
    "sharegpt-ranking.json": PAIRS.replace("inside", "in conversations"),
    "skywork-large-types.parquet": PAIRS,
    "skywork-role-first.parquet": PAIRS,
    "skywork.jsonl": PAIRS,
    "skywork.parquet": PAIRS,
    "ultrafeedback-binarized-like.parquet": PAIRS,
    "unpaired-labels.jsonl": "rollouts (messages in completion; prompt in prompt)",
}


def read(name: str) -> pa.Table:
    path = FILES / name
    if path.suffix == ".parquet":
        return pq.read_table(path)
    return read_json_table(path.read_bytes(), name)[0]


def test_no_format_file_is_left_out() -> None:
    assert {path.name for path in FILES.iterdir()} == set(DESCRIPTIONS)


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_file_is_described_as_what_it_is(name: str) -> None:
    table = read(name)
    layout = found(table.slice(0, 32))
    assert describe(layout) == describe(layout, table.schema) == DESCRIPTIONS[name]
    assert set(columns_needed(layout)) <= set(table.column_names)


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_schema_alone_gives_the_same_fields(name: str) -> None:
    table = read(name)
    bare = found(table.slice(0, 0))
    layout = found(table.slice(0, 32))
    assert (bare.format, bare.columns) == (layout.format, layout.columns)


# Which kind.


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ({"messages": DIALOGUE, "text": "t"}, Format.CONVERSATION),
        ({"conversation": DIALOGUE}, Format.CONVERSATION),
        ({"conversations": [{"from": "human", "value": "q"}]}, Format.CONVERSATION),
        ({"messages": PROMPT, "completions": ["a"]}, Format.ROLLOUT_GROUP),
        ({"prompt": PROMPT, "responses": ["a"], "models": ["m"]}, Format.ROLLOUT_GROUP),
        ({"conversations": [DIALOGUE]}, Format.ROLLOUT_GROUP),
        ({"messages": DIALOGUE, "chosen": DIALOGUE, "rejected": DIALOGUE}, Format.PREFERENCE_PAIR),
        ({"chosen": [DIALOGUE], "rejected": [DIALOGUE]}, Format.BEST_OF_N),
        ({"chosen": [1, 2], "rejected": [3]}, Format.PREFERENCE_PAIR),
        ({"chosen": [[1, 2]], "rejected": [[3]]}, Format.BEST_OF_N),
        ({"question": "q", "output": "a", "text": "t"}, Format.ROLLOUT),
        ({"text": "<s>rendered"}, Format.TEXT),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, Format.TOKEN_IDS),
    ],
)
def test_kind_by_columns_and_types(columns: dict[str, Any], format: Format) -> None:
    assert found(columns).format == format


@pytest.mark.parametrize(
    ("columns", "choices"),
    [
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "responses": ["a", "b"]},
            ("preference_pair", "rollout_group"),
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "response": "c"},
            ("preference_pair", "rollout"),
        ),
        ({"prompt": "q", "responses": ["a"], "output": "b"}, ("rollout_group", "rollout")),
        ({"text": "t", "input_ids": [1]}, ("text", "token_ids")),
    ],
)
def test_two_kinds_of_equal_right_are_refused(
    columns: dict[str, Any], choices: tuple[str, str]
) -> None:
    message = refused(columns)
    assert all(choice in message for choice in choices)
    assert "--format" in message
    assert found(columns, format=Format(choices[1])).format == choices[1]


def test_unknown_columns_are_listed_with_what_to_pass() -> None:
    message = refused({"answer_a": "x", "answer_b": "y", "id": 3})
    for part in ("answer_a: string", "id: int64", "rollout_group (prompt, responses)", "--column"):
        assert part in message
    assert "Columns: none" in refused(pa.table({}))
    assert "and 60 more" in refused({f"c{i}": 1 for i in range(100)})


def test_types_that_hold_no_text_fit_no_field() -> None:
    refused({"chosen": 1, "rejected": 2})
    refused({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}})
    refused({"prompt": b"q", "response": b"a"})
    refused({"chosen": "q", "rejected": DIALOGUE})


def test_two_columns_of_one_name_are_not_guessed_at() -> None:
    column = pa.array([DIALOGUE])
    refused(pa.table([column, column], names=["messages", "messages"]))


def test_what_unread_columns_hold_does_not_matter() -> None:
    # No datetime of Python reaches this year.
    far = pa.array([10**15], pa.timestamp("s"))
    table = pa.table({"messages": [DIALOGUE], "made": far})
    assert found(table).columns == {"messages": "messages"}


# Where the prompt is.


def test_prompt_beside_whole_dialogues_is_left_out() -> None:
    for prompt in ("q", PROMPT):
        layout = found({"prompt": prompt, "chosen": DIALOGUE, "rejected": DIALOGUE})
        assert "prompt" not in layout.columns
        assert layout.text_style is None
        group = found({"prompt": prompt, "responses": [DIALOGUE, DIALOGUE]})
        assert "prompt" not in group.columns


def test_prompt_beside_replies_is_kept() -> None:
    text = found({"prompt": "q", "chosen": REPLY, "rejected": REPLY})
    assert (text.columns["prompt"], text.text_style) == ("prompt", TextStyle.PLAIN)
    messages = found({"prompt": PROMPT, "chosen": REPLY, "rejected": REPLY})
    assert (messages.columns["prompt"], messages.text_style) == ("prompt", None)


def test_most_sampled_rows_say_where_the_prompt_is() -> None:
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    sides = pa.array([DIALOGUE, DIALOGUE, REPLY, None], message)
    layout = found(pa.table({"prompt": ["q"] * 4, "chosen": sides, "rejected": sides}))
    assert "prompt" not in layout.columns


def test_without_rows_only_text_is_taken_to_be_inside_messages() -> None:
    def bare(prompt: Any) -> Layout:
        row = {"prompt": [prompt], "chosen": [DIALOGUE], "rejected": [DIALOGUE]}
        return found(pa.table(row).slice(0, 0))

    assert "prompt" not in bare("q").columns
    assert "prompt" in bare(PROMPT).columns


def test_prompt_that_was_named_is_never_left_out() -> None:
    row = {"prompt": PROMPT, "chosen": DIALOGUE, "rejected": DIALOGUE}
    assert found(row, named={"prompt": "prompt"}).columns["prompt"] == "prompt"


def test_prompt_can_be_declined() -> None:
    row = {"prompt": PROMPT, "chosen": REPLY, "rejected": REPLY}
    assert "prompt" not in found(row, named={"prompt": ""}).columns


def test_token_ids_that_begin_with_the_prompt_hold_it() -> None:
    whole = {"prompt": [1, 2], "chosen": [1, 2, 3], "rejected": [1, 2, 4]}
    layout = found(whole)
    assert "prompt" not in layout.columns
    reply = found({"prompt": [1, 2], "chosen": [3], "rejected": [4]})
    assert reply.columns["prompt"] == "prompt"
    schema = pa.table({name: [value] for name, value in whole.items()}).schema
    line = "preference pairs (token ids in chosen, rejected; prompt inside)"
    assert describe(layout, schema) == line


def test_a_single_message_needs_a_prompt() -> None:
    row = {"chosen": REPLY[0], "rejected": REPLY[0]}
    assert "--column prompt=" in refused(row)
    assert found({"conversations": PROMPT, **row}).columns["prompt"] == "conversations"


def test_two_possible_prompts_are_refused() -> None:
    row = {"instruction": "i", "question": "q", "response": "a"}
    assert "instruction and question could both be the prompt" in refused(row)
    assert found(row, named={"prompt": "question"}).columns["prompt"] == "question"
    # Whole dialogues hold their prompt: nothing is unclear.
    found({"instruction": "i", "question": "q", "chosen": DIALOGUE, "rejected": DIALOGUE})


# Text styles.


def test_strings_without_a_prompt_must_be_hh_or_named() -> None:
    assert found({"chosen": HH, "rejected": HH}).text_style == TextStyle.HH
    message = refused({"chosen": "a", "rejected": "b"})
    assert "--text-style rendered" in message
    rendered = found({"chosen": "a", "rejected": "b"}, style=TextStyle.RENDERED)
    assert rendered.text_style == TextStyle.RENDERED
    refused({"chosen": "a", "rejected": "b"}, style=TextStyle.PLAIN)
    empty = pa.table({"chosen": [HH], "rejected": [HH]}).slice(0, 0)
    assert found(empty).text_style == TextStyle.HH


def test_strings_beside_a_prompt_are_plain_unless_they_show_marks() -> None:
    assert found({"prompt": "q", "response": "a"}).text_style == TextStyle.PLAIN
    assert found({"prompt": PROMPT, "response": "a"}).text_style == TextStyle.PLAIN
    marked = found({"prompt": HH_PROMPT, "response": "a"})
    assert (marked.text_style, marked.columns["prompt"]) == (TextStyle.HH, "prompt")
    whole = found({"prompt": HH_PROMPT, "response": HH})
    assert (whole.text_style, "prompt" in whole.columns) == (TextStyle.HH, False)


def test_text_column_is_rendered_unless_it_shows_marks() -> None:
    assert found({"text": "<s>q</s>"}).text_style == TextStyle.RENDERED
    assert found({"text": HH}).text_style == TextStyle.HH


def test_marks_in_some_rows_only_are_refused() -> None:
    table = pa.table({"prompt": [HH_PROMPT, "q"], "response": ["a", "b"]})
    assert "1 of 2 sampled texts in prompt" in refused(table)
    assert found(table, style=TextStyle.HH).text_style == TextStyle.HH


def test_rendered_text_that_contains_the_prompt_is_whole() -> None:
    whole = {"prompt": "q", "response": "<user>q<assistant>a"}
    assert "prompt" not in found(whole, style=TextStyle.RENDERED).columns
    rest = {"prompt": "<user>q<assistant>", "response": "a"}
    assert found(rest, style=TextStyle.RENDERED).columns["prompt"] == "prompt"


def test_style_that_does_not_fit_messages_is_refused() -> None:
    for style in (TextStyle.RENDERED, TextStyle.HH):
        assert "does not fit messages" in refused({"prompt": PROMPT, "response": "a"}, style=style)
    # Where there is no text at all, there is nothing to style.
    assert found({"messages": DIALOGUE}, style=TextStyle.HH).text_style is None


# Overrides.


def test_named_columns_say_the_kind() -> None:
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "messages": DIALOGUE}
    layout = found(row, named={"chosen": "response_1", "rejected": "response_0"})
    assert layout.format == Format.PREFERENCE_PAIR
    assert layout.columns == {"prompt": "prompt", "chosen": "response_1", "rejected": "response_0"}
    assert columns_needed(layout) == ["prompt", "response_1", "response_0"]


def test_text_can_be_named_a_conversation() -> None:
    layout = found({"dialog": HH}, format=Format.CONVERSATION, named={"messages": "dialog"})
    assert layout == Layout(Format.CONVERSATION, {"messages": "dialog"}, TextStyle.HH)
    assert describe(layout) == "conversations (HH dialogue text in dialog)"


def test_misspelt_names_come_with_a_suggestion() -> None:
    row = {"my_chosen": "a", "rejected": "b"}
    assert "did you mean my_chosen?" in refused(row, named={"chosen": "my_chosn"})
    assert "did you mean chosen?" in refused(row, named={"choosen": "my_chosen"})
    assert "format text has text" in refused(row, format=Format.TEXT, named={"chosen": "x"})


def test_named_column_of_a_useless_type_is_refused() -> None:
    assert "column n, named for prompt, is int64" in refused(
        {"n": 1, "response": "a"}, named={"prompt": "n"}
    )


def test_format_whose_columns_are_missing_is_refused() -> None:
    assert "preference_pair (prompt, chosen, rejected)" in refused(
        {"prompt": "q", "chosen": "a"}, format=Format.PREFERENCE_PAIR
    )


def test_input_text_is_no_known_prompt() -> None:
    refused({"input": "user\nq\nassistant\n", "output": "a"})
    assert found({"input": PROMPT, "output": "a"}).columns["prompt"] == "input"


# The documentation.


def test_examples_in_the_docs_are_detected_as_the_docs_say() -> None:
    text = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()
    examples = re.findall(r"```json\n(.+?)\n```\n\n> (.+)\n", text)
    assert len(examples) == text.count("```json") > 10
    for row, line in examples:
        table, _ = read_json_table(row.encode(), "formats.md")
        layout = found(table)
        assert describe(layout, table.schema) == line
        parsed = parse(columns_of(table)[0], layout)
        assert parsed.row_errors == {}
        assert not any(isinstance(sequence, RowError) for sequence in parsed.sequences)
    for format in Format:
        assert f"(`{format}`)" in text
