"""Arrow's own files."""

import io
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather

from tests.corpus.case import Case, file_case
from tests.corpus.parquet_files import TYPES, asked, beside, not_utf8, overwritten

KEY = "m.arrow"
ROWS = 4


def indexed(table: pa.Table, rows: int | None = None, **options: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, rows)
    return sink.getvalue()


def stream(table: pa.Table, rows: int | None = None) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, rows)
    return sink.getvalue()


def feathered(**options: Any) -> bytes:
    sink = io.BytesIO()
    feather.write_feather(asked(), sink, **options)
    return sink.getvalue()


FILE, STREAM = indexed(asked()), stream(asked())
ODD = (
    "null", "bool", "float16", "float64 that is no number", "decimal32", "decimal256",
    "binary view", "string view", "large list", "fixed list", "map", "dictionary",
    "struct of NaN", "list of structs of lists", "uuid", "timestamp[us, tz=UTC]",
)  # fmt: skip
ONLY_ARROW: dict[str, Callable[[], pa.Array]] = {
    "list view": lambda: pa.array([[1], None], pa.list_view(pa.int32())),
    "months, days, nanoseconds": lambda: pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
    "run ends": lambda: pa.RunEndEncodedArray.from_arrays([1, 3], ["a", "b"]),
    "a union": lambda: pa.UnionArray.from_sparse(
        pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])]
    ),
}
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "the mark alone": b"ARROW1\0\0",
    "zeros": bytes(200),
    "text": b"hello\n" * 20,
    "a Parquet file": b"PAR1" + bytes(60) + b"PAR1",
    "Feather 1": b"FEA1" + bytes(60) + b"FEA1",
    "cut in the middle": FILE[: len(FILE) // 2],
    "cut by one byte": FILE[:-1],
    "cut by the end mark": FILE[:-6],
    "a footer longer than the file": overwritten(FILE, -10, b"\xff\xff\xff\x7f"),
    "a footer of negative length": overwritten(FILE, -10, b"\xff\xff\xff\xff"),
    "a cut stream": STREAM[: len(STREAM) // 2],
    "a stream cut in its schema": STREAM[:30],
}


def with_bad_text(kind: str) -> bytes:
    responses = not_utf8([b"ok", b"\xff", b"fine"])
    table = pa.table({"prompt": ["a", "b", "c"], kind: responses})
    return indexed(table if kind == "response" else table.append_column("response", [["d"] * 3]))


CASES: list[Case] = [
    file_case("indexed", KEY, FILE, ROWS),
    file_case("a stream", KEY, STREAM, ROWS),
    file_case("Feather", "m.feather", feathered(), ROWS),
    *(
        file_case(f"Feather, {codec}", "m.feather",
                  lambda codec=codec: feathered(compression=codec), ROWS)
        for codec in ("uncompressed", "lz4", "zstd")
    ),
    file_case("batches of one row", KEY, lambda: indexed(asked(7), 1), 7),
    file_case("a stream of one row each", KEY, lambda: stream(asked(7), 1), 7),
    file_case("batches over shards", KEY, lambda: indexed(asked(9), 2), 9,
              flags=("--shard-rows", 4)),
    file_case("no rows", KEY, lambda: indexed(asked(0))),
    file_case("a stream without rows", KEY, lambda: stream(asked(0))),
    file_case("no columns", KEY, lambda: indexed(pa.table({})), failed="wrong_schema"),
    file_case("other columns", KEY, lambda: indexed(pa.table({"a": [1]})), failed="wrong_schema"),
    file_case("a score column", KEY, lambda: indexed(beside(pa.array([1.0]), "score")),
              failed="column_collision"),
    file_case("nulls", KEY,
              lambda: indexed(pa.table({"prompt": ["a", None], "response": ["b", "c"]})), 1,
              marked={"null_value": 1}),
    *(
        file_case(f"beside {name}", KEY, lambda name=name: indexed(beside(TYPES[name]())),
                  len(TYPES[name]()))
        for name in ODD
    ),
    *(
        file_case(f"beside {name}", KEY, lambda make=make: indexed(beside(make())), len(make()))
        for name, make in ONLY_ARROW.items()
    ),
    *(file_case(f"damage: {name}", KEY, data, failed="unreadable_file")
      for name, data in DAMAGED.items()),
    file_case("bytes behind a stream", KEY, STREAM + b"more", ROWS),
    file_case("not UTF-8 where it is read", KEY, lambda: with_bad_text("response"), 2,
              marked={"not_utf8": 1}),
    file_case("not UTF-8 where it is not read", KEY, lambda: with_bad_text("x"), 3),
]  # fmt: skip
