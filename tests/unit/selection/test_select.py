"""What a selection keeps, against DuckDB or pandas over the same rows: nulls, NaN and ties too."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from batch_scorer.derived.output import SHARDS_KEY, Totals
from batch_scorer.errors import InputError, OutputError
from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.select import select

_NUMBER = 600
_KEPT = "score is not null and not isnan(score)"


def _rows() -> list[dict[str, Any]]:
    """Rollouts: few values, so that many are equal, and each twentieth null or NaN."""
    chance = random.Random(3)
    rows = []
    for number in range(_NUMBER):
        score: float | None = chance.choice([-1.5, 0.0, 0.25, 0.5, 2.0])
        if number % 20 < 2:
            score = None if number % 20 else float("nan")
        rows.append(
            {
                "id": number,
                "prompt": f"question {chance.randrange(80)}",
                "response": f"answer {number}",
                "source": chance.choice(["math", "code", "chat", None]),
                "score": score,
                "num_tokens": 3,
            }
        )
    return rows


def _write(folder: Path, rows: Sequence[dict[str, Any]], shard_rows: int) -> str:
    schema = pa.schema(
        {
            "id": pa.int64(),
            "prompt": pa.string(),
            "response": pa.string(),
            "source": pa.string(),
            "score": pa.float32(),
            "num_tokens": pa.int32(),
        }
    )
    folder.mkdir()
    for start in range(0, len(rows), shard_rows):
        part = list(rows[start : start + shard_rows])
        pq.write_table(pa.Table.from_pylist(part, schema), folder / f"{start:05}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _write(tmp_path_factory.mktemp("in") / "scored", _rows(), 250)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same rows in another order and in smaller shards."""
    rows = _rows()
    random.Random(5).shuffle(rows)
    return _write(tmp_path_factory.mktemp("in") / "scored", rows, 77)


def _files(output: Path) -> list[Path]:
    return sorted(path for path in output.rglob("*.parquet") if "_batch_scorer" not in path.parts)


def _ids(output: Path) -> list[int]:
    found = [row for path in _files(output) for row in pq.read_table(path)["id"].to_pylist()]
    return sorted(found)


def _sql(place: str, query: str) -> list[int]:
    with duckdb.connect() as database:
        database.create_function("tie", _tie, ["varchar", "varchar"], "ubigint")
        found = database.execute(query.replace("ROWS", f"read_parquet('{place}/*.parquet')"))
        return sorted(row[0] for row in found.fetchall())


def _tie(prompt: str, response: str) -> int:
    """By what equal values are ordered."""
    low = (xxhash.xxh3_128_intdigest(text.encode()) % 2**64 for text in (prompt, response))
    return (next(low) * 0x9E3779B97F4A7C15 + next(low)) % 2**64


_TIE = "tie(prompt, response)"
_SELECTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "marked rows are never kept": ({}, f"select id from ROWS where {_KEPT}"),
    "where": (
        {"where": 'field("score") > 0.1'},
        f"select id from ROWS where {_KEPT} and score > 0.1",
    ),
    "quantiles": (
        {"quantiles": (0.1, 0.7)},
        f"with r as (select * from ROWS where {_KEPT}) select id from r where score between "
        "(select quantile_disc(score, 0.1) from r) and (select quantile_disc(score, 0.7) from r)",
    ),
    "best of a prompt": (
        {"best": 2, "group_by": ("prompt",)},
        f"select id from ROWS where {_KEPT} qualify row_number() over "
        f"(partition by prompt order by score desc, {_TIE}) <= 2",
    ),
    "best and worst of a key": (
        {"best": 1, "worst": 1, "group_by": ("source",)},
        f"select id from ROWS where {_KEPT} qualify row_number() over "
        f"(partition by source order by score desc, {_TIE}) = 1 or row_number() over "
        f"(partition by source order by score, {_TIE}) = 1",
    ),
    "two keys": (
        {"best": 1, "group_by": ("source", "prompt")},
        f"select id from ROWS where {_KEPT} qualify row_number() over "
        f"(partition by source, prompt order by score desc, {_TIE}) = 1",
    ),
    "top percent with offsets": (
        {
            "top_percent": {"math": 30, "code": 7, "*": 10},
            "offsets": {"math": -0.1, "*": 0.5},
        },
        "with r as (select *, score::double + case source when 'math' then -0.1 else 0.5 end as v "
        f"from ROWS where {_KEPT}) select id from r qualify row_number() over "
        f"(partition by source order by v desc, {_TIE}) <= ceil((case source when 'math' then 30 "
        "when 'code' then 7 else 10 end) * count(*) over (partition by source) / 100)",
    ),
    "categories that are not named stay whole": (
        {"top_percent": {"math": 50}},
        f"select id from ROWS where {_KEPT} qualify source is distinct from 'math' or row_number() "
        f"over (partition by source order by score desc, {_TIE}) <= "
        "ceil(count(*) over (partition by source) / 2)",
    ),
    "sample": (
        {"sample": 50, "seed": 4},
        f"select id from ROWS where {_KEPT} order by md5_number_lower({_TIE} || ':4') limit 50",
    ),
}


