"""The rows without a score, as `status --marked` lists them."""

import json
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer import load_config, score
from batch_scorer.errors import IntegrityError
from batch_scorer.nightly.night import Night, run_night
from batch_scorer.runs.marked import SCHEMA, read_marked
from tests.helpers.in_process import run_cli

EMPTY = {3, 4, 5, 6, 17}
"""Rows of `a`; more of the first shard than its receipt has details of."""


def rows(empty: set[int] = EMPTY, count: int = 20) -> list[dict[str, Any]]:
    return [
        {
            "prompt": "What is 2+2?",
            "response": None if row in empty else f"{row}.",
            "even": not row % 2,
        }
        for row in range(count)
    ]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows()), tmp_path / "in" / "a.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in rows({11}))
    (tmp_path / "in" / "sub" / "b.jsonl").write_text(lines)
    pq.write_table(pa.Table.from_pylist(rows(set())), tmp_path / "in" / "c.parquet")
    return tmp_path


def settings(place: Path, model: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model), "inputs": str(place / "in"), "output": str(place / "out"),
        "backend": "fake", "use_ray": False, "shard_rows": 8, **more,
    }  # fmt: skip


def listed(output: Path) -> list[tuple[str, int | None]]:
    found = read_marked(str(output)).rows.to_pylist()
    assert {row["reason"] for row in found} <= {"null_value"}
    return [(row["file"], row["row"]) for row in found]


ALL = [*(("a.parquet", row) for row in sorted(EMPTY)), ("sub/b.jsonl", 11)]


def test_the_command_lists_rows_by_their_number_in_the_input_file(
    place: Path, tiny_model: Path
) -> None:
    score(load_config(**settings(place, tiny_model)))
    assert listed(place / "out") == ALL

    # The same as a query of the data.
    query = f"SELECT count(*) FROM '{place}/out/**/*.parquet' WHERE score_error IS NOT NULL"
    assert duckdb.sql(query).fetchall() == [(len(ALL),)]

    to = place / "new" / "marked.parquet"
    ended = run_cli("status", "--marked", place / "out", "--to", to, "--json")
    assert ended.exit_code == 0
    found = ended.json["rows"]
    assert [(row["file"], row["row"]) for row in found] == ALL
    assert found == pq.read_table(to).to_pylist()
    assert {row["column"] for row in found} == {"score_error"}
    # Receipts have three details of a shard: rows 3 to 5 of the first, 17 of the last.
    assert [bool(row["detail"]) for row in found] == [True, True, True, False, True, True]
    shown = run_cli("status", "--marked", place / "out").out
    assert all(f"{row}" in shown for _, row in ALL)

    # Receipts only add details.
    for file in (place / "out" / "_batch_scorer").rglob("*"):
        if file.parent.name in ("manifests", "ledger") or file.name == "CURRENT":
            file.unlink()
    assert listed(place / "out") == ALL

    for flags in (("--to", to), ("--marked", "--to", place / "out" / "marked.parquet")):
        assert run_cli("status", place / "out", *flags).exit_code == 2

    shard = next((place / "out").glob("a*.parquet"))
    shard.write_bytes(shard.read_bytes()[:100] + bytes(400) + shard.read_bytes()[500:])
    with pytest.raises(IntegrityError, match="is not the shard that was committed"):
        listed(place / "out")


def test_rows_that_where_picked_are_counted_in_the_input(place: Path, tiny_model: Path) -> None:
    score(load_config(**settings(place, tiny_model, where='field("even") == False')))
    odd = [(file, row) for file, row in ALL if row % 2]
    assert listed(place / "out") == odd
    (place / "in" / "a.parquet").unlink()
    assert listed(place / "out") == [(f, None if f == "a.parquet" else r) for f, r in odd]


def test_rows_of_a_nightly_root_are_those_that_latest_points_to(
    place: Path, tiny_model: Path
) -> None:
    config = load_config(**settings(place, tiny_model))
    assert run_cli("status", "--marked", place / "out").exit_code == 2
    run_night(config, Night())
    found = run_cli("status", "--marked", place / "out", "--json").json
    assert [(row["file"], row["row"]) for row in found["rows"]] == ALL
    assert found["output"] == str(place / "out")


def test_an_output_without_marked_rows_is_an_empty_table(place: Path, tiny_model: Path) -> None:
    for name in ("a.parquet", "sub/b.jsonl"):
        (place / "in" / name).unlink()
    score(load_config(**settings(place, tiny_model)))
    found = read_marked(str(place / "out"))
    assert found.rows.num_rows == 0
    found.save(place / "none.parquet")
    assert pq.read_schema(place / "none.parquet") == SCHEMA
