"""Small inputs made of the real rows in tests/data."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FORMATS = Path(__file__).parents[1] / "data" / "formats"
_TURN_CHARS = 60
_LONG_CHARS = 4000

Row = dict[str, Any]


@cache
def _samples() -> tuple[Row, ...]:
    return tuple(pq.read_table(FORMATS / "skywork.parquet").to_pylist())


def pair_schema() -> pa.Schema:
    return pq.read_schema(FORMATS / "skywork.parquet").remove_metadata()


def pair_rows(count: int, start: int = 0) -> list[Row]:
    """Real pairs with their turns cut short; number `start + i` is in the text, so all differ."""

    def turn(message: Row, number: int) -> Row:
        return {"role": message["role"], "content": f"{number}. {message['content'][:_TURN_CHARS]}"}

    rows = []
    for number in range(start, start + count):
        sample = _samples()[number % len(_samples())]
        sides = {
            side: [turn(message, number) for message in (sample[side][0], sample[side][-1])]
            for side in ("chosen", "rejected")
        }
        rows.append({**sides, "source": sample["source"]})
    return rows


def long_pair_rows(count: int) -> list[Row]:
    """Pairs of a few thousand tokens each, so that a shard of them keeps a tiny model busy."""
    text = " ".join(message["content"] for row in _samples() for message in row["chosen"])

    def conversation(start: int) -> list[Row]:
        return [
            {"role": "user", "content": text[start : start + _LONG_CHARS]},
            {"role": "assistant", "content": text[start + _LONG_CHARS : start + _LONG_CHARS + 50]},
        ]

    return [
        {"chosen": conversation(31 * i), "rejected": conversation(31 * i + 7), "source": "long"}
        for i in range(count)
    ]


def pairs(count: int, start: int = 0) -> pa.Table:
    return table_of(pair_rows(count, start))


def table_of(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, pair_schema())


def parquet(table: pa.Table, row_group_rows: int | None = None) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=row_group_rows, compression="zstd")
    return sink.getvalue()


def jsonl(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
