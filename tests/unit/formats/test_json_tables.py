"""JSON Lines and JSON arrays as tables: rows keep their places, whatever the lines hold."""

import gzip
import io
import json
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.formats import packed as packing
from batch_scorer.formats import (
    read_json_table,
    read_json_values,
    read_line_values,
    read_lines,
    scan_lines,
    unpack_lines,
)
from batch_scorer.records import RowError

ROWS = [{"a": "x", "n": [1, 2]}, {"a": "ü\u2028", "n": []}]


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def refused(data: bytes) -> str:
    with pytest.raises(ShardError) as raised:
        read_json_table(data, "in/a.jsonl")
    assert raised.value.reason == ShardReason.UNREADABLE_FILE
    assert raised.value.detail.startswith("in/a.jsonl: ")
    return raised.value.detail


@pytest.mark.parametrize(
    "data",
    [
        lines(*ROWS),
        lines(*ROWS).rstrip(),
        lines(*ROWS).replace(b"\n", b"\r\n"),
        b"\n \n" + lines(*ROWS).replace(b"\n", b"\n\n\t\n"),
        b"\xef\xbb\xbf" + lines(*ROWS),
        gzip.compress(lines(*ROWS), mtime=0),
        json.dumps(ROWS).encode(),
        b"\n " + json.dumps(ROWS, indent=2).encode() + b"\n",
        gzip.compress(json.dumps(ROWS).encode(), mtime=0),
    ],
)
def test_rows_come_back_from_every_container(data: bytes) -> None:
    table, errors = read_json_table(data, "a")
    assert (table.to_pylist(), errors) == (ROWS, {})


@pytest.mark.parametrize("data", [b"", b"\n\n", b"  ", b"[]", gzip.compress(b"", mtime=0)])
def test_file_without_rows_is_an_empty_table(data: bytes) -> None:
    table, errors = read_json_table(data, "a")
    assert (table.num_rows, table.num_columns, errors) == (0, 0, {})


@pytest.mark.parametrize(
    "bad",
    [
        b'{"a": "x"',
        b"{bad}",
        b"[1]",
        b'"x"',
        b"7",
        b'{"a": "x"} {"a": "y"}',
        b'{"a": "x", "a": "y"}',
        b"[" * 200,
    ],
)
def test_malformed_line_is_a_row_of_nulls_in_its_place(bad: bytes) -> None:
    table, errors = read_json_table(b'{"a": "1"}\n\n' + bad + b'\n{"a": "2"}\n', "a")
    assert table.to_pylist() == [{"a": "1"}, {"a": None}, {"a": "2"}]
    assert list(errors) == [1]
    assert errors[1].reason == RowReason.MALFORMED_JSON
    assert errors[1].detail.startswith("line 3: ")


@pytest.mark.parametrize("bad", [b'{"a": "\xff"}', b'{"a": "\\ud800"}', b'{"b": "\xff"}'])
def test_a_line_that_is_not_utf8_is_marked_as_such(bad: bytes) -> None:
    table, errors = read_json_table(b'{"a": "1"}\n' + bad + b'\n{"a": "2"}\n', "a")
    assert table.to_pylist() == [{"a": "1"}, {"a": None}, {"a": "2"}]
    assert errors == {1: RowError(RowReason.NOT_UTF8, "line 2: not UTF-8")}


def test_malformed_first_and_last_lines_are_marked() -> None:
    table, errors = read_json_table(b'[1]\n{"a": 1}\n{"a": ', "a")
    assert table.to_pylist() == [{"a": None}, {"a": 1}, {"a": None}]
    assert list(errors) == [0, 2]


def test_as_many_objects_as_lines_are_not_yet_one_a_line() -> None:
    tables, errors = in_runs(b'{"b": 1}\n{"a": 1} {"a": 2}\n{"a":\n3}\n', 10, 10**6)
    assert [table.to_pylist() for table in tables] == [[{"b": 1}, *[{"b": None}] * 3]]
    assert [*errors] == [1, 2, 3]


def test_object_over_two_lines_is_two_malformed_rows() -> None:
    table, errors = read_json_table(b'{"a": 1}\n{"a": 2\n}\n', "a")
    assert table.to_pylist() == [{"a": 1}, {"a": None}, {"a": None}]
    assert list(errors) == [1, 2]


def test_array_element_that_is_no_object_is_marked() -> None:
    table, errors = read_json_table(b'[{"a": 1}, 5, {"a": 2}]', "a")
    assert table.to_pylist() == [{"a": 1}, {"a": None}, {"a": 2}]
    assert errors[1].detail == "element 2: not a JSON object"


