"""What the page says of several members' scores, computed again from the rows."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batch_scorer.outputs.families import families_of, headline_prefix
from batch_scorer.records import Format, Layout
from batch_scorer.reports.page.page import ScoredPage, read_page
from tests.helpers.ensembles import MEMBERS, ensemble_output
from tests.helpers.pages import number, numbers, tables_of
from tests.helpers.places import Place
from tests.helpers.scored import CANARY
from tests.helpers.written import write_scored

Rows = list[dict[str, Any]]
Tables = Mapping[str, list[list[str]]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[ScoredPage, Rows]:
    place, rows = ensemble_output(Place(str(tmp_path_factory.mktemp("ensemble"))))
    return read_page(place.url, {}), rows


@pytest.fixture(scope="module")
def tables(written: tuple[ScoredPage, Rows]) -> Tables:
    return tables_of(written[0].to_html())


@pytest.fixture(scope="module")
def rows(written: tuple[ScoredPage, Rows]) -> Rows:
    return written[1]


def values_of(rows: Rows, member: str) -> list[float | None]:
    return [value for row in rows for value in row[f"{member}_scores"]]


def test_each_member_is_counted_by_itself(tables: Tables, rows: Rows) -> None:
    head, *lines = tables["members"]
    assert [line[0] for line in lines] == [*MEMBERS]
    for place, line in enumerate(lines):
        values = np.array([v for v in values_of(rows, MEMBERS[place]) if v is not None])
        shown = dict(zip(head[1:], map(number, line[1:]), strict=True))
        assert shown["answers"] == len(values)
        assert shown["mean"] == pytest.approx(values.mean(), rel=1e-5)
        assert shown["std"] == pytest.approx(values.std(), rel=1e-5)
        assert shown["median"] == pytest.approx(
            np.quantile(values, 0.5, method="inverted_cdf"), abs=np.ptp(values) / 900
        )
        histogram = tables[f"member-{place + 1}"]
        edges = [*numbers(histogram, "from"), numbers(histogram, "to before")[-1]]
        assert numbers(histogram, "answers") == np.histogram(values, edges)[0].tolist()


def test_members_are_correlated_over_the_answers_that_both_have(tables: Tables, rows: Rows) -> None:
    scores = [np.array([np.nan if v is None else v for v in values_of(rows, m)]) for m in MEMBERS]
    complete = ~np.isnan(scores).any(axis=0)
    shown = {line[0]: line[1:] for line in tables["member-correlation"][1:]}
    pairs = {
        f"{MEMBERS[i]}, {MEMBERS[j]}": (scores[i], scores[j]) for i, j in combinations(range(3), 2)
    }
    assert shown.keys() == pairs.keys()
    for name, (a, b) in pairs.items():
        both = ~np.isnan(a) & ~np.isnan(b)
        count, pearson, low, high, spearman = map(number, shown[name])
        assert count == both.sum()
        exact = np.corrcoef(a[both], b[both])[0, 1]
        assert pearson == pytest.approx(exact, abs=1e-5)
        assert (low, high) == pytest.approx(
            np.tanh(np.arctanh(exact) + np.array([-1, 1]) * 1.959964 / np.sqrt(count - 3)), abs=1e-4
        )
        ranks = [(x[:, None] > x).sum(axis=1) for x in (a[complete], b[complete])]
        assert spearman == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-4)


def test_disagreement_is_counted_by_row_and_by_source(tables: Tables, rows: Rows) -> None:
    found = [row for row in rows if row["rank_disagreement"] is not None]
    values = np.array([row["rank_disagreement"] for row in found])
    assert sum(numbers(tables["disagreement"], "rows")) == len(values)
    shown = {
        line[0]: (number(line[1]), number(line[2])) for line in tables["disagreement-by-source"][1:]
    }
    sources = np.array([row["source"] for row in found])
    for source in {*sources, "all"}:
        here = values[(sources == source) | (source == "all")]
        assert shown[source] == (len(here), pytest.approx(here.mean(), rel=1e-5))
    stds = [value for row in rows for value in row["std_scores"] if value is not None]
    histogram = tables["member-stds"]
    edges = [*numbers(histogram, "from"), numbers(histogram, "to before")[-1]]
    assert numbers(histogram, "answers") == np.histogram(stds, edges)[0].tolist()


def test_the_rows_that_members_order_most_differently_are_shown(
    written: tuple[ScoredPage, Rows],
) -> None:
    page, rows = written

    def order(place: int) -> tuple[float, float]:
        row = rows[place]
        stds = [value for value in row["std_scores"] if value is not None]
        return -(row["rank_disagreement"] or 0.0), -max(stds, default=0.0)

    expected = sorted(range(len(rows)), key=order)[:5]
    shown = [int(row.file.removesuffix(".parquet")) * 40 + (row.row or 0) for row in page.apart]
    assert shown == expected
    assert all(row.texts and row.detail.startswith("rank disagreement ") for row in page.apart)
    first = rows[expected[0]]
    for member in MEMBERS:
        told = ", ".join(f"{value:.4g}" for value in first[f"{member}_scores"])
        assert f"{member} {told}" in page.apart[0].detail
    html = page.to_html()
    assert CANARY not in html and "<b>brief" not in html and "&lt;b&gt;brief" in html


def test_two_families_without_aggregates_are_members_too(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(4, 50)).astype(np.float32)
    columns = {"chosen": ["a"] * 50, "rejected": ["b"] * 50}
    for prefix, (chosen, rejected) in (("", values[:2]), ("length_", values[2:])):
        columns |= {
            f"{prefix}score_chosen": chosen,
            f"{prefix}score_rejected": rejected,
            f"{prefix}score_error": pa.nulls(50, pa.string()),
            f"{prefix}num_tokens_chosen": np.full(50, 3, np.int32),
            f"{prefix}num_tokens_rejected": np.full(50, 3, np.int32),
        }
    layout = Layout(Format.PREFERENCE_PAIR, {"chosen": "chosen", "rejected": "rejected"})
    added = [name for name in columns if name not in layout.columns]
    place = Place(str(tmp_path))
    write_scored(place.store, [("a.parquet", pa.table(columns))], layout, added)
    tables = tables_of(read_page(place.url, {}).to_html())
    assert [line[0] for line in tables["members"][1:]] == ["score", "length"]
    assert "disagreement" not in tables and "member-stds" not in tables
    (line,) = tables["member-correlation"][1:]
    a, b = values[:2].T.ravel(), values[2:].T.ravel()
    assert number(line[2]) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-5)
    points = tables["member-points"]
    assert sorted(numbers(points, "score")) == pytest.approx(sorted(a), rel=1e-4, abs=1e-6)


def test_aggregates_are_no_family() -> None:
    names = ["score", "a_score_chosen", "a_score_error", "mean_score_chosen", "b_score_error"]
    assert [(f.prefix, f.name, f.columns) for f in families_of(names)] == [
        ("a_", "a", ("a_score_chosen",))
    ]


def test_the_mean_of_the_members_stands_for_a_row(tables: Tables, rows: Rows) -> None:
    values = [value for row in rows for value in row["mean_scores"] if value is not None]
    table = tables["scores"]
    edges = [*numbers(table, "from"), numbers(table, "to before")[-1]]
    assert numbers(table, "answers") == np.histogram(values, edges)[0].tolist()
    assert headline_prefix(["x_score_error", "x_mean_score", "x_a_score"], ["score"]) == "x_mean_"
    assert headline_prefix(["x_score", "x_score_error", "a_score_error"], ["score"]) == "x_"
