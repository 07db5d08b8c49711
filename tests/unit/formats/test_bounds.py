"""What a row may take: one that takes more is marked, and costs nothing but itself."""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.config import Config
from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.formats import (
    bounded,
    columns_of,
    read_delimited,
    read_json_table,
    read_json_values,
    read_line_values,
    read_lines,
    scan_delimited,
    scan_lines,
    unpack_lines,
)
from batch_scorer.formats import packed as packing
from batch_scorer.formats.bounded import are_within, elements_of, fault_of, fault_of_literal
from batch_scorer.formats.encoded import decode
from batch_scorer.formats.lines import lines_of
from batch_scorer.formats.values import texts_of
from batch_scorer.inputs.files import columns_of_shard, rows_of_shard
from batch_scorer.inputs.plan import make_plan
from batch_scorer.outputs.by_source import row_sources
from batch_scorer.records import DEFAULT_BOUNDS, ReadBounds, RowError
from batch_scorer.shard import parse_shard

SMALL = ReadBounds(max_row_bytes=60, max_nesting=3, max_keys=4)

VALUE = st.recursive(
    st.none() | st.integers() | st.sampled_from(["", "[{:,", "\\", '\\"[', 'a"{', "x\\\\", "}}]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b:{", 'c"', "d\\", "e"]), inner, max_size=3)
    ),
    max_leaves=12,
)


def depth(value: Any) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value
    return 1 + max(map(depth, inner), default=0) if isinstance(inner, list) else 0


