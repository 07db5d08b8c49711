"""A trial on some rows and columns: what is scored, what is counted, and what is refused after."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.in_process import run_cli
from tests.helpers.inputs import Row, jsonl, pair_rows, pair_schema
from tests.helpers.places import Place, of_input, rows_scored_and_marked
from tests.helpers.program import Ended

pytestmark = pytest.mark.e2e

MATH = 'field("kind") == "math"'


def rows(count: int, start: int = 0) -> list[Row]:
    """Every third of kind "math", the others "chat"."""
    return [
        {**row, "id": start + n, "kind": "chat" if n % 3 else "math"}
        for n, row in enumerate(pair_rows(count, start))
    ]


def parquet(rows: list[Row], row_group_size: int = 8) -> bytes:
    schema = pair_schema().append(pa.field("id", pa.int64())).append(pa.field("kind", pa.string()))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink, row_group_size=row_group_size)
    return sink.getvalue().to_pybytes()


class Trial:
    """A folder with inputs of 30 + 12 + 6 rows, of which 10, 4 and none are of kind "math"."""

    def __init__(self, place: Place, model: Path) -> None:
        self.place, self.model = place, model
        self.inputs, self.output = place / "in", place / "out"
        chats = [{**row, "kind": "chat"} for row in rows(6, 80)]
        self.inputs.write(
            {
                "a.parquet": parquet(rows(30)),
                "b.jsonl": jsonl(rows(12, 40)),
                "c.parquet": parquet(chats),
            }
        )

    def run(self, *flags: object, command: str = "score", output: str = "out") -> Ended:
        return run_cli(
            command, self.inputs.url, "--model", self.model, "--output", (self.place / output).url,
            "--no-ray", "--backend", "fake", "--shard-rows", 4, *self.place.flags, *flags,
        )  # fmt: skip

    def score(self, *flags: object) -> dict[str, Any]:
        ended = self.run("--json", *flags)
        assert ended.exit_code == 0, ended.err
        return ended.json

    def show(self, command: str) -> Ended:
        return run_cli(command, self.output.url, *self.output.flags)

    def verify(self, exit_code: int = 0) -> str:
        ended = self.show("verify")
        assert ended.exit_code == exit_code, ended.out
        return ended.out

    def ids(self, *names: str) -> list[int]:
        shards = self.output.shards()
        found: list[int] = []
        for name in names:
            found += of_input(shards, name)["id"].to_pylist()
        return found


@pytest.fixture
def trial(tmp_path: Path, tiny_model: Path) -> Trial:
    return Trial(Place(str(tmp_path)), tiny_model)


def test_rows_that_match_are_scored_and_the_others_are_counted(trial: Trial) -> None:
    totals = trial.score("--where", MATH)
    assert totals["rows"] == totals["rows_scored"] + totals["rows_not_asked"] == 48
    assert (totals["rows_scored"], totals["rows_not_asked"], totals["rows_marked"]) == (14, 34, 0)
    assert trial.ids("a.parquet") == list(range(0, 30, 3))
    assert trial.ids("b.jsonl") == list(range(40, 52, 3))
    assert "48 rows = 14 scored + 0 marked + 34 not asked for" in trial.verify()
    assert "not asked for: 34 rows" in trial.show("status").out
    manifest = pq.read_table(pa.BufferReader(trial.output.store.read(totals["manifest"])))
    by_input: dict[str, int] = {}
    for row in manifest.to_pylist():
        there = by_input.get(row["input"], 0)
        by_input[row["input"]] = there + row["rows"] + row["rows_not_asked"]
    assert by_input == {"a.parquet": 30, "b.jsonl": 12, "c.parquet": 6}
    assert {row["status"] for row in manifest.to_pylist()} == {"committed", "not_asked"}


def test_a_trial_ends_right_in_every_store(store_place: Place, tiny_model: Path) -> None:
    trial = Trial(store_place, tiny_model)
    totals = trial.score("--where", MATH, "--limit", 9, "--keep-columns", "id")
    assert (totals["rows_scored"], totals["rows_not_asked"]) == (9, 39)
    assert trial.ids("a.parquet", "b.jsonl") == [0, 3, 6, 9, 12, 15, 40, 43, 46]
    assert "48 rows = 9 scored + 0 marked + 39 not asked for" in trial.verify()


def test_check_takes_its_sample_from_rows_that_are_asked_for(trial: Trial) -> None:
    flags = ("--where", MATH, "--max-tokens", 4096, "--json")
    checked = run_cli("check", trial.model, trial.inputs.url, *flags)
    assert checked.exit_code == 0, checked.err
    names = [compared["name"] for compared in checked.json["parity"]["compared"]]
    files = {"a.parquet": set(range(0, 30, 3)), "b.jsonl": set(range(0, 12, 3))}
    for name in names:
        file, _, row, *_ = name.replace(",", "").split()
        assert int(row) in files[file]


def test_a_limit_takes_the_first_rows_of_every_file(trial: Trial) -> None:
    planned = run_cli("plan", trial.inputs.url, "--limit", 8, "--json").json
    assert (planned["rows"], planned["rows_not_asked"]) == (8, 40)
    totals = trial.score("--limit", 8)
    assert (totals["rows"], totals["rows_scored"], totals["rows_not_asked"]) == (48, 8, 40)
    assert trial.ids("a.parquet", "b.jsonl", "c.parquet") == [0, 1, 2, 3, 4, 40, 41, 80]
    assert "48 rows = 8 scored + 0 marked + 40 not asked for" in trial.verify()


def test_a_trial_that_was_interrupted_is_finished_with_the_same_rows(trial: Trial) -> None:
    flags = ("--where", MATH, "--limit", 9)
    trial.score(*flags)
    before = trial.output.shards()
    for key in ("_SUCCESS", *list(before)[1:3]):
        trial.output.store.delete(key)
    totals = trial.score(*flags)
    assert (totals["rows_scored"], totals["rows_not_asked"]) == (9, 39)
    after = trial.output.shards()
    assert {key: shard.table.to_pylist() for key, shard in after.items()} == {
        key: shard.table.to_pylist() for key, shard in before.items()
    }
    trial.verify()


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (("--limit", 9), "limit: 8 there, 9 here"),
        ((), "limit: 8 there, None here"),
        (("--limit", 8, "--where", MATH), 'where: None there, field("kind'),
        (("--limit", 8, "--keep-columns", "id"), "keep_columns: [] there, ['id'] here"),
    ],
)
def test_an_output_has_one_selection(
    trial: Trial, flags: tuple[object, ...], difference: str
) -> None:
    trial.score("--limit", 8)
    before = trial.output.shards()
    again = trial.run(*flags)
    assert again.exit_code == 2
    (line,) = [line for line in again.error.splitlines() if "there" in line and "here" in line]
    assert line.strip().startswith(difference)
    assert trial.output.shards() == before


def test_a_file_that_comes_later_changes_what_the_others_are_asked_for(trial: Trial) -> None:
    trial.score("--limit", 8)
    trial.inputs.write({"d.jsonl": jsonl(rows(48, 100))})
    totals = trial.score("--limit", 8)
    assert (totals["rows"], totals["rows_scored"]) == (96, 8)
    assert trial.ids("a.parquet", "d.jsonl") == [0, 1, 2, 100, 101, 102, 103]
    assert "96 rows = 8 scored" in trial.verify()


def test_rows_that_nothing_accounts_for_are_found(trial: Trial) -> None:
    """A shard that leaves out rows, and a record of it that agrees."""
    trial.score("--where", MATH)
    run = trial.output.read_json("_batch_scorer/run.json")
    run["layout"]["where"] = 'field("kind").isin(["math", "chat"])'
    trial.output.write({"_batch_scorer/run.json": json.dumps(run).encode()})
    said = trial.verify(exit_code=4)
    assert "a.parquet: 30 rows match `where`; 10 in its shards" in said


def test_a_marked_row_is_named_by_its_row_of_the_file(trial: Trial) -> None:
    data = rows(12, 40)
    data[9] = {**data[9], "chosen": []}
    trial.inputs.write({"b.jsonl": jsonl(data)})
    ended = trial.run("--where", MATH)
    assert ended.exit_code == 0
    assert "b.jsonl row 9: " in ended.out + ended.err
    shards = trial.output.shards().values()
    assert rows_scored_and_marked(shard.table for shard in shards) == (13, 1)
    assert "13 scored + 1 marked + 34 not asked for" in trial.verify()


# Columns


def test_only_the_kept_columns_are_written_beside_the_scores(trial: Trial) -> None:
    trial.score("--keep-columns", "source,id", "--drop-columns", "source")
    for shard in trial.output.shards().values():
        added = shard.commit.added_columns
        assert shard.table.column_names == ["id", *added]
    assert trial.ids("a.parquet") == list(range(30))
    trial.verify()
    file = Path(trial.output.url, "c.rows0-3.parquet")
    table = pq.read_table(file)
    pq.write_table(table.set_column(0, "id", table["id"].take([1, 0, 2])), file)
    assert "column id is not as it was in the input" in trial.verify(exit_code=4)


def test_scores_are_not_reused_where_what_was_scored_is_not_kept(trial: Trial) -> None:
    flags = ("--keep-columns", "id")
    trial.score(*flags)
    trial.inputs.write({"a.parquet": parquet(rows(31))})
    totals = trial.score(*flags)
    assert totals["metrics"]["reused_sequences"] == 0
    assert totals["rows_scored"] == 49
    trial.verify()


def test_scores_are_reused_within_a_selection(trial: Trial) -> None:
    flags = ("--where", MATH, "--drop-columns", "source")
    trial.score(*flags)
    trial.inputs.write({"a.parquet": parquet(rows(40))})
    totals = trial.score(*flags)
    assert totals["metrics"]["reused_rows"] == 10
    assert (totals["rows"], totals["rows_scored"], totals["rows_not_asked"]) == (58, 18, 40)
    trial.verify()


# Nightly runs


def test_a_nightly_run_counts_what_it_leaves_out(trial: Trial) -> None:
    flags = ("--where", MATH, "--json")
    (line,) = trial.run(*flags, command="nightly").json["night"]["lines"]
    rows_of = line["rows"]
    assert (rows_of["total"], rows_of["new"], rows_of["not_asked"]) == (48, 14, 34)
    trial.inputs.write({"d.jsonl": jsonl(rows(6, 60))})
    (ahead,) = json.loads(trial.run(*flags, "--dry-run", command="nightly").out)
    assert (ahead["rows_to_do"], ahead["rows_not_asked"]) == (2, 38)
    (line,) = trial.run(*flags, command="nightly").json["night"]["lines"]
    rows_of = line["rows"]
    assert (rows_of["new"], rows_of["kept"], rows_of["not_asked"]) == (2, 14, 38)
    assert run_cli("verify", f"{trial.output.url}/{line['path']}").exit_code == 0
    assert trial.run(*flags, command="nightly").json["night"] is None  # nothing to do


def test_another_selection_is_another_generation_and_latest_moves_to_it(trial: Trial) -> None:
    trial.run(command="nightly")
    night = trial.run("--where", MATH, "--json", command="nightly").json["night"]
    assert night["has_moved"] and night["lines"][0]["rows"]["reused"] == 14


def test_a_name_that_two_columns_have_costs_no_file(trial: Trial) -> None:
    table = pa.Table.from_pylist(rows(9))
    table = pa.table([*table.columns, table["id"]], names=[*table.column_names, "id"])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=4)
    trial.inputs.write({"c.parquet": sink.getvalue().to_pybytes()})
    trial.score("--where", MATH, "--exclude", "[ab].*")
    ended = run_cli("verify", (trial.place / "out").url, "--json", *trial.place.flags)
    assert (ended.exit_code, ended.json["inputs_compared"]) == (0, ended.json["shards"])
    assert (ended.json["rows_scored"], ended.json["rows_not_asked"]) == (3, 6)
