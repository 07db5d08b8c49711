"""The page of a nightly root: its newest generation, and how the nights have moved its scores."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_scorer.errors import IncompleteError
from batch_scorer.reports.page.page import read_page
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import parquet, table_of
from tests.helpers.nights import night_rows, nightly_root
from tests.helpers.pages import number, numbers, tables_of
from tests.helpers.places import Place
from tests.helpers.scored import CANARY
from tests.helpers.tiny import tiny_reward_model

Tables = Mapping[str, list[list[str]]]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("other") / "model", bos=True)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, other_model: Path
) -> tuple[Place, list[Any]]:
    return nightly_root(Place(str(tmp_path_factory.mktemp("nights"))), tiny_model, other_model)


@pytest.fixture(scope="module")
def html(made: tuple[Place, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("html") / "page.html"
    ended = run_cli("report", made[0].url, "--html", file)
    assert ended.exit_code == 0, ended.err
    return file.read_text()


@pytest.fixture(scope="module")
def tables(html: str) -> Tables:
    return tables_of(html)


def lines_of(made: tuple[Place, list[Any]]) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Night, record and drift of the only series, as the nightly runs printed them."""
    for printed in made[1]:
        (line,), (drift,) = printed["night"]["lines"], printed["drift"]["lines"]
        yield printed["night"]["night"], line, drift


def scores_of(place: Place) -> dict[str, list[float]]:
    """All scores of an output by source, from its shards."""
    found: dict[str, list[float]] = {}
    for shard in place.shards().values():
        for row in shard.table.to_pylist():
            both = [row["score_chosen"], row["score_rejected"]]
            found.setdefault(row["source"], []).extend(v for v in both if v is not None)
    return found


def test_the_newest_generation_is_on_the_page(made: tuple[Place, list[Any]], html: str) -> None:
    root = made[0]
    path = root.read_json("latest.json")["path"]
    assert f"latest.json names {path}" in html
    scores = scores_of(root / path)
    shown = {row[0]: (number(row[1]), number(row[2])) for row in tables_of(html)["by-source"][1:]}
    assert shown == {
        source: (len(values), pytest.approx(np.mean(values), rel=1e-4))
        for source, values in scores.items()
    }


def test_the_rows_of_each_night_are_those_of_its_record(
    made: tuple[Place, list[Any]], tables: Tables
) -> None:
    table = tables["nights-rows"]
    nights = list(lines_of(made))
    assert numbers(table, "night") == [1, 2, 3, 4]
    names = {"rows": "total", "not asked for": "not_asked"}
    for shown in ("rows", "new", "reused", "kept", "gone", "marked", "failed", "left"):
        expected = [line["rows"][names.get(shown, shown)] for _, line, _ in nights]
        assert numbers(table, shown) == expected, shown
    # What was done, in the test's own words: 12 rows, 9 more, a file of 9 with 4 of its rows kept
    # as they were and one that lost its answer, and all of them with another model.
    assert numbers(table, "rows") == [12, 21, 18, 22]
    assert numbers(table, "new")[:2] == [12, 9]
    assert numbers(table, "marked") == [0, 0, 1, 1]
    assert numbers(table, "reused")[2] > 0
    assert [row[2] for row in table[1:]] == [line["path"] for _, line, _ in nights]


def test_scores_of_a_source_are_followed_over_the_nights(
    made: tuple[Place, list[Any]], tables: Tables, html: str
) -> None:
    titles = {f"Scores of &lt;b&gt;source {k}&lt;/b&gt; by night" for k in range(2)}
    assert all(title in html for title in titles)
    assert CANARY not in html and "<b>source" not in html
    newest = scores_of(made[0] / made[0].read_json("latest.json")["path"])
    by_rows = sorted(newest, key=lambda source: (-len(newest[source]), source))
    nights = list(lines_of(made))
    for place, source in enumerate(by_rows, 1):
        table = tables[f"nights-scores-{place}"]
        found = [
            (night, line["sources"][source])
            for night, line, _ in nights
            if source in line["sources"] and line["sources"][source]["scores"]
        ]
        assert numbers(table, "night") == [night for night, _ in found]
        assert numbers(table, "mean") == pytest.approx([f["mean"] for _, f in found], rel=1e-5)
        assert numbers(table, "50%") == pytest.approx(
            [f["quantiles"][3] for _, f in found], rel=1e-4
        )
        # The last night is what the shards hold now.
        assert numbers(table, "scores")[-1] == len(newest[source])
        assert numbers(table, "mean")[-1] == pytest.approx(np.mean(newest[source]), rel=1e-4)


