"""Rows and columns that are asked for: how many of each file, which, and what is read for them."""

import gzip
import json
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.config import Config, load_config
from batch_scorer.errors import ConfigError, InputError, ShardReason
from batch_scorer.inputs import files
from batch_scorer.inputs.files import row_numbers, rows_of_shard
from batch_scorer.inputs.plan import Plan, make_plan
from batch_scorer.inputs.selection import kept_columns, kept_of, spread
from batch_scorer.inputs.tables import FileTable, InputFile, cut
from batch_scorer.quarantine import Bounds, apart
from batch_scorer.records import Format, Layout, Shard, Source, Status
from batch_scorer.storage import Store, Version

Row = dict[str, Any]
ROWS: list[Row] = [
    {"text": f"row {n}", "n": n, "source": "ab"[n % 2] if n % 5 else None} for n in range(60)
]
"""Of 60 rows 24 are of source "a", and 24 of "b"."""


def parquet(rows: list[Row]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


def jsonl(rows: list[Row]) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows)


KINDS: dict[str, Callable[[list[Row]], bytes]] = {
    "parquet": parquet,
    "jsonl": jsonl,
    "jsonl.gz": lambda rows: gzip.compress(jsonl(rows), mtime=0),
    "json": lambda rows: json.dumps(rows).encode(),
}


def config(folder: Path, **settings: Any) -> Config:
    settings = {"format": "text", "text_style": "rendered", "shard_rows": 10} | settings
    return load_config(model="m", inputs=(str(folder),), output="/nowhere/out", **settings)


def planned(folder: Path, files: dict[str, bytes], **settings: Any) -> Plan:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return make_plan(config(folder, **settings))


# How many


@given(st.integers(1, 200), st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_limit_is_spread_over_files_in_proportion(limit: int, sizes: list[int]) -> None:
    shares, total = spread(limit, sizes), sum(sizes)
    assert sum(shares) == min(limit, total)
    for share, size in zip(shares, sizes, strict=True):
        exact = min(limit, total) * size / max(1, total)
        assert share <= size and exact - 1 < share < exact + 1


def test_the_largest_parts_of_rows_are_made_whole() -> None:
    assert spread(10, [10, 10, 80]) == [1, 1, 8]
    assert spread(5, [10, 25, 65]) == [1, 1, 3]  # 0.5, 1.25 and 3.25
    assert spread(2, [1, 1, 1]) == [1, 1, 0]
    assert spread(7, [3, 2]) == [3, 2]


def test_columns_are_kept_in_the_order_of_the_file() -> None:
    assert kept_columns("abcd", (), ()) == ["a", "b", "c", "d"]
    assert kept_columns("abcd", ("d", "b"), ()) == ["b", "d"]
    assert kept_columns("abcd", ("d", "b"), ("b",)) == ["d"]
    twice = pa.table([[1], [2], [3]], names=["a", "b", "a"])
    assert kept_of(twice, (), ()).equals(twice)
    assert kept_of(twice, (), ("b",)).equals(twice.select([0, 2]))


# Which


@given(
    groups=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 400)), max_size=8),
    shard_rows=st.integers(1, 40),
    shard_tokens=st.integers(1, 500),
    limit=st.none() | st.integers(1, 120),
    seed=st.none() | st.integers(0, 99),
)
def test_every_row_is_asked_for_in_one_shard_or_counted_with_one(
    groups: list[tuple[int, int]],
    shard_rows: int,
    shard_tokens: int,
    limit: int | None,
    seed: int | None,
) -> None:
    num_rows = sum(rows for rows, _ in groups)
    bits = None
    asked = list(range(num_rows))
    if seed is not None:
        matches = np.random.default_rng(seed).random(num_rows) < 0.3
        bits, asked = np.packbits(matches).tobytes(), np.flatnonzero(matches).tolist()
    asked = asked[:limit]
    file = InputFile(
        Source("/data", "a.parquet", 1, Version("e")), pa.schema([]), Layout(Format.TEXT, {}),
        tuple(groups), where="w" if bits is not None else None, matching=bits, limit=limit,
    )  # fmt: skip
    shards = list(cut(FileTable.of([file]), shard_rows, shard_tokens))
    if num_rows and not asked:
        assert not shards
        return
    assert sum(shard.num_rows + shard.rows_not_asked for shard in shards) == num_rows
    assert len({shard.output_key for shard in shards}) == len(shards)
    done = 0
    for shard in shards:
        rows = asked[done : done + shard.num_rows]
        done += shard.num_rows
        assert shard.num_rows <= shard_rows and shard.rows_not_asked >= 0
        if rows:
            assert shard.first_row == rows[0] and shard.row_groups is not None
            start, stop = shard.row_groups
            before = sum(size for size, _ in groups[:start])
            assert before + shard.skip_rows == rows[0]
            assert rows[-1] < sum(size for size, _ in groups[:stop])
    assert done == len(asked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [None, 13])