def most_keys(value: Any) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(inner, list):
        return 0
    own = len(value) if isinstance(value, dict) else 0
    return max([own, *map(most_keys, inner)])


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """So that marks and strings lie across the blocks that are looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded, "_BLOCK_BYTES", 7)
        yield


@given(VALUE, st.integers(1, 4), st.integers(1, 3))
def test_nesting_and_keys_are_counted_as_a_parser_finds_them(
    value: Any, max_nesting: int, max_keys: int
) -> None:
    bounds = ReadBounds(max_nesting=max_nesting, max_keys=max_keys)
    line = json.dumps(value).encode()
    fault = fault_of(line, bounds)
    if depth(value) > max_nesting:
        want: RowReason | None = RowReason.TOO_NESTED
    else:
        want = RowReason.TOO_MANY_KEYS if most_keys(value) > max_keys else None
    assert (fault and fault.reason) == want
    lines = b'{"a": 1}\n' + line + b"\n"
    data = pa.array([9, len(lines)]).to_numpy()
    assert are_within(lines, data, bounds) == (want is None)


@given(st.lists(VALUE, max_size=4), st.sampled_from([None, 1]))
def test_elements_of_an_array_are_where_a_parser_finds_them(
    values: list[Any], indent: int | None
) -> None:
    array = json.dumps(values, indent=indent).encode()
    spans = elements_of(array)
    assert spans is not None
    assert [json.loads(array[start:stop]) for start, stop in spans] == values


@pytest.mark.parametrize("array", ["[1,]", "[,1]", "[1] 2", "[{]", "[1]]", '["a]', "x[1]", "[1"])
def test_what_is_not_one_array_has_no_elements(array: str) -> None:
    assert elements_of(array.encode()) is None


ROWS: list[tuple[bytes, RowReason | None]] = [
    (b'{"a": "first"}', None),
    (b'{"a": "' + b"x" * 60 + b'"}', RowReason.ROW_TOO_LARGE),
    (b'{"a": "[[[[[[{{{{{{", "b": [[1]]}', None),
    (b'{"a": "x", "b": [[[1]]]}', RowReason.TOO_NESTED),
    (b'{"a": "x", "c": 1, "d": 2, "e": 3, "f": 4}', RowReason.TOO_MANY_KEYS),
    (b'{"a": "\xff"}', RowReason.NOT_UTF8),
    (b'{"a": "' + b"y" * 200 + b'"}', RowReason.ROW_TOO_LARGE),
    (b'{"a": "last"}', None),
]
REASONS = {row: reason for row, (_, reason) in enumerate(ROWS) if reason}
TEXTS = [None if reason else json.loads(line)["a"] for line, reason in ROWS]


@pytest.mark.parametrize("read_bytes", [3, 50, 1 << 20])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_beyond_the_bounds_are_marked_in_their_place(
    pack: Any, read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_READ_BYTES", read_bytes)
    data = b"\n\n" + b"\n".join(line for line, _ in ROWS)
    for max_rows in (1, 3, 100):
        scanned = scan_lines(
            io.BytesIO(pack(data)), "a", max_rows=max_rows, max_bytes=10**6, bounds=SMALL
        )
        assert scanned is not None
        lines, sample = scanned
        assert sample.num_rows and lines.bounds == SMALL
        held = unpack_lines(io.BytesIO(pack(data)), "a", lines)
        assert b"x" * 60 not in held and b"y" * 60 not in held
        table, errors = read_lines(held, lines)
        assert table["a"].to_pylist() == TEXTS
        assert {row: error.reason for row, error in errors.items()} == REASONS
        assert [error.detail.split(":")[0] for error in errors.values()] == [
            f"line {row + 3}" for row in REASONS
        ]
        values, same = read_line_values(held, lines, ["a"])
        assert (values, same) == ({"a": TEXTS}, errors)


def test_elements_beyond_the_bounds_are_marked_in_their_place() -> None:
    array = b"[" + b",\n".join(line for line, _ in ROWS) + b"]"
    table, errors = read_json_table(array, "a", SMALL)
    assert table["a"].to_pylist() == TEXTS
    assert {row: error.reason for row, error in errors.items()} == REASONS
    assert read_json_values(array, "a", ["a"], SMALL) == ({"a": TEXTS}, errors)


def test_one_bad_element_costs_no_other() -> None:
    table, errors = read_json_table(b'[{"a": 1}, {bad}, {"a": 2}]', "a")
    assert table["a"].to_pylist() == [1, None, 2]
    assert errors[1].reason == RowReason.MALFORMED_JSON


@given(
    st.lists(st.sampled_from([b"", b"a", b" ", b"bcdef", b"g" * 12, b"h" * 30]), max_size=9),
    st.integers(1, 40),
    st.integers(1, 20),
)
def test_lines_are_cut_alike_whatever_the_blocks(
    some: list[bytes], read_bytes: int, max_bytes: int
) -> None:
    data = b"\n".join(some)
    blocks = [data[at : at + read_bytes] for at in range(0, len(data), read_bytes)]
    found = list(lines_of(blocks, max_bytes))
    assert b"".join(part for part, _ in found) == data
    longest = max_bytes + max(read_bytes, 1)
    assert all(len(part) <= longest for part, is_part in found if is_part)
    for part, is_part in found:
        if not is_part:
            assert all(len(line) <= max_bytes for line in part.split(b"\n"))
    long = b"".join(part for part, is_part in found if is_part).split(b"\n")
    assert [line for line in long if line] == [line for line in some if len(line) > max_bytes]


@given(
    st.lists(st.tuples(*[st.text(alphabet='ab",\n\r', max_size=30)] * 2), min_size=1, max_size=7),
    st.integers(8, 40),
    st.integers(1, 50),
)
def test_records_beyond_the_bounds_are_marked_in_their_place(
    rows: list[tuple[str, str]], max_row_bytes: int, read_bytes: int
) -> None:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n", quoting=csv.QUOTE_ALL)
    sizes = [writer.writerow(row) - 1 for row in [("a", "b"), *rows]][1:]
    data = sink.getvalue().encode()
    bounds = ReadBounds(max_row_bytes=max_row_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_READ_BYTES", read_bytes)
        lines, _ = scan_delimited(
            io.BytesIO(data), "a.csv", delimiter=",", max_rows=3, max_bytes=10**6, bounds=bounds
        )
        held = unpack_lines(io.BytesIO(data), "a.csv", lines)
    table, errors = read_delimited(held, "a.csv", lines)
    is_large = [size > max_row_bytes for size in sizes]
    want = [(None, None) if large else row for row, large in zip(rows, is_large, strict=True)]
    assert [tuple(row.values()) for row in table.to_pylist()] == want
    assert list(errors) == [row for row, large in enumerate(is_large) if large]
    assert {error.reason for error in errors.values()} <= {RowReason.ROW_TOO_LARGE}


def test_a_header_has_no_more_names_than_keys_may_be() -> None:
    with pytest.raises(ShardError, match="5 names, and max_keys is 4"):
        scan_delimited(
            io.BytesIO(b"a,b,c,d,e\n"), "a", delimiter=",", max_rows=1, max_bytes=9, bounds=SMALL
        )


def test_a_packed_file_stops_at_what_it_may_unpack_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_scorer.records.rows.FREELY_UNPACKED_BYTES", 1000)
    line = b'{"a": "' + b"x" * 90 + b'"}\n'
    few, many = gzip.compress(line * 9), gzip.compress(line * 2000)
    tight = replace(DEFAULT_BOUNDS, max_expansion=2)
    for bounds, data in ((tight, many), (replace(DEFAULT_BOUNDS, max_unpacked_gib=5e-7), few)):
        with pytest.raises(ShardError, match="that unpack to more than") as raised:
            scan_lines(io.BytesIO(data), "a", max_rows=9, max_bytes=999, bounds=bounds)
        assert raised.value.reason == ShardReason.TOO_LARGE
    assert read_json_table(few, "a", tight)[0].num_rows == 9
    assert read_json_table(line * 2000, "a", tight)[0].num_rows == 2000  # it is not packed


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("[{'a': 'x[[[[[(((', \"b\": -1.5e-7}]", None),
        ("['it\\'s', '''it's [[[[''', None, (1,), {1: 2}]", None),
        ("'a' 'b'", None),
        ("[[[[1]]]]", RowReason.TOO_NESTED),
        ("((((1,),),),)", RowReason.TOO_NESTED),
        ("{'a': 1, 'b': 2, 'c': 3, 'd': 4, 'e': 5}", RowReason.TOO_MANY_KEYS),
        *[
            (text, RowReason.MALFORMED_JSON)
            for text in ("f'x'", "a(1)", "1+1+1", "lambda: 1", "--1", "1if 2", "# x", "'a\n'")
        ],
    ],
)
def test_only_literals_within_the_bounds_are_given_to_python(
    text: str, want: RowReason | None
) -> None:
    fault = fault_of_literal(text, SMALL)
    assert (fault and fault.reason) == want
    value = decode(text, "m", replace(SMALL, max_row_bytes=99))
    assert (value.reason if isinstance(value, RowError) else None) == want


# Parquet and Arrow


def not_utf8(values: list[bytes | None]) -> pa.Array:
    """A text column of these bytes."""
    array = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


BYTES = [b"good", b"\xff", None, b"fine"]


@pytest.mark.parametrize(
    ("array", "want"),
    [
        (not_utf8(BYTES), ["good", None, None, "fine"]),
        (pa.ListArray.from_arrays(pa.array([0, 1, 2, 4]), not_utf8(BYTES)), 1),
        (pa.StructArray.from_arrays([not_utf8(BYTES)], ["a"]), 1),
        (pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 3]), not_utf8(BYTES)), 1),
        (pa.ExtensionArray.from_storage(pa.json_(pa.string()), not_utf8(BYTES)), 1),
        (not_utf8(BYTES).view(pa.string()).slice(1), 0),
    ],
)
def test_text_that_is_not_utf8_marks_its_row(array: pa.Array, want: Any) -> None:
    columns, errors = columns_of(pa.table({"x": array, "n": range(len(array))}))
    row = 1 if isinstance(want, list) else want
    assert errors == {row: RowError(RowReason.NOT_UTF8, "x holds text that is not UTF-8")}
    assert columns["n"] == [None if n == row else n for n in range(len(array))]
    assert not isinstance(want, list) or columns["x"] == want


def test_rows_of_columns_are_held_to_the_bounds() -> None:
    table = pa.table({"x": [["a" * 40, "b"], ["c" * 61], None], "n": [1, 2, 3]})
    columns, errors = columns_of(table, ["x"], SMALL)
    assert columns == {"x": [["a" * 40, "b"], None, None]}
    assert {row: error.reason for row, error in errors.items()} == {1: RowReason.ROW_TOO_LARGE}
    texts = pa.array(["[[[[1]]]]", "[1]", '{"a":1,"b":1,"c":1,"d":1,"e":1}'])
    array = pa.ExtensionArray.from_storage(pa.json_(pa.string()), texts)
    columns, errors = columns_of(pa.table({"x": array}), None, SMALL)
    assert columns == {"x": [None, [1], None]}
    assert [errors[row].reason for row in (0, 2)] == [
        RowReason.TOO_NESTED,
        RowReason.TOO_MANY_KEYS,
    ]


def test_sources_that_are_not_utf8_have_a_name() -> None:
    table = pa.table({"source": not_utf8(BYTES)})
    assert row_sources(table).tolist() == ["good", "\\xff", "None", "fine"]
    assert texts_of(table["source"])[1] == "\\xff"


def _config(path: Path, **settings: Any) -> Config:
    return Config(model="m", inputs=(str(path),), output="/nowhere", **settings)


@pytest.mark.parametrize("bad", [0, 3, 60])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_one_row_that_is_not_utf8_is_one_marked_row(tmp_path: Path, bad: int, kind: str) -> None:
    texts: list[bytes | None] = [f"text {n}".encode() for n in range(80)]
    answers = not_utf8([b"\xfe\xff" if n == bad else text for n, text in enumerate(texts)])
    beside = not_utf8([b"\xc3", *texts[1:]])
    prompts = pa.array([f"question {n}" for n in range(80)])
    table = pa.table({"prompt": prompts, "response": answers, "beside": beside})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    plan = make_plan(_config(path))
    (shard,) = plan.shards
    parsed = parse_shard(shard, _config(path))
    assert {row: error.reason for row, error in parsed.row_errors.items()} == {
        bad: RowReason.NOT_UTF8
    }
    assert len(parsed.sequences) == 79 and parsed.num_rows == 80
    read, _ = rows_of_shard(shard, {}, None)
    for name in ("response", "beside"):
        given = table[name].chunk(0).view(pa.binary())
        assert read[name].combine_chunks().view(pa.binary()).equals(given)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_shard_is_read_by_the_bounds_of_its_plan(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "p", "response": "x" * size} for size in (5, 50, 6)]
    table = pa.Table.from_pylist(rows)
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(table, path)
    elif name == "a.csv":
        path.write_text("prompt,response\n" + "".join(f"p,{r['response']}\n" for r in rows))
    elif name == "a.json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (shard,) = make_plan(_config(path, max_row_bytes=45)).shards
    columns, errors = columns_of_shard(shard, {}, ["prompt", "response"])
    assert columns["response"] == ["xxxxx", None, "xxxxxx"]
    assert {row: error.reason for row, error in errors.items()} == {1: RowReason.ROW_TOO_LARGE}
    (shard,) = make_plan(_config(path)).shards
    assert columns_of_shard(shard, {}, ["prompt"])[1] == {}