def test_accuracy_counts_ties_as_misses_in_every_night(
    made: tuple[Place, list[Any]], tables: Tables
) -> None:
    table = tables["nights-accuracy"]
    for row, (_, line, _) in zip(table[1:], lines_of(made), strict=True):
        counts = [figures["pairs"] for figures in line["sources"].values()]
        pairs, higher, ties = (
            sum(c[n] for c in counts) for n in ("pairs", "chosen_higher", "ties")
        )
        assert [number(cell) for cell in row[2:5]] == [pairs, higher, ties]
        assert number(row[5]) == pytest.approx(higher / pairs, rel=1e-5)
    rows = [
        row
        for shard in (made[0] / made[0].read_json("latest.json")["path"]).shards().values()
        for row in shard.table.to_pylist()
        if row["margin"] is not None
    ]
    assert number(table[-1][2]) == len(rows)
    assert number(table[-1][3]) == sum(row["margin"] > 0 for row in rows)


def test_the_drift_of_the_last_night_is_that_of_its_report(
    made: tuple[Place, list[Any]], tables: Tables
) -> None:
    *_, (_, _, drift) = lines_of(made)
    head, *rows = tables["nights-drift"]
    assert {row[0] for row in rows} == set(drift["sources"])
    for row in rows:
        shown = dict(zip(head[1:], row[1:], strict=True))
        now, then = drift["sources"][row[0]], drift["sources_before"].get(row[0])
        assert [number(shown[name]) for name in ("rows", "new", "gone")] == [
            now[name] for name in ("rows", "new", "gone")
        ]
        assert number(shown["mean"]) == pytest.approx(now["mean"], rel=1e-5)
        change = None if then is None else now["mean"] - then["mean"]
        if change is None:
            assert shown["mean, change"] == "n/a"
        else:
            assert number(shown["mean, change"]) == pytest.approx(change, rel=1e-4, abs=1e-6)
    ranks = drift["ranks"]
    (line,) = tables["nights-ranks"][1:]
    assert number(line[0]) == 4 and number(line[4]) == ranks["scores"]
    assert number(line[5]) == pytest.approx(ranks["spearman"], rel=1e-5)
    assert len(tables["nights-movers"]) - 1 == len(ranks["movers"])


def test_a_root_without_a_complete_generation_has_no_page(tmp_path: Path, tiny_model: Path) -> None:
    place = Place(str(tmp_path))
    (place / "in").write({"a.parquet": parquet(table_of(night_rows(12)))})
    words = ("nightly", (place / "in").url, "--model", tiny_model, "--output", (place / "root").url)
    ended = run_cli(*words, "--backend", "fake", "--no-ray", "--shard-rows", 4, "--max-shards", 1)
    assert ended.exit_code == 0, ended.err
    with pytest.raises(IncompleteError, match="no generation is complete"):
        read_page((place / "root").url, {})


def test_the_page_of_a_root_comes_with_its_nights(
    tmp_path: Path, tiny_model: Path, other_model: Path
) -> None:
    root, printed = nightly_root(Place(str(tmp_path)), tiny_model, other_model, "--report")
    page = root.store.read("_report.html").decode()
    assert page == read_page(root.url, {}).to_html()
    assert numbers(tables_of(page)["nights-rows"], "night") == [1, 2, 3, 4]
    ended = run_cli("report", root.url, "--html", tmp_path / "p.html", "--json")
    assert json.loads(ended.out)["generation"] == printed[-1]["night"]["latest"]["main"]
