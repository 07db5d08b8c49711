"""Every value on the page that compares two outputs, computed again from both outputs' shards."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from batch_scorer import Config, score
from batch_scorer.errors import OutputError
from batch_scorer.reports.page.compare import read_comparison
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs as real_pairs
from tests.helpers.inputs import parquet
from tests.helpers.pages import number, numbers, tables_of
from tests.helpers.places import Place, of_input
from tests.helpers.scored import CANARY, scored_output
from tests.helpers.tiny import tiny_reward_model

INPUTS = ("pairs.parquet", "equal.jsonl", "bad.jsonl", "rollouts.parquet")


class Row(NamedTuple):
    """A row's answers that both have a score for."""

    name: str
    source: str
    is_pair: bool
    a: list[float]
    b: list[float]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Place, Place]:
    place = Place(str(tmp_path_factory.mktemp("compared")))
    other = tiny_reward_model(tmp_path_factory.mktemp("other") / "other", bos=True)
    return scored_output(place, tiny_model, "a"), scored_output(place, other, "b")


@pytest.fixture(scope="module")
def html(outputs: tuple[Place, Place], tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("html") / "page.html"
    a, b = outputs
    ended = run_cli("report", a.url, "--compare", b.url, "--html", file)
    assert ended.exit_code == 0, ended.err
    assert "86 rows in both, 0 rows only in A, 0 rows only in B" in ended.out
    return file.read_text()


@pytest.fixture(scope="module")
def tables(html: str) -> Mapping[str, list[list[str]]]:
    return tables_of(html)


@pytest.fixture(scope="module")
def rows(outputs: tuple[Place, Place]) -> list[Row]:
    return list(_rows(*(place.shards() for place in outputs)))


def _rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Row]:
    for name in INPUTS:
        both = (of_input(shards, name).to_pylist() for shards in (a, b))
        for place, (one, other) in enumerate(zip(*both, strict=True)):
            is_pair = "score_chosen" in one
            scores = [
                [row["score_chosen"], row["score_rejected"]] if is_pair else row["scores"]
                for row in (one, other)
            ]
            there = [pair for pair in zip(*scores, strict=True) if None not in pair]
            if there:
                left, right = map(list, zip(*there, strict=True))
                yield Row(f"{name}, row {place}", one["source"], is_pair, left, right)


def test_both_scores_are_points(tables: Mapping[str, list[list[str]]], rows: list[Row]) -> None:
    table = tables["ab-points"]
    shown = sorted(zip(numbers(table, "A"), numbers(table, "B"), strict=True))
    exact = sorted(pair for row in rows for pair in zip(row.a, row.b, strict=True))
    assert np.array(shown) == pytest.approx(np.array(exact), rel=1e-4, abs=1e-6)


def test_correlations_are_of_scores_and_ranks(
    tables: Mapping[str, list[list[str]]], rows: list[Row]
) -> None:
    a, b = (np.concatenate([getattr(row, side) for row in rows]) for side in "ab")
    pearson, spearman = tables["ab-correlation"][1:]
    assert number(pearson[2]) == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-4)

    def ranks(values: Any) -> Any:
        return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])

    assert number(spearman[2]) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1], rel=1e-4)
    assert number(pearson[1]) == number(spearman[1]) == len(a)


def test_decisions_are_the_same_where_the_same_answers_are_on_top(
    tables: Mapping[str, list[list[str]]], rows: list[Row]
) -> None:
    exact: dict[str, list[int]] = {}
    for row in rows:
        if len(row.a) > 1:
            tops = [{k for k, v in enumerate(s) if v == max(s)} for s in (row.a, row.b)]
            for source in (row.source, "all"):
                counts = exact.setdefault(source, [0, 0])
                counts[0] += 1
                counts[1] += tops[0] == tops[1]
    shown = {row[0]: [int(number(cell)) for cell in row[1:3]] for row in tables["ab-decisions"][1:]}
    assert shown == exact
    assert 0 < exact["all"][1] < exact["all"][0]


def test_who_is_right_about_each_pair(
    tables: Mapping[str, list[list[str]]], rows: list[Row]
) -> None:
    pairs = [row for row in rows if row.is_pair and len(row.a) == 2]
    right = [(row.a[0] > row.a[1], row.b[0] > row.b[1]) for row in pairs]
    order = [(True, True), (True, False), (False, True), (False, False)]
    table = tables["ab-pairs"]
    assert numbers(table, "pairs") == [right.count(each) for each in order]
    shares = [right.count(each) / len(right) for each in order]
    assert numbers(table, "share") == pytest.approx(shares, rel=1e-5)


def test_the_rows_farthest_apart_are_shown(
    outputs: tuple[Place, Place], rows: list[Row], html: str
) -> None:
    means, stds = (
        [f(np.concatenate([getattr(row, side) for row in rows])) for side in "ab"]
        for f in (np.mean, np.std)
    )
    apart = {}
    for row in rows:
        gaps = (np.array(row.a) - means[0]) / stds[0] - (np.array(row.b) - means[1]) / stds[1]
        apart[row.name] = np.ptp(gaps) if len(gaps) > 1 else abs(gaps[0])
    shown = read_comparison(outputs[0].url, outputs[1].url, {}).apart
    names = sorted(apart, key=lambda name: -apart[name])[:5]
    assert [f"{row.file}, row {row.row}" for row in shown] == names
    assert all(row.texts for row in shown)
    assert CANARY not in html and "&lt;b&gt;source 1&lt;/b&gt;" in html


def test_an_output_agrees_with_itself(outputs: tuple[Place, Place], tmp_path: Path) -> None:
    url, file = outputs[0].url, tmp_path / "page.html"
    ended = run_cli("report", url, "--compare", url, "--html", file, "--json")
    found = json.loads(ended.out)
    assert [row[2] for row in found["figures"]["ab-correlation"]["rows"]] == pytest.approx([1, 1])
    assert all(row[3] == 1 for row in found["figures"]["ab-decisions"]["rows"])
    assert found["apart"] == []


def test_outputs_of_other_rows_cannot_be_compared(
    outputs: tuple[Place, Place], tmp_path: Path, tiny_model: Path
) -> None:
    place = Place(str(tmp_path))
    (place / "in").write({"pairs.parquet": parquet(real_pairs(2))})
    score(
        Config(
            model=str(tiny_model),
            inputs=((place / "in").url,),
            output=(place / "out").url,
            backend="fake",
            use_ray=False,
        )
    )
    with pytest.raises(OutputError, match="no shard of the same rows"):
        read_comparison(outputs[0].url, (place / "out").url, {})