@pytest.mark.parametrize("name", _SELECTIONS)
def test_a_selection_keeps_what_sql_keeps_whatever_the_shards(
    name: str, scored: str, shuffled: str, tmp_path: Path
) -> None:
    settings, query = _SELECTIONS[name]
    expected = _sql(scored, query)
    for number, place in enumerate([scored, shuffled]):
        output = tmp_path / str(number)
        totals = select([place], str(output), Selection(**settings)).totals
        assert _ids(output) == expected
        assert (totals.rows, totals.rows_kept) == (_NUMBER, len(expected))
        assert totals.rows == totals.rows_kept + sum(totals.dropped.values())
        assert totals.dropped["marked"] == 60


def test_rows_come_with_all_columns_in_their_order(scored: str, tmp_path: Path) -> None:
    select([scored], str(tmp_path / "out"), Selection(where='field("source") == "math"'))
    for path in _files(tmp_path / "out"):
        kept = pq.read_table(path)
        given = pq.read_table(Path(scored) / path.name)
        ids = set(kept["id"].to_pylist())
        assert kept.to_pylist() == [row for row in given.to_pylist() if row["id"] in ids]


def test_no_prompt_is_in_two_splits(scored: str, shuffled: str, tmp_path: Path) -> None:
    selection = Selection(splits={"train": 0.8, "test": 0.2})
    found = []
    for number, place in enumerate([scored, shuffled]):
        output = tmp_path / str(number)
        select([place], str(output), selection)
        found.append([_ids(output / name) for name in ("train", "test")])
    assert found[0] == found[1]
    train, test = (
        {prompt for path in _files(tmp_path / "0" / name) for prompt in _prompts(path)}
        for name in ("train", "test")
    )
    assert train
    assert test
    assert not train & test


def _prompts(path: Path) -> list[str]:
    found: list[str] = pq.read_table(path)["prompt"].to_pylist()
    return found


def test_one_user_message_is_the_same_prompt_as_its_text(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    text = pa.table({"prompt": ["Hi"], "response": ["a"], "score": [1.0]})
    messages = pa.table(
        {"prompt": [[{"role": "user", "content": "Hi"}]], "response": ["b"], "score": [2.0]}
    )
    pq.write_table(text, folder / "a.parquet")
    pq.write_table(messages, folder / "b.parquet")
    select([str(folder)], str(tmp_path / "out"), Selection(best=1, group_by=("prompt",)))
    assert [path.name for path in _files(tmp_path / "out")] == ["b.parquet"]


def test_pairs_are_kept_above_a_margin(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    margins = [None, float("nan"), 0.0, -1.0, 0.5]
    pairs = {"chosen": list("abcde"), "rejected": list("fghij"), "margin": margins}
    pq.write_table(pa.table({"id": range(5), **pairs}), folder / "a.parquet")
    totals = select([str(folder)], str(tmp_path / "out"), Selection(above_margin=0)).totals
    assert _ids(tmp_path / "out") == [4]
    assert totals.dropped == {"margin": 2, "marked": 2}


def test_a_second_run_does_nothing_and_another_recipe_is_refused(
    scored: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    first = select([scored], str(output), Selection(sample=9))
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert select([scored], str(output), Selection(sample=9)) == first
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == times
    with pytest.raises(OutputError, match="sample was 9, now 8"):
        select([scored], str(output), Selection(sample=8))


def test_a_begun_selection_ends_in_the_same_bytes(scored: str, tmp_path: Path) -> None:
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    for output in (whole, begun):
        select([scored], str(output), Selection(best=1, group_by=("prompt",)))
    # As a run leaves it that was killed after its first shard.
    (begun / "_SUCCESS").unlink()
    (begun / SHARDS_KEY).unlink()
    for path in _files(begun)[1:]:
        path.unlink()
    select([scored], str(begun), Selection(best=1, group_by=("prompt",)))
    for path in (*_files(whole), whole / "_SUCCESS", whole / SHARDS_KEY):
        assert (begun / path.relative_to(whole)).read_bytes() == path.read_bytes()


def test_a_column_that_is_not_there_is_named(scored: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"00000\.parquet: there is no column 'reward'"):
        select([scored], str(tmp_path / "out"), Selection(by="reward"))


def test_totals_are_what_is_stored(scored: str, tmp_path: Path) -> None:
    totals = select([scored], str(tmp_path / "out"), Selection()).totals
    assert Totals(**json.loads((tmp_path / "out" / "_SUCCESS").read_text())) == totals