def test_null_line_is_a_row_of_nulls() -> None:
    for rest in (b'{"a": 1}\n', b'{"a": 1}\n{bad}\n'):
        for data, row in ((b"null\n" + rest, 0), (rest + b" null \n", -1)):
            table, errors = read_json_table(data, "a")
            assert table.to_pylist()[row] == {"a": None}
            assert len(errors) == rest.count(b"bad")


def test_dates_stay_strings() -> None:
    row = {"a": "2024-01-01", "b": [{"content": "2024-01-01 10:00:00"}], "c": [["2024-01-01"]]}
    table, errors = read_json_table(lines(row), "a")
    assert (table.to_pylist(), errors) == ([row], {})


def test_a_row_may_be_longer_than_arrows_block() -> None:
    rows = [{"a": "x"}, {"a": "y" * (3 << 20)}, {"a": "z"}]
    assert read_json_table(lines(*rows), "a")[0].to_pylist() == rows


def test_types_are_found_from_all_rows() -> None:
    rows = [{"a": None}] * 3000 + [{"a": [{"role": "user", "content": "q"}], "b": 1}]
    table, _ = read_json_table(lines(*rows), "a")
    assert pa.types.is_list(table.schema.field("a").type)
    assert table.num_rows == 3001


def json_text(table: pa.Table, name: str) -> list[Any]:
    """The values of a column of JSON text."""
    assert table.schema.field(name).type == pa.json_(pa.string())
    return [None if text is None else json.loads(text) for text in table[name].to_pylist()]


@pytest.mark.parametrize(
    "values",
    [
        [1, "x"],
        [True, 1],
        ["x", [{"role": "user"}]],
        [["x"], [[1]]],
        [{"answer": 1}, {"answer": "1"}],
        [{}, {}],
        [[{}], []],
        [1.5, 2**53 + 1],
        [-1, 2**63],
        [2**64, 1],
        [{"n": [0.5]}, {"n": [2**60]}],
        [{str(key): 1 for key in range(1001)}, {"z": 1}],
    ],
)
def test_values_without_a_type_in_common_are_json_text(values: list[Any]) -> None:
    rows = [{"a": value, "text": "t"} for value in [*values, None]]
    table, errors = read_json_table(lines(*rows), "a")
    assert errors == {}
    assert json_text(table, "a") == [*values, None]
    assert table["text"].to_pylist() == ["t"] * len(rows)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 2**64 - 1], pa.uint64()),
        ([-(2**63), 2**63 - 1], pa.int64()),
        ([2**53, 0.5, -3], pa.float64()),
        ([[None, None], [None]], pa.list_(pa.null())),
        ([float("inf"), -2.5], pa.float64()),
    ],
)
def test_types_hold_every_value_exactly(values: list[Any], dtype: pa.DataType) -> None:
    table, _ = read_json_table(lines(*({"a": value} for value in values)), "a")
    assert table.schema.field("a").type == dtype
    assert table["a"].to_pylist() == values


def test_an_object_with_new_keys_in_every_row_is_json_text() -> None:
    rows = [{"m": {f"key {row}": {"x": row}}, "n": row} for row in range(1500)]
    tables, errors = in_runs(lines(*rows), 400, 10**6)
    table = pa.concat_tables(tables)
    assert (json_text(table, "m"), errors) == ([row["m"] for row in rows], {})
    few, _ = in_runs(lines(*rows[:90]), 400, 10**6)
    assert pa.types.is_struct(few[0].schema.field("m").type)


def test_nan_is_a_number() -> None:
    table, errors = read_json_table(b'{"a": NaN}\n{"a": 1}\n', "a")
    assert errors == {} and str(table["a"].to_pylist()) == "[nan, 1.0]"


def test_a_line_of_many_levels_is_kept_or_marked() -> None:
    for levels, marked in ((199, []), (200, [1]), (900, [1])):
        deep = b'{"a": ' + b"[" * levels + b"]" * levels + b"}"
        tables, errors = in_runs(b'{"a": [[]]}\n' + deep + b"\n", 10, 10**6)
        assert [sum(table.num_rows for table in tables), [*errors]] == [2, marked]


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"\x1f\x8bnonsense", "gzip"),
        (gzip.compress(lines(*ROWS), mtime=0)[:-9], "gzip"),
        (b"PAR1....", "line 1: not JSON"),
        (b'{\n  "a": 1\n}', "line 1: not JSON"),
        (b"[{]", "JSON array"),
        (b'[{"a": 1, "a": 2}]', "twice"),
        (b"{}\n{}\n", "no fields"),
        (b"[1, 2]", "not a JSON object"),
    ],
)
def test_file_that_holds_no_table_is_refused(data: bytes, cause: str) -> None:
    assert cause in refused(data)


