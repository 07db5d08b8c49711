"""What `formats.parse` cuts, `RowShape` puts back in its place."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer import formats
from batch_scorer.formats.kinds import KINDS, Prompt
from batch_scorer.formats.shape import shape_of
from batch_scorer.records import Format, Layout, RowError, SequenceInput, TextStyle

OF_TEXT = [
    Format.PREFERENCE_PAIR, Format.BEST_OF_N, Format.ROLLOUT_GROUP, Format.ROLLOUT, Format.TEXT,
]  # fmt: skip


@st.composite
def cells(draw: st.DrawFn) -> tuple[Format, list[list[Any]]]:
    """A format and R rows: the cell of each side, with a null or an empty text here and there."""
    format = draw(st.sampled_from(OF_TEXT))
    kind = KINDS[format]
    text = st.sampled_from(["an answer", "an answer", "", None])
    cell: st.SearchStrategy[Any] = text
    if kind.is_group:
        cell = st.none() | st.lists(text, max_size=4)
    sides = len(kind.responses)
    return format, draw(st.lists(st.lists(cell, min_size=sides, max_size=sides), max_size=5))


def place_of(sequence: SequenceInput | RowError) -> str | None:
    """Which answer a sequence was cut from; None for one that cannot be read."""
    if isinstance(sequence, RowError):
        return None
    last = sequence if isinstance(sequence, str) else sequence[-1]
    return str(last["content"] if isinstance(last, dict) else last)


@given(cells())
def test_the_value_of_a_sequence_returns_to_the_place_that_it_was_cut_from(
    drawn: tuple[Format, list[list[Any]]],
) -> None:
    format, rows = drawn
    kind, shape = KINDS[format], shape_of(format)

    def named(value: str | None, place: str) -> str | None:
        return place if value else value

    placed = [
        [
            [named(item, f"row {row}, {name}, {i}") for i, item in enumerate(cell)]
            if isinstance(cell, list)
            else named(cell, f"row {row}, {name}")
            for name, cell in zip(kind.responses, cells_of_row, strict=True)
        ]
        for row, cells_of_row in enumerate(rows)
    ]
    type = pa.list_(pa.string()) if kind.is_group else pa.string()
    table = pa.table(
        {
            name: pa.array([row[side] for row in placed], type)
            for side, name in enumerate(kind.responses)
        }
    )
    layout = Layout(format, {name: name for name in kind.responses}, TextStyle.PLAIN)
    if kind.prompt is not Prompt.NEVER:
        table = table.append_column("prompt", pa.array(["a question"] * len(rows), pa.string()))
        layout = Layout(format, {**layout.columns, "prompt": "prompt"}, TextStyle.PLAIN)
    parsed = formats.parse(formats.columns_of(table)[0], layout)

    values = pa.array([place_of(sequence) for sequence in parsed.sequences], pa.string())
    counts = shape.counts(table, layout, parsed.row_offsets)
    columns = shape.to_columns(values, counts)

    def read(value: Any) -> Any:
        """A cell with nulls where no answer can be read; an empty group is a null."""
        return ([item or None for item in value] or None) if isinstance(value, list) else value

    expected = [
        [None if row in parsed.row_errors else read(placed[row][side]) for row in range(len(rows))]
        for side in range(len(kind.responses))
    ]
    assert [column.to_pylist() for column in columns] == [
        [value or None for value in column] for column in expected
    ]
    assert shape.from_columns(columns, counts).equals(values)
    assert np.array_equal(counts.sum(axis=1), np.diff(parsed.row_offsets))


@pytest.mark.parametrize("is_json", [True, False])
def test_lists_in_writing_are_as_long_as_what_they_spell(is_json: bool) -> None:
    cells = [[["a"], ["b"]], [], None, [["c"]]]
    texts = pa.array([None if cell is None else json.dumps(cell) for cell in cells], pa.string())
    column = pa.ExtensionArray.from_storage(pa.json_(pa.string()), texts) if is_json else texts
    table = pa.table({"chosen": column, "rejected": column})
    offsets = np.array([0, 4, 5, 5, 7], dtype=np.int64)
    layout = Layout(Format.BEST_OF_N, {"chosen": "chosen", "rejected": "rejected"})
    counts = shape_of(Format.BEST_OF_N).counts(table, layout, offsets)
    assert counts.tolist() == [[2, 2], [0, 1], [0, 0], [1, 1]]
