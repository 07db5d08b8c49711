"""JSON Lines and JSON arrays as tables: rows keep their places, whatever the lines hold."""

import gzip
import io
import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.formats import jsonl, read_json_table, read_lines, scan_lines, unpack_lines
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
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b"[" * 5_000,
    ],
)
def test_malformed_line_is_a_row_of_nulls_in_its_place(bad: bytes) -> None:
    table, errors = read_json_table(b'{"a": "1"}\n\n' + bad + b'\n{"a": "2"}\n', "a")
    assert table.to_pylist() == [{"a": "1"}, {"a": None}, {"a": "2"}]
    assert list(errors) == [1]
    assert errors[1].reason == RowReason.MALFORMED_JSON
    assert errors[1].detail.startswith("line 3: ")


def test_malformed_first_and_last_lines_are_marked() -> None:
    table, errors = read_json_table(b'[1]\n{"a": 1}\n{"a": ', "a")
    assert table.to_pylist() == [{"a": None}, {"a": 1}, {"a": None}]
    assert list(errors) == [0, 2]


def test_object_over_two_lines_is_two_malformed_rows() -> None:
    table, errors = read_json_table(b'{"a": 1}\n{"a": 2\n}\n', "a")
    assert table.to_pylist() == [{"a": 1}, {"a": None}, {"a": None}]
    assert list(errors) == [1, 2]


def test_array_element_that_is_no_object_is_marked() -> None:
    table, errors = read_json_table(b'[{"a": 1}, 5, {"a": 2}]', "a")
    assert table.to_pylist() == [{"a": 1}, {"a": None}, {"a": 2}]
    assert errors[1].detail == "line 2: not a JSON object"


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


@pytest.mark.parametrize(
    ("second", "third"),
    [({"a": 1}, {"a": "x"}), ({"a": "x"}, {"a": [{"role": "user"}]}), ({"a": ["x"]}, {"a": [[1]]})],
)
def test_rows_that_disagree_about_a_type_fail_the_file(second: Any, third: Any) -> None:
    message = refused(b"\n" + lines(second, third))
    assert "line 3: " in message
    assert "changed from" in message


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
        if lines.is_gzip:
            unpacked = unpack_lines(io.BytesIO(data), "in/a.jsonl", part)
        else:
            unpacked = data[part.start : part.stop]
        table, bad = read_lines(unpacked, "in/a.jsonl", part)
        assert table.num_rows == run.num_rows
        tables.append(table)
        errors |= {before + row: error for row, error in bad.items()}
        before += run.num_rows
    assert first.equals(tables[0] if tables else pa.table({}))
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
        patch.setattr(jsonl, "_READ_BYTES", read_bytes)
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
    [({"a": 1}, {"a": "x"}), ({"a": [{"r": 1}]}, {"a": [{"r": "u"}]}), ({"a": {}}, {"a": []})],
)
def test_runs_that_disagree_about_a_type_fail_the_file(first: Any, second: Any) -> None:
    with pytest.raises(ShardError, match=r"in/a.jsonl: lines from 2: .* held .* before"):
        in_runs(lines(first, second), 1, 10**6)


def test_an_array_is_not_cut() -> None:
    data = json.dumps(ROWS, indent=2).encode()
    assert scan_lines(io.BytesIO(data), "a", max_rows=1, max_bytes=10) is None


def test_broken_gzip_is_refused_wherever_it_breaks() -> None:
    whole = gzip.compress(lines(*ROWS), mtime=0)
    for broken in (whole[:-9], whole[:30], b"\x1f\x8bnonsense"):
        with pytest.raises(ShardError, match="broken gzip"):
            in_runs(broken, 10, 100)
