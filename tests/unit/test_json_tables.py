"""JSON Lines and JSON arrays as tables: rows keep their places, whatever the lines hold."""

import gzip
import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.formats import read_json_table

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
    for more in (b"", b"{bad}\n"):
        table, errors = read_json_table(b'{"a": 1}\nnull\n' + more, "a")
        assert table.to_pylist()[1] == {"a": None}
        assert 1 not in errors


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
