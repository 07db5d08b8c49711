"""Numbers that a file declares of itself are held against the file; one that lies fails alone."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from batch_scorer.config import Config, Device
from batch_scorer.errors import ShardError, ShardReason
from batch_scorer.inputs.arrow_files import open_arrow
from batch_scorer.inputs.files import rows_of_shard
from batch_scorer.inputs.plan import make_plan
from batch_scorer.job import Job
from batch_scorer.outputs.commit import commit_shard
from batch_scorer.records import ScoredRows, Scores, Source
from batch_scorer.storage import Store, open_store
from tests.helpers import parquet_footer as footer
from tests.helpers.inputs import FORMATS

ROWS = [
    {"prompt": f"question {n}", "chosen": f"yes {n}", "rejected": "no", "tags": ["t"] * (n % 3)}
    for n in range(1000)
]
TABLE = pa.Table.from_pylist(ROWS)
GROUPS = {"row_group_size": 250}


def parquet(table: pa.Table = TABLE, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def stream(batches: list[pa.RecordBatch], compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def config(folder: Path, **settings: Any) -> Config:
    return Config(model="m", inputs=(str(folder),), output="/nowhere", **settings)


def failure(folder: Path, name: str, data: bytes, **settings: Any) -> tuple[ShardReason, str]:
    """Why this file cannot be planned, beside one that can."""
    (folder / name).write_bytes(data)
    (folder / "healthy.parquet").write_bytes(parquet())
    plan = make_plan(config(folder, **settings))
    assert plan.num_rows == len(ROWS)
    (receipt,) = plan.failed
    assert receipt.input == name and receipt.reason is not None and "\n" not in receipt.detail
    return receipt.reason, receipt.detail


def stored(file: Path) -> tuple[Store, Source]:
    """The file as readers are given it."""
    store = open_store(str(file.parent), {})
    info = store.head(file.name)
    return store, Source(store.root, file.name, info.size_bytes, info.version)


def rows_of(folder: Path, **settings: Any) -> pa.Table:
    """All rows of the only file in the folder."""
    plan = make_plan(config(folder, **settings))
    assert not plan.failed
    return pa.concat_tables([rows_of_shard(shard, {}, None)[0] for shard in plan.shards])


# Footers

Edit = Callable[[footer.Struct], None]


def edited(edit: Edit) -> bytes:
    """Four groups of 250 rows, with another footer."""
    data = parquet(**GROUPS)
    tree = footer.read_footer(data)
    edit(tree)
    return footer.with_footer(data, tree)


def declare_rows(tree: footer.Struct, num_rows: int, group: int = 1) -> None:
    """Another number of rows in a group, and all other counts as if it were true."""
    found = footer.row_groups(tree)[group]
    more = num_rows - found[footer.GROUP_NUM_ROWS]
    found[footer.GROUP_NUM_ROWS] = num_rows
    tree[footer.NUM_ROWS] += more
    for chunk in found[footer.COLUMNS].values:
        chunk[footer.META_DATA][footer.NUM_VALUES] += more


def first_chunk(number: int, value: int) -> Edit:
    return lambda tree: next(footer.chunks(tree)).put(number, footer.I64, value)


def of_file(tree: footer.Struct) -> None:
    tree[footer.NUM_ROWS] = 10**15


def of_group(tree: footer.Struct) -> None:
    footer.row_groups(tree)[0][footer.GROUP_NUM_ROWS] = 900
    tree[footer.NUM_ROWS] += 650


def negative(tree: footer.Struct) -> None:
    footer.row_groups(tree)[0][footer.GROUP_NUM_ROWS] = -250
    tree[footer.NUM_ROWS] -= 500


def without_a_group(tree: footer.Struct) -> None:
    footer.row_groups(tree).pop()


def without_groups(tree: footer.Struct) -> None:
    footer.row_groups(tree).clear()


def a_group_twice(tree: footer.Struct) -> None:
    footer.row_groups(tree).append(copy.deepcopy(footer.row_groups(tree)[0]))
    tree[footer.NUM_ROWS] += 250


def without_a_column(tree: footer.Struct) -> None:
    footer.row_groups(tree)[2][footer.COLUMNS].values.pop()


def behind_the_end(tree: footer.Struct) -> None:
    chunk = next(footer.chunks(tree))
    del chunk[footer.DICTIONARY_PAGE]
    chunk[footer.DATA_PAGE] = 10**9


COUNT, UNREADABLE, LARGE = (
    ShardReason.WRONG_ROW_COUNT,
    ShardReason.UNREADABLE_FILE,
    ShardReason.TOO_LARGE,
)
FOOTERS: dict[str, tuple[Edit, ShardReason, list[int]]] = {
    "rows of the file": (of_file, COUNT, [10**15, 1000]),
    "rows of a group": (of_group, COUNT, [900, 250]),
    "negative rows": (negative, COUNT, [-250]),
    "a group is not listed": (without_a_group, COUNT, [1000, 750]),
    "no group is listed": (without_groups, COUNT, [1000, 0]),
    "a group is listed twice": (a_group_twice, UNREADABLE, []),
    "a column is not listed": (without_a_column, UNREADABLE, [3, 4]),
    "more values than rows": (first_chunk(footer.NUM_VALUES, 251), COUNT, [250, 251]),
    "fewer values than rows": (first_chunk(footer.NUM_VALUES, 249), COUNT, [250, 249]),
    "pages behind the end": (behind_the_end, UNREADABLE, [10**9]),
    "pages up to behind the end": (
        first_chunk(footer.COMPRESSED_SIZE, 10**9), UNREADABLE, [10**9],
    ),
    "pages that overlap": (first_chunk(footer.COMPRESSED_SIZE, 9000), UNREADABLE, []),
    "a negative size": (first_chunk(footer.UNCOMPRESSED_SIZE, -1), UNREADABLE, []),
    "unpacked bytes": (first_chunk(footer.UNCOMPRESSED_SIZE, 10**14), LARGE, []),
    "more rows than any file could hold": (lambda t: declare_rows(t, 10**15), LARGE, [10**15]),
    "more rows than bytes": (lambda t: declare_rows(t, 10**6), COUNT, [10**6, 250]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOOTERS)
def test_a_footer_that_lies_costs_its_file(tmp_path: Path, name: str) -> None:
    edit, reason, numbers = FOOTERS[name]
    found, detail = failure(tmp_path, "a.parquet", edited(edit))
    assert found is reason
    assert all(str(number) in detail for number in numbers), detail


def test_a_footer_that_is_written_again_is_the_same() -> None:
    for data in (
        parquet(**GROUPS, write_page_index=True, write_page_checksum=True),
        (FORMATS / "rollouts-wide.parquet").read_bytes(),
    ):
        assert footer.with_footer(data, footer.read_footer(data)) == data


SETTINGS: list[dict[str, Any]] = [{}, {"shard_rows": 100}, {"where": 'field("rejected") > ""'}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_group_that_ends_early_is_a_wrong_count(tmp_path: Path, settings: dict[str, Any]) -> None:
    # Rows that could be, for all that the footer shows: only reading tells.
    (tmp_path / "a.parquet").write_bytes(edited(lambda tree: declare_rows(tree, 260)))
    (tmp_path / "b.parquet").write_bytes(parquet())
    plan = make_plan(config(tmp_path, **settings))
    wrong = [(receipt.reason, receipt.detail) for receipt in plan.failed]
    for shard in plan.shards:
        try:
            table, _ = rows_of_shard(shard, {}, None)
            assert table.num_rows == shard.num_rows
        except ShardError as error:
            assert shard.source.key == "a.parquet"
            wrong.append((error.reason, error.detail))
    assert set(wrong) == {(COUNT, "row group 1 declares 260 rows and holds 250")}


@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_that_no_footer_names_are_none(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "a.parquet").write_bytes(edited(lambda tree: declare_rows(tree, 240)))
    assert rows_of(tmp_path, **settings).num_rows == 990


def test_many_equal_rows_are_no_wrong_count(tmp_path: Path) -> None:
    same = pa.table({name: [name] * 100_000 for name in ("prompt", "chosen", "rejected")})
    pq.write_table(same, tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    assert rows_of(tmp_path).equals(same)


def test_what_a_file_may_unpack_to_is_a_setting(tmp_path: Path) -> None:
    many = edited(lambda tree: declare_rows(tree, 10**8))
    assert failure(tmp_path, "a.parquet", many)[0] is LARGE
    assert failure(tmp_path, "a.parquet", many, max_expansion=1e6)[0] is COUNT
    unpacked = parquet(pa.concat_tables([TABLE] * 4), use_dictionary=False)
    assert failure(tmp_path, "a.parquet", unpacked, max_unpacked_gib=1e-4)[0] is LARGE


# Files as they should be


def with_empty_groups() -> bytes:
    """pyarrow leaves the dictionary pages of empty groups, and names none of them."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, TABLE.schema) as writer:
        for part in (TABLE.slice(0, 0), TABLE.slice(0, 600), TABLE.slice(0, 0), TABLE.slice(600)):
            writer.write_table(part)
    return sink.getvalue()


