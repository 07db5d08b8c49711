"""Texts of messages that Arrow makes are those that Python makes of the same values."""

import random
from typing import Any

import pyarrow as pa
import pytest

from batch_scorer.selection.message_texts import MessageColumn, shared, shared_counts, text_of

Messages = list[dict[str, Any] | None] | None

TEXTS = ["Hi", "", "2:Hi", 'a "quoted"\n\t\x00 line', "ünï → 文", "user", "🙂" * 3]
KIND = pa.list_(
    pa.struct({"role": pa.string(), "content": pa.string(), "calls": pa.list_(pa.int32())})
)


def message(dice: random.Random) -> dict[str, Any] | None:
    if dice.random() < 0.03:
        return None
    return {
        "role": dice.choice(["user", "user", "assistant", "system", None]),
        "content": dice.choice(TEXTS) if dice.random() < 0.95 else None,
        "calls": dice.choice([None, None, None, None, None, None, [], [1]]),
    }


def conversations(seed: int) -> list[Messages]:
    dice = random.Random(seed)
    return [
        None if dice.random() < 0.05 else [message(dice) for _ in range(dice.randrange(5))]
        for _ in range(2000)
    ]


def column_of(rows: list[Messages]) -> MessageColumn:
    """In chunks, of which one begins in the middle of another array."""
    array = pa.array(rows, KIND)
    chunks = [array.slice(0, 700), pa.array([], KIND), array.slice(700)]
    found = MessageColumn.of(pa.chunked_array(chunks))
    assert found is not None
    return found


def test_texts_are_those_of_the_values_and_no_two_are_alike() -> None:
    rows = conversations(1)
    column = column_of(rows)
    assert 500 < column.are_plain().sum() < 1900
    texts = column.texts(column.lengths).to_pylist()
    assert texts == [text_of(row) for row in rows]
    # Without null keys, and a user's only message as its text: other values, other texts.
    told_apart = {text: repr(_canonical(row)) for text, row in zip(texts, rows, strict=True)}
    assert len(told_apart) == len({repr(_canonical(row)) for row in rows})
    last = [None if row is None else max(len(row) - 1, 0) for row in rows]
    before = column.texts((column.lengths - 1).clip(0)).to_pylist()
    assert before == [text_of(row and row[:n]) for row, n in zip(rows, last, strict=True)]


def _canonical(row: Messages) -> Any:
    if row is None:
        return None
    return [m and {k: v for k, v in m.items() if v is not None} for m in row]


def test_what_two_lists_begin_with_is_that_of_the_values() -> None:
    chosen, others = conversations(2), conversations(3)
    dice = random.Random(4)
    rejected: list[Messages] = [
        other if row is None or other is None else row[: dice.randrange(5)] + other
        for row, other in zip(chosen, others, strict=True)
    ]
    counts = shared_counts(column_of(chosen), column_of(rejected)).tolist()
    assert counts == [len(shared(*both)) for both in zip(chosen, rejected, strict=True)]
    assert {0, 1, 2, 3} <= set(counts)


def test_the_same_messages_have_one_text_whatever_other_keys_their_column_has() -> None:
    rows = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "é"}]]
    plain = MessageColumn.of(pa.chunked_array([pa.array(rows)]))
    assert plain is not None
    wide = column_of([*rows])
    assert plain.texts(plain.lengths) == wide.texts(wide.lengths)
    assert shared_counts(plain, wide).tolist() == [2]


@pytest.mark.parametrize(
    "column",
    [pa.array([["a"]]), pa.array(["a"]), pa.array([[{"role": "user", "content": [{"a": 1}]}]])],
)
def test_other_values_are_left_to_python(column: pa.Array) -> None:
    assert MessageColumn.of(pa.chunked_array([column])) is None
