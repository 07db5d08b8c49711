"""Parts of the gate's own road: what it reads of a file, and which rows it takes."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.backends.plain_tokenizer import PlainTokenizer
from batch_scorer.config import OverLength, load_config
from batch_scorer.errors import RowNote
from batch_scorer.inputs.plan import make_plan
from batch_scorer.models.adapter import Prompt
from batch_scorer.parity.cover import Candidate, choose, traits_of
from batch_scorer.parity.raw_rows import read_raw_rows
from batch_scorer.parity.raw_sequences import RawSequence, raw_sequences
from batch_scorer.parity.sample import parts_of
from batch_scorer.records import (
    Conversation,
    Format,
    Layout,
    LineRun,
    Lines,
    Message,
    ParsedRows,
    Shard,
    Source,
    TextStyle,
)
from batch_scorer.render import Renderer
from batch_scorer.storage import open_store
from tests.helpers.tiny import tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": f"What is {n}?", "response": f"It is {n}.\nÄ", "other": n} for n in range(40)
]
WANTED = [0, 7, 8, 31]
PARTS = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}TEXT{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}\n{% endfor %}"
)
ALL = PARTS.replace("TEXT", "{{ m.content }}")
"""Templates that take lists of parts: only these, or texts too."""


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n\n".join(json.dumps(row) for row in rows).encode()


def write(file: Path) -> None:
    """The rows as the file's kind has them."""
    table = pa.Table.from_pylist(ROWS)
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=9)
    elif file.suffix == ".arrow":
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    elif file.suffix == ".stream":
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    elif file.suffix == ".csv":
        header = "prompt,response,other\n"
        texts = ('"{prompt}","{response}",{other}\n'.format(**row) for row in ROWS)
        file.write_text(header + "".join(texts))
    elif file.suffix == ".json":
        file.write_text(json.dumps(ROWS))
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines(ROWS)))
    elif file.suffix == ".zst":
        file.write_bytes(pa.compress(lines(ROWS), "zstd", asbytes=True))
    else:
        file.write_bytes(lines(ROWS))


def shard_of(file: Path, skip_rows: int = 0) -> Shard:
    """All rows behind the first `skip_rows`, as a plan has them."""
    info = open_store(str(file.parent), {}).head(file.name)
    source = Source(str(file.parent), file.name, info.size_bytes, info.version)
    in_groups = file.suffix in (".parquet", ".arrow", ".stream")
    start = len("prompt,response,other\n") if file.suffix == ".csv" else 0
    run = LineRun(start, 10_000_000 if file.suffix in (".gz", ".zst") else info.size_bytes, 1, 40)
    schema = pa.schema([(name, pa.string()) for name in ROWS[0]])
    return Shard(
        source=source,
        layout=Layout(Format.ROLLOUT, {"prompt": "prompt", "response": "response"}),
        first_row=skip_rows,
        num_rows=40 - skip_rows,
        row_groups=(0, 5) if in_groups else None,
        skip_rows=skip_rows,
        estimated_tokens=1,
        output_key="out",
        lines=None if in_groups or file.suffix == ".json" else Lines((run,), schema, None),
    )


