"""Which difference between a shard and its input counts as one."""

from typing import Any

import pyarrow as pa
import pytest

from batch_scorer.outputs.verify import _compare_input
from tests.helpers.receipts import COMMIT

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
    ],
)
def test_nan_is_as_it_was_in_the_input(kept: list[Any], given: list[Any], is_same: bool) -> None:
    difference = _compare_input(pa.table({"x": kept}), COMMIT, pa.table({"x": given}))
    assert difference == ("" if is_same else "column x is not as it was in the input")
