"""How scores have moved between two nightly runs."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.nightly.drift import (
    MOVERS,
    Figures,
    Origin,
    Scored,
    committed_before,
    compare,
    figures_by_source,
    origins,
    ranks,
    spearman,
    together,
)
from batch_scorer.nightly.record import DriftReport, SeriesDrift, Shift
from batch_scorer.outputs.by_source import LEVELS, row_sources, spread_by_source
from batch_scorer.records import PairCounts, Receipt, Reused, ScoredRows, Scores, Spread, Status
from batch_scorer.records.reading import parsed
from batch_scorer.storage import Version
from tests.helpers.receipts import COMMIT, DONE, stored


def spread_of(values: Sequence[float], sources: Sequence[str]) -> dict[str, Spread]:
    """As a commit of rows of one sequence each has it."""
    count = len(values)
    rows = ScoredRows(
        Scores(np.array(values, np.float32)[:, None]), np.ones(count, np.int32),
        np.zeros(count, np.int32), np.arange(count + 1), {}, "", {}, 0.0,
    )  # fmt: skip
    table = pa.table({"source": pa.array(sources, pa.string())})
    return spread_by_source(rows, row_sources(table))


def receipt(key: str, identity: str, sources: dict[str, list[float]], **changes: Any) -> Receipt:
    """A committed shard with these scores by source."""
    values = [value for scores in sources.values() for value in scores]
    names = [source for source, scores in sources.items() for _ in scores]
    commit = replace(
        COMMIT,
        identity=identity,
        input=key,
        num_rows=len(values),
        spread=spread_of(values, names),
        pairs={},
    )
    return replace(
        DONE, output_key=key, input=key, num_rows=len(values), stored=stored(commit), **changes
    )


# Rows


def test_rows_are_new_reused_kept_or_gone() -> None:
    before = [
        receipt("kept", "1", {"a": [0.0] * 10}),
        receipt("rewritten", "2", {"a": [0.0] * 20, "b": [0.0] * 5}),
        receipt("gone", "3", {"b": [0.0] * 7}),
        receipt("long gone", "4", {"b": [0.0] * 9}, status=Status.INPUT_GONE),
    ]
    after = [
        before[0],
        # 18 of the 20 rows of `a` are as they were, 4 are new; `b` has lost two of its five.
        receipt(
            "rewritten",
            "2'",
            {"a": [0.0] * 22, "b": [0.0] * 3},
            reused=Reused(rows={"a": 18, "b": 3}),
        ),
        receipt("added", "5", {"c": [0.0] * 6}),
        replace(before[2], status=Status.INPUT_GONE),
    ]
    figures = figures_by_source(after, committed_before(before))
    rows = {
        name: (found.rows, found.new, found.reused, found.kept, found.gone)
        for name, found in figures.items()
    }
    assert rows == {"a": (32, 4, 18, 10, 2), "b": (3, 0, 3, 0, 9), "c": (6, 6, 0, 0, 0)}
    all_rows = together(figures)
    assert (all_rows.rows, all_rows.new, all_rows.gone) == (41, 10, 11)


def test_rows_of_a_shard_that_was_tried_again_are_new_or_reused_and_none_is_gone() -> None:
    before = receipt("a", "1", {"a": [0.0] * 10})
    commit = before.commit
    assert commit is not None
    after = replace(before, stored=stored(replace(commit, retries=1)), reused=Reused(rows={"a": 8}))
    found = figures_by_source([after], committed_before([before]))["a"]
    assert (found.rows, found.new, found.reused, found.kept, found.gone) == (10, 2, 8, 0, 0)


# Statistics


@given(
    st.lists(
        st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40), min_size=1, max_size=6
    )
)
def test_statistics_of_shards_add_up_to_those_of_all_scores(parts: list[list[float]]) -> None:
    receipts = [receipt(str(i), str(i), {"a": part}) for i, part in enumerate(parts)]
    figures = figures_by_source(receipts, {})["a"]
    every = np.concatenate([np.array(part, np.float32) for part in parts]).astype(np.float64)
    assert figures.scores == len(every)
    assert figures.mean == pytest.approx(every.mean(), abs=1e-3)
    assert figures.std == pytest.approx(every.std(), abs=1e-3)
    assert figures.quantiles[0] == pytest.approx(every.min(), abs=1e-3)
    assert figures.quantiles[-1] == pytest.approx(every.max(), abs=1e-3)
    assert list(figures.quantiles) == sorted(figures.quantiles)


def test_quantiles_of_many_unlike_shards_are_near_those_of_all_scores() -> None:
    random = np.random.default_rng(3)
    parts = [random.normal(size=500) * random.uniform(0.5, 2) + random.normal() for _ in range(300)]
    receipts = [receipt(str(i), str(i), {"a": list(part)}) for i, part in enumerate(parts)]
    figures = figures_by_source(receipts, {})["a"]
    every = np.concatenate(parts)
    for level, quantile in zip(LEVELS, figures.quantiles, strict=True):
        below = (every <= quantile).mean()
        assert abs(below - level) < 0.02, level


# Ranks


def test_equal_values_share_their_rank() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]
    assert ranks(np.zeros(0)).tolist() == []


def test_rank_correlation_sees_order_and_nothing_else() -> None:
    values = np.array([1.0, 5.0, 2.0, 9.0])
    assert spearman(values, np.exp(values)) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)
    # The textbook's: 1 - 6 Σd² / n(n² - 1), with d = 0, 1, 1, 0.
    assert spearman(values, np.array([1.0, 2.0, 5.0, 9.0])) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman(values, np.ones(4)) is None
    assert spearman(values[:1], values[:1]) is None


def scored(name: str, before: list[float], after: list[float], *, is_pair: bool = False) -> Scored:
    count = len(before)
    rows, places = (np.arange(count) // 2, np.arange(count) % 2)
    if not is_pair:
        rows, places = np.arange(count), np.zeros(count, np.int64)
    return Scored(name, is_pair, rows, places, np.array(before), np.array(after))


def test_the_largest_movers_are_named_over_all_files() -> None:
    still = scored("a", [float(i) for i in range(50)], [float(i) for i in range(50)])
    jumps = scored("b", [10.5, 60.0], [70.0, 60.0])
    found = compare([still, jumps])
    assert (found.rows, found.scores, len(found.movers)) == (52, 52, MOVERS)
    first = found.movers[0]
    assert (first.input, first.row, first.before, first.after) == ("b", 0, 10.5, 70.0)
    assert first.below_before == pytest.approx(11 / 51)
    assert first.below_after == 1.0
    assert found.spearman is not None and 0.5 < found.spearman < 1


def test_pairs_that_changed_their_mind_are_counted() -> None:
    part = scored(
        "a",
        [2.0, 1.0, 1.0, 2.0, 1.0, 1.0, 5.0, 4.0],
        [1.0, 2.0, 2.0, 1.0, 2.0, 1.0, 9.0, 8.0],
        is_pair=True,
    )
    one_side = Scored("b", True, np.array([0]), np.array([1]), np.ones(1), np.ones(1))
    found = compare([part, one_side])
    assert (found.pairs, found.won, found.lost) == (4, 2, 1)


def test_nothing_in_common_is_no_error() -> None:
    found = compare([])
    assert (found.scores, found.spearman, found.movers) == (0, None, ())


def test_rows_are_traced_to_the_input_file() -> None:
    def of(key: str, source: str, etag: str, first: int, version: str) -> Receipt:
        commit = replace(COMMIT, input=source, input_etag=Version(etag).etag, first_row=first)
        return replace(DONE, output_key=key, stored=stored(commit, version))

    first = [of("x.rows10-20", "x", "e", 10, "v1"), of("y", "y", "f", 0, "v2")]
    assert origins(first) == {"x.rows10-20": Origin("x", '"e"', 10), "y": Origin("y", '"f"', 0)}


def test_rows_picked_by_where_are_compared_with_the_same_rows_only() -> None:
    """They do not follow each other in the file, so a shard of them is compared as a whole."""

    def of(**changes: Any) -> Receipt:
        commit = replace(COMMIT, first_row=3, where="w", rows_not_asked=5)
        return replace(DONE, output_key="x", stored=stored(replace(commit, **changes)))

    ((_, origin),) = origins([of()]).items()
    assert (origin.input, origin.first_row) == ("x", 0)
    assert origins([of(identity="of another model")]) == {"x": origin}
    for other in ({"where": "v"}, {"first_row": 4}, {"num_rows": 9}, {"input_etag": "f"}):
        assert origins([of(**other)])["x"].etag != origin.etag


def test_a_drift_report_is_kept_as_json() -> None:
    now = Figures(120, 20, 10, 90, 5, 240, 1.5, 1.0, tuple(range(7)), PairCounts(100, 75, 0))
    quantiles = tuple(q - 0.25 for q in range(7))
    then = replace(now, mean=1.0, quantiles=quantiles, pairs=PairCounts(100, 70, 0))
    found = compare([scored("a", [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])])
    moved = SeriesDrift(
        series="main",
        path="generations/main/b-2",
        since=3,
        before="generations/main/a-1",
        sources={"few": replace(now, rows=1), "web": now, "new": replace(now, mean=None)},
        sources_before={"few": then, "web": then},
        ranks_of="generations/main/a-1",
        ranks=found,
    )
    report = DriftReport(4, (moved,))
    kept = json.dumps(report.to_json())
    assert json.loads(kept)["lines"][0]["line"] == "main"
    assert parsed(kept, DriftReport) == report

    by_source = moved.by_source()
    assert [each.name for each in by_source] == ["new", "web", "few"]  # most rows first
    assert {name: shift.change for name, shift in by_source[1].shifts.items()} == {
        "mean": 0.5, "std": 0.0, "5%": 0.25, "50%": 0.25, "95%": 0.25,
        "accuracy": pytest.approx(0.05),
    }  # fmt: skip
    assert by_source[0].shifts["mean"] == Shift(None, None)
    assert by_source[0].shifts["accuracy"] == Shift(0.75, None)
    assert moved.all_sources().now.rows == 241
