"""Parquet: types, layouts, names, damage, and footers that say what is not so."""

import datetime
import decimal
import gzip
import io
import uuid
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.corpus.case import Case, asks, file_case, lines
from tests.helpers.parquet_footer import (
    GROUP_NUM_ROWS,
    NUM_ROWS,
    NUM_VALUES,
    Struct,
    chunks,
    read_footer,
    row_groups,
    with_footer,
)

KEY = "m.parquet"
SCHEMA = pa.schema([("prompt", pa.string()), ("response", pa.string())])
ROWS = 4


def written(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def asked(rows: int = ROWS) -> pa.Table:
    return pa.Table.from_pylist(asks(rows), SCHEMA)


def beside(column: pa.Array, name: str = "x") -> pa.Table:
    """Rows that can be scored, with a column that is not read."""
    return asked(len(column)).append_column(name, column)


DAY = datetime.datetime(2026, 11, 28, 12, 30, 15)
NAN, INFINITY = float("nan"), float("inf")
LOW, HIGH = -(2**63), 2**63 - 1


def nested(depth: int) -> pa.Array:
    value: Any = 1
    kind: pa.DataType = pa.int32()
    for _ in range(depth):
        value, kind = [value], pa.list_(kind)
    return pa.array([value, None], kind)


def structs(depth: int) -> pa.Array:
    value: Any = 1
    kind: pa.DataType = pa.int32()
    for _ in range(depth):
        value, kind = {"a": value}, pa.struct([("a", kind)])
    return pa.array([value, None], kind)


def not_utf8(texts: list[bytes], kind: pa.DataType | None = None) -> pa.Array:
    """A column of text whose bytes need not be any."""
    binary = pa.array(texts, pa.binary())
    plain = pa.Array.from_buffers(pa.string(), len(texts), binary.buffers())
    return plain if kind is None else plain.cast(kind)


def dictionary(values: list[Any]) -> pa.Array:
    return pa.array(values).dictionary_encode()


TYPES: dict[str, Callable[[], pa.Array]] = {
    "null": lambda: pa.nulls(2),
    "bool": lambda: pa.array([True, None]),
    **{
        str(kind): lambda kind=kind: pa.array([0, 1, None], kind)
        for kind in (
            pa.int8(),
            pa.int16(),
            pa.int32(),
            pa.uint8(),
            pa.uint16(),
            pa.uint32(),
            pa.date32(),
            pa.date64(),
            pa.time32("s"),
            pa.time32("ms"),
            pa.time64("us"),
            pa.time64("ns"),
            pa.duration("s"),
            pa.duration("ms"),
            pa.duration("us"),
            pa.duration("ns"),
            pa.timestamp("s"),
            pa.timestamp("ms"),
            pa.timestamp("us"),
            pa.timestamp("ns"),
            pa.timestamp("us", "UTC"),
            pa.timestamp("ms", "Asia/Tokyo"),
            pa.timestamp("us", "+05:30"),
        )
    },
    "int64 at its ends": lambda: pa.array([LOW, HIGH, None]),
    "uint64 at its end": lambda: pa.array([0, 2**64 - 1], pa.uint64()),
    "float16": lambda: pa.array([1.5, None, NAN], pa.float16()),
    "float32 that is no number": lambda: pa.array([NAN, INFINITY, -INFINITY, -0.0], pa.float32()),
    "float64 that is no number": lambda: pa.array([NAN, INFINITY, None, 5e-324]),
    "timestamp at its end": lambda: pa.array([HIGH, LOW], pa.timestamp("us")),
    "date beyond Python's": lambda: pa.array([2**31 - 1, -(2**31)], pa.int32()).cast(pa.date32()),
    "decimal32": lambda: pa.array([decimal.Decimal("1.23"), None], pa.decimal32(5, 2)),
    "decimal64": lambda: pa.array([decimal.Decimal("1.23"), None], pa.decimal64(12, 2)),
    "decimal128": lambda: pa.array([decimal.Decimal("-" + "9" * 38), None], pa.decimal128(38, 0)),
    "decimal256": lambda: pa.array([decimal.Decimal("1.23"), None], pa.decimal256(70, 30)),
    "binary": lambda: pa.array([b"", b"\0\xff", None]),
    "large binary": lambda: pa.array([b"\xff", None], pa.large_binary()),
    "fixed binary": lambda: pa.array([b"abcd", None], pa.binary(4)),
    "binary view": lambda: pa.array([b"\xff" * 40, None], pa.binary_view()),
    "string view": lambda: pa.array(["a" * 40, "", None], pa.string_view()),
    "large string": lambda: pa.array(["a", None], pa.large_string()),
    "text with a zero": lambda: pa.array(["a\0b", "\U0001f600"]),
    "list": lambda: pa.array([[1, None], [], None]),
    "large list": lambda: pa.array([[1], None], pa.large_list(pa.int8())),
    "fixed list": lambda: pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)),
    "list of text": lambda: pa.array([["a", None], None]),
    "list of NaN": lambda: pa.array([[NAN, 1.0], [None], []]),
    "struct of NaN": lambda: pa.array([{"a": NAN}, {"a": None}, None]),
    "struct": lambda: pa.array([{"a": 1, "b": None}, None]),
    "map": lambda: pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int32())),
    "map with a key twice": lambda: pa.array(
        [[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int32())
    ),
    "map of NaN": lambda: pa.array([[("a", NAN)], None], pa.map_(pa.string(), pa.float64())),
    "dictionary": lambda: dictionary(["a", "b", "a", None]),
    "dictionary of numbers": lambda: dictionary([1, 2, 1]),
    "dictionary of NaN": lambda: dictionary([NAN, 1.0, NAN]),
    "list of structs of lists": lambda: pa.array([[{"a": [1]}], [{"a": None}], None]),
    "struct with two fields of one name": lambda: pa.StructArray.from_arrays(
        [pa.array([1]), pa.array(["b"])], ["a", "a"]
    ),
    "lists 20 deep": lambda: nested(20),
    "structs 50 deep": lambda: structs(50),
    "uuid": lambda: pa.array([uuid.UUID(int=1).bytes, None], pa.uuid()),
    "JSON": lambda: pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', "not JSON"])),
    "bool8": lambda: pa.ExtensionArray.from_storage(pa.bool8(), pa.array([0, 1], pa.int8())),
    "long text": lambda: pa.array(["a" * 300_000, None]),
}

