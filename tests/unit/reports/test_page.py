"""Every value on the page of a scored output, computed again from its shards."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.errors import IncompleteError, IntegrityError, OutputError
from batch_scorer.records import Format, Layout, Spread
from batch_scorer.reports.page.page import read_page
from batch_scorer.reports.page.sums import Histogram, Moments
from batch_scorer.reports.page.tally import (
    EXAMPLES,
    MOST_MODELS,
    OTHER_SOURCES,
    SAMPLE,
    Pick,
    Tally,
)
from batch_scorer.reports.page.values import ShardValues
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import jsonl, pair_rows
from tests.helpers.pages import number, numbers, page_of, tables_of
from tests.helpers.places import Place, of_input, rows_scored_and_marked
from tests.helpers.receipts import COMMIT
from tests.helpers.scored import CANARY, scored_output
from tests.helpers.written import write_scored

FloatArray = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    return scored_output(Place(str(tmp_path_factory.mktemp("page"))), tiny_model)


@pytest.fixture(scope="module")
def html(output: Place, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("html") / "new" / "page.html"
    ended = run_cli("report", output.url, "--html", file)
    assert ended.exit_code == 0, ended.err
    assert f"The page is {file}" in ended.out
    return file.read_text()


@pytest.fixture(scope="module")
def tables(html: str) -> Mapping[str, list[list[str]]]:
    return tables_of(html)


@pytest.fixture(scope="module")
def pairs(output: Place) -> pa.Table:
    shards = output.shards()
    names = ("pairs.parquet", "equal.jsonl", "bad.jsonl")
    return pa.concat_tables(
        [of_input(shards, name) for name in names], promote_options="permissive"
    )


@pytest.fixture(scope="module")
def rollouts(output: Place) -> pa.Table:
    return of_input(output.shards(), "rollouts.parquet")


@pytest.fixture(scope="module")
def answers(pairs: pa.Table, rollouts: pa.Table) -> Mapping[str, npt.NDArray[Any]]:
    """Of every answer with a score: score, tokens, source, row, and messages."""
    found: list[tuple[float, int, str, str, int]] = []
    for place, row in enumerate(pairs.to_pylist()):
        for side in ("chosen", "rejected"):
            if (value := row[f"score_{side}"]) is not None:
                tokens, count = row[f"num_tokens_{side}"], len(row[side])
                found.append((value, tokens, row["source"], f"pair {place}", count))
    for place, row in enumerate(rollouts.to_pylist()):
        for value, tokens in zip(row["scores"], row["num_tokens"], strict=True):
            found.append((value, tokens, row["source"], f"group {place}", 2))
    names = ("score", "tokens", "source", "row", "messages")
    parts = map(np.array, zip(*found, strict=True))
    return dict(zip(names, parts, strict=True))


def margins_of(pairs: pa.Table) -> FloatArray:
    """Of the pairs with both scores, in float64: subtracted as the page says it."""
    both = [
        (row["score_chosen"], row["score_rejected"])
        for row in pairs.to_pylist()
        if row["score_chosen"] is not None and row["score_rejected"] is not None
    ]
    return np.array([chosen - rejected for chosen, rejected in both])


def test_the_top_counts_every_row(output: Place, html: str, pairs: pa.Table) -> None:
    tables = [shard.table for shard in output.shards().values()]
    scored, marked = rows_scored_and_marked(tables)
    assert marked == 3
    text = f"{scored + marked} rows = {scored} scored + {marked} marked + 0 not asked for."
    assert text in html
    for reason in set(pairs["score_error"].drop_null().to_pylist()):
        rows = pairs["score_error"].to_pylist().count(reason)
        assert f'<td class="word">{reason}</td><td>{rows}</td>' in html


@pytest.mark.parametrize("figure", ["scores", "margins"])
def test_histograms_count_every_value(
    figure: str,
    tables: Mapping[str, list[list[str]]],
    answers: Mapping[str, npt.NDArray[Any]],
    pairs: pa.Table,
) -> None:
    values = answers["score"] if figure == "scores" else margins_of(pairs)
    table = tables[figure]
    edges = [*numbers(table, "from"), numbers(table, "to before")[-1]]
    assert edges[1:-1] == numbers(table, "to before")[:-1]
    assert 10 <= len(edges) <= 42
    counts = numbers(table, "answers" if figure == "scores" else "pairs")
    assert counts == np.histogram(values, edges)[0].tolist()
    assert sum(counts) == len(values)


@pytest.mark.parametrize(("figure", "name"), [("by-source", "source"), ("by-messages", "messages")])
def test_spreads_are_those_of_each_group(
    figure: str,
    name: str,
    tables: Mapping[str, list[list[str]]],
    answers: Mapping[str, npt.NDArray[Any]],
) -> None:
    head, *rows = tables[figure]
    groups = answers[name].astype(str)
    assert {row[0] for row in rows} == set(groups)
    assert len(rows) > 1
    bin_width = np.ptp(answers["score"]) / 900
    for row in rows:
        values = answers["score"][groups == row[0]]
        shown = dict(zip(head[1:], map(number, row[1:]), strict=True))
        assert shown["answers"] == len(values)
        exact = {
            "mean": values.mean(),
            "std": values.std(),
            "least": values.min(),
            "most": values.max(),
        }
        for each, value in exact.items():
            assert shown[each] == pytest.approx(value, rel=1e-4, abs=1e-7)
        levels = {"5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95}
        for each, level in levels.items():
            value = np.quantile(values, level, method="inverted_cdf")
            assert shown[each] == pytest.approx(value, abs=bin_width)


def test_accuracy_is_by_source_with_ties_as_misses(
    tables: Mapping[str, list[list[str]]], pairs: pa.Table
) -> None:
    counts: dict[str, list[int]] = {}
    for row in pairs.to_pylist():
        if row["margin"] is not None:
            for source in (row["source"], "all"):
                found = counts.setdefault(source, [0, 0, 0])
                found[0] += 1
                found[1] += row["margin"] > 0
                found[2] += row["margin"] == 0
    shown = {row[0]: [int(number(c)) for c in row[1:4]] for row in tables["accuracy"][1:]}
    assert shown == counts
    assert counts["all"][2] > 0
    for row in tables["accuracy"][1:]:
        pairs_of, higher, _ = counts[row[0]]
        low, value, high = number(row[5]), number(row[4]), number(row[6])
        assert value == pytest.approx(higher / pairs_of, rel=1e-5)
        assert 0 <= low <= value <= high <= 1


def test_calibration_compares_the_sigmoid_with_the_label(
    tables: Mapping[str, list[list[str]]], pairs: pa.Table, html: str
) -> None:
    margins = margins_of(pairs)
    probability = 1 / (1 + np.exp(-margins))
    sure = np.maximum(probability, 1 - probability)
    right = np.where(margins == 0, 0.5, margins > 0)
    places = np.minimum(((sure - 0.5) / 0.05).astype(int), 9)
    table, error = tables["calibration"], 0.0
    assert len(table) - 1 == len(np.unique(places))
    for row, place in zip(table[1:], np.unique(places), strict=True):
        here = places == place
        low, high, count, mean, share = (number(cell) for cell in row[:5])
        assert (low, high) == pytest.approx((0.5 + place / 20, 0.55 + place / 20))
        assert count == here.sum()
        assert mean == pytest.approx(sure[here].mean(), rel=1e-5)
        assert share == pytest.approx(right[here].mean(), rel=1e-5)
        error += here.sum() * abs(sure[here].mean() - right[here].mean()) / len(margins)
    assert f"Expected calibration error: {error:.4f}, Brier" in html


def test_every_answer_is_a_point_where_they_are_few(
    tables: Mapping[str, list[list[str]]], answers: Mapping[str, npt.NDArray[Any]], html: str
) -> None:
    table = tables["length-points"]
    shown = sorted(zip(numbers(table, "tokens"), numbers(table, "score"), strict=True))
    exact = sorted(zip(answers["tokens"], answers["score"], strict=True))
    assert np.array(shown) == pytest.approx(np.array(exact), rel=1e-4, abs=1e-6)
    assert f"Of {len(exact)} answers, all of them" in html


def test_scores_by_length(
    tables: Mapping[str, list[list[str]]], answers: Mapping[str, npt.NDArray[Any]]
) -> None:
    total = 0
    for row in tables["length-means"][1:]:
        low, high, count, mean, std, *quantiles = map(number, row)
        assert high == 2 * low
        here = (answers["tokens"] >= low) & (answers["tokens"] < high)
        assert count == here.sum() > 0
        scores = answers["score"][here]
        assert mean == pytest.approx(scores.mean(), rel=1e-4, abs=1e-7)
        assert std == pytest.approx(scores.std(), rel=1e-4, abs=1e-7)
        exact = np.quantile(scores, [0.05, 0.5, 0.95], method="inverted_cdf")
        assert quantiles == pytest.approx(exact, abs=np.ptp(answers["score"]) / 900)
        total += int(count)
    assert total == len(answers["score"])


def _left(values: FloatArray, groups: npt.NDArray[Any]) -> FloatArray:
    """What a regression on the groups leaves of the values."""
    dummies = (groups[:, None] == np.unique(groups)).astype(np.float64)
    return np.asarray(values - dummies @ np.linalg.lstsq(dummies, values, rcond=None)[0])


def test_correlations_with_length(
    tables: Mapping[str, list[list[str]]], answers: Mapping[str, npt.NDArray[Any]]
) -> None:
    shown = {row[0]: row[1:] for row in tables["length-correlation"][1:]}
    x, y = answers["tokens"].astype(np.float64), answers["score"]
    assert list(shown) == ["all answers", "partial, given the source", "partial, given the row"]
    for group, (count, value) in zip((None, "source", "row"), shown.values(), strict=True):
        groups = np.zeros(len(x)) if group is None else answers[group]
        exact = np.corrcoef(_left(x, groups), _left(y, groups))[0, 1]
        assert number(value) == pytest.approx(exact, rel=1e-4)
        _, sizes = np.unique(answers["row"], return_counts=True)
        assert number(count) == (sizes[sizes > 1].sum() if group == "row" else len(x))


def test_longer_answers_win_by_label_and_by_score(
    tables: Mapping[str, list[list[str]]], pairs: pa.Table
) -> None:
    found = [
        (row["num_tokens_chosen"] - row["num_tokens_rejected"], row["margin"])
        for row in pairs.to_pylist()
        if row["margin"] is not None and row["num_tokens_chosen"] != row["num_tokens_rejected"]
    ]
    by_label = np.mean([longer > 0 for longer, _ in found])
    by_score = np.mean([0.5 if not m else (longer > 0) == (m > 0) for longer, m in found])
    table = tables["longer"]
    assert numbers(table, "pairs") == [len(found)] * 2
    assert numbers(table, "share") == pytest.approx([by_label, by_score], rel=1e-5)


def test_the_gain_is_that_of_every_way_to_draw(
    tables: Mapping[str, list[list[str]]], rollouts: pa.Table
) -> None:
    groups = [[v for v in scores if v is not None] for scores in rollouts["scores"].to_pylist()]
    most = max(map(len, groups))
    table = tables["best-of-n"]
    assert numbers(table, "n") == list(range(1, most + 1))
    for n, row in enumerate(table[1:], 1):
        gains = [
            np.mean([max(drawn) for drawn in combinations(scores, n)]) - np.mean(scores)
            for scores in groups
            if len(scores) >= n
        ]
        assert number(row[1]) == len(gains)
        assert number(row[2]) == pytest.approx(np.mean(gains), rel=1e-4, abs=1e-6)
        error = np.std(gains) / np.sqrt(len(gains))
        assert number(row[3]) == pytest.approx(error, rel=1e-4, abs=1e-6)


def test_text_of_rows_is_text(html: str) -> None:
    assert CANARY not in html
    assert "<script" not in html and "<img" not in html
    assert "&lt;script&gt;document.title=" in html
    assert "&lt;b&gt;source 1&lt;/b&gt;" in html


def test_marked_rows_are_shown_where_they_are(output: Place, html: str) -> None:
    page = read_page(output.url, {})
    bad = of_input(output.shards(), "bad.jsonl")["score_error"].to_pylist()
    shown = {(reason, row.row) for reason, rows in page.examples.items() for row in rows}
    assert shown == {(reason, place) for place, reason in enumerate(bad) if reason}
    for rows in page.examples.values():
        for row in rows:
            assert row.file == "bad.jsonl"
            assert row.detail and len(row.texts["rejected"]) < 700
            assert row.texts["chosen"].startswith(f"user: {CANARY}")


def test_the_pairs_most_against_their_label_are_shown(output: Place, pairs: pa.Table) -> None:
    shown = [row.margin for row in read_page(output.url, {}).lowest]
    assert shown == pytest.approx(sorted(margins_of(pairs))[: len(shown)])
    assert len(shown) == 5


def test_cost_template_and_settings_are_there(output: Place, html: str) -> None:
    metrics = output.read_json("_batch_scorer/runs/000001.json")["metrics"]
    assert (
        f'<td class="word">scored_tokens</td><td class="word">{metrics["scored_tokens"]:,}' in html
    )
    claim = output.read_json("_batch_scorer/run.json")
    assert "How many sides does a square have?" in html
    assert claim["fingerprint"]["model"] in html
    assert claim["provenance"]["batch_scorer"] in html


def test_json_has_the_same_values(output: Place, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    ended = run_cli("report", output.url, "--html", file, "--json")
    found = json.loads(ended.out)
    assert found["totals"]["rows_marked"] == 3
    assert found["bytes"] == file.stat().st_size
    shown = tables_of(file.read_text())
    assert shown.keys() == found["figures"].keys()
    assert [len(table) - 1 for table in shown.values()] == [
        len(figure["rows"]) for figure in found["figures"].values()
    ]


def test_the_same_output_gives_the_same_page(output: Place, html: str) -> None:
    assert read_page(output.url, {}).to_html() == html


def test_a_file_in_the_output_and_one_that_cannot_be_written(output: Place, tmp_path: Path) -> None:
    ended = run_cli("report", output.url, "--html", Path(output.url) / "page.html")
    assert (ended.exit_code, "--html" in ended.err) == (2, True)
    (tmp_path / "taken").write_text("")
    ended = run_cli("report", output.url, "--html", tmp_path / "taken" / "page.html")
    assert ended.exit_code == 2
    assert "cannot be written" in ended.err


def test_what_is_no_output_or_not_begun_or_changed(tmp_path: Path, output: Place) -> None:
    with pytest.raises(OutputError):
        read_page(str(tmp_path), {})
    copied = Place(str(tmp_path / "copied"))
    source = output.store
    copied.write({info.key: source.read(info.key) for info in source.list()})
    with pytest.raises(IntegrityError, match="verify"):  # its versions are others than committed
        read_page(copied.url, {})
    copied.store.delete("_batch_scorer/CURRENT")
    with pytest.raises(IncompleteError):
        read_page(copied.url, {})


# The tally


def shard(seed: int, rows: int = 400, sources: int = 1) -> ShardValues:
    rng = np.random.default_rng(seed)
    return ShardValues(
        sources=np.array([f"s{k % sources:03}" for k in range(rows)], object),
        rows=np.repeat(np.arange(rows), 2),
        scores=rng.normal(size=2 * rows),
        tokens=rng.integers(1, 5000, 2 * rows).astype(np.float64),
        messages=np.full(2 * rows, 2),
        marked=[(int(place), "too_long") for place in rng.integers(0, rows, 9)],
        sides=2,
        is_group=False,
        same_tokens=np.zeros(rows, dtype=bool),
    )


def tally_of(sources: int = 1) -> Tally:
    spread = {f"s{k:03}": Spread(rows=9) for k in range(sources)}
    return Tally.for_commits([replace(COMMIT, spread=spread)])


def test_samples_are_bounded_and_the_same_in_any_order_of_shards() -> None:
    shards = {f"{number}.parquet": shard(number) for number in range(8)}
    first, second = tally_of(), tally_of()
    for key in shards:
        first.add(key, shards[key])
    for key in reversed(shards):
        second.add(key, shards[key])
    assert len(first.points) == SAMPLE
    assert (first.points == second.points).all()
    points = {
        point
        for each in shards.values()
        for point in zip(each.tokens.tolist(), each.scores.tolist(), strict=True)
    }
    assert {(x, y) for _, x, y in first.points.tolist()} <= points
    best = sorted(first.examples["too_long"])[:EXAMPLES]
    assert best == sorted(second.examples["too_long"])[:EXAMPLES]
    assert len(best) == EXAMPLES
    assert first.lowest == second.lowest
    assert isinstance(first.lowest[0], Pick)
    assert first.marked == {"too_long": 72}


def test_the_smallest_sources_are_one() -> None:
    tally = tally_of(sources=40)
    tally.add("a.parquet", shard(0, sources=40))
    assert len(tally.by_source) == 21
    assert tally.by_source[OTHER_SOURCES].moments.n == 400
    assert tally.every.moments.n == 800


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.0), (5.0, 5.0), (-1e-7, 2e-7), (1000.0, 1000.002), (-3e8, 1e9)]
)
def test_bins_hold_values_of_any_size(low: float, high: float) -> None:
    values = np.linspace(low, high, 101)
    histogram = Histogram()
    histogram.add(values)
    edges, shown = histogram.shown()
    assert shown.sum() == histogram.counts.sum() == 101
    assert len(shown) <= 41
    assert edges[0] <= low and high < edges[-1]
    assert shown.tolist() == np.histogram(values, edges)[0].tolist()
    assert len(histogram.counts) <= 10_004


def test_moments_add_up_without_loss() -> None:
    rng = np.random.default_rng(3)
    x, y = 1e6 + rng.normal(size=1000), 1e6 + rng.normal(size=1000)
    parts = [Moments.of(x[k : k + 77], y[k : k + 77]) for k in range(0, 1000, 77)]
    together = sum(parts, Moments())
    assert together.n == 1000
    assert together.correlation == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert together.std_y == pytest.approx(y.std())
    assert Moments.of(x[:1], y[:1]).correlation is None


@given(st.lists(st.lists(st.floats(-(2.0**40), 2.0**40, width=32), max_size=20), max_size=6))
def test_a_histogram_is_the_same_in_whatever_order_values_come(parts: list[list[float]]) -> None:
    def counted(arrays: list[FloatArray]) -> Histogram:
        histogram = Histogram()
        for values in arrays:
            histogram.add(values)
        return histogram

    arrays = [np.array(part) for part in parts]
    every = np.concatenate([np.zeros(0), *arrays])
    at_once = counted([every])
    others = [
        counted(arrays),
        counted(arrays[::-1]),
        sum(map(counted, [[a] for a in arrays]), Histogram()),
    ]
    for other in others:
        assert (other.power, other.first) == (at_once.power, at_once.first)
        assert other.counts.tolist() == at_once.counts.tolist()
    if len(every):
        assert (at_once.low, at_once.high) == (every.min(), every.max())
        assert at_once.counts.sum() == len(every)
        assert at_once.counts.tolist() == np.histogram(every, at_once.edges)[0].tolist()


def test_pairs_that_no_model_can_tell_apart_are_left_out_as_in_a_run(tmp_path: Path) -> None:
    chosen, rejected = [1.0, 2.0, 0.0, 5.0], [0.0, 2.0, 1.0, 5.0]
    notes = [None, None, None, ["same_tokens"]]
    columns = {
        "chosen": ["a"] * 4,
        "rejected": ["b"] * 4,
        "score_chosen": pa.array(chosen, pa.float32()),
        "score_rejected": pa.array(rejected, pa.float32()),
        "score_error": pa.nulls(4, pa.string()),
        "num_tokens_chosen": pa.array([3] * 4, pa.int32()),
        "num_tokens_rejected": pa.array([3] * 4, pa.int32()),
        "score_notes": pa.array(notes, pa.list_(pa.string())),
    }
    layout = Layout(Format.PREFERENCE_PAIR, {"chosen": "chosen", "rejected": "rejected"})
    added = [name for name in columns if name not in layout.columns]
    place = Place(str(tmp_path))
    write_scored(place.store, [("a.parquet", pa.table(columns))], layout, added)
    html = read_page(place.url, {}).to_html()
    _, (source, *counts) = tables_of(html)["accuracy"]
    assert (source, [number(cell) for cell in counts[:4]]) == (
        "all",
        [3, 1, 1, pytest.approx(1 / 3, rel=1e-5)],
    )
    assert "1 pairs are left out here" in html
    assert sum(numbers(tables_of(html)["margins"], "pairs")) == 3


def test_scores_are_shown_by_the_model_that_wrote_the_answer(
    tmp_path: Path, tiny_model: Path
) -> None:
    rows = pair_rows(20)
    for place, row in enumerate(rows):
        row |= {
            "chosen_model": f"m{place % 3}",
            "rejected-model": None if place == 5 else "<i>m</i>",
        }
    page, output = page_of(tmp_path, tiny_model, {"a.jsonl": jsonl(rows)}, shard_rows=8)
    found: dict[str, list[float]] = {}
    for row in of_input(output.shards(), "a.jsonl").to_pylist():
        found.setdefault(row["chosen_model"], []).append(row["score_chosen"])
        if row["rejected-model"]:
            found.setdefault(row["rejected-model"], []).append(row["score_rejected"])
    lines = tables_of(page.to_html())["by-model"][1:]
    assert [line[0] for line in lines] == ["<i>m</i>", "m0", "m1", "m2"]
    for name, count, mean, *_ in lines:
        assert (number(count), number(mean)) == (
            len(found[name]),
            pytest.approx(np.mean(found[name]), rel=1e-4),
        )


def test_too_many_names_are_no_models() -> None:
    tally = tally_of()
    names = np.array([f"m{k}" for k in range(MOST_MODELS)], object)
    tally.add("a", replace(shard(0, rows=MOST_MODELS), models=np.repeat(names, 2)))
    assert tally.by_model is not None and len(tally.by_model) == MOST_MODELS
    tally.add("b", replace(shard(1, rows=1), models=np.array(["another", None], object)))
    tally.add("c", replace(shard(2, rows=1), models=np.array(["one more", None], object)))
    assert tally.by_model is None
