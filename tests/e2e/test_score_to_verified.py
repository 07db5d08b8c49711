"""From inputs in S3 to verified scores in S3, on Ray and without it."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.local.seaweed import S3Server
from tests.helpers.inputs import FORMATS, jsonl, pair_rows, pairs, parquet
from tests.helpers.places import Place, Stored, digests, of_input
from tests.helpers.program import Ended, Program

pytestmark = pytest.mark.e2e

SHARD_ROWS = 20
ADDED = {
    "score_chosen": pa.float32(),
    "score_rejected": pa.float32(),
    "margin": pa.float32(),
    "score_error": pa.string(),
    "num_tokens_chosen": pa.int32(),
    "num_tokens_rejected": pa.int32(),
    "score_notes": pa.list_(pa.string()),
    "num_special_tokens": pa.int32(),
}
JSON_ROWS = pair_rows(10, start=500)


def parquet_inputs() -> dict[str, pa.Table]:
    return {
        "a/three-groups.parquet": pairs(60),
        "a/one-group.parquet": pairs(45, start=100),
        "b/empty.parquet": pairs(0),
        "b/single.parquet": pairs(1, start=200),
        "b/large-types.parquet": pq.read_table(FORMATS / "skywork-large-types.parquet").slice(8, 6),
    }


def other_inputs() -> dict[str, bytes]:
    return {"c/pairs.jsonl": jsonl(JSON_ROWS), "c/pairs.jsonl.gz": gzip.compress(jsonl(JSON_ROWS))}


@pytest.fixture(scope="module")
def place(s3: S3Server) -> Place:
    """Several files with several row groups, an empty one, one of one row, and JSON Lines."""
    place = Place(s3.url("e2e"), s3.options)
    groups = {"a/three-groups.parquet": 20}
    files = {key: parquet(table, groups.get(key)) for key, table in parquet_inputs().items()}
    (place / "in").write(files | other_inputs())
    return place


class Scoring:
    """One way of scoring the same inputs."""

    def __init__(self, program: Program, place: Place, model: Path) -> None:
        self._program = program
        self.place = place
        self._model = model

    def __call__(self, output: str, *flags: str) -> Ended:
        return self._program.run(
            "score", "--model", self._model, (self.place / "in").url,
            "--output", (self.place / output).url, *self.place.flags, "--json",
            "--dtype", "float32", "--shard-rows", SHARD_ROWS, *flags,
        )  # fmt: skip


@pytest.fixture(scope="module")
def scoring(module_program: Program, place: Place, tiny_model: Path) -> Scoring:
    return Scoring(module_program, place, tiny_model)


@pytest.fixture(scope="module")
def on_ray(scoring: Scoring) -> Ended:
    return scoring("out")


@pytest.fixture(scope="module")
def shards(on_ray: Ended, place: Place) -> dict[str, Stored]:
    assert on_ray.exit_code == 0, on_ray.err
    return (place / "out").shards()


def test_every_row_comes_back_scored_with_its_columns_as_they_were(
    on_ray: Ended, shards: dict[str, Stored]
) -> None:
    rows = 0
    for key, expected in parquet_inputs().items():
        scored = of_input(shards, key)
        assert scored.column_names == [*expected.column_names, *ADDED], key
        assert [scored.schema.field(name).type for name in ADDED] == list(ADDED.values()), key
        kept = scored.select(expected.column_names)
        assert kept.schema.types == expected.schema.types, key
        assert kept.equals(expected), key
        _assert_scored(scored)
        rows += scored.num_rows
    for key in other_inputs():
        scored = of_input(shards, key)
        assert scored.drop_columns(list(ADDED)).to_pylist() == JSON_ROWS, key
        _assert_scored(scored)
        rows += scored.num_rows
    totals = on_ray.json
    assert (totals["rows"], totals["rows_scored"], totals["rows_marked"]) == (rows, rows, 0)


def _assert_scored(table: pa.Table) -> None:
    assert table["score_error"].null_count == table.num_rows
    for name in ("score_chosen", "score_rejected", "margin"):
        assert table[name].null_count == 0
    scores = table.to_pydict()
    both = zip(scores["score_chosen"], scores["score_rejected"], scores["margin"], strict=True)
    assert all(
        chosen - rejected == pytest.approx(margin, abs=1e-4) for chosen, rejected, margin in both
    )


def test_shards_are_cut_at_row_groups_and_inside_a_large_one(shards: dict[str, Stored]) -> None:
    assert sorted(shards) == [
        "a/one-group.rows0-15.parquet",
        "a/one-group.rows15-30.parquet",
        "a/one-group.rows30-45.parquet",
        "a/three-groups.rows0-20.parquet",
        "a/three-groups.rows20-40.parquet",
        "a/three-groups.rows40-60.parquet",
        "b/empty.parquet",
        "b/large-types.parquet",
        "b/single.parquet",
        "c/pairs.jsonl.gz.parquet",
        "c/pairs.jsonl.parquet",
    ]


def test_the_figures_of_a_run_are_in_its_summary_and_stay_with_the_output(
    module_program: Program, place: Place, on_ray: Ended, shards: dict[str, Stored]
) -> None:
    figures = on_ray.json["metrics"]
    assert figures["scored_tokens"] == on_ray.json["tokens"]
    assert 0 < figures["computed_tokens"] <= figures["scored_tokens"]
    assert figures["computed_ratio"] == figures["computed_tokens"] / figures["scored_tokens"]
    assert figures["padding_share"] == 0
    assert figures["goodput_tokens_per_s_per_device"] > 0 and figures["tokenize_s"] > 0
    assert 0 <= figures["idle_share"] <= 1
    assert figures["peak_flop_per_s"] > 0 and 0 < figures["model_flop_utilisation"] <= 1
    status = module_program.run("status", (place / "out").url, *place.flags, "--json").json
    assert (status["state"], status["metrics"], status["left_s"]) == ("complete", figures, None)


def test_verify_recounts_and_compares_all_shards(
    module_program: Program, place: Place, on_ray: Ended, shards: dict[str, Stored]
) -> None:
    verdict = module_program.run("verify", (place / "out").url, *place.flags, "--json")
    assert verdict.exit_code == 0, verdict.out + verdict.err
    assert verdict.json["inputs_compared"] == verdict.json["shards"] == len(shards)
    assert verdict.json["rows"] == on_ray.json["rows"]


def test_the_plain_loop_writes_the_same_bytes(
    scoring: Scoring, place: Place, shards: dict[str, Stored]
) -> None:
    plain = scoring("out-plain", "--no-ray")
    assert plain.exit_code == 0, plain.err
    assert digests((place / "out-plain").shards()) == digests(shards)


def test_a_second_run_scores_nothing_and_touches_nothing(
    scoring: Scoring, place: Place, shards: dict[str, Stored], on_ray: Ended
) -> None:
    again = scoring("out")
    assert again.exit_code == 0, again.err
    assert again.json["metrics"]["scored_tokens"] == again.json["metrics"]["computed_tokens"] == 0
    assert again.json["rows_scored"] == on_ray.json["rows_scored"]
    assert again.json["tokens"] == on_ray.json["tokens"]
    after = (place / "out").shards()
    assert {k: (s.etag, s.last_modified, s.data) for k, s in after.items()} == {
        k: (s.etag, s.last_modified, s.data) for k, s in shards.items()
    }
