"""`score --report` puts the page beside `_SUCCESS`, on every kind of store, and nobody takes it for
rows; a page that cannot be written costs a warning."""

import logging
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from batch_scorer import Config, evaluate, score, verify
from batch_scorer.errors import ConfigError
from batch_scorer.outputs.manifest import REPORT_KEY, SUCCESS_KEY
from batch_scorer.records import Receipt
from batch_scorer.reports.page.page import read_page
from batch_scorer.runs.remaining import Work
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pairs, parquet
from tests.helpers.places import Place


def settings(place: Place, model: Path, **more: Any) -> Config:
    return Config(
        model=str(model),
        inputs=((place / "in").url,),
        output=(place / "out").url,
        store_options=dict(place.options),
        backend="fake",
        shard_rows=4,
        use_ray=False,
        **more,
    )


def page_in(place: Place) -> str | None:
    keys = {info.key for info in (place / "out").store.list()}
    return (place / "out").store.read(REPORT_KEY).decode() if REPORT_KEY in keys else None


def test_the_page_lies_beside_success(store_place: Place, tiny_model: Path) -> None:
    place = store_place
    (place / "in").write({"a.parquet": parquet(pairs(10))})
    config = settings(place, tiny_model, report=True)
    score(config)
    page = page_in(place)
    assert page == read_page(config.output, config.store_options).to_html()
    assert "10 rows = 10 scored" in page
    assert (place / "out").store.read(SUCCESS_KEY)
    assert verify(config.output, config.store_options).exit_code == 0
    assert len((place / "out").shard_keys()) == 3
    # A run with other rows and no page of its own leaves none that is out of date.
    (place / "in").write({"b.parquet": parquet(pairs(2, 50))})
    score(config.model_copy(update={"report": False}))
    assert page_in(place) is None
    ended = run_cli(
        "score", (place / "in").url, "--model", tiny_model, "--output", config.output,
        "--backend", "fake", "--shard-rows", 4, "--no-ray", "--report", *place.flags,
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    assert f"The page is {config.output}/{REPORT_KEY}" in ended.out
    assert "12 rows = 12 scored" in (page_in(place) or "")


def test_readers_do_not_take_it_for_rows(tmp_path: Path, tiny_model: Path) -> None:
    place = Place(str(tmp_path))
    (place / "in").write({"a.parquet": parquet(pairs(10))})
    score(settings(place, tiny_model, report=True))
    assert ds.dataset((place / "out").url, format="parquet").count_rows() == 10


def test_a_page_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(str(tmp_path))
    (place / "in").write({"a.parquet": parquet(pairs(3))})

    class Losing:
        """A disk that loses a shard once it is committed."""

        def planned(self, work: Work) -> None: ...

        def finished(self, receipt: Receipt) -> None:
            (place / "out").store.delete(receipt.output_key)

    with caplog.at_level(logging.WARNING, "batch_scorer"):
        summary = score(settings(place, tiny_model, report=True), Losing())
    assert summary.is_complete
    assert (tmp_path / "out" / SUCCESS_KEY).exists() and page_in(place) is None
    assert [r.message for r in caplog.records if "the page is not written" in r.message]


def test_what_writes_no_page_says_so(tmp_path: Path, tiny_model: Path) -> None:
    place = Place(str(tmp_path))
    (place / "in").write({"a.parquet": parquet(pairs(3))})
    with pytest.raises(ConfigError, match="report: `score` and `nightly`"):
        evaluate(settings(place, tiny_model, report=True), benchmark="pairs")
