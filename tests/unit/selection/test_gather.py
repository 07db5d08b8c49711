"""Pairs and shuffled rows, written: every shard from rows that lie anywhere."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.errors import IncompleteError
from batch_scorer.selection.recipe import Columns, Pairs, Selection
from batch_scorer.selection.select import select

PROMPTS, ANSWERS = 12, 4


def rollouts(seed: int) -> list[dict[str, Any]]:
    """Some with equal scores, some without any."""
    random_ = random.Random(seed)
    rows = [
        {
            "prompt": f"What is {number}?",
            "response": f"It is {number} or {answer}.",
            "source": ("math", "chat")[number % 2],
            "score": None if random_.random() < 0.1 else float(random_.randrange(6)),
            "num_tokens": 10 + answer,
        }
        for number in range(PROMPTS)
        for answer in range(ANSWERS)
    ]
    return rows


def write(rows: list[dict[str, Any]], folder: Path, shard_rows: int) -> str:
    folder.mkdir(parents=True)
    for start in range(0, len(rows), shard_rows):
        table = pa.Table.from_pylist(rows[start : start + shard_rows])
        pq.write_table(table, folder / f"{start:04}.parquet")
    return str(folder)


def read(folder: Path) -> list[dict[str, Any]]:
    files = sorted(file for file in folder.rglob("*.parquet") if "_batch_scorer" not in file.parts)
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def expected_pairs(rows: list[dict[str, Any]]) -> set[tuple[str, float, float]]:
    """Prompt and both scores of the best and the worst, where they differ."""
    found = set()
    for prompt in {row["prompt"] for row in rows}:
        scores = [r["score"] for r in rows if r["prompt"] == prompt and r["score"] is not None]
        if scores and max(scores) > min(scores):
            found.add((prompt, max(scores), min(scores)))
    return found


@pytest.mark.parametrize("shuffle", [False, True])
def test_pairs_are_those_of_the_rule_whatever_the_shards(tmp_path: Path, shuffle: bool) -> None:
    rows = rollouts(1)
    recipe = Selection(
        group_by=("prompt",),
        pairs=Pairs.BEST_WORST,
        shuffle=shuffle,
        shard_rows=5,
        columns=Columns.SKYWORK,
    )
    outputs = []
    for number, shard_rows in enumerate((7, 1000)):
        given = random.Random(number).sample(rows, len(rows)) if number else rows
        place = write(given, tmp_path / f"in{number}", shard_rows)
        totals = select([place], str(tmp_path / f"out{number}"), recipe).totals
        written = read(tmp_path / f"out{number}")
        assert {
            (row["chosen"][0]["content"], row["score_chosen"], row["score_rejected"])
            for row in written
        } == expected_pairs(rows)
        assert totals.rows == len(rows) == totals.rows_kept + sum(totals.dropped.values())
        assert (totals.rows_written, totals.rows_kept) == (len(written), 2 * len(written))
        assert totals.shards == -(-len(written) // 5)
        outputs.append(written if shuffle else sorted(written, key=str))
    assert outputs[0] == outputs[1]


def test_both_sides_of_a_pair_are_texts_of_that_prompt(tmp_path: Path) -> None:
    rows = rollouts(2)
    place = write(rows, tmp_path / "in", 9)
    select([place], str(tmp_path / "out"), Selection(pairs=Pairs.ALL, shard_rows=1000))
    by_text = {row["response"]: row for row in rows}
    written = read(tmp_path / "out")
    assert written
    for row in written:
        chosen, rejected = by_text[row["chosen"]], by_text[row["rejected"]]
        assert row["prompt"] == chosen["prompt"] == rejected["prompt"]
        assert row["score_chosen"] == chosen["score"] > rejected["score"] == row["score_rejected"]
        assert row["score_margin"] == chosen["score"] - rejected["score"]
        assert (row["tokens_chosen"], row["source"]) == (chosen["num_tokens"], chosen["source"])


def test_shuffled_rows_are_the_rows_in_an_order_of_the_seed_alone(tmp_path: Path) -> None:
    rows = [row for row in rollouts(3) if row["score"] is not None]
    orders = []
    for number, (seed, shard_rows) in enumerate(((0, 5), (0, 1000), (1, 5))):
        place = write(rows, tmp_path / f"in{number}", shard_rows)
        select([place], str(tmp_path / f"out{number}"), Selection(shuffle=True, seed=seed))
        orders.append(read(tmp_path / f"out{number}"))
    assert orders[0] == orders[1] != orders[2]
    for found in orders:
        assert sorted(found, key=str) == sorted(rows, key=str) != found


def test_every_prompt_without_a_pair_is_counted_by_reason(tmp_path: Path) -> None:
    answers: dict[str, list[tuple[str, float | None, int]]] = {
        "paired": [("a", 2.0, 5), ("b", 0.0, 5)],
        "paired too": [("a", 2.0, 5), ("b", 0.0, 5)],
        "one": [("a", 2.0, 5), ("b", None, 5)],
        "one text": [("a", 2.0, 5), ("a", 1.0, 5)],
        "equal": [("a", 1.0, 5), ("b", 1.0, 5)],
        "close": [("a", 1.0, 5), ("b", 0.75, 5)],
        "long": [("a", 2.0, 50), ("b", 0.0, 5)],
        "marked": [("a", None, 5), ("b", None, 5)],
    }
    rows = [
        {"prompt": prompt, "response": text, "score": score, "num_tokens": tokens}
        for prompt, each in answers.items()
        for text, score, tokens in each
    ]
    place = write(rows, tmp_path / "in", 9)
    recipe = Selection(pairs=Pairs.BEST_WORST, min_margin=0.5, max_tokens=20)
    totals = select([place], str(tmp_path / "out"), recipe).totals
    # No response to "marked" has a value: it is no prompt that a pair could be made of.
    without = {"one_response": 2, "equal": 1, "margin": 1, "too_long": 1}
    assert (totals.prompts, totals.prompts_without_pair) == (7, without)
    assert totals.dropped == {"marked": 3, "no_pair": 9}
    assert {row["prompt"] for row in read(tmp_path / "out")} == {"paired", "paired too"}

    one = select([place], str(tmp_path / "one"), recipe.model_copy(update={"sample": 1})).totals
    assert one.prompts_without_pair == {**without, "sample": 1}
    assert one.dropped == {**totals.dropped, "sample": 2}
    assert (one.rows_kept, one.rows_written) == (2, 1)


def test_splits_of_pairs_share_no_prompt(tmp_path: Path) -> None:
    place = write(rollouts(4), tmp_path / "in", 10)
    recipe = Selection(
        pairs=Pairs.ADJACENT, splits={"train": 0.5, "test": 0.5}, columns=Columns.TRL
    )
    select([place], str(tmp_path / "out"), recipe)
    train, test = (
        {row["prompt"][0]["content"] for row in read(tmp_path / "out" / name)}
        for name in ("train", "test")
    )
    assert train and test and not train & test


def test_a_sample_of_pairs_is_taken_by_the_seed(tmp_path: Path) -> None:
    place = write(rollouts(5), tmp_path / "in", 10)
    for name in ("a", "b"):
        select([place], str(tmp_path / name), Selection(pairs=Pairs.ALL, sample=7))
    assert len(read(tmp_path / "a")) == 7
    assert read(tmp_path / "a") == read(tmp_path / "b")


def test_an_unfinished_selection_is_not_selected_from(tmp_path: Path) -> None:
    place = write(rollouts(6), tmp_path / "in", 10)
    select([place], str(tmp_path / "a"), Selection(best=1, group_by=("prompt",)))
    whole = select([str(tmp_path / "a")], str(tmp_path / "b"), Selection()).totals
    assert whole.rows == len(read(tmp_path / "a"))
    (tmp_path / "a" / "_SUCCESS").unlink()
    with pytest.raises(IncompleteError, match="is not complete"):
        select([str(tmp_path / "a")], str(tmp_path / "c"), Selection())
