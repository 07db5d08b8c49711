"""Schedules: what the files say, and a real cron daemon that overlaps itself."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise, takewhile
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import yaml
from croniter import croniter
from cronsim import CronSim

from batch_scorer.nightly.generations import read_generations, read_latest
from tests.helpers.inputs import pairs, parquet
from tests.helpers.places import Place
from tests.helpers.program import REPOSITORY, Program, wait_until
from tests.manifests.job_files import KUBERAY, argo, dag_call, documents

FIRST, LAST = datetime(2026, 1, 1), datetime(2028, 1, 1)
UTC_NAME = "Etc/UTC"
# Clocks that are changed at 00:00, 01:00, 02:00, 02:45 and 03:00, by an hour or by half of one.
ZONES = (
    "Africa/Cairo", "America/New_York", "America/Santiago", "America/St_Johns", "Asia/Beirut",
    "Australia/Lord_Howe", "Europe/Berlin", "Europe/London", "Pacific/Chatham",
)  # fmt: skip


def shipped() -> dict[str, tuple[str, str]]:
    """Expression and time zone of every schedule in jobs/."""
    found = {}
    for name in ("cronjob-nightly", "raycronjob-nightly"):
        spec = documents(KUBERAY / f"{name}.yaml")[0]["spec"]
        found[name] = (spec["schedule"], spec["timeZone"])
    workflow = argo()["spec"]
    for number, expression in enumerate(workflow["schedules"]):
        found[f"argo {number}"] = (expression, workflow["timezone"])
    start = dag_call("pendulum.datetime")[1]
    found["airflow"] = (dag_call("DAG")[1]["schedule"], start["tz"])
    return found


SHIPPED = shipped()


def runs(expression: str, zone: str) -> list[datetime]:
    """All runs of two years. Raises AssertionError if two libraries read the expression in two
    ways."""
    start, end = (moment.replace(tzinfo=ZoneInfo(zone)) for moment in (FIRST, LAST))
    by_cronsim = list(takewhile(lambda run: run < end, CronSim(expression, start)))
    iterator = croniter(expression, start)
    by_croniter = [iterator.get_next(datetime) for _ in by_cronsim]
    assert [run.astimezone(UTC) for run in by_croniter] == [
        run.astimezone(UTC) for run in by_cronsim
    ]
    return by_cronsim


@pytest.mark.parametrize("name", SHIPPED)
def test_nights_are_a_day_apart_and_nobody_reads_them_otherwise(name: str) -> None:
    expression, zone = SHIPPED[name]
    nights = runs(expression, zone)
    assert len(nights) == (LAST - FIRST).days
    assert {later - earlier for earlier, later in pairwise(nights)} == {timedelta(days=1)}


def test_all_schedules_say_the_same() -> None:
    assert len({expression for expression, _ in SHIPPED.values()}) == 1
    assert {zone for _, zone in SHIPPED.values()} <= {UTC_NAME, "UTC"}


@pytest.mark.parametrize("zone", ZONES)
def test_in_a_zone_with_summer_time_too_there_is_one_night_a_day(zone: str) -> None:
    (expression,) = {expression for expression, _ in SHIPPED.values()}
    nights = runs(expression, zone)
    assert len({night.utcoffset() for night in nights}) > 1, "no clock was changed"
    days = [night.date() for night in nights]
    assert days == [FIRST.date() + timedelta(days=day) for day in range((LAST - FIRST).days)]
    assert {(night.hour, night.minute) for night in nights} == {(4, 17)}


@pytest.mark.parametrize(
    ("expression", "zone"), [("30 2 * * *", "Europe/Berlin"), ("30 1 * * *", "Europe/London")]
)
def test_in_the_hour_of_the_change_a_schedule_is_read_in_two_ways(
    expression: str, zone: str
) -> None:
    """Which is why ours keep out of it."""
    with pytest.raises(AssertionError):
        runs(expression, zone)


# A real daemon.

TICK = """#!/bin/sh
# A tick: what the command says, and how it ends, under the tick's own name.
tick=$(mktemp -p "$1" tick-XXXXXXXX)
shift
"$@" > "$tick" 2>&1
echo $? > "$tick.code.new"
mv "$tick.code.new" "$tick.code"
"""


@dataclass(frozen=True)
class Ticks:
    """What the ticks of a daemon left in a folder."""

    folder: Path

    def started(self) -> set[Path]:
        return {file for file in self.folder.iterdir() if "." not in file.name}

    def ended(self) -> dict[Path, int]:
        """Exit code by tick."""
        codes = self.folder.glob("*.code")
        return {code.with_suffix(""): int(code.read_text()) for code in codes}


@contextmanager
def ticking(program: Program, folder: Path, period_s: int, *command: object) -> Iterator[Ticks]:
    """A cron daemon that runs the command every `period_s` seconds, whether the last one has ended
    or not; ended, with all that it started, on leaving."""
    ticks = folder / "ticks"
    ticks.mkdir()
    (folder / "tick.sh").write_text(TICK)
    job = {
        "name": "nightly",
        "command": ["/bin/sh", str(folder / "tick.sh"), str(ticks), *map(str, command)],
        "schedule": f"*/{period_s} * * * * * *",
        "concurrencyPolicy": "Allow",
    }
    crontab = folder / "crontab.yaml"
    crontab.write_text(yaml.safe_dump({"jobs": [job]}))
    ours = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (folder / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen(
            [Path(sys.executable).parent / "cronstable", "-c", crontab],
            cwd=REPOSITORY,
            env={**ours, "RAY_TMPDIR": str(program.home)},
            stdout=log,
            stderr=log,
        )
    try:
        yield Ticks(ticks)
    finally:
        daemon.kill()
        daemon.wait()


@pytest.mark.e2e
def test_a_tick_that_comes_while_a_night_is_at_work_leaves_it_alone(
    program: Program, tiny_model: Path, tmp_path: Path
) -> None:
    rows = 40
    place, output = Place(str(tmp_path / "in")), Place(str(tmp_path / "out"))
    place.write(
        {
            f"{name}.parquet": parquet(pairs(rows // 2, start))
            for name, start in (("a", 0), ("b", 100))
        }
    )
    settings = tmp_path / "nightly.yaml"
    settings.write_text(
        yaml.safe_dump(
            {
                "model": str(tiny_model),
                "inputs": [place.url],
                "output": output.url,
                "backend": "fake",
                "shard_rows": 10,
                "use_ray": False,
                # The night that is held still must not count as dead.
                "lease_s": 600,
            }
        )
    )
    command = (sys.executable, "-m", "batch_scorer.cli", "nightly", "--config", settings)
    lease = tmp_path / "out" / "_batch_scorer" / "lease.json"
    with ticking(program, tmp_path, 10, *command) as ticks:
        wait_until(lease.exists, "a night is at work")
        holder = int(output.read_json("_batch_scorer/lease.json")["holder"]["pid"])
        # Held still, it is at work for as long as the next tick takes.
        os.kill(holder, signal.SIGSTOP)
        try:
            first = Path(os.readlink(f"/proc/{holder}/fd/1"))
            before = set(ticks.ended())
            wait_until(lambda: set(ticks.ended()) - before, "another tick has ended")
            overlapping = set(ticks.ended()) - before
        finally:
            os.kill(holder, signal.SIGCONT)
        wait_until(lambda: first in ticks.ended(), "the first night has ended")
        seen = ticks.started()

        def idle() -> list[Path]:
            later = set(ticks.ended()) - seen
            return [tick for tick in later if "nothing to do" in tick.read_text()]

        wait_until(idle, "a night after it has found nothing to do")
    assert first not in overlapping
    assert set(ticks.ended().values()) == {0}
    for tick in overlapping:
        assert "another nightly run holds this output" in tick.read_text(), tick.read_text()
    latest = read_latest(output.store)
    assert latest is not None
    (path,) = latest.paths.values()
    assert [generation.path for generation in read_generations(output.store)] == [path]
    verdict = program.run("verify", (output / path).url, "--json")
    assert verdict.exit_code == 0, verdict.err
    assert verdict.json["rows"] == rows