@pytest.mark.parametrize("where", [None, 'field("source") == "a"', 'field("n") >= 41'])
def test_shards_hold_the_rows_that_are_asked_for(
    tmp_path: Path, kind: str, limit: int | None, where: str | None
) -> None:
    plan = planned(tmp_path, {f"x.{kind}": KINDS[kind](ROWS)}, limit=limit, where=where)
    wanted = [
        row
        for row in ROWS
        if where is None or (row["source"] == "a" if "source" in where else row["n"] >= 41)
    ][:limit]
    tables = [rows_of_shard(shard, {}, None)[0] for shard in plan.shards]
    assert pa.concat_tables(tables).to_pylist() == wanted
    texts = [rows_of_shard(shard, {}, ["text"])[0] for shard in plan.shards]
    assert pa.concat_tables(texts).to_pylist() == [{"text": row["text"]} for row in wanted]
    numbers = [number for shard in plan.shards for number in row_numbers(shard, {})]
    assert numbers == [row["n"] for row in wanted]
    assert plan.num_rows == len(wanted)
    assert plan.num_rows + plan.rows_not_asked == len(ROWS)


def test_a_line_that_is_no_json_keeps_its_number_and_is_not_asked_for(tmp_path: Path) -> None:
    lines = jsonl(ROWS[:10]).split(b"\n")
    lines[2] = b"{broken"
    plan = planned(tmp_path, {"x.jsonl": b"\n".join(lines)}, where='field("n") > 0')
    (shard,) = plan.shards
    assert (shard.num_rows, shard.rows_not_asked) == (8, 2)
    assert row_numbers(shard, {}) == [1, 3, 4, 5, 6, 7, 8, 9]
    every = planned(tmp_path, {}, where='field("n").is_null()')
    table, malformed = rows_of_shard(every.shards[0], {}, None)
    assert table.num_rows == 1 and "line 3" in malformed[0].detail


def test_the_rest_of_a_limit_goes_to_files_that_have_matches(tmp_path: Path) -> None:
    none = [{**row, "source": "c"} for row in ROWS]
    plan = planned(
        tmp_path,
        {"a.parquet": parquet(ROWS), "b.jsonl": jsonl(none), "c.jsonl": jsonl(ROWS[:20])},
        where='field("source") == "a"',
        limit=16,
    )
    counts = {shard.source.key: 0 for shard in plan.shards}
    for shard in plan.shards:
        counts[shard.source.key] += shard.num_rows
    assert counts == {"a.parquet": 12, "c.jsonl": 4}
    (unused,) = plan.not_asked
    assert (unused.input, unused.status, unused.rows_not_asked) == (
        "b.jsonl", Status.NOT_ASKED, 60
    )  # fmt: skip
    assert plan.rows_not_asked == 60 + 60 + 20 - 16
    assert plan.inputs.keys() == {"a.parquet", "b.jsonl", "c.jsonl"}


def test_another_selection_makes_other_shards(tmp_path: Path) -> None:
    every = planned(tmp_path, {"x.parquet": parquet(ROWS[:8])})
    picked = planned(tmp_path, {}, where='field("n") >= 0')
    fewer = planned(tmp_path, {}, limit=7)
    assert len({plan.digest("f", "") for plan in (every, picked, fewer)}) == 3
    assert {shard.output_key for plan in (every, picked, fewer) for shard in plan.shards} == {
        "x.parquet"
    }


