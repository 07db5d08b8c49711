"""Columns that are not scored come back: in their type, or in what Parquet can hold of it."""

import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.formats import as_stored, lost_types, stored_schema

RUNS = pa.RunEndEncodedArray.from_arrays(pa.array([1, 3], pa.int32()), pa.array(["x", "y"]))
UNION = pa.UnionArray.from_sparse(
    pa.array([0, 1, 0], pa.int8()), [pa.array([1, 2, None]), pa.array(["a", "b", "c"])]
)
INTERVAL = pa.array([(1, 2, 3), None, (0, 0, 0)], pa.month_day_nano_interval())
JSON = pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array(['{"a":1}', None, "2"]))
UUID = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * 3, pa.binary(16)))


def written(table: pa.Table) -> pa.Table:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return pq.read_table(io.BytesIO(sink.getvalue()))


@pytest.mark.parametrize(
    "array",
    [
        pa.array([[1], None, [2, 3]], pa.list_view(pa.int64())),
        pa.array([["a"], None, []], pa.large_list_view(pa.string())),
        pa.array([b"a", None, b"b"], pa.large_binary()),
        pa.array([None, None, None]),
        pa.array([1.5, None, 2.5], pa.float16()),
        pa.array([Decimal("1.50"), None, None], pa.decimal64(10, 2)),
        pa.array(["a", None, "a"]).dictionary_encode(),
        pa.array([{"k": 1}, None, {}], pa.map_(pa.string(), pa.int64())),
        JSON,
        UUID,
        pa.StructArray.from_arrays([JSON, UUID], ["j", "u"]),
        pa.ListArray.from_arrays([0, 1, 2, 3], JSON),
    ],
    ids=lambda array: str(array.type),
)
def test_a_type_that_parquet_can_hold_is_kept(array: pa.Array) -> None:
    table = pa.table({"a": array})
    stored = as_stored(table)
    assert stored.schema == table.schema == stored_schema(table.schema)
    assert written(stored).equals(table)


@pytest.mark.parametrize(
    ("array", "dtype", "values"),
    [
        (RUNS, pa.string(), ["x", "y", "y"]),
        (
            pa.StructArray.from_arrays([RUNS], ["r"]),
            pa.struct([("r", pa.string())]),
            [{"r": "x"}, {"r": "y"}, {"r": "y"}],
        ),
        (pa.array([3, None, 3]).dictionary_encode(), pa.int64(), [3, None, 3]),
        (pa.array(["a", None, "b"], pa.string_view()), pa.large_string(), None),
        (
            pa.array([[{"t": "a"}], None, []], pa.list_(pa.struct([("t", pa.string_view())]))),
            pa.list_(pa.struct([("t", pa.large_string())])),
            None,
        ),
        (pa.array([5, None, 7], pa.time32("s")), pa.time32("ms"), None),
        (pa.array([5, None, 7], pa.timestamp("s")), pa.timestamp("ms"), None),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_a_type_that_changes_keeps_its_values(array: pa.Array, dtype: Any, values: Any) -> None:
    stored = as_stored(pa.table({"a": array}))
    assert stored.schema.field("a").type == dtype
    assert stored["a"].to_pylist() == (values or array.to_pylist())
    assert written(stored).equals(stored)


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (UNION, [1, "b", None]),
        (INTERVAL, [[1, 2, 3], None, [0, 0, 0]]),
        (pa.array([{}, None, {}], pa.struct([])), [{}, None, {}]),
        (
            pa.StructArray.from_arrays(
                [UNION, RUNS, pa.array([b"\0", b"", None])], ["u", "r", "b"]
            ),
            [
                {"u": 1, "r": "x", "b": "AA=="},
                {"u": "b", "r": "y", "b": ""},
                {"u": None, "r": "y", "b": None},
            ],
        ),
        (pa.ListArray.from_arrays([0, 2, 3, 3], UNION), [[1, "b"], [None], []]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_what_has_no_place_in_parquet_is_json_text(array: pa.Array, values: list[Any]) -> None:
    table = as_stored(pa.table({"a": array, "n": [1, 2, 3]}))
    assert table.schema.types == [pa.json_(pa.string()), pa.int64()]
    texts = written(table)["a"].to_pylist()
    assert [None if text is None else json.loads(text) for text in texts] == values


def test_parquet_types_that_would_be_lost_are_named(tmp_path: Path) -> None:
    def lost(query: str, options: str = "") -> tuple[str, ...]:
        file = tmp_path / "a.parquet"
        duckdb.sql(f"copy ({query}) to '{file}' (format parquet{options})")
        return lost_types(pq.ParquetFile(file))

    columns = {
        "id": "1",
        "j": "'{}'::json",
        "u": "uuid()",
        "nested": "{'x': '{}'::json, 'l': [1, 2]}",
        "v": "5::variant",
        "span": "interval 1 day",
    }
    query = f"select {', '.join(f'{value} as {name}' for name, value in columns.items())}"
    assert lost(query) == ("v (Variant)", "span (Interval)")
    shape = "select 'POINT(1 2)'::geometry as g, 1 as n"
    assert lost(shape, ", geoparquet_version 'V2'") == ("g (Geometry)",)
    plain = pa.table({"a": ["x"], "t": pa.array([1], pa.timestamp("us", "UTC")), "l": [[1]]})
    sink = io.BytesIO()
    pq.write_table(plain, sink)
    assert lost_types(pq.ParquetFile(sink)) == ()
