"""Nightly runs on every kind of store."""

from datetime import date

import pytest

from batch_scorer import Config
from batch_scorer.nightly.night import Ended, Night, run_night
from batch_scorer.outputs.manifest import SUCCESS_KEY
from tests.helpers.inputs import pairs, parquet
from tests.stores.jobs import StoreJob

pytestmark = pytest.mark.fault

DAYS = ("2026-11-20", "2026-11-21", "2026-11-22")


def nights_of(job: StoreJob, inputs: str = "in") -> Config:
    return job.config("nights", inputs)


def latest(job: StoreJob) -> str:
    """The output that readers take."""
    path: str = (job.place / "nights").read_json("latest.json")["path"]
    return f"nights/{path}"


def write_day(job: StoreJob, day: int) -> None:
    table = pairs(4, start=10 * day)
    (job.place / "days").write({f"dt={DAYS[day]}/x.parquet": parquet(table)})


def test_two_nights_score_what_is_new_and_nothing_else(job: StoreJob) -> None:
    first = run_night(nights_of(job), Night())
    assert first.record is not None and first.record.has_moved
    job.assert_right(latest(job), job.undisturbed())
    before = (job.place / latest(job)).shards()

    # A file in another cut (fault 1: readers found its rows twice), another as it was.
    (job.place / "in").write({"b.parquet": parquet(pairs(7, start=100))})
    second = run_night(nights_of(job), Night())
    assert second.record is not None
    rows = second.record.series[0].rows
    assert (rows.total, rows.new, rows.kept, rows.left) == (12, 7, 5, 0)
    after = (job.place / latest(job)).shards()
    a = {key for key in before if key.startswith("a.")}
    assert {key: after[key] for key in a} == {key: before[key] for key in a}
    job.assert_right(latest(job), job.undisturbed(), same_bytes=False)

    third = run_night(nights_of(job), Night())
    assert (third.record, third.is_complete) == (None, True)
    assert (job.place / latest(job)).shards() == after


def test_a_night_of_some_days_keeps_what_the_night_before_has_scored(job: StoreJob) -> None:
    """Fault 3: on Azure and on S3 with versioning it lost `_SUCCESS`, and nothing brought it
    back."""

    def night(since: str | None = None) -> Ended:
        return run_night(nights_of(job, "days"), Night(since=since and date.fromisoformat(since)))

    def counted() -> int:
        success = (job.place / latest(job)).store.read_json(SUCCESS_KEY)
        assert (success["rows_left"], success["shards_left"]) == (0, 0)
        return int(success["rows"])

    write_day(job, 0)
    write_day(job, 1)
    night()
    before = (job.place / latest(job)).shards()
    assert night(since=DAYS[1]).record is None
    assert counted() == 8
    assert (job.place / latest(job)).shards() == before

    write_day(job, 2)
    third = night(since=DAYS[2])
    assert third.record is not None and third.record.series[0].rows.new == 4
    assert counted() == 12
    assert night(since=DAYS[2]).record is None
    assert counted() == 12
    job.assert_right(latest(job), job.undisturbed("days"), "days", same_bytes=False)
