"""CSV and TSV as tables of text: every value as it stands in the file, every row in its place."""

import csv
import gzip
import io
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.errors import RowReason, ShardError
from batch_scorer.formats import read_delimited, scan_delimited, unpack_lines
from batch_scorer.records import RowError


def in_runs(
    data: bytes, max_rows: int = 100, max_bytes: int = 10**6, delimiter: str = ","
) -> tuple[pa.Table, dict[int, RowError], list[int]]:
    """The rows of all runs, each read on its own; the errors; the number of rows of each run."""
    limits: Any = {"delimiter": delimiter, "max_rows": max_rows, "max_bytes": max_bytes}
    lines, first = scan_delimited(io.BytesIO(data), "in/a.csv", **limits)
    tables, errors, before = [lines.schema.empty_table()], {}, 0
    for index, run in enumerate(lines.runs):
        part = lines.part(index, index + 1)
        piece = b"".join(data[start:stop] for start, stop in part.spans)
        if lines.codec:
            piece = unpack_lines(io.BytesIO(data), "in/a.csv", part)
        table, bad = read_delimited(piece, "in/a.csv", part)
        assert table.num_rows == run.num_rows <= max_rows
        assert run.num_rows == 1 or run.stop - run.start <= max_bytes
        if index == 0:
            assert first.equals(table)
        tables.append(table)
        errors |= {before + row: error for row, error in bad.items()}
        before += run.num_rows
    return pa.concat_tables(tables), errors, [run.num_rows for run in lines.runs]


def test_every_value_is_text() -> None:
    data = b'\xef\xbb\xbf,id,answer\r\n0,007,"a ""b"", c\r\nd"\r\n\r\n1,1e5,\r\n'
    data += b'2,NA,"\xc3\xbc\x00"\r\n'
    for packed in (data, gzip.compress(data), pa.compress(data, "zstd", asbytes=True)):
        table, errors, _ = in_runs(packed)
        assert (table.to_pylist(), errors) == (
            [
                {"": "0", "id": "007", "answer": 'a "b", c\r\nd'},
                {"": "1", "id": "1e5", "answer": ""},
                {"": "2", "id": "NA", "answer": "ü\0"},
            ],
            {},
        )


def test_tabs_separate_where_they_are_asked_for() -> None:
    table, _, _ = in_runs(b'a\tb\n1,2\t"x\ty"\n', delimiter="\t")
    assert table.to_pylist() == [{"a": "1,2", "b": "x\ty"}]


@given(
    st.lists(st.tuples(st.text(max_size=6), st.text(alphabet='a",\n\r\t', max_size=6)), max_size=9),
    st.sampled_from([",", "\t"]),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(1, 5),
    st.integers(1, 40),
)
def test_what_was_written_comes_back_in_its_order(
    rows: list[tuple[str, str]], delimiter: str, end: str, max_rows: int, max_bytes: int
) -> None:
    sink = io.StringIO()
    writer = csv.writer(
        sink, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL, strict=True
    )
    writer.writerows([("left", "right"), *rows])
    table, errors, runs = in_runs(sink.getvalue().encode(), max_rows, max_bytes, delimiter)
    assert errors == {} and sum(runs) == len(rows)
    assert [tuple(row.values()) for row in table.to_pylist()] == rows


def test_rows_that_do_not_fit_keep_their_place() -> None:
    data = b'a,b\n1,2\n"x\ny"\n\n1,2,3\n\xff,2\n5,6\n'
    for max_rows in (1, 2, 10):
        table, errors, _ = in_runs(data, max_rows)
        assert table["a"].to_pylist() == ["1", None, None, None, "5"]
        assert {row: error.detail for row, error in errors.items()} == {
            1: "line 3: 1 values, and the header names 2",
            2: "line 6: 3 values, and the header names 2",
            3: "line 7: not UTF-8",
        }
        reasons = [error.reason for error in errors.values()]
        assert reasons == [RowReason.BAD_STRUCTURE] * 2 + [RowReason.NOT_UTF8]


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"a,a\n1,2\n", "names a twice"),
        (b'a,b\n1,"x"y\n', "row that begins in line 2: ',' expected after '\"'"),
        (b'a,b\n\n1,2\n3,"x\n4,5\n', "row that begins in line 4: unexpected end of data"),
        (b"a\xff,b\n", "header is not UTF-8"),
    ],
)
def test_a_file_whose_rows_nobody_can_tell_is_refused(data: bytes, cause: str) -> None:
    with pytest.raises(ShardError, match=r"^in/a.csv: ") as raised:
        in_runs(data)
    assert cause in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"a,b\n", b"\na,b\r\n\r\n"])
def test_a_file_without_rows_is_empty(data: bytes) -> None:
    table, errors, runs = in_runs(data)
    assert (table.num_rows, errors, runs) == (0, {}, [])


def test_a_value_may_be_long() -> None:
    long = "x" * 3_000_000
    table, _, _ = in_runs(f"a\n{long}\n".encode())
    assert table["a"].to_pylist() == [long]