def of_polars(**options: Any) -> bytes:
    sink = io.BytesIO()
    pl.DataFrame(TABLE).write_parquet(sink, **options)
    return sink.getvalue()


def of_duckdb(folder: Path, options: str) -> bytes:
    with duckdb.connect() as connection:
        connection.register("rows", TABLE)
        connection.sql(f"copy (from rows) to '{folder / 'd.pq'}' (format parquet{options})")
    return (folder / "d.pq").read_bytes()


WRITERS: dict[str, Callable[[Path], bytes]] = {
    "pyarrow, page index, checksums": lambda _: parquet(
        **GROUPS, write_page_index=True, write_page_checksum=True
    ),
    "pyarrow, Bloom filters": lambda _: parquet(bloom_filter_options={"prompt": {"ndv": 1000}}),
    "pyarrow, pages of version 2": lambda _: parquet(
        data_page_version="2.0", data_page_size=2000, write_page_checksum=True
    ),
    "pyarrow, empty groups": lambda _: with_empty_groups(),
    "polars": lambda _: of_polars(row_group_size=300),
    "polars, not packed": lambda _: of_polars(compression="uncompressed", data_page_size=1000),
    "duckdb": lambda folder: of_duckdb(folder, ""),
    "duckdb, version 2": lambda folder: of_duckdb(folder, ", parquet_version v2, compression zstd"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_other_writers_pass(tmp_path: Path, writer: str) -> None:
    (tmp_path / "a.parquet").write_bytes(WRITERS[writer](tmp_path))
    for settings in SETTINGS:
        assert rows_of(tmp_path, **settings).to_pylist() == ROWS


# Checksums


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("row", [3, 900])
def test_a_page_that_was_changed_is_not_scored(tmp_path: Path, row: int, version: str) -> None:
    # Neither packed nor in a dictionary, so that the changed text is found and reads as text.
    data = parquet(
        **GROUPS, compression="none", use_dictionary=False, data_page_version=version,
        write_page_checksum=True,
    )  # fmt: skip
    (tmp_path / "b.parquet").write_bytes(data)
    changed = data.replace(f"yes {row}".encode(), f"yea {row}".encode())
    assert changed != data
    (tmp_path / "a.parquet").write_bytes(changed)
    plan = make_plan(config(tmp_path, shard_rows=100))
    wrong = {(receipt.input, receipt.reason) for receipt in plan.failed}
    assert bool(wrong) == (row < 32)  # planning reads the first rows
    for shard in plan.shards:
        try:
            found, _ = rows_of_shard(shard, {}, None)
            assert not pc.any(pc.starts_with(found["chosen"], "yea")).as_py()
        except ShardError as error:
            wrong.add((shard.source.key, error.reason))
    assert wrong == {("a.parquet", UNREADABLE)}


# Arrow


def with_column(column: pa.Array) -> list[pa.RecordBatch]:
    """Two batches; the first has nothing in this column, and the second these 500 values."""
    batches = TABLE.to_batches(500)
    columns = pa.nulls(500, column.type), column
    return [batch.append_column("odd", odd) for batch, odd in zip(batches, columns, strict=True)]


def test_a_column_that_is_not_scored_is_checked_as_it_is_read(tmp_path: Path) -> None:
    numbers = pa.array([None, *range(499)])
    wrong = pa.Array.from_buffers(pa.int64(), 500, numbers.buffers(), null_count=2)
    (tmp_path / "a.arrow").write_bytes(stream(with_column(wrong)))
    first, second = make_plan(config(tmp_path, shard_rows=500)).shards
    assert rows_of_shard(first, {}, None)[0].num_rows == 500
    with pytest.raises(ShardError, match="null_count") as raised:
        rows_of_shard(second, {}, None)
    assert raised.value.reason is UNREADABLE
    assert rows_of_shard(second, {}, ["prompt"])[0].num_rows == 500


def odd_values() -> dict[str, pa.Array]:
    """Values that a full validation refuses, and that are nobody's harm."""
    offsets = pa.array(range(0, 1001, 2), pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 500, [None, offsets, pa.py_buffer(b"\xff\xfe" * 500)])
    days = pa.array(range(500), pa.int64()).view(pa.date64())
    large = pa.array([1000] * 500, pa.decimal128(9, 0))
    return {
        "text": text,
        "text in lists": pa.ListArray.from_arrays(pa.array(range(501), pa.int32()), text),
        "text in structs": pa.StructArray.from_arrays([text], ["text"]),
        "dates": days,
        "decimals": pa.Array.from_buffers(pa.decimal128(2, 0), 500, large.buffers()),
    }


@pytest.mark.parametrize("name", odd_values())
def test_what_values_mean_is_not_judged(tmp_path: Path, name: str) -> None:
    column = odd_values()[name]
    with pytest.raises(pa.ArrowInvalid):
        column.validate(full=True)
    (tmp_path / "a.arrow").write_bytes(stream(with_column(column)))
    assert not make_plan(config(tmp_path)).failed
    with open_arrow(*stored(tmp_path / "a.arrow")) as file:
        _, second = file.batches()
    assert [b and b.to_pybytes() for b in second["odd"].buffers()] == [
        b and b.to_pybytes() for b in column.buffers()
    ]


def test_more_rows_than_a_file_could_hold(tmp_path: Path) -> None:
    # A run of equal values takes a few bytes, however long it is: only its length can be judged.
    ends = pa.array([10**9], pa.int32())
    runs = pa.RunEndEncodedArray.from_arrays(ends, pa.array(["text"]))
    batch = pa.record_batch([runs] * 3, ["prompt", "chosen", "rejected"])
    found, detail = failure(tmp_path, "a.arrow", stream([batch]))
    assert found is LARGE and f"{10**9} rows" in detail


def test_a_packed_buffer_that_declares_too_much_is_an_error_of_memory(tmp_path: Path) -> None:
    data = stream([pa.record_batch({"prompt": ["q" * 77] * 1001})], "zstd")
    true, false = (length.to_bytes(8, "little") for length in (77 * 1001, 1 << 50))
    assert data.count(true) == 1
    (tmp_path / "a.arrow").write_bytes(data.replace(true, false))
    with open_arrow(*stored(tmp_path / "a.arrow")) as file, pytest.raises(MemoryError):
        next(file.batches())


# Commit


def test_rows_lost_on_the_way_are_a_wrong_count(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet())
    settings = config(tmp_path)
    (shard,) = make_plan(settings).shards
    nothing = cast(Any, None)  # the commit ends before it needs more of the job
    job = Job(settings, nothing, (), None, Device.CPU, "float32", None, nothing)
    scored = ScoredRows(
        Scores(np.zeros((998, 1), np.float32)), np.ones(998, np.int32), np.zeros(998, np.int32),
        np.arange(999), {}, "", {}, 0.0,
    )  # fmt: skip
    for planned in (shard, replace(shard, num_rows=999)):
        with pytest.raises(ShardError) as raised:
            commit_shard(job, 1, planned, {"": scored}, lambda *_: None)
        assert raised.value.reason is COUNT
        assert f"{planned.num_rows} rows planned, 998 scored" in raised.value.detail
