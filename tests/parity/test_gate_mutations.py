"""The gate's own road: whatever the product's reading of a row loses or changes stops the job, and
the error names it. Each mistake is made through `choose_sample`'s seam, or in what the renderer
gives; without one, nothing is reported."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.config import Config, load_config
from batch_scorer.errors import ParityError
from batch_scorer.parity import choose_sample
from batch_scorer.records import Message, ParsedRows, TokenizedRows
from batch_scorer.render import Renderer, renderer_of
from batch_scorer.render import rows as tokenized_rows
from batch_scorer.runs import run
from batch_scorer.runs.run import score
from batch_scorer.shard import parse_shard
from tests.helpers.tiny import tiny_reward_model

pytestmark = pytest.mark.usefixtures("one_thread")

# Writes all that it is given, so that nothing can be lost without a trace.
TEMPLATE = """\
{{- strftime_now('%d %b %Y') }}{{ style or '' }}
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for page in documents or [] %}{{ page.text }}{% endfor %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{%- for key, value in message.items() if key not in ('role', 'content') %}
{{- key }}: {{ value | tojson }}
{%- endfor %}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content or [] %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>
{%- endfor %}"""
DATE = datetime(2026, 3, 1)


def conversation(number: int) -> list[Message]:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": number, "b": 2}}}
    parts = [{"type": "text", "text": f"And {number}?"}, {"type": "text", "text": "Do tell."}]
    return [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": parts, "name": "alice"},
        {"role": "assistant", "content": None, "tool_calls": [call], "thinking": "I add them."},
        {
            "role": "tool",
            "content": [{"type": "text", "text": str(number + 2)}],
            "tool_call_id": "c7",
        },
    ]


def answer(text: str) -> list[Message]:
    content = [{"type": "text", "text": text}]
    return [{"role": "assistant", "content": content, "reasoning_content": "Easy.", "mood": "calm"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_reward_model(tmp_path_factory.mktemp("mutations") / "model", bos=True)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Config:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    rows = [
        {
            "prompt": conversation(number),
            "chosen": answer(f"It is {number + 2}."),
            "rejected": answer("No idea."),
            "tools": [tool],
            "documents": [{"title": "Sums", "text": "How to add."}],
            "chat_template_kwargs": {"style": "terse"},
        }
        for number in range(12)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    return config_of(model, tmp_path)


def config_of(model: Path, folder: Path) -> Config:
    return load_config(
        model=str(model),
        inputs=(str(folder / "*.parquet"),),
        output=str(folder / "out"),
        template_date=DATE,
        dtype="float32",
        use_ray=False,
    )


def assert_stopped(config: Config, named: str) -> None:
    with pytest.raises(ParityError, match=named) as stopped:
        score(config)
    assert "rows.parquet row " in str(stopped.value)
    assert list(Path(config.output).glob("*.parquet")) == []


Change = Callable[[ParsedRows], None]


def parsed_wrongly(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    def read(*arguments: Any) -> ParsedRows:
        parsed = parse_shard(*arguments)
        change(parsed)
        return parsed

    monkeypatch.setattr(run, "choose_sample", partial(choose_sample, read=read))


def tokenized_wrongly(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[list[int]], list[int]]
) -> None:
    tokenize = Renderer.tokenize

    def wrong(self: Renderer, parsed: ParsedRows) -> TokenizedRows:
        rows = tokenize(self, parsed)
        bounds = rows.sequence_offsets.tolist()
        ids = [change(rows.token_ids[a:b].tolist()) for a, b in pairwise(bounds)]
        rows.token_ids = np.array([*chain(*ids)], np.int32)
        rows.sequence_offsets = np.cumsum([0, *map(len, ids)])
        return rows

    monkeypatch.setattr(Renderer, "tokenize", wrong)


def on_messages(change: Callable[[list[Message]], list[Message]]) -> Change:
    def changed(parsed: ParsedRows) -> None:
        parsed.sequences = [change(list(messages)) for messages in parsed.sequences]  # type: ignore[arg-type]

    return changed


def without(name: str) -> Change:
    return on_messages(
        lambda messages: [{k: v for k, v in m.items() if k != name} for m in messages]
    )


def without_argument(name: str) -> Change:
    def changed(parsed: ParsedRows) -> None:
        parsed.arguments = {
            row: {k: v for k, v in own.items() if k != name}
            for row, own in parsed.arguments.items()
        }

    return changed


def one_part_less(messages: list[Message]) -> list[Message]:
    return [m if m["role"] != "user" else {**m, "content": m["content"][:-1]} for m in messages]


def other_arguments(messages: list[Message]) -> list[Message]:
    """Arguments of a call as text, where the row has an object."""
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    return [{**m, "tool_calls": [call]} if "tool_calls" in m else m for m in messages]


def swapped(parsed: ParsedRows) -> None:
    pairs = zip(parsed.sequences[1::2], parsed.sequences[::2], strict=True)
    parsed.sequences = [sequence for pair in pairs for sequence in pair]


def test_nothing_is_reported_of_a_right_reading(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed_wrongly(monkeypatch, lambda parsed: None)
    summary = score(config)
    assert summary.parity is not None and summary.parity["agrees"]
    assert summary.parity["rows_compared"] == 12
    covered = summary.parity["covered"]
    for trait in (
        "tools",
        "tool_calls",
        "reasoning_content",
        "mood",
        "parts",
        "role tool",
        "style",
    ):
        assert covered[trait] == 12
    assert summary.parity["explained"] == {"bos": 24}  # added by the tokenizer, as on a model card


@pytest.mark.parametrize(
    ("change", "named"),
    [
        *((without(name), f"message [0-9] lacks {name}$") for name in (
            "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "mood"
        )),
        (on_messages(one_part_less), "message 2 lacks a part of content"),
        (on_messages(other_arguments), "message 3 has another tool_calls"),
        (on_messages(lambda m: m[1:]), "the system turn is lost"),
        (on_messages(lambda m: [m[0], *m[2:]]), "the conversation has 4 turns, 5 in the row"),
        (
            on_messages(lambda m: [*m[:-1], {**m[-1], "role": "user"}]),
            "message 5 has the role 'user', in the row it is 'assistant'",
        ),
        (swapped, "swapped sides"),
        *((without_argument(name), f"it lacks the row's {name}$") for name in (
            "tools", "documents", "style"
        )),
    ],
)  # fmt: skip
def test_a_row_that_is_read_wrongly_stops_the_job(
    change: Change, named: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed_wrongly(monkeypatch, change)
    assert_stopped(config, named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda ids: ids[1:], "BOS is lost"),
        (lambda ids: [ids[0], *ids], "BOS twice"),
        (lambda ids: ids[:-1], "EOS is lost"),
        (lambda ids: [*ids, ids[-1]], "EOS twice"),
        (lambda ids: [*ids[:40], *ids[41:]], "from token 4[0-9] on it is '.+' here, '.+' there"),
    ],
)
def test_ids_that_are_lost_or_added_stop_the_job(
    change: Callable[[list[int]], list[int]],
    named: str,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenized_wrongly(monkeypatch, change)
    assert_stopped(config, named)


def test_another_date_than_the_recorded_one_stops_the_job(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def later(config: Config, model: Any) -> Renderer:
        prompt = replace(model.prompt, date=datetime(2026, 3, 2))
        return renderer_of(config, replace(model, prompt=prompt))

    monkeypatch.setattr(tokenized_rows, "renderer_of", later)
    assert_stopped(config, "the template's date is another than the recorded one")


def test_a_mask_that_is_ignored_stops_the_job(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {
            "input_ids": [1, *range(20, 30 + n), *[0] * (9 - n)],
            "attention_mask": [1] * (11 + n) + [0] * (9 - n),
        }
        for n in range(9)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    config = config_of(model, tmp_path)
    right = score(config).parity
    assert right is not None and right["covered"]["attention mask"] == 9

    def whole(parsed: ParsedRows) -> None:
        parsed.sequences = [row["input_ids"] for row in rows]  # type: ignore[misc]

    parsed_wrongly(monkeypatch, whole)
    assert_stopped(config.model_copy(update={"output": str(tmp_path / "other")}), "mask is ignored")
