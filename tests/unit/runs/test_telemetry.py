"""The table of metrics: in the code, in the document, and in one name each."""

import re
from pathlib import Path

from batch_scorer.runs.metrics import run_name
from batch_scorer.runs.telemetry import INSTRUMENTS

PAGE = Path(__file__).parents[3] / "docs" / "observability.md"


def test_the_page_has_the_table_of_metrics() -> None:
    rows = re.findall(r"^\| `(ray_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", PAGE.read_text(), re.M)
    assert rows == [
        (each.exported, each.kind, f"`{each.tag}`" if each.tag else "", each.help)
        for each in INSTRUMENTS
    ]


def test_metrics_have_names_that_prometheus_takes() -> None:
    assert len({each.name for each in INSTRUMENTS}) == len(INSTRUMENTS)
    for each in INSTRUMENTS:
        assert re.fullmatch(r"batch_scorer_[a-z_]+", each.name)
        assert each.help.isascii()


def test_a_run_is_called_by_its_output_and_epoch() -> None:
    assert run_name("s3://bucket/scored/pairs/", 3) == "pairs:3"
    assert run_name("scored", 1) == "scored:1"
