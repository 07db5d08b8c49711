"""Pages of outputs that lack something: scores, texts, a source, a readable file."""

from pathlib import Path

import pytest

from batch_scorer.judges.page import load_page
from batch_scorer.records import Source
from batch_scorer.reports.page.figures import sections_of
from batch_scorer.reports.page.page import ScoredPage, read_page
from batch_scorer.reports.page.tally import Tally
from batch_scorer.reports.page.values import read_values
from tests.helpers.embedded import conversations, embed
from tests.helpers.inputs import jsonl, pair_rows, pairs, parquet
from tests.helpers.pages import numbers, page_of, tables_of
from tests.helpers.places import Place


def keys_of(page: ScoredPage) -> list[str]:
    return [figure.key for section in page.sections for figure in section.figures]


def test_a_failed_file_is_named_and_the_others_are_shown(tmp_path: Path, tiny_model: Path) -> None:
    files = {"good.parquet": parquet(pairs(8)), "<i>.parquet": b"PAR1 and nothing else"}
    page, _ = page_of(tmp_path, tiny_model, files)
    (failed,) = page.failed
    assert (failed.input, failed.reason) == ("<i>.parquet", "unreadable_file")
    html = page.to_html()
    assert '<td class="word">&lt;i&gt;.parquet</td><td class="word">unreadable_file</td>' in html
    assert "8 rows = 8 scored" in html
    assert sum(numbers(tables_of(html)["scores"], "answers")) == 16


def test_without_the_texts_rows_are_shown_by_their_place(tmp_path: Path, tiny_model: Path) -> None:
    page, _ = page_of(
        tmp_path,
        tiny_model,
        {"a.parquet": parquet(pairs(30))},
        column_prefix="mine_",
        keep_columns=("source",),
        shard_rows=10,
    )
    assert len(page.lowest) == 5
    assert all(row.texts == {} and row.row is not None for row in page.lowest)
    assert "by-messages" not in keys_of(page)
    assert sum(numbers(tables_of(page.to_html())["margins"], "pairs")) == 30


def test_rows_that_where_has_picked_have_no_number(tmp_path: Path, tiny_model: Path) -> None:
    rows = pair_rows(20)
    for number, row in enumerate(rows):
        row["source"] = f"s{number % 2}"
    page, _ = page_of(
        tmp_path, tiny_model, {"a.jsonl": jsonl(rows)}, where='field("source") == "s1"'
    )
    assert page.lowest and all(row.row is None and row.texts for row in page.lowest)
    html = page.to_html()
    assert "20 rows = 10 scored + 0 marked + 10 not asked for" in html
    assert [row[0] for row in tables_of(html)["by-source"][1:]] == ["s1"]


def test_where_nothing_is_scored_there_are_counts_only(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{**row, "chosen": None} for row in pair_rows(5)]
    rows[0] = pair_rows(1)[0]
    page, _ = page_of(tmp_path, tiny_model, {"a.jsonl": jsonl(rows)}, max_tokens=8)
    assert keys_of(page) == []
    assert sum(page.totals["marked"].values()) == 5
    assert {reason: len(rows) for reason, rows in page.examples.items()} == {
        "null_value": 3,
        "too_long": 1,
    }
    assert "<figure" not in page.to_html()


def test_embeddings_have_no_scores(tmp_path: Path, tiny_model: Path) -> None:
    texts = ["Why?", "Name a tree.", "2 + 2"]
    output = embed(Place(str(tmp_path)), "out", conversations(texts), tiny_model)
    page = read_page(output, {})
    assert keys_of(page) == []
    assert "3 rows = 3 scored" in page.to_html()


@pytest.mark.parametrize("has_odds", [True, False])
def test_a_judges_grades_are_no_log_odds(has_odds: bool, tmp_path: Path, tiny_model: Path) -> None:
    _, output = page_of(tmp_path, tiny_model, {"a.parquet": parquet(pairs(8))})
    (key,) = output.shard_keys()
    commit, info = output.shards()[key].commit, output.store.head(key)
    judge = None if has_odds else load_page("grade").model_dump(mode="json")
    tally = Tally.for_commits([commit], judge)
    source = Source(output.url, key, info.size_bytes, info.version)
    tally.add(key, read_values(output.store, source, commit))
    sections = sections_of(tally)
    keys = [figure.key for section in sections for figure in section.figures]
    assert ("calibration" in keys) is has_odds
    assert "accuracy" in keys
