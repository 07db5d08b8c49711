"""Pairs as trainers' own code prepares them: from `datasets`, through TRL."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trl.data_utils import is_conversational, maybe_extract_prompt

from batch_scorer.selection.recipe import Columns, Pairs, Selection
from batch_scorer.selection.select import select

PROMPT = "Which colour has the sky?"
ANSWERS = {"Blue. ": 2.0, "Blue or so.": 1.0, "Green.": -1.0}


@pytest.fixture
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> list[dict[str, Any]]:
    """The pairs of the prompt's answers in a layout, as `load_dataset` gives them."""
    table = pa.table(
        {"prompt": [PROMPT] * 3, "response": list(ANSWERS), "score": list(ANSWERS.values())}
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    recipe = Selection(pairs=Pairs.ALL, columns=request.param)
    select([str(tmp_path / "in")], str(tmp_path / "out"), recipe)
    found = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "out" / "**" / "*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert len(found) == 3
    rows: list[dict[str, Any]] = found.to_list()
    return rows


@pytest.mark.parametrize("loaded", [Columns.TRL, Columns.SKYWORK], indirect=True)
def test_trl_finds_the_prompt_and_both_answers(loaded: list[dict[str, Any]]) -> None:
    for row in loaded:
        assert is_conversational(row) and "margin" not in row
        found = maybe_extract_prompt(row)
        assert found["prompt"] == [{"role": "user", "content": PROMPT}]
        (chosen,), (rejected,) = found["chosen"], found["rejected"]
        assert ANSWERS[chosen["content"]] - ANSWERS[rejected["content"]] == row["score_margin"] > 0
        assert (chosen["role"], rejected["role"]) == ("assistant", "assistant")


@pytest.mark.parametrize("loaded", [Columns.INPUT], indirect=True)
def test_texts_with_a_prompt_of_their_own_are_not_cut_by_trl(loaded: list[dict[str, Any]]) -> None:
    for row in loaded:
        assert maybe_extract_prompt(row) == row
        assert row["prompt"] == PROMPT and {row["chosen"], row["rejected"]} <= ANSWERS.keys()
