"""Answers in steps are one sequence, whose steps are those of the given list."""

from typing import Any

import pyarrow as pa
import pytest

from batch_scorer.errors import RowReason
from batch_scorer.formats import describe
from batch_scorer.records import Format
from tests.unit.formats.tables import assistant, found, parsed, reasons, refused, system, user

STEPS = ["3+2 is 5.", "5+3 is 8."]
ASKED = [user("What is 3+2+3?"), assistant("")]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"prompt": "What is 3+2+3?", "completions": STEPS, "labels": [True, False]},
            "answers in steps (steps in completions; prompt in prompt)",
        ),
        (
            {"problem": "What is 3+2+3?", "steps": STEPS, "label": -1, "generator": "m"},
            "answers in steps (steps in steps; prompt in problem)",
        ),
        (
            {"prompt": [user("What is 3+2+3?")], "steps": STEPS},
            "answers in steps (steps in steps; prompt in prompt)",
        ),
    ],
)
def test_a_list_of_steps_is_one_answer(row: dict[str, Any], line: str) -> None:
    assert describe(found(row)) == line
    rows = parsed(row)
    assert rows.sequences == [ASKED]
    assert rows.steps == {0: tuple(STEPS)}


def prm800k(steps: list[dict[str, Any]]) -> pa.Table:
    question = {"problem": "What is 3+2+3?", "ground_truth_answer": "8"}
    return pa.table({"question": [question], "label": [{"steps": steps, "total_time": 3}]})


def completion(text: str) -> dict[str, Any]:
    return {"text": text, "rating": 1}


def test_raw_prm800k_gives_the_steps_that_its_labelers_went_on_with() -> None:
    table = prm800k(
        [
            {"completions": [completion("a"), completion("b")], "chosen_completion": 1},
            {"completions": [completion("c")], "human_completion": completion("d")},
            {"completions": [completion("e"), completion("f")]},
        ]
    )
    assert describe(found(table)) == "answers in steps (steps in label; prompt in question)"
    rows = parsed(table)
    assert (rows.sequences, rows.steps) == ([ASKED], {0: ("b", "d", "e")})


def test_completions_beside_labels_are_never_a_group_unless_named() -> None:
    row = {"prompt": "q", "completions": STEPS, "labels": [True, False]}
    message = refused(row, format=Format.ROLLOUT_GROUP)
    assert "--column responses=completions" in message
    named = parsed(row, named={"responses": "completions"})
    assert [one[-1]["content"] for one in named.sequences] == STEPS
    scalar = {**row, "labels": True}
    assert found(scalar).format is Format.ROLLOUT_GROUP


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([], RowReason.NO_STEPS),
        (None, RowReason.NULL_VALUE),
        (["a", None], RowReason.NULL_VALUE),
        (["a", " "], RowReason.EMPTY),
    ],
)
def test_steps_that_are_none_mark_their_row(steps: Any, reason: RowReason) -> None:
    lists = pa.array([["a"], steps, ["b", "c"]], pa.list_(pa.string()))
    rows = parsed(pa.table({"prompt": ["q", "q", "q"], "steps": lists}))
    assert reasons(rows) == [None, reason, None]
    assert rows.steps == {0: ("a",), 1: ("b", "c")}  # by sequence


def test_steps_have_a_context_and_need_a_prompt() -> None:
    row = {"prompt": "q", "steps": STEPS, "system_prompt": "s"}
    assert parsed(row).sequences == [[system("s"), user("q"), assistant("")]]
    blank = pa.table({"prompt": ["q", ""], "steps": [STEPS, STEPS]})
    assert reasons(parsed(blank)) == [None, RowReason.EMPTY]
