"""What the benchmarks share: intervals, subsets, and telling which benchmark files are of."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from batch_scorer.errors import ConfigError, OutputError
from batch_scorer.evaluation import Benchmark, rewardbench
from batch_scorer.evaluation.evaluate import File, evaluate, find_benchmark
from batch_scorer.evaluation.result import (
    Estimate,
    floats,
    mean_of,
    mean_of_all,
    weighted_mean,
    wilson,
)
from batch_scorer.records import Format
from batch_scorer.reports.console import show


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Newcombe 1998, Statist. Med. 17, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_published_values(
    right: int, count: int, low: float, high: float
) -> None:
    found = wilson(right / count, count)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_all_right_keeps_a_width_and_ends_at_the_value() -> None:
    assert wilson(1.0, 100).high == 1.0
    assert wilson(1.0, 100).low == pytest.approx(0.963, abs=5e-4)
    assert wilson(0.0, 100).low == 0.0


def test_a_value_outside_of_0_and_1_is_inside_its_interval() -> None:
    """RewardBench 2's Ties may be up to 1.01 and down to -0.01."""
    for value in (1.008, -0.01):
        found = wilson(value, 51)
        assert found.low <= value <= found.high


def test_no_credits_have_no_mean() -> None:
    assert mean_of(np.array([])) is None


def test_a_mean_of_means_has_the_interval_of_the_mean_of_their_parts() -> None:
    a, b, c = wilson(0.5, 40), wilson(0.9, 100), wilson(1.0, 30)
    nested = weighted_mean([(3, weighted_mean([(1, a), (2, b)])), (1, c)])
    flat = weighted_mean([(1, a), (2, b), (1, c)])
    assert (nested.value, nested.low, nested.high) == pytest.approx(
        (flat.value, flat.low, flat.high)
    )


def test_the_interval_of_a_weighted_mean_holds_what_it_promises() -> None:
    """Of 2000 samples of a section with its weights, 95 % (±1.5) cover the true value."""
    random = np.random.default_rng(0)
    shares = np.array([0.97, 0.55, 0.8, 0.99])
    counts, weights = np.array([447, 37, 100, 164]), np.array([984, 37, 100, 164])
    truth = float(shares @ weights / weights.sum())
    covered = 0
    for right in random.binomial(counts, shares, size=(2000, 4)):
        parts = [wilson(r / n, int(n)) for r, n in zip(right, counts, strict=True)]
        found = weighted_mean(zip(weights.tolist(), parts, strict=True))
        covered += found.low <= truth <= found.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_the_mean_of_parts_with_one_missing_is_missing() -> None:
    there = Estimate(0.5, 0.4, 0.6)
    assert mean_of_all([there, None]) is None
    assert mean_of_all([]) is None
    found = mean_of_all([there, there])
    assert found is not None
    assert found.value == 0.5


def test_null_nan_and_infinite_scores_are_no_scores() -> None:
    table = pa.table({"score": pa.array([1.5, None, math.nan, math.inf], pa.float32())})
    assert np.isnan(floats(table, "score")).tolist() == [False, True, True, True]


PAIR, BEST = Format.PREFERENCE_PAIR, Format.BEST_OF_N
SIDES = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
A_AND_B = {"prompt": "question", "chosen": "response_A", "rejected": "response_B"}


def file(format: Format, *columns: str, fields: dict[str, str] = SIDES, name: str = "x") -> File:
    return File(name, format, fields, frozenset(columns))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([file(PAIR, "subset", "id")], Benchmark.REWARDBENCH),
        (
            [file(PAIR, "subset"), file(PAIR, "id", name="data/shp-00000-of-00001.parquet")],
            Benchmark.REWARDBENCH,
        ),
        ([file(BEST, "subset", "id")], Benchmark.REWARDBENCH_2),
        ([file(BEST, "domain", "id")], Benchmark.RM_BENCH),
        ([file(PAIR, "source", "label", "pair_id", fields=A_AND_B)], Benchmark.JUDGEBENCH),
    ],
)
def test_the_benchmark_is_found_from_the_columns(files: list[File], expected: Benchmark) -> None:
    assert find_benchmark(files) is expected
    assert find_benchmark(files, expected) is expected


def test_any_pairs_are_evaluated_where_they_are_named_so() -> None:
    files = [file(PAIR, "id"), file(PAIR, "source", "label", fields=A_AND_B)]
    assert find_benchmark(files, Benchmark.PAIRS) is Benchmark.PAIRS
    with pytest.raises(OutputError, match="pairs: any pairs, with --benchmark pairs"):
        find_benchmark(files)
    with pytest.raises(OutputError, match=r"b\.parquet holds best_of_n rows"):
        find_benchmark([*files, file(BEST, "id", name="b.parquet")], Benchmark.PAIRS)


@pytest.mark.parametrize(
    ("files", "wanted", "message"),
    [
        ([file(PAIR, "id", name="shp_mine.parquet")], None, "shp_mine.parquet holds"),
        ([file(PAIR, "source", name="p.parquet")], None, "p.parquet holds preference_pair rows"),
        ([file(PAIR, "subset"), file(BEST, "id", name="b.parquet")], None, "b.parquet holds"),
        ([file(PAIR, "subset")], Benchmark.RM_BENCH, "rm-bench: best-of-n rows"),
        ([file(PAIR, "source", "label")], Benchmark.JUDGEBENCH, "--column chosen=response_A"),
        ([], None, "no rows"),
    ],
)
def test_files_that_do_not_fit_are_named(
    files: list[File], wanted: Benchmark | None, message: str
) -> None:
    with pytest.raises(OutputError, match=message):
        find_benchmark(files, wanted)


def test_an_unknown_benchmark_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="rewardbench-2, rm-bench, judgebench"):
        evaluate("nowhere", benchmark="rewardbench3")


def test_the_table_and_the_json_show_what_is_missing() -> None:
    table = pa.table(
        {
            "subset": ["hep-go", "hep-go", "[mine]"],
            "score_chosen": [1.0, None, 1.0],
            "score_rejected": [0.0, 0.0, 2.0],
        }
    )
    result = rewardbench.evaluate(table)
    console = Console(width=150, record=True)
    show(console, result)
    shown = console.export_text()
    assert "Score" in shown
    assert "n/a" in shown
    for said in (
        "1 of 3 rows lack a score and count as wrong",
        "not the published number of rows: hep-go 2 of 164",
        "not of this benchmark, in no column: [mine]",
        "cannot be computed for lack of rows: Score, Chat, Chat Hard, Safety",
    ):
        assert said in shown
    found = json.loads(json.dumps(result.to_json()))
    assert found["columns"]["Score"] is None
    assert found["columns"]["Reasoning"]["value"] == 0.5
    assert found["unscored"] == 1
    assert "hep-rust" in found["missing"]