# What is refused


def test_a_file_without_the_column_fails_alone(tmp_path: Path) -> None:
    texts = {"text": ["a", "b"]}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({**texts, "n": ["1", "2"]}), sink)
    plan = planned(
        tmp_path,
        {
            "good.jsonl": jsonl(ROWS),
            "lacks.jsonl": b'{"text": "a"}\n',
            "other.parquet": sink.getvalue().to_pybytes(),
        },
        where='field("n") < 3',
    )
    assert [shard.source.key for shard in plan.shards] == ["good.jsonl"]
    details = {receipt.input: (receipt.reason, receipt.detail) for receipt in plan.failed}
    assert details["lacks.jsonl"] == (
        ShardReason.WRONG_SCHEMA, "where: there is no column 'n'; there are text"
    )  # fmt: skip
    reason, detail = details["other.parquet"]
    assert reason is ShardReason.WRONG_SCHEMA and "(n is string)" in detail


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"where": 'field("n") <'}, ConfigError, "where: at character"),
        ({"where": 'field("m") < 3'}, InputError, "x.jsonl: where: there is no column 'm'"),
        ({"where": 'field("n") < 0'}, InputError, 'no row of .* matches field\\("n"\\) < 0'),
        ({"keep_columns": ("n", "m")}, ConfigError, "keep_columns: no input has a column 'm'"),
        ({"drop_columns": ("m",)}, ConfigError, "drop_columns: .* there are n, source, text"),
    ],
)
def test_a_selection_that_fits_no_file_is_refused(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        planned(tmp_path, {"x.jsonl": jsonl(ROWS)}, **settings)


def test_a_column_that_is_dropped_may_be_added_anew(tmp_path: Path) -> None:
    scored = [{**row, "score": 1.0} for row in ROWS]
    assert planned(tmp_path, {"x.jsonl": jsonl(scored)}, drop_columns=("score",)).failed == []
    with pytest.raises(InputError, match="already has score"):
        planned(tmp_path, {})


# What is read


def test_row_groups_that_hold_no_match_are_not_read(tmp_path: Path) -> None:
    """By their statistics: neither by the plan nor for a shard."""
    texts = [f"{n} " + "x" * 2000 for n in range(2000)]
    table = pa.table({"text": texts, "n": range(2000)})
    options = {"compression": "none", "use_dictionary": False}
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=200, **options)
    metadata = pq.read_metadata(tmp_path / "x.parquet")
    firsts = [metadata.row_group(group).column(0).data_page_offset for group in range(10)]
    where = '(field("n") == 555) | (field("n") == 1111)'
    # In a process apart: what is planned and read there is read by itself.
    shard, planned, numbers, read = apart(Bounds(300, 1 << 30), requests, tmp_path, where)
    assert (shard.first_row, shard.num_rows, shard.row_groups) == (555, 2, (2, 6))
    # The sample of the first rows, and the matches.
    assert {bisect_right(firsts, start) - 1 for start in planned} == {0, 2, 5}
    assert numbers == [555, 1111]
    assert {bisect_right(firsts, start) - 1 for start in read} == {2, 5}


def requests(folder: Path, where: str) -> tuple[Shard, list[int], list[int], list[int]]:
    """The only shard of a plan, and the numbers of its rows; after each where the requests begin,
    all of which read on, up to 64 kB."""
    begun: list[int] = []
    read_range = Store.read_range
    size = (folder / "x.parquet").stat().st_size

    def noted(self: Store, key: str, version: Version, start: int, stop: int) -> bytes:
        if stop < size:  # the footer is at the end
            begun.append(start)
        return read_range(self, key, version, start, stop)

    with patch.object(files, "_WHOLE_BYTES", 0), patch.object(Store, "read_range", noted):
        (shard,) = make_plan(config(folder, where=where)).shards
        planned = list(begun)
        begun.clear()
        rows, _ = rows_of_shard(shard, {}, None)
    return shard, planned, rows["n"].to_pylist(), begun
