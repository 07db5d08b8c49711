"""Columns become the values that were written, without the nulls that a union of keys adds."""

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_scorer.errors import ShardError
from batch_scorer.formats.values import columns_of, is_empty

LEAVES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): st.text(max_size=5),
    pa.large_string(): st.text(max_size=5),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float64(): st.floats(allow_nan=False),
    pa.bool_(): st.booleans(),
    pa.binary(): st.binary(max_size=5),
}
Drawn = tuple[pa.DataType, st.SearchStrategy[Any]]


def lists(inner: Drawn) -> Drawn:
    return pa.list_(inner[0]), st.none() | st.lists(inner[1], max_size=3)


def large_lists(inner: Drawn) -> Drawn:
    return pa.large_list(inner[0]), st.none() | st.lists(inner[1], max_size=3)


def structs(fields: dict[str, Drawn]) -> Drawn:
    dtype = pa.struct([(name, inner[0]) for name, inner in fields.items()])
    return dtype, st.none() | st.fixed_dictionaries(
        {name: inner[1] for name, inner in fields.items()}
    )


LEAF = st.sampled_from([(dtype, st.none() | values) for dtype, values in LEAVES.items()])
TYPES: st.SearchStrategy[Drawn] = st.recursive(
    LEAF,
    lambda inner: (
        inner.map(lists)
        | inner.map(large_lists)
        | st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3).map(structs)
    ),
    max_leaves=6,
)


def without_nulls(value: Any) -> Any:
    """The value without the keys whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_values_are_those_that_were_written_without_null_keys(data: st.DataObject) -> None:
    dtype, values = data.draw(TYPES)
    rows = data.draw(st.lists(values, max_size=6))
    file = io.BytesIO()
    pq.write_table(pa.table({"x": pa.array(rows, dtype)}), file)
    table = pq.read_table(file)
    expected = [without_nulls(row) for row in rows]
    assert columns_of(table, ["x"]) == ({"x": expected}, {})
    start = data.draw(st.integers(0, len(rows)))
    parts = pa.concat_tables([table.slice(0, start), table.slice(start)])
    assert columns_of(parts, ["x"]) == ({"x": expected}, {})


def values(array: pa.Array) -> list[Any]:
    return columns_of(pa.table({"x": array}), ["x"])[0]["x"]


def test_absent_keys_are_absent_in_tool_arguments_too() -> None:
    calls = [
        [{"function": {"name": "f", "arguments": {"city": "Oslo", "days": None}}}],
        [{"function": {"name": "g", "arguments": {"city": None, "days": 3}}}],
    ]
    assert values(pa.array(calls)) == [
        [{"function": {"name": "f", "arguments": {"city": "Oslo"}}}],
        [{"function": {"name": "g", "arguments": {"days": 3}}}],
    ]


def test_a_message_keeps_its_content_where_it_is_null() -> None:
    message = {"role": "assistant", "content": None, "name": None}
    assert values(pa.array([message])) == [{"role": "assistant", "content": None}]
    assert values(pa.array([{"from": "gpt", "value": None}])) == [{"from": "gpt", "value": None}]


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (pa.list_view(pa.int32()), [[1, 2], None, [], [3]]),
        (pa.large_list_view(pa.string()), [["a"], None, ["b", None]]),
        (pa.list_(pa.int32(), 2), [[1, 2], None, [3, 4]]),
        (pa.dictionary(pa.int8(), pa.string()), ["a", None, "b", "a"]),
        (pa.string_view(), ["a", None]),
    ],
)
def test_every_kind_of_list_and_text_is_what_it_holds(dtype: pa.DataType, rows: list[Any]) -> None:
    array = pa.array(rows, dtype)
    assert values(array) == rows
    assert values(array.slice(1)) == rows[1:]


def test_maps_are_objects_with_all_their_items() -> None:
    dtype = pa.map_(pa.string(), pa.string())
    array = pa.array([[("role", "user"), ("content", None)], None, [], [("a", "b")]], dtype)
    expected = [{"role": "user", "content": None}, None, {}, {"a": "b"}]
    assert values(array) == expected
    assert values(array.slice(1, 3)) == expected[1:]


def test_the_json_type_is_what_its_text_says() -> None:
    held = [[{"role": "user", "content": None}], 3, "a", None]
    texts = [None if value is None else json.dumps(value) for value in held]
    storage = pa.array(texts, pa.string())
    array = pa.ExtensionArray.from_storage(pa.json_(pa.string()), storage)
    assert values(array) == held
    broken = pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array(["{", "[]"]))
    assert values(broken) == ["{", []]


def test_other_extension_types_are_their_storage() -> None:
    array = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16)))
    assert values(array) == [b"0" * 16]


@pytest.mark.parametrize("table", [pa.table({"a": [1]}), pa.table([[1], [2]], names=["x", "x"])])
def test_a_column_that_is_not_there_once_is_an_error(table: pa.Table) -> None:
    with pytest.raises(ShardError, match="no column 'x'"):
        columns_of(table, ["x"])


def test_what_says_nothing_is_empty() -> None:
    assert all(map(is_empty, [None, "", " \n", [], {}, b"", [None, ""], {"bytes": None}]))
    assert not any(map(is_empty, ["a", [0], 0, False, b"a", {"a": 1}]))
