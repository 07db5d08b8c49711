"""Pairs as trainers load them, through Parquet and back."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.selection.layouts import fits, paired_table
from batch_scorer.selection.recipe import Columns

TRAINERS = [columns for columns in Columns if columns is not Columns.INPUT]
QUESTION = [{"role": "user", "content": "Which colour has the sky?"}]


def side(text: Any, score: float, tokens: int, prompt: Any = QUESTION) -> pa.Table:
    return pa.table(
        {
            "prompt": [prompt],
            "side": [text],
            "source": ["chat"],
            "score": [score],
            "tokens": pa.array([tokens], pa.int32()),
        }
    )


def reloaded(columns: Columns, prompt: Any = QUESTION) -> pa.Table:
    both = side("Blue. ", 2.5, 12, prompt), side("Green. ", 1.0, 13, prompt)
    sink = io.BytesIO()
    pq.write_table(paired_table(*both, columns), sink)
    return pq.read_table(pa.BufferReader(sink.getvalue()))


@pytest.mark.parametrize("columns", TRAINERS)
def test_no_layout_has_a_column_that_trainers_take_into_the_loss(columns: Columns) -> None:
    table = reloaded(columns)
    assert "margin" not in table.column_names
    row = table.to_pylist()[0]
    assert (row["score_margin"], row["tokens_chosen"], row["tokens_rejected"]) == (1.5, 12, 13)


@pytest.mark.parametrize("columns", TRAINERS)
def test_null_keys_of_messages_do_not_come_back(columns: Columns) -> None:
    null = [{"role": "user", "content": "Hi", "tool_calls": None}]
    assert "tool_calls" not in str(reloaded(columns, null).to_pylist())


@pytest.mark.parametrize("columns", TRAINERS)
def test_a_message_that_calls_a_tool_is_refused_not_cut(columns: Columns) -> None:
    calls = [{"role": "user", "content": "Hi", "tool_calls": [{"id": "1"}]}]
    assert fits(side("Blue.", 1.0, 1, calls), columns) == [False]
    assert fits(side("Blue.", 1.0, 1), columns) == [True]


@pytest.mark.parametrize("columns", [Columns.TRL, Columns.OPENRLHF])
def test_the_prompt_has_a_column_of_its_own(columns: Columns) -> None:
    (row,) = reloaded(columns, "Q").to_pylist()
    assert row["prompt"] == [{"role": "user", "content": "Q"}]
    assert row["chosen"] == [{"role": "assistant", "content": "Blue. "}]


def test_without_a_layout_texts_stay_texts() -> None:
    (row,) = reloaded(Columns.INPUT, "Q").to_pylist()
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Q", "Blue. ", "Green. ")


def test_skywork_sides_hold_the_whole_conversation() -> None:
    row = reloaded(Columns.SKYWORK).to_pylist()[0]
    assert row["chosen"] == [*QUESTION, {"role": "assistant", "content": "Blue. "}]
    assert row["source"] == "chat"


@pytest.mark.parametrize("columns", [Columns.LLAMA_FACTORY, Columns.VERL])
def test_turns_that_a_trainer_would_drop_are_refused(columns: Columns) -> None:
    assert fits(side("Blue.", 1.0, 1, QUESTION * 2), columns) == [False]