TEXTS: dict[str, pa.DataType] = {
    "string": pa.string(),
    "large string": pa.large_string(),
    "string view": pa.string_view(),
    "dictionary of text": pa.dictionary(pa.int32(), pa.string()),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "version 1.0": {"version": "1.0"},
    "version 2.4": {"version": "2.4"},
    "pages of version 2": {"data_page_version": "2.0"},
    "tiny pages": {"data_page_size": 1, "write_batch_size": 1},
    "tiny pages of version 2": {
        "data_page_size": 1, "write_batch_size": 1, "data_page_version": "2.0",
    },
    **{
        f"codec {codec}": {"compression": codec}
        for codec in ("none", "snappy", "gzip", "brotli", "lz4", "zstd")
    },
    "page checksums": {"write_page_checksum": True},
    "page checksums, version 2": {"write_page_checksum": True, "data_page_version": "2.0"},
    "a page index": {"write_page_index": True},
    "no dictionary": {"use_dictionary": False},
    "no statistics": {"write_statistics": False},
    "no Arrow schema": {"store_schema": False},
    "delta lengths": {"use_dictionary": False, "column_encoding": "DELTA_LENGTH_BYTE_ARRAY"},
    "deltas": {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"},
    "sorted by nothing": {"sorting_columns": [pq.SortingColumn(0)]},
    "a group for each row": {"row_group_size": 1},
}  # fmt: skip

NAMES = {
    "empty": "", "a dot": "a.b", "dots": "..", "a slash": "a/b", "a space": " ",
    "a line feed": "a\nb",
    "a zero": "a\0b", "an emoji": "\U0001f600", "right to left": "\u202eabc", "a quote": '"',
    "a backslash": "a\\b", "long": "n" * 5000, "other case": "PROMPT", "like a record": "_SUCCESS",
    "a format string": "{0} %s", "a tag": "[bold]x[/bold]",
}  # fmt: skip


def groups(*sizes: int) -> bytes:
    """A file with row groups of these sizes."""
    sink = io.BytesIO()
    table = asked(max(sizes, default=0))
    with pq.ParquetWriter(sink, asked(1).schema) as writer:
        for size in sizes:
            writer.write_table(table.slice(0, size))
    return sink.getvalue()


def renamed(table: pa.Table, names: list[str]) -> bytes:
    return written(table.rename_columns(names))


def overwritten(data: bytes, at: int, new: bytes) -> bytes:
    at %= len(data)
    return data[:at] + new + data[at + len(new) :]


def damaged_page(**options: Any) -> bytes:
    """The first page of the prompts is not what was packed."""
    data = written(asked(200), compression="zstd", use_dictionary=False, **options)
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0)
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    return overwritten(data, middle, b"\xff" * (chunk.total_compressed_size // 4))


def changed_text(**options: Any) -> bytes:
    """One letter of a prompt is another one."""
    data = written(asked(ROWS), compression="none", use_dictionary=False, **options)
    return overwritten(data, data.index(b"What is 2"), b"Whot is 2")


def footer_with(change: Callable[[Struct], object]) -> bytes:
    """A file of two row groups of four rows, under a changed footer."""
    data = written(asked(8), row_group_size=4)
    footer = read_footer(data)
    change(footer)
    return with_footer(data, footer)


def all_rows(footer: Struct, rows: int) -> None:
    """So many rows of a group, wherever a footer has their number."""
    footer[NUM_ROWS] = 2 * rows
    for group in row_groups(footer):
        group[GROUP_NUM_ROWS] = rows
    for chunk in chunks(footer):
        chunk[NUM_VALUES] = rows


def group_rows(footer: Struct, rows: int) -> None:
    row_groups(footer)[0][GROUP_NUM_ROWS] = rows


def total_rows(footer: Struct, rows: int) -> None:
    footer[NUM_ROWS] = rows


FOOTERS: dict[str, tuple[Callable[[Struct], object], str]] = {
    "more rows than there are": (lambda footer: all_rows(footer, 5), "wrong_row_count"),
    "far more rows than there are": (lambda footer: all_rows(footer, 10**9), "too_large"),
    "another total": (lambda footer: total_rows(footer, 9), "wrong_row_count"),
    "a total of 0": (lambda footer: total_rows(footer, 0), "wrong_row_count"),
    "a total below 0": (lambda footer: total_rows(footer, -1), "wrong_row_count"),
    "no groups, but rows": (lambda footer: row_groups(footer).clear(), "wrong_row_count"),
    "a group less": (lambda footer: row_groups(footer).pop(), "wrong_row_count"),
    "a group twice": (
        lambda footer: row_groups(footer).append(row_groups(footer)[0]),
        "wrong_row_count",
    ),
    "a group of more rows": (lambda footer: group_rows(footer, 6), "wrong_row_count"),
    "a group of fewer rows": (lambda footer: group_rows(footer, 2), "wrong_row_count"),
    "a group of rows below 0": (lambda footer: group_rows(footer, -4), "wrong_row_count"),
}

SOUND = written(asked())
DAMAGED: dict[str, bytes | Callable[[], bytes]] = {
    "empty": b"",
    "one byte": b"P",
    "the mark alone": b"PAR1",
    "two marks": b"PAR1PAR1",
    "zeros": bytes(1000),
    "all bytes": bytes(range(256)) * 4,
    "text": b"prompt,response\na,b\n",
    "JSON lines": lines(asks(2)),
    "packed": gzip.compress(SOUND),
    "an Arrow file": b"ARROW1\0\0" + bytes(100),
    "cut in the middle": SOUND[: len(SOUND) // 2],
    "cut by one byte": SOUND[:-1],
    "cut by the end mark": SOUND[:-4],
    "cut by the footer's length": SOUND[:-8],
    "without its first half": SOUND[len(SOUND) // 2 :],
    "bytes behind it": SOUND + b"\n",
    "another mark": overwritten(SOUND, -4, b"PAR2"),
    "the mark of an encrypted file": overwritten(SOUND, -4, b"PARE"),
    "a footer longer than the file": overwritten(SOUND, -8, b"\xff\xff\xff\x7f"),
    "a footer of negative length": overwritten(SOUND, -8, b"\xff\xff\xff\xff"),
    "a footer of no length": overwritten(SOUND, -8, b"\0\0\0\0"),
    "a footer of zeros": overwritten(
        SOUND, -8 - int.from_bytes(SOUND[-8:-4], "little"), bytes(200)
    ),
    "a damaged page": damaged_page,
    "a damaged page with a checksum": lambda: damaged_page(write_page_checksum=True),
}


def repeated(names: list[str]) -> bytes:
    first, second = pa.array(["a", "b"]), pa.array([1.0, NAN])
    table = beside(first, "x").append_column("y", second)
    return renamed(table, ["prompt", "response", *names])


def texts_as(kind: pa.DataType) -> bytes:
    table = asked()
    return written(
        pa.table({n: pa.array(table[n].to_pylist()).cast(kind) for n in table.column_names})
    )


def overwritten_name() -> bytes:
    """A column whose name is no text in the footer."""
    data = written(beside(pa.array([1]), "xyzxyz"), store_schema=False)
    return data.replace(b"xyzxyz", b"xy\xff\xfeyz")


def with_bad_text(bad_row: int, rows: int, column: str) -> bytes:
    """Rows of which one has a text that is none, in that column."""
    table = asked(rows)
    texts = [text.encode() for text in table["response"].to_pylist()]
    texts[bad_row] = b"It is \xff\xfe."
    array = not_utf8(texts)
    if column == "response":
        return written(table.set_column(1, "response", array))
    return written(table.append_column(column, array))


CASES: list[Case] = [
    *(
        file_case(f"beside {name}", KEY, lambda make=make: written(beside(make())), len(make()))
        for name, make in TYPES.items()
    ),
    *(
        file_case(f"text as {name}", KEY, lambda kind=kind: texts_as(kind), ROWS)
        for name, kind in TEXTS.items()
    ),
    *(
        file_case(name, KEY, lambda options=options: written(asked(), **options), ROWS)
        for name, options in OPTIONS.items()
    ),
    *(
        file_case(f"a name: {name}", KEY, lambda odd=odd: written(beside(pa.array([1, 2]), odd)), 2)
        for name, odd in NAMES.items()
    ),
    file_case("two columns of one name", KEY, lambda: repeated(["x", "x"]), 2),
    file_case(
        "two prompts", KEY,
        lambda: renamed(beside(pa.array(["a"])), ["prompt", "response", "prompt"]),
        failed="wrong_schema",
    ),
    file_case("a score column", KEY, lambda: written(beside(pa.array([1.0]), "score")),
              failed="column_collision"),
    file_case("a score_error column", KEY, lambda: written(beside(pa.array(["a"]), "score_error")),
              failed="column_collision"),
    file_case("a score column under a prefix", KEY,
              lambda: written(beside(pa.array([1.0]), "score")), 1,
              flags=("--column-prefix", "rm_")),
    file_case("no columns", KEY, lambda: written(pa.table({})), failed="wrong_schema"),
    file_case("other columns", KEY, lambda: written(pa.table({"a": [1]})), failed="wrong_schema"),
    file_case("numbers as texts", KEY,
              lambda: written(pa.table({"prompt": [1], "response": [2]})), failed="wrong_schema"),
    file_case("binary as text", KEY,
              lambda: written(pa.table({"prompt": [b"a"], "response": [b"b"]})),
              failed="wrong_schema"),
    file_case("1000 columns", KEY,
              lambda: written(pa.table({"prompt": ["a"], "response": ["b"],
                                        **{f"c{i}": [i] for i in range(1000)}})), 1),
    file_case("no rows", KEY, lambda: written(asked(0))),
    file_case("no groups", KEY, lambda: groups()),
    file_case("an empty group alone", KEY, lambda: groups(0)),
    file_case("empty groups between", KEY, lambda: groups(0, 2, 0, 3, 0), 5),
    file_case("300 groups", KEY, lambda: written(asked(300), row_group_size=1), 300),
    file_case("groups over shards", KEY, lambda: groups(5, 1, 7, 2), 15,
              flags=("--shard-rows", 3)),
    file_case("nulls", KEY, lambda: written(pa.table({"prompt": ["a", None, "b"],
                                                      "response": ["x", "y", None]})), 1,
              marked={"null_value": 2}),
    file_case("only nulls", KEY, lambda: written(pa.table({
        "prompt": pa.array([None, None], pa.string()),
        "response": pa.array([None, None], pa.string())})), marked={"null_value": 2}),
    file_case("empty texts", KEY, lambda: written(pa.table({"prompt": ["a", "", " "],
                                                            "response": ["", "b", "\n"]})),
              marked={"empty": 3}),
    *(
        file_case(f"not UTF-8, row {row} of {rows}", KEY,
                  lambda row=row, rows=rows: with_bad_text(row, rows, "response"), rows - 1,
                  marked={"not_utf8": 1})
        for row, rows in ((0, 3), (2, 3), (50, 60))
    ),
    file_case("not UTF-8 where it is not read", KEY, lambda: with_bad_text(1, 3, "x"), 3),
    file_case("a name that is not UTF-8", KEY,
              overwritten_name, failed="unreadable_file"),
    *(file_case(f"damage: {name}", KEY, data, failed="unreadable_file")
      for name, data in DAMAGED.items()),
    file_case("a changed letter under a checksum", KEY,
              lambda: changed_text(write_page_checksum=True), failed="unreadable_file"),
    file_case("a changed letter without a checksum", KEY, changed_text, ROWS),
    *(
        file_case(f"a footer with {name}", KEY, lambda change=change: footer_with(change),
                  failed=reason)
        for name, (change, reason) in FOOTERS.items()
    ),
    # Footer and columns agree; the rows beyond are those of no reader.
    file_case("a footer with fewer rows than there are", KEY,
              lambda: footer_with(lambda footer: all_rows(footer, 3)), 6),
    file_case("suffix in capitals", "M.PARQUET", SOUND, ROWS),
    file_case("snappy in the name", "m.snappy.parquet", SOUND, ROWS),
]  # fmt: skip
