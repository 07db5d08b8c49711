"""Which difference between a shard and its input counts as one."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batch_scorer.outputs.verify import _compare_input, is_same

NAN = float("nan")


@pytest.mark.parametrize(
    ("kept", "given", "is_same"),
    [
        ([NAN, 1.0], [NAN, 1.0], True),
        ([{"a": [NAN, None]}], [{"a": [NAN, None]}], True),
        ([NAN, 1.0], [NAN, 2.0], False),
        ([NAN, 1.0], [None, 1.0], False),
        ([0.5], [NAN], False),
        (["nan"], ["NaN"], False),
        ([[NAN], []], [[NAN], []], True),
        ([[NAN], []], [[], [NAN]], False),
        ([[NAN], None], [[NAN], []], False),
        ([[{"a": NAN}]], [[{"a": NAN}]], True),
        ([[{"a": NAN}]], [[{"a": 1.0}]], False),
    ],
)
def test_nan_is_as_it_was_in_the_input(kept: list[Any], given: list[Any], is_same: bool) -> None:
    difference = _compare_input(pa.table({"x": kept}), pa.table({"x": given}))
    assert difference == ("" if is_same else "column x is not as it was in the input")


@pytest.mark.parametrize(
    "kind",
    [
        pa.map_(pa.string(), pa.float64()),
        pa.list_(pa.float32(), 1),
        pa.large_list(pa.float16()),
        pa.dictionary(pa.int8(), pa.float64()),
    ],
)
def test_nan_is_nan_in_every_kind_of_column(kind: pa.DataType) -> None:
    def array(value: float) -> pa.Array:
        if pa.types.is_dictionary(kind):
            values = pa.array([value, 1.0], kind.value_type)
            return pa.DictionaryArray.from_arrays(pa.array([0, None, 1], kind.index_type), values)
        if pa.types.is_map(kind):
            return pa.array([[("k", value)], None, [("k", 1.0)]], kind)
        number = np.float16 if pa.types.is_large_list(kind) else float
        return pa.array([[number(value)], None, [number(1.0)]], kind)

    assert is_same(array(NAN), array(NAN))
    assert is_same(array(NAN)[1:], array(2.0)[1:])
    assert not is_same(array(NAN), array(2.0))
