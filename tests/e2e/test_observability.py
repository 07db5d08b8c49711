"""What a scrape and the log files show of a real run, one of whose workers dies at work."""

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from batch_scorer.runs import telemetry
from batch_scorer.runs.telemetry import INSTRUMENTS, Instrument
from tests.helpers.inputs import long_pair_rows, pair_rows, pairs, parquet, table_of
from tests.helpers.places import Place
from tests.helpers.program import Ended, Running, temporary_ray_home

pytestmark = pytest.mark.e2e

RUN = "out:1"
MARKED, TOO_LONG = 2, 1
LINE = re.compile(r"(\w+)\{(.*)\} (\S+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Observed:
    """What the run said: its own figures, samples of the scrape, lines of the log."""

    figures: dict[str, Any]
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]
    types: dict[str, str]
    driver_lines: list[dict[str, Any]]
    worker_lines: list[dict[str, Any]]

    def value(self, name: str, **labels: str) -> float:
        """The sample with `run` and these labels, whatever labels Ray adds."""
        wanted = {("run", RUN), *labels.items()}
        (found,) = (
            value
            for (sample, has), value in self.samples.items()
            if sample == name and wanted <= has
        )
        return found


def json_lines(text: str) -> list[dict[str, Any]]:
    """Ours, of all the lines of JSON."""
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [line for line in found if line.get("name", "").startswith("batch_scorer")]


@pytest.fixture(scope="module")
def observed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    folder = tmp_path_factory.mktemp("observed")
    place = Place(str(folder))
    marked = [{**row, "chosen": None} for row in pair_rows(MARKED, start=50)]
    (place / "in").write(
        {
            "a.parquet": parquet(table_of(pair_rows(12) + marked)),
            "b.parquet": parquet(pairs(9, start=100)),
            "long.parquet": parquet(table_of(pair_rows(3, start=200) + long_pair_rows(TOO_LONG))),
        }
    )
    config = folder / "config.yaml"
    settings = {
        "model": str(tiny_model),
        "inputs": [(place / "in").url],
        "output": (place / "out").url,
        # Padded batches: otherwise there were no padding to count.
        "attention": "sdpa",
        "dtype": "float32",
        "max_tokens": 500,
        "over_length": "error",
        "shard_rows": 7,
        "parity_check": "off",
    }
    config.write_text(yaml.safe_dump(settings))
    with temporary_ray_home() as home:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {
            "RAY_TMPDIR": str(home),
            "RAY_LOGGING_CONFIG_ENCODING": "JSON",
            "RAY_metrics_report_interval_ms": "3000",
        }
        ended = Running(
            [sys.executable, "-m", "tests.e2e.scraped_run", str(config)], environment, home
        ).wait()
        assert ended.exit_code == 0, ended.err
        workers = [file.read_text() for file in home.glob("**/logs/worker-*.err")]
    yield read(ended, workers)


def read(ended: Ended, workers: list[str]) -> Observed:
    samples, types = {}, {}
    for line in ended.json["scrape"].splitlines():
        if (found := LINE.fullmatch(line)) is not None:
            name, labels, value = found.groups()
            samples[name, frozenset(LABEL.findall(labels))] = float(value)
        elif line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            types[name] = kind
    lines = [line for text in workers for line in json_lines(text)]
    return Observed(ended.json, samples, types, json_lines(ended.err), lines)


@pytest.mark.parametrize("instrument", INSTRUMENTS, ids=lambda instrument: instrument.name)
def test_a_scrape_shows_every_metric_of_the_table(
    observed: Observed, instrument: Instrument
) -> None:
    assert observed.types[instrument.exported] == instrument.kind
    suffix = "_count" if instrument.kind == "histogram" else ""
    found = [
        dict(labels) for name, labels in observed.samples if name == instrument.exported + suffix
    ]
    assert found
    for labels in found:
        assert labels["run"] == RUN
        assert (instrument.tag is None) or labels[instrument.tag]


def test_what_is_counted_is_what_the_run_did(observed: Observed) -> None:
    totals, metrics = observed.figures["totals"], observed.figures["metrics"]
    assert (totals["rows_marked"], totals["rows_failed"]) == (MARKED, 3 + TOO_LONG)
    for outcome in ("scored", "marked", "failed"):
        counted = observed.value(telemetry.ROWS.exported, outcome=outcome)
        assert counted == totals[f"rows_{outcome}"]
    shards = {"committed": totals["shards"] - totals["shards_failed"], "failed": 1}
    for outcome, count in shards.items():
        assert observed.value(telemetry.SHARDS.exported, outcome=outcome) == count
    for kind in ("scored", "computed", "padding"):
        counted = observed.value(telemetry.TOKENS.exported, kind=kind)
        assert counted == metrics[f"{kind}_tokens"] > 0
    assert observed.value(telemetry.TOKENS.exported, kind="scored") == totals["tokens"]
    assert observed.value(telemetry.RETRIES.exported) == observed.figures["retries"] == 1
    timed = observed.value(f"{telemetry.SHARD_SECONDS.exported}_count")
    assert timed == shards["committed"]


def test_gauges_stand_where_the_run_ended(observed: Observed) -> None:
    metrics = observed.figures["metrics"]
    for instrument, figure in (
        (telemetry.GOODPUT, "goodput_tokens_per_s_per_device"),
        (telemetry.COMPUTED_RATIO, "computed_ratio"),
        (telemetry.IDLE_SHARE, "idle_share"),
        (telemetry.UTILISATION, "model_flop_utilisation"),
    ):
        assert observed.value(instrument.exported) == pytest.approx(metrics[figure])
    assert observed.value(telemetry.ROWS_LEFT.exported) == 0
    assert observed.value(telemetry.ETA.exported) == 0


def test_the_driver_logs_every_shard_with_run_and_attempt(observed: Observed) -> None:
    lines = observed.driver_lines
    assert {line["run"] for line in lines if "run" in line} == {RUN}
    ended = {
        line["shard"]: line for line in lines if line["message"].startswith(("committed", "failed"))
    }
    assert sorted(ended) == [
        "a.rows0-7.parquet", "a.rows7-14.parquet", "b.rows0-5.parquet", "b.rows5-9.parquet",
        "long.parquet",
    ]  # fmt: skip
    assert ended["long.parquet"]["reason"] == "over_length_row"
    assert sorted(line["attempt"] for line in ended.values()) == [1, 1, 1, 1, 2]
    marked = [line for line in lines if line["message"].startswith("marked")]
    assert {line["shard"] for line in marked} == {"a.rows7-14.parquet"}


def test_workers_log_what_they_do_with_run_shard_and_attempt(observed: Observed) -> None:
    steps = [line for line in observed.worker_lines if line["message"] in ("read", "score")]
    assert {line["run"] for line in steps} == {RUN}
    tries = {
        step: [(line["shard"], line["attempt"]) for line in steps if line["message"] == step]
        for step in ("read", "score")
    }
    assert len({shard for shard, _ in tries["read"]}) == 5
    assert sorted(attempt for _, attempt in tries["read"]) == [1, 1, 1, 1, 1]
    assert sorted(attempt for _, attempt in tries["score"]) == [1, 1, 1, 1, 2]
