"""Rows that are pairs as they are stored, in the columns that trainers load."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trl.data_utils import maybe_extract_prompt

from batch_scorer import Config, score
from batch_scorer.derived.recipes import load_recipe
from batch_scorer.errors import ConfigError, InputError
from batch_scorer.selection.recipe import Columns, Selection
from batch_scorer.selection.select import select
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pair_rows, table_of

TRAINERS = [columns for columns in Columns if columns is not Columns.INPUT]
ROWS = 12
SAME, MARKED = 4, 7


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Real pairs in three shards, one with equal sides and one without an answer."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = pair_rows(ROWS)
    rows[SAME]["rejected"] = rows[SAME]["chosen"]
    rows[MARKED]["rejected"] = None
    pq.write_table(table_of(rows), folder / "in.parquet")
    config = Config(
        model=str(tiny_model),
        inputs=(str(folder / "in.parquet"),),
        output=str(folder / "scored"),
        backend="fake",
        use_ray=False,
        shard_rows=5,
    )
    score(config)
    return folder / "scored"


def stored(folder: Path) -> list[dict[str, Any]]:
    return [row for p in sorted(folder.glob("*.parquet")) for row in pq.read_table(p).to_pylist()]


def loaded(output: Path) -> list[dict[str, Any]]:
    found = datasets.load_dataset(
        "parquet",
        data_files=str(output / "**" / "*.parquet"),
        split="train",
        cache_dir=str(output.parent / f"{output.name} cache"),
    )
    rows: list[dict[str, Any]] = found.to_list()
    return rows


def sides_in(row: dict[str, Any], columns: Columns) -> tuple[Any, Any]:
    """Both conversations, whatever the layout."""
    match columns:
        case Columns.SKYWORK:
            return row["chosen"], row["rejected"]
        case Columns.LLAMA_FACTORY:
            before = row["conversations"]
            return [*before, row["chosen"]], [*before, row["rejected"]]
        case Columns.VERL:
            before = [user(row["prompt"])]
            return [*before, answer(row["chosen"])], [*before, answer(row["rejected"])]
        case _:
            return row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("columns", TRAINERS)
def test_scored_pairs_load_with_their_conversations_scores_and_lengths(
    columns: Columns, shuffle: bool, scored: Path, tmp_path: Path
) -> None:
    totals = select(
        [str(scored)], str(tmp_path / "out"), Selection(columns=columns, shuffle=shuffle)
    ).totals
    assert totals.dropped == {"marked": 1, "same_text": 1}
    assert (totals.rows, totals.rows_written) == (ROWS, ROWS - 2)
    given = {
        row["chosen"][0]["content"]: row
        for number, row in enumerate(stored(scored))
        if number not in (SAME, MARKED)
    }
    found = loaded(tmp_path / "out")
    assert len(found) == len(given)
    for row in found:
        assert "margin" not in row
        chosen, rejected = sides_in(row, columns)
        from_ = given[chosen[0]["content"]]
        assert (chosen, rejected) == (from_["chosen"], from_["rejected"]) and chosen != rejected
        for side in ("chosen", "rejected"):
            assert row[f"score_{side}"] == from_[f"score_{side}"]
            assert row[f"tokens_{side}"] == from_[f"num_tokens_{side}"] > 0
        assert row["score_margin"] == row["score_chosen"] - row["score_rejected"]
        assert row["source"] == from_["source"]
    assert run_cli("verify", tmp_path / "out").exit_code == 0


def test_filters_come_before_the_layout(scored: Path, tmp_path: Path) -> None:
    above = '(field("score_chosen") > field("score_rejected"))'
    recipe = Selection(columns=Columns.TRL, where=above)
    totals = select([str(scored)], str(tmp_path / "out"), recipe).totals
    found = loaded(tmp_path / "out")
    # The pair with equal sides has equal scores: it fails the filter first.
    assert totals.dropped == {"marked": 1, "where": ROWS - 1 - len(found)}
    assert 0 < len(found) < ROWS - 2
    for row in found:
        assert row["score_margin"] > 0
        extracted = maybe_extract_prompt(row)
        assert extracted["prompt"] == row["prompt"] and len(extracted["chosen"]) == 1


FORMS: dict[str, dict[str, list[Any]]] = {
    "text": {"prompt": ["Q", "Q"], "chosen": ["a", "b"], "rejected": ["b", "b"]},
    "whole messages beside a prompt": {
        "prompt": ["Q", "Q"],
        "chosen": [[user("Q"), answer("a")], [user("Q"), answer("b")]],
        "rejected": [[user("Q"), answer("b")], [user("Q"), answer("b")]],
    },
    "replies beside messages": {
        "prompt": [[user("Q")], [user("Q")]],
        "chosen": [[answer("a")], [answer("b")]],
        "rejected": [[answer("b")], [answer("b")]],
    },
    "HH": {
        "chosen": ["\n\nHuman: Q\n\nAssistant: a", "\n\nHuman: Q\n\nAssistant: b"],
        "rejected": ["\n\nHuman: Q\n\nAssistant: b", "\n\nHuman: Q\n\nAssistant: b"],
    },
}


@pytest.mark.parametrize("columns", TRAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_pairs_is_read_as_scoring_reads_it(
    form: str, columns: Columns, tmp_path: Path
) -> None:
    """Of files that were never scored, without scores too."""
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(FORMS[form]), tmp_path / "in" / "a.parquet")
    recipe = Selection(columns=columns)
    totals = select([str(tmp_path / "in")], str(tmp_path / "out"), recipe).totals
    assert totals.dropped == {"same_text": 1}
    (row,) = loaded(tmp_path / "out")
    assert sides_in(row, columns) == ([user("Q"), answer("a")], [user("Q"), answer("b")])
    beside = ("source", "score_chosen", "score_margin", "tokens_chosen", "tokens_rejected")
    assert [row[name] for name in beside] == [None] * 5


def test_scores_of_others_are_taken_and_a_pair_without_one_is_marked(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = {"prompt": ["Q"] * 4, "chosen": list("abcd"), "rejected": list("efgh")}
    scores = {"chosen_score": [4, 1, None, 3], "rejected_score": [1.5, 2.0, 1.0, None]}
    pq.write_table(pa.table(texts | scores), tmp_path / "in" / "a.parquet")
    place = str(tmp_path / "in")
    totals = select([place], str(tmp_path / "all"), Selection(columns=Columns.OPENRLHF)).totals
    assert totals.dropped == {"marked": 2}
    margins = {row["chosen"][0]["content"]: row["score_margin"] for row in loaded(tmp_path / "all")}
    assert margins == {"a": 2.5, "b": -1.0}
    above = 'field("chosen_score") > field("rejected_score")'
    ended = run_cli(
        "select", place, "--where", above, "--columns", "trl", "--output", tmp_path / "best"
    )
    assert ended.exit_code == 0, ended.err
    (row,) = loaded(tmp_path / "best")
    assert (row["score_chosen"], row["score_rejected"], row["score_margin"]) == (4, 1.5, 2.5)


def conversation(*turns: dict[str, Any]) -> list[dict[str, Any]]:
    return [user("Q"), *turns]


UNFIT = {
    "a tool is called": (
        conversation(answer("a", tool_calls=[{"id": "1"}])),
        conversation(answer("b")),
        set(TRAINERS),
    ),
    "the one goes on from the other": (
        conversation(answer("a")),
        conversation(answer("a"), user("R"), answer("b")),
        set(TRAINERS),
    ),
    "they part at a question": (
        conversation(answer("a"), user("R"), answer("c")),
        conversation(answer("a"), user("S"), answer("c")),
        set(TRAINERS),
    ),
    "several turns on a side": (
        conversation(answer("a"), user("R"), answer("c")),
        conversation(answer("b"), user("R"), answer("c")),
        {Columns.LLAMA_FACTORY, Columns.VERL},
    ),
    "a prompt of several turns": (
        conversation(answer("a"), user("R"), answer("c")),
        conversation(answer("a"), user("R"), answer("d")),
        {Columns.VERL},
    ),
}


@pytest.mark.parametrize("columns", TRAINERS)
@pytest.mark.parametrize("name", UNFIT)
def test_what_a_layout_has_no_form_for_is_left_out_and_counted(
    name: str, columns: Columns, tmp_path: Path
) -> None:
    chosen, rejected, without_form = UNFIT[name]
    (tmp_path / "in").mkdir()
    table = pa.table({"chosen": [chosen], "rejected": [rejected]})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    recipe = Selection(columns=columns)
    totals = select([str(tmp_path / "in")], str(tmp_path / "out"), recipe).totals
    assert totals.dropped == ({"columns": 1} if columns in without_form else {})


def test_rows_that_are_no_pairs_need_a_rule(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table({"prompt": ["Q"], "response": ["a"], "score": [1.0]})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    with pytest.raises(InputError, match="no pairs; name the rule"):
        select([str(tmp_path / "in")], str(tmp_path / "out"), Selection(columns=Columns.TRL))


def test_pairs_are_not_made_across_prompts() -> None:
    with pytest.raises(ConfigError, match="pairs are of one prompt"):
        load_recipe(Selection, pairs="all", group_by=("source",))