@given(st.lists(st.fixed_dictionaries({"a": st.text(), "b": st.none() | st.lists(st.text())})))
def test_any_text_comes_back(rows: list[dict[str, Any]]) -> None:
    table, errors = read_json_table(lines(*rows), "a")
    assert (table.to_pylist(), errors) == (rows, {})


# In runs, as shards read them.


def in_runs(
    data: bytes, max_rows: int, max_bytes: int
) -> tuple[list[pa.Table], dict[int, RowError]]:
    """The tables of all runs, each read on its own, and the errors by row of the file."""
    scanned = scan_lines(io.BytesIO(data), "in/a.jsonl", max_rows=max_rows, max_bytes=max_bytes)
    assert scanned is not None
    lines, first = scanned
    tables: list[pa.Table] = []
    errors: dict[int, RowError] = {}
    before = 0
    for index, run in enumerate(lines.runs):
        assert run.num_rows <= max_rows
        assert run.num_rows == 1 or run.stop - run.start <= max_bytes
        part = lines.part(index, index + 1)
        if lines.codec:
            unpacked = unpack_lines(io.BytesIO(data), "in/a.jsonl", part)
        else:
            unpacked = b"".join(data[start:stop] for start, stop in part.spans)
        table, bad = read_lines(unpacked, part)
        assert table.num_rows == run.num_rows
        tables.append(table)
        errors |= {before + row: error for row, error in bad.items()}
        before += run.num_rows
    assert any(map(first.equals, tables or [pa.table({})]))
    return tables, errors


LINE = st.sampled_from(
    [
        b"",
        b" \t\r",
        b'{"a": 1}',
        b'{"a": 1.5, "b": [null]}\r',
        b' {"b": [{"x": "2024-01-01"}]}',
        b'{"b": [{"y": 2, "x": "\xc3\xbc"}, null], "c": null}',
        b"null",
        b"{bad",
        b'{"a": "\xff"}',
        b'{"a": 1} {"a": 2}',
        b"7",
    ]
)


@given(
    st.lists(LINE, max_size=12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 5),
    st.integers(1, 60),
    st.integers(1, 30),
)
def test_runs_hold_what_the_whole_file_holds(
    some: list[bytes],
    ends_in_newline: bool,
    has_bom: bool,
    is_zipped: bool,
    max_rows: int,
    max_bytes: int,
    read_bytes: int,
) -> None:
    data = b"\xef\xbb\xbf" * has_bom + b"\n".join(some) + b"\n" * ends_in_newline
    packed = gzip.compress(data, mtime=0) if is_zipped else data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_READ_BYTES", read_bytes)
        try:
            table, errors = read_json_table(packed, "in/a.jsonl")
        except ShardError as error:
            with pytest.raises(ShardError) as raised:
                in_runs(packed, max_rows, max_bytes)
            assert raised.value.detail == error.detail
            return
        tables, found = in_runs(packed, max_rows, max_bytes)
    assert found == errors
    if tables:
        assert pa.concat_tables(tables).combine_chunks().equals(table.combine_chunks())
    else:
        assert table.num_rows == 0


def test_types_are_found_from_all_runs() -> None:
    rows = [{"a": None}, {"a": [1], "b": {"x": 1}}, {"b": {"y": "z"}}, {"a": [0.5]}]
    tables, _ = in_runs(lines(*rows), 1, 10**6)
    assert len({str(table.schema) for table in tables}) == 1
    assert pa.concat_tables(tables)["a"].to_pylist() == [None, [1.0], None, [0.5]]


@pytest.mark.parametrize(
    ("first", "second"),
    [(1, "x"), ([{"r": 1}], [{"r": "u"}]), ({}, []), (0.5, 2**53 + 1), (2**63, -1)],
)
def test_runs_without_a_type_in_common_are_json_text(first: Any, second: Any) -> None:
    tables, _ = in_runs(lines({"a": first}, {"a": second}), 1, 10**6)
    assert [json_text(table, "a") for table in tables] == [[first], [second]]


VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([2**53, 2**53 + 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1])
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.sampled_from(["2024-01-01", "null", "{}", "12345678901234567890"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(st.none() | inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", ""]), inner, max_size=2)
    ),
    max_leaves=5,
)


def as_in_table(value: Any, dtype: pa.DataType) -> Any:
    """What a column of this type holds of a value: an absent key is a null there."""
    if value is None or not (pa.types.is_struct(dtype) or pa.types.is_list(dtype)):
        return value
    if pa.types.is_list(dtype):
        return [as_in_table(inner, dtype.value_type) for inner in value]
    assert value.keys() <= {field.name for field in dtype}
    return {field.name: as_in_table(value.get(field.name), field.type) for field in dtype}


@given(
    # Columns of like values, so that types are found, and of any.
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "any": VALUE,
                "ints": st.lists(st.none() | st.integers(0, 2**64 - 1), max_size=3),
                "turns": st.lists(
                    st.none() | st.fixed_dictionaries({"r": st.none() | st.text(max_size=2)}),
                    max_size=3,
                ),
                "n": st.none() | st.floats(allow_nan=False) | st.integers(-9, 9),
            },
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 8),
)
@settings(max_examples=300)
def test_rows_are_what_json_gives_for_the_lines_in_their_order(
    rows: list[dict[str, Any]], max_rows: int
) -> None:
    if not any(rows):
        return
    data = lines(*rows)
    tables, errors = in_runs(data, max_rows, 10**6)
    table = pa.concat_tables(tables)
    assert errors == {} and table.num_rows == len(rows)
    for field in table.schema:
        if field.type == pa.json_(pa.string()):
            assert json_text(table, field.name) == [row.get(field.name) for row in rows]
        else:
            want = [as_in_table(row.get(field.name), field.type) for row in rows]
            assert table[field.name].to_pylist() == want
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)  # what cannot be written would fail after it was scored
    assert pq.read_table(pa.BufferReader(sink.getvalue())).equals(table)


@given(st.lists(LINE, max_size=12), st.integers(1, 5))
def test_values_of_lines_are_what_json_gives(some: list[bytes], max_rows: int) -> None:
    data = b"\n".join(some)
    try:
        scanned = scan_lines(io.BytesIO(data), "a", max_rows=max_rows, max_bytes=10**6)
    except ShardError:
        return
    assert scanned is not None
    found, _ = scanned
    for index in range(len(found.runs)):
        part = found.part(index, index + 1)
        piece = b"".join(data[start:stop] for start, stop in part.spans)
        columns, errors = read_line_values(piece, part, ["a", "b", "new"])
        table, same = read_lines(piece, part)
        assert errors == same
        good = [line for line in piece.split(b"\n") if line and not line.isspace()]
        for row, line in enumerate(good):
            want = {} if row in errors else json.loads(line) or {}
            assert [columns[name][row] for name in ("a", "b", "new")] == [
                want.get("a"), want.get("b"), None,
            ]  # fmt: skip
        assert table.num_rows == len(good)


def test_absent_keys_and_nulls_stay_apart_in_values() -> None:
    rows = [{"m": [{"role": "user", "name": None}]}, {"m": [{"role": "user"}]}, {}]
    scanned = scan_lines(io.BytesIO(lines(*rows)), "a", max_rows=9, max_bytes=10**6)
    assert scanned is not None
    columns, errors = read_line_values(lines(*rows), scanned[0], ["m"])
    assert (columns, errors) == ({"m": [*(row["m"] for row in rows[:2]), None]}, {})
    array, _ = read_json_values(json.dumps(rows).encode(), "a", ["m"])
    assert array == columns


@pytest.mark.parametrize("first", [[None, "x"], [None, None], [[None, 1]], [{"b": [None, 1]}]])
def test_nulls_that_begin_a_list_stay_in_their_row(first: list[Any]) -> None:
    rows = [{"a": first, "n": 1}, {"a": first[::-1], "n": 2}, {"a": [], "n": 3}]
    for data in (lines(*rows), json.dumps(rows).encode()):
        table, _ = read_json_table(data, "a")
        assert table.to_pylist() == rows
    tables, _ = in_runs(lines(*rows), 2, 10**6)
    assert pa.concat_tables(tables).to_pylist() == rows


def test_an_array_is_not_cut() -> None:
    data = json.dumps(ROWS, indent=2).encode()
    assert scan_lines(io.BytesIO(data), "a", max_rows=1, max_bytes=10) is None


def zstd(data: bytes) -> bytes:
    packed: bytes = pa.compress(data, "zstd", asbytes=True)
    return packed


def test_broken_files_are_refused_wherever_they_break() -> None:
    for pack in (partial(gzip.compress, mtime=0), zstd):
        whole = pack(lines(*ROWS) * 20)
        for broken in (whole[:-3], whole[:30], whole[:5] + b"nonsense"):
            with pytest.raises(ShardError, match=r"broken (gzip|zstd)"):
                in_runs(broken, 10, 100)


def test_packed_parts_that_follow_each_other_are_one_file() -> None:
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    for first, second in (
        (gzip.compress(lines(ROWS[0])), gzip.compress(lines(ROWS[1]))),
        (zstd(lines(ROWS[0])), skippable + zstd(lines(ROWS[1]))),
        (skippable + zstd(lines(ROWS[0])[:7]), zstd(lines(ROWS[0])[7:] + lines(ROWS[1]))),
    ):
        tables, _ = in_runs(first + second, 1, 100)
        assert pa.concat_tables(tables).to_pylist() == ROWS
