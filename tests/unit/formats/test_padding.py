"""Padding is no part of a sequence of token ids."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.errors import RowReason
from batch_scorer.formats import describe
from tests.unit.formats.tables import found, parsed, reasons, refused, sequences

IDS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@given(st.lists(IDS, min_size=1, max_size=5), st.sampled_from(["left", "right"]))
def test_ids_are_those_where_the_mask_is_one(rows: list[list[int]], side: str) -> None:
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    if side == "left":
        ids = [pad + row for pad, row in zip(pads, rows, strict=True)]
        masks = [pad + one for pad, one in zip(pads, ones, strict=True)]
    else:
        ids = [row + pad for pad, row in zip(pads, rows, strict=True)]
        masks = [one + pad for pad, one in zip(pads, ones, strict=True)]
    table = pa.table({"input_ids": ids, "attention_mask": masks})
    assert sequences(table) == rows


@pytest.mark.parametrize(
    "names", [("{}", "{}_attention_mask"), ("input_ids_{}", "attention_mask_{}")]
)
def test_each_side_of_a_pair_has_its_own_mask(names: tuple[str, str]) -> None:
    ids, mask = names
    row = {
        ids.format("chosen"): [0, 1, 2, 3],
        mask.format("chosen"): [0, 1, 1, 1],
        ids.format("rejected"): [1, 2, 0, 0],
        mask.format("rejected"): [True, True, False, False],
    }
    assert sequences(row) == [[1, 2, 3], [1, 2]]


def test_a_prompt_of_ids_is_found_in_padded_answers() -> None:
    row = {
        "prompt": [0, 5, 6],
        "prompt_attention_mask": [0, 1, 1],
        "responses": [[0, 5, 6, 7], [5, 6, 7, 8]],
        "responses_attention_mask": [[0, 1, 1, 1], [1, 1, 1, 1]],
    }
    assert sequences(row) == [[5, 6, 7], [5, 6, 7, 8]]
    apart = {**row, "responses": [[0, 0, 7, 8], [7, 8, 9, 9]]}
    apart["responses_attention_mask"] = [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert sequences(apart) == [[5, 6, 7, 8]] * 2


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ([1, 1], RowReason.BAD_STRUCTURE),
        ([1, 0, 1], RowReason.BAD_STRUCTURE),
        ([1, 2, 0], RowReason.BAD_STRUCTURE),
        ([1, None, 1], RowReason.BAD_STRUCTURE),
        ([0, 0, 0], RowReason.EMPTY),
        (None, RowReason.NULL_VALUE),
    ],
)
def test_a_mask_that_does_not_fit_marks_its_row(
    mask: list[int | None] | None, reason: RowReason
) -> None:
    masks = pa.array([[1, 1, 1], mask], pa.list_(pa.int64()))
    rows = parsed(pa.table({"input_ids": [[4, 5, 6], [4, 5, 6]], "attention_mask": masks}))
    assert reasons(rows) == [None, reason]


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2, 3, 4, 5], [1, 2, 0, 0, 0]],
        [[0, 0, 0, 4, 5], [1, 2, 3, 4, 5]],
        [[1, 2, 3, 0, 0], [1, 2, 3, 4, 0], [1, 2, 3, 4, 5]],
        # Two batches, each filled up to its longest.
        [[1, 0, 0, 0], [1, 2, 3, 4], [2, 3, 0, 0, 0], [1, 2, 3, 4, 5], [1, 2, 3]],
    ],
)
def test_ids_that_look_padded_are_refused_without_a_mask(rows: list[list[int]]) -> None:
    table = pa.table({"input_ids": rows})
    message = refused(table)
    assert "input_ids look padded" in message and "--column attention_mask=" in message
    assert sequences(table, ignore=("attention_mask",)) == rows
    masks = pa.array([[1] * len(row) for row in rows])
    own = table.append_column("my_mask", masks)
    assert describe(found(own, named={"attention_mask": "my_mask"})).endswith(
        "attention mask in my_mask)"
    )
    both = pa.table({"chosen": rows, "rejected": rows})
    assert "--column attention_mask_chosen=" in refused(both)


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2, 0, 0]],
        [[1, 2, 0, 0, 0], [1, 0, 0, 0]],
        [[1, 2, 3], [1, 2, 3]],
        [[5, 5, 6], [1, 2, 3]],
    ],
)
def test_other_ids_are_taken_as_they_are(rows: list[Any]) -> None:
    assert sequences(pa.table({"input_ids": rows})) == rows


def test_a_mask_that_is_named_for_text_is_refused() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "m": [1]}
    assert "belongs to no token ids" in refused(row, named={"attention_mask_chosen": "m"})