@pytest.mark.parametrize(
    "suffix",
    [".parquet", ".arrow", ".stream", ".csv", ".json", ".jsonl", ".jsonl.gz", ".jsonl.zst"],
)
def test_raw_rows_are_those_of_the_file(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{suffix}"
    write(file)
    store = open_store(str(tmp_path), {})
    for skip_rows in (0, 5):
        rows = read_raw_rows(store, shard_of(file, skip_rows), WANTED)
        assert rows == {
            row: {name: ROWS[skip_rows + row][name] for name in ("prompt", "response")}
            for row in WANTED
        }


def test_a_shard_is_read_at_its_beginning_middle_and_end(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": str(n)} for n in range(1000)]
    (tmp_path / "rows.jsonl").write_bytes(lines(rows))
    config = load_config(inputs=(str(tmp_path / "*.jsonl"),), model="m", output=str(tmp_path / "o"))
    (shard,) = make_plan(config).shards
    parts = parts_of(shard)
    assert [(part.first_row, part.num_rows) for part in parts] == [(0, 48), (476, 48), (952, 48)]
    store = open_store(str(tmp_path), {})
    found = [read_raw_rows(store, part, [0])[0]["response"] for part in parts]
    assert found == ["0", "476", "952"]
    assert parts_of(replace(shard, num_rows=100)) == [replace(shard, num_rows=100)]


def test_rows_that_hold_something_rare_are_taken() -> None:
    usual = [Candidate(n % 3, n, 10 + n, frozenset({"system"})) for n in range(100)]
    rare = [Candidate(1, 100, 50, frozenset({"tools"})), Candidate(2, 101, 60, frozenset({"mask"}))]
    chosen = choose([*usual, *rare], 6, 1000)
    assert {"tools", "mask", "system"} == set().union(*(each.traits for each in chosen))
    assert [each.tokens for each in chosen] == sorted(each.tokens for each in chosen)
    assert chosen[0].tokens == 10 and chosen[-1].tokens == 109 and len(chosen) == 6
    # Shortest, median and longest stay where nothing else has room.
    assert [each.tokens for each in choose([*usual, *rare], 6, 5)] == [10, 59, 109]


def test_what_stands_around_a_prompt_is_part_of_its_conversation() -> None:
    names = ("prompt", "response", "system", "history", "input", "tools", "template_arguments")
    layout = Layout(Format.ROLLOUT, {name: name for name in names}, TextStyle.PLAIN)
    row = {
        "prompt": "Add them.",
        "input": "1 and 2",
        "response": "3",
        "system": "Be brief.",
        "history": [["Hi.", "Hello."]],
        "tools": '[{"name": "add"}]',
        "template_arguments": {"enable_thinking": False},
    }
    (sequence,) = raw_sequences(row, layout)
    assert sequence is not None
    assert sequence.content == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Add them.\n1 and 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert sequence.arguments == {"tools": [{"name": "add"}], "enable_thinking": False}


@pytest.mark.parametrize(
    ("layout", "row", "contents"),
    [
        (
            Layout(Format.PREFERENCE_PAIR, {"chosen": "a", "rejected": "b"}, TextStyle.HH),
            {"a": "\n\nHuman: Hi.\n\nAssistant: Yes. ", "b": "\n\nHuman: Hi.\n\nAssistant: No."},
            [["Hi.", "Yes."], ["Hi.", "No."]],
        ),
        (
            Layout(
                Format.ROLLOUT,
                {"prompt": "p", "response": "r"},
                TextStyle.PLAIN,
                prompt_inside=True,
            ),
            {"p": "Hi. ", "r": "Hi.  Yes."},
            [["Hi. ", "Yes."]],
        ),
        (
            Layout(Format.CONVERSATION, {"messages": "m"}, encoded=("m",)),
            {"m": "[{'from': 'human', 'value': 'Hi.'}, {'from': 'gpt', 'value': 'Yes.'}]"},
            [["Hi.", "Yes."]],
        ),
        (
            Layout(Format.STEPS, {"prompt": "p", "steps": "s"}, TextStyle.PLAIN),
            {"p": "Hi.", "s": ["First.", "Then."]},
            [["Hi.", ""]],
        ),
    ],
)
def test_layouts_are_read_as_their_page_says(
    layout: Layout, row: dict[str, Any], contents: list[list[str]]
) -> None:
    found = raw_sequences(row, layout)
    assert [[m["content"] for m in s.content] for s in found if s] == contents  # type: ignore[index]
    assert [m["role"] for m in found[0].content] == ["user", "assistant"]  # type: ignore


def test_the_padding_of_prompt_and_answer_is_left_out() -> None:
    """As verl dumps them: the prompt padded on the left, the answer on the right."""
    names = ("prompt", "response", "attention_mask_prompt", "attention_mask_response")
    layout = Layout(Format.ROLLOUT, {name: name for name in names})
    row = dict(zip(names, ([0, 0, 5], [6, 7, 0], [0, 0, 1], [1, 1, 0]), strict=True))
    (sequence,) = raw_sequences(row, layout)
    assert sequence is not None
    assert sequence.content == [5, 6, 7]
    assert sequence.unmasked == [0, 0, 5, 6, 7, 0]


@pytest.mark.parametrize("template", [PARTS.replace("TEXT", ""), ALL])
@pytest.mark.parametrize("reasoning", ["keep", "drop"])
@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>Hm.</think>\n\nYes."},
        {"content": [{"type": "text", "text": "<think>Hm.</think> Yes."}]},
        {"content": "Yes.", "reasoning_content": "Hm."},
        {"content": [{"type": "text", "text": "Yes."}], "reasoning_content": "Hm."},
    ],
)
def test_both_roads_treat_reasoning_alike_where_a_template_takes_parts(
    template: str, reasoning: Literal["keep", "drop"], answer: Message, tmp_path: Path
) -> None:
    tiny_tokenizer(tmp_path, bos=True)
    prompt = Prompt(template=template, reasoning=reasoning)
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", **answer}]
    rows = ParsedRows([talk], np.array([0, 1]))
    made = Renderer(tmp_path, 1000, OverLength.MARK, prompt).tokenize(rows)
    plain = PlainTokenizer(tmp_path, prompt).token_ids(talk, {})
    assert made.token_ids.tolist() == plain.ids
    assert ("Hm." in PlainTokenizer(tmp_path, prompt).visible(plain.ids)) == (reasoning == "keep")


