"""`evaluate` on what this program scored: on Ray into S3, and by the plain loop on this disk."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer import evaluate, load_config
from batch_scorer.errors import BatchScorerError
from batch_scorer.evaluation import rewardbench, rewardbench2
from batch_scorer.records import Receipt
from batch_scorer.runs.remaining import Work
from cluster.local.seaweed import S3Server
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pair_rows, pairs, parquet
from tests.helpers.places import Place
from tests.helpers.program import Ended, Program

pytestmark = pytest.mark.e2e

SUBSETS = [name for rows in rewardbench.SECTIONS.values() for name in rows]
SHARD_ROWS = 23
ROWS = 4 * len(SUBSETS)
EMPTY = 7
"""The number of a row whose rejected answer is empty: it will be marked."""


def texts(count: int) -> list[dict[str, str]]:
    return [
        {
            "prompt": row["chosen"][0]["content"],
            "chosen": row["chosen"][1]["content"],
            "rejected": row["rejected"][1]["content"],
        }
        for row in pair_rows(count)
    ]


def rewardbench_table() -> pa.Table:
    """Four rows of each subset, neighbours of different ones, with the columns of the data set."""
    rows = [
        {
            **text,
            "rejected": "" if number == EMPTY else text["rejected"],
            "chosen_model": "a",
            "rejected_model": "b",
            "subset": SUBSETS[number % len(SUBSETS)],
            "id": number,
        }
        for number, text in enumerate(texts(ROWS))
    ]
    return pa.Table.from_pylist(rows)


def rewardbench2_table() -> pa.Table:
    """Six rows of each best-of-4 subset and three prompts of Ties, whose two forms lie apart."""
    told = iter(texts(200))

    def row(name: str, subset: str, right: int, wrong: int) -> dict[str, Any]:
        answers = [next(told)["chosen"] for _ in range(right + wrong)]
        counts = {"num_correct": right, "num_incorrect": wrong, "total_completions": right + wrong}
        lists = {"chosen": answers[:right], "rejected": answers[right:]}
        return {"id": name, "prompt": "Why?", **lists, **counts, "subset": subset}

    best_of = [s for s in rewardbench2.SUBSETS if s != rewardbench2.TIES]
    ref = [row(f"ref:{n}", "Ties", 1, 2 + n) for n in range(3)]
    rows = [row(f"{s}-{n}", s, 1, 3) for n in range(6) for s in best_of]
    return pa.Table.from_pylist(ref + rows + [row(f"tied:{n}", "Ties", 3, 2) for n in range(3)])


def scored_table(place: Place) -> pa.Table:
    """All scored rows, read without the program."""
    shards = place.shards().values()
    return pa.concat_tables(pq.read_table(io.BytesIO(shard.data)) for shard in shards)


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> Place:
    place = Place(s3.url("evaluate"), s3.options)
    (place / "in").write({"rewardbench.parquet": parquet(rewardbench_table())})
    (place / "in2").write({"rewardbench2.parquet": parquet(rewardbench2_table(), 9)})
    return place


@pytest.fixture(scope="module")
def one_go(module_program: Program, bucket: Place, tiny_model: Path) -> Ended:
    """Scored on Ray and evaluated by one command."""
    return module_program.run(
        "evaluate", (bucket / "in").url, "--model", tiny_model, "--output", (bucket / "out").url,
        *bucket.flags, "--shard-rows", SHARD_ROWS, "--dtype", "float32", "--json",
    )  # fmt: skip


def test_one_command_scores_and_evaluates(one_go: Ended, bucket: Place) -> None:
    assert one_go.exit_code == 0, one_go.err
    assert len((bucket / "out").shards()) == -(-ROWS // SHARD_ROWS)
    table = scored_table(bucket / "out")
    expected = rewardbench.evaluate(table).to_json()
    found = one_go.json
    assert {name: found[name] for name in ("columns", "subsets", "missing", "notes")} == {
        name: expected[name] for name in ("columns", "subsets", "missing", "notes")
    }
    assert (found["rows"], found["unscored"], found["missing"]) == (ROWS, 1, [])
    # The same by hand, from the rows themselves.
    wins = {
        subset: [
            row["margin"] is not None and row["margin"] > 0
            for row in table.to_pylist()
            if row["subset"] == subset
        ]
        for subset in SUBSETS
    }
    for subset in found["subsets"]:
        here = wins[subset["name"]]
        assert subset["accuracy"]["value"] == sum(here) / len(here), subset
    assert 0 < found["columns"]["Score"]["value"] < 1


def test_a_scored_output_is_evaluated_to_the_same_from_the_shell_and_from_python(
    one_go: Ended, bucket: Place, tmp_path: Path
) -> None:
    report = tmp_path / "results" / "rewardbench.json"
    again = run_cli("evaluate", (bucket / "out").url, *bucket.flags, "--to", report)
    assert again.exit_code == 0, again.err
    assert json.loads(report.read_text()) == one_go.json
    for name in ("Model", "Score", "Chat", "Chat Hard", "Safety", "Reasoning", "xstest-should"):
        assert name in again.out
    assert "1 of 92 rows lack a score and count as wrong" in again.out
    assert evaluate((bucket / "out").url, bucket.options).to_json() == one_go.json


def test_the_legacy_weights_change_safety_alone(one_go: Ended, bucket: Place) -> None:
    legacy = run_cli(
        "evaluate", (bucket / "out").url, *bucket.flags, "--legacy-xstest-weights", "--json"
    )
    expected = rewardbench.evaluate(scored_table(bucket / "out"), legacy_xstest_weights=True)
    assert legacy.json["columns"] == expected.to_json()["columns"]
    assert legacy.json["columns"]["Chat"] == one_go.json["columns"]["Chat"]


def test_best_of_n_rows_of_several_shards(bucket: Place, tiny_model: Path) -> None:
    """T-RB2-3: the two forms of a Ties prompt come from the first and the last shard."""
    done = run_cli(
        "evaluate", (bucket / "in2").url, "--model", tiny_model, "--output", (bucket / "out2").url,
        *bucket.flags, "--shard-rows", 9, "--no-ray", "--backend", "fake", "--json",
        "--column-prefix", "rm_",
    )  # fmt: skip
    assert done.exit_code == 0, done.err
    assert len((bucket / "out2").shards()) == 4
    table = scored_table(bucket / "out2")
    names = [name.removeprefix("rm_") for name in table.column_names]
    expected = rewardbench2.evaluate(table.rename_columns(names)).to_json()
    assert done.json["columns"] == expected["columns"]
    assert done.json["details"] == expected["details"]
    assert done.json["benchmark"] == "rewardbench-2"


@pytest.fixture
def disk(tmp_path: Path) -> Place:
    return Place(str(tmp_path))


def run(command: str, place: Place, model: Path, *flags: object) -> Ended:
    return run_cli(
        command, (place / "in").url, "--model", model, "--output", (place / "out").url,
        "--no-ray", "--backend", "fake", *flags,
    )  # fmt: skip


def test_judgebench_scores_both_responses_and_reads_the_label(
    disk: Place, tiny_model: Path
) -> None:
    sources = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench")
    rows = [
        {
            "pair_id": str(number),
            "source": sources[number % 4],
            "question": text["prompt"],
            "response_model": "gpt-4o",
            "response_A": text["chosen"],
            "response_B": text["rejected"],
            "label": ("A>B", "B>A")[number % 3 == 0],
        }
        for number, text in enumerate(texts(24))
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (disk / "in").write({"gpt.jsonl": lines})
    done = run("evaluate", disk, tiny_model, "--benchmark", "judgebench", "--json")
    assert done.exit_code == 0, done.err
    right = [
        (row["margin"] > 0) == (row["label"] == "A>B")
        for row in scored_table(disk / "out").to_pylist()
    ]
    assert done.json["columns"]["Score"]["value"] == sum(right) / 24
    # The same from Python, where scoring has nothing left to do.
    config = load_config(
        inputs=(disk / "in").url, model=str(tiny_model), output=(disk / "out").url,
        use_ray=False, backend="fake",
    )  # fmt: skip
    assert evaluate(config, benchmark="judgebench").to_json() == done.json
    # Later, what was scored tells that this is JudgeBench.
    assert run_cli("evaluate", (disk / "out").url, "--json").json == done.json


def test_prior_sets_are_told_by_their_file(disk: Place, tiny_model: Path) -> None:
    table = rewardbench_table()
    shp = table.drop_columns(["subset"]).slice(0, 5)
    (disk / "in").write(
        {"shp-00000-of-00001.parquet": parquet(shp), "filtered.parquet": parquet(table)}
    )
    found = run("evaluate", disk, tiny_model, "--json").json
    assert {s["name"]: s["rows"] for s in found["subsets"]}["shp"] == 5
    assert set(found["columns"]) >= {"Prior Sets", "Score with Prior Sets"}
    assert found["missing"] == ["anthropic_helpful", "anthropic_hhh", "summarize"]


def test_a_column_that_is_needed_and_not_kept_is_missed_before_scoring(
    disk: Place, tiny_model: Path
) -> None:
    (disk / "in").write({"a.parquet": parquet(rewardbench_table())})
    refused = run("evaluate", disk, tiny_model, "--drop-columns", "subset")
    assert refused.exit_code == 2
    assert "not the rows of one benchmark" in refused.error
    assert not Path(disk.url, "out").exists()


def test_rows_that_are_no_benchmark_are_refused_before_they_are_scored(
    disk: Place, tiny_model: Path
) -> None:
    (disk / "in").write({"pairs.parquet": parquet(pairs(5))})
    refused = run("evaluate", disk, tiny_model)
    assert refused.exit_code == 2
    assert "pairs.parquet holds preference_pair rows with columns chosen, rejected, source" in (
        refused.error
    )
    assert not Path(disk.url, "out").exists()
    assert run("score", disk, tiny_model).exit_code == 0
    refused = run_cli("evaluate", (disk / "out").url)
    assert refused.exit_code == 2
    assert "not the rows of one benchmark" in refused.error


def test_python_scores_first_what_is_a_benchmark_and_refuses_the_rest(
    disk: Place, tiny_model: Path
) -> None:
    (disk / "in").write({"a.parquet": parquet(rewardbench_table())})
    config = load_config(
        inputs=(disk / "in").url, model=str(tiny_model), output=(disk / "out").url,
        use_ray=False, backend="fake", shard_rows=SHARD_ROWS,
    )  # fmt: skip
    for asked, message in (
        ({"benchmark": "mt-bench"}, "unknown benchmark 'mt-bench'; known are rewardbench, "),
        ({"benchmark": "rm-bench"}, "not the rows of one benchmark"),
        ({"store_options": {"region": "a"}}, "store_options: a Config has its own"),
    ):
        with pytest.raises(BatchScorerError, match=message):
            evaluate(config, **asked)
    assert not Path(disk.url, "out").exists()

    seen: list[str] = []

    class Counting:
        def planned(self, work: Work) -> None:
            seen.append(f"planned {len(work.todo)}")

        def finished(self, receipt: Receipt) -> None:
            seen.append(receipt.output_key)

    result = evaluate(config, listeners=[Counting()])
    assert (result.rows, result.output) == (ROWS, config.output)
    assert seen[0] == "planned 4" and len(set(seen)) == 5
    assert result == evaluate(config.output)


def test_a_report_that_cannot_be_written_is_named(disk: Place, tiny_model: Path) -> None:
    (disk / "in").write({"a.parquet": parquet(rewardbench_table())})
    refused = run("evaluate", disk, tiny_model, "--to", f"{disk.url}/in/a.parquet/r.json")
    assert refused.exit_code == 2
    assert "a.parquet/r.json: the report cannot be written" in refused.error


def test_subsets_of_another_benchmark_need_it_to_be_named(disk: Place, tiny_model: Path) -> None:
    table = rewardbench_table().slice(0, 6)
    mine = table.set_column(table.column_names.index("subset"), "subset", [["mine"] * 6])
    (disk / "in").write({"a.parquet": parquet(mine)})
    assert run("score", disk, tiny_model).exit_code == 0
    refused = run_cli("evaluate", (disk / "out").url)
    assert refused.exit_code == 2
    assert "pass --benchmark rewardbench" in refused.error
    done = run_cli("evaluate", (disk / "out").url, "--benchmark", "rewardbench", "--json")
    assert [s["name"] for s in done.json["subsets"]] == ["mine"]
    assert done.json["columns"]["Score"] is None


def test_an_incomplete_output_is_refused_with_what_is_missing(
    disk: Place, tiny_model: Path
) -> None:
    (disk / "in").write(
        {"a.parquet": parquet(rewardbench_table()), "b.parquet": b"PAR1 and no more"}
    )
    failed = run("evaluate", disk, tiny_model, "--shard-rows", SHARD_ROWS)
    assert failed.exit_code == 3
    refused = run_cli("evaluate", (disk / "out").url)
    assert refused.exit_code == 3
    assert "4 of 4 planned shards are scored, 92 of 92 rows" in refused.error
    assert "b.parquet failed" in refused.error
    # As if the run had been killed before it came to two of its shards.
    for rows in ("23-46", "46-69"):
        Path(disk.url, "out", f"a.rows{rows}.parquet").unlink()
    refused = run_cli("evaluate", (disk / "out").url)
    assert refused.exit_code == 3
    assert "2 of 4 planned shards are scored, 46 of 92 rows" in refused.error
    assert "a.parquet: rows 23 to 69 are missing" in refused.error


def test_a_shard_that_is_gone_is_no_result(disk: Place, tiny_model: Path) -> None:
    (disk / "in").write({"a.parquet": parquet(rewardbench_table())})
    assert run("score", disk, tiny_model, "--shard-rows", SHARD_ROWS).exit_code == 0
    Path(disk.url, "out", "a.rows23-46.parquet").unlink()
    refused = run_cli("evaluate", (disk / "out").url)
    assert refused.exit_code == 4
    assert "a.rows23-46.parquet is not the shard that was committed" in refused.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`inputs` is needed"),
        (["in", "--model", "m"], "`output` is needed"),
        (["in", "--output", "o"], "`model` is needed"),
        (["a", "b"], "several inputs: only for scoring"),
        (["a", "--dtype", "float32"], "dtype: only for scoring"),
        (["nowhere"], "nowhere: no such folder"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    refused = run_cli("evaluate", *arguments)
    assert refused.exit_code == 2
    assert message in refused.error


def test_a_config_file_with_a_model_means_scoring_and_one_without_must_name_it(
    disk: Place, tiny_model: Path
) -> None:
    (disk / "in").write({"a.parquet": parquet(rewardbench_table())})
    file = Path(disk.url, "job.yaml")
    lines = f"inputs: [{disk.url}/in]\noutput: {disk.url}/out\nbackend: fake\nuse_ray: false\n"
    file.write_text(lines)
    refused = run_cli("evaluate", "--config", file)
    assert refused.exit_code == 2
    assert "`model` is needed" in refused.error
    file.write_text(f"{lines}model: {tiny_model}\n")
    done = run_cli("evaluate", "--config", file, "--json")
    assert done.json["rows"] == ROWS


def test_an_unknown_benchmark_is_refused_with_those_there_are() -> None:
    refused = run_cli("evaluate", "in", "--benchmark", "mt-bench")
    assert refused.exit_code == 2
    assert "rewardbench-2" in refused.err
    assert "Traceback" not in refused.err
