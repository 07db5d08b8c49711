"""Ids of the product's road, from a file to tokens, are those of transformers' own call.

Every family of generated rows is written as Parquet and as JSON lines, read and rendered as a job
does it, with each of the models' own templates. A row has transformers' ids, or it is marked with
the template's own error; what the product does to a row beyond that is noted on it.

Parquet gives the messages of a file the keys of all of them, null where a row has none. So what a
row of Parquet says is taken to be without its nulls, but for the content of a message. In JSON a
null that is written is kept.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from batch_scorer.config import OverLength, load_config
from batch_scorer.errors import RowNote, RowReason
from batch_scorer.inputs.plan import make_plan
from batch_scorer.models.adapter import Prompt
from batch_scorer.parity.raw_rows import read_raw_rows
from batch_scorer.parity.raw_sequences import raw_sequences
from batch_scorer.records import ParsedRows, TokenizedRows
from batch_scorer.render import Renderer
from batch_scorer.shard import parse_shard
from batch_scorer.storage import open_store
from tests.helpers.conversations import FAMILIES, Message, Row, rows_of
from tests.helpers.templates import TEMPLATES, model_folder

ROWS = 60  # of each of seven families
DATE = datetime(2026, 2, 3, 4, 5)
ARGUMENTS = ("tools", "documents")


@dataclass
class Read:
    """A written family as the product read it, and its rows as they are meant."""

    name: str
    parsed: ParsedRows
    meant: list[Row]


def without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: without_nulls(item) for key, item in value.items() if item is not None}
    return {"role": value["role"], "content": None, **kept} if "role" in value else kept


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Read]:
    folder = tmp_path_factory.mktemp("families")
    found: list[Read] = []
    for number, family in enumerate(FAMILIES):
        rows = rows_of(family, ROWS)
        lines, columns = folder / f"{number}.jsonl", folder / f"{number}.parquet"
        lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        pq.write_table(pa.Table.from_pylist(rows), columns, row_group_size=25)
        meant = {
            lines: rows,
            columns: [without_nulls(r) for r in pq.read_table(columns).to_pylist()],
        }
        for file, as_meant in meant.items():
            found.append(Read(f"{family}, {file.suffix}", read(file, as_meant), as_meant))
    return found


def read(file: Path, meant: list[Row]) -> ParsedRows:
    config = load_config(inputs=(str(file),), model="unused", output=str(file.parent / "out"))
    (shard,) = make_plan(config).shards
    parsed = parse_shard(shard, config)
    assert parsed.row_errors == {}
    # The gate's own road has to say the same, so that it can check the product's.
    raw = read_raw_rows(open_store(str(file.parent), {}), shard, range(len(meant)))
    for row, own in raw.items():
        (sequence,) = raw_sequences(own, shard.layout)
        assert sequence is not None
        assert sequence.content == meant[row]["messages"]
        assert sequence.arguments == arguments_of(meant[row])
    return parsed


def arguments_of(row: Row) -> dict[str, Any]:
    found = {name: row[name] for name in ARGUMENTS if row.get(name)}
    if isinstance(found.get("tools"), str):
        found["tools"] = json.loads(found["tools"])
    return {**(row.get("chat_template_kwargs") or {}), **found}


@dataclass
class Model:
    renderer: Renderer
    tokenizer: Any

    def own_ids(self, messages: list[Message], arguments: dict[str, Any]) -> list[int]:
        """transformers' call, and BOS where the model's tokenizer adds it and its template does
        not write it."""
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, strftime_now=DATE.strftime, **arguments
        )["input_ids"]
        added = self.tokenizer("")["input_ids"]
        return ids if ids[: len(added)] == added else [*added, *ids]


@pytest.fixture(scope="module", params=list(TEMPLATES))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    folder = model_folder(request.param, tmp_path_factory.mktemp("models") / request.param)
    yield Model(
        Renderer(folder, 100_000, OverLength.MARK, Prompt(date=DATE)),
        AutoTokenizer.from_pretrained(str(folder)),
    )


def test_ids_are_those_of_transformers_own_call(model: Model, families: list[Read]) -> None:
    scored = 0
    for family in families:
        rows = model.renderer.tokenize(family.parsed)
        for number, row in enumerate(family.meant):
            place = f"{family.name}, row {number}"
            messages, arguments = row["messages"], arguments_of(row)
            messages = as_noted(messages, rows.notes.get(number, ()))
            error = rows.sequence_errors.get(number)
            try:
                wanted = model.own_ids(messages, arguments)
            except Exception as own_error:  # whatever the template raises
                assert error is not None, f"{place}: {own_error}"
                assert error.reason is RowReason.TEMPLATE_ERROR
                assert str(own_error)[:40] in error.detail
                continue
            assert error is None, f"{place}: {error}"
            assert ids_of(rows, number) == wanted, place
            scored += 1
    assert scored > len(families) * ROWS / 4


def as_noted(messages: list[Message], notes: tuple[RowNote, ...]) -> list[Message]:
    """The messages as the notes on their row say that they were given to the template."""
    if RowNote.ROLE_RENAMED in notes:
        usual = {"human": "user", "gpt": "assistant"}
        messages = [{**m, "role": usual.get(m["role"], m["role"])} for m in messages]
    if RowNote.PARTS_JOINED in notes:
        messages = [
            {**m, "content": "\n".join(part["text"] for part in m["content"])} for m in messages
        ]
    return messages


def ids_of(rows: TokenizedRows, sequence: int) -> list[int]:
    start, stop = rows.sequence_offsets[sequence : sequence + 2].tolist()
    return rows.token_ids[start:stop].tolist()  # type: ignore[no-any-return]