@pytest.mark.parametrize("value", [{"x": 1}, [{"x": 1}], ["a", "b"], 7, [], None])
def test_what_a_tool_gives_stays_beside_parts_that_are_joined(value: Any, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path, bos=True)
    prompt = Prompt(template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    talk: Conversation = [
        {"role": "user", "content": [{"type": "text", "text": "Hi?"}]},
        {"role": "tool", "content": value},
        {"role": "assistant", "content": "Yes."},
    ]
    renderer = Renderer(tmp_path, 1000, OverLength.MARK, prompt)
    made = renderer.tokenize(ParsedRows([talk], np.array([0, 1])))
    assert made.notes == {0: (RowNote.PARTS_JOINED,)}
    text = renderer.visible(made.token_ids)
    assert text.endswith(f"user: Hi?\ntool: {value}\nassistant: Yes.\n")
    assert PlainTokenizer(tmp_path, prompt).token_ids(talk, {}, None, made.notes[0]).ids == (
        made.token_ids.tolist()
    )
    assert "values as content" in traits_of([RawSequence([{"role": "tool", "content": {"x": 1}}])])


@pytest.mark.parametrize("eos", ["keep", "openrlhf", "append"])
@pytest.mark.parametrize("special_text", ["parse", "literal"])
def test_both_roads_join_what_several_settings_do(
    special_text: Literal["parse", "literal"],
    eos: Literal["keep", "openrlhf", "append"],
    tmp_path: Path,
) -> None:
    """A template that cuts reasoning, an answer that spells a special token, a trainer's end."""
    tiny_tokenizer(tmp_path, bos=True)
    cuts = (
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    )
    prompt = Prompt(template=cuts, reasoning="keep", special_text=special_text, eos=eos)
    answer = "<think>Yes</think>\n\nYes. <|im_end|>"
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": answer}]
    made = Renderer(tmp_path, 1000, OverLength.MARK, prompt).tokenize(
        ParsedRows([talk], np.array([0, 1]))
    )
    plain = PlainTokenizer(tmp_path, prompt)
    assert answer in plain.visible(made.token_ids.tolist())
    assert plain.token_ids(talk, {}).ids == made.token_ids.tolist()


@pytest.mark.parametrize("role", ["System", "developer", "system"])
def test_a_system_message_is_known_by_any_of_its_names(role: str, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path, bos=True)
    prompt = Prompt(system="Be brief.", template=ALL)
    talk = [
        {"role": role, "content": "Be kind."},
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Yes."},
    ]
    renderer = Renderer(tmp_path, 1000, OverLength.MARK, prompt)
    made = renderer.tokenize(ParsedRows([talk], np.array([0, 1])))
    assert "Be brief." not in renderer.visible(made.token_ids)
    assert PlainTokenizer(tmp_path, prompt).token_ids(talk, {}).ids == made.token_ids.tolist()
