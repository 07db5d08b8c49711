"""An output's status while a run holds it."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from batch_scorer.fingerprint import Fingerprint
from batch_scorer.outputs.claim import claim_output
from batch_scorer.outputs.lease import Lease
from batch_scorer.outputs.ledger import Ledger
from batch_scorer.outputs.manifest import record_plan
from batch_scorer.records import Status
from batch_scorer.runs.metrics import Metrics, record_run
from batch_scorer.runs.status import read_status
from batch_scorer.storage import Store
from tests.helpers.receipts import ONE, OTHER, RUN

LEFT_S = 3.5
"""After ONE: 800 of 1,500 estimated tokens took 4 seconds."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "out"), {}, create=True)
    claim_output(store, Fingerprint({}), {}, {})
    record_run(store, RUN, None)
    return store


@pytest.fixture
def lease(store: Store) -> Iterator[Lease]:
    with Lease(store, "digest", 30.0) as lease:
        yield lease


def records_of(store: Store, folder: str) -> list[Path]:
    return sorted((Path(store.root) / "_batch_scorer").glob(folder))


def test_the_time_left_is_estimated_from_what_this_run_did(store: Store, lease: Lease) -> None:
    """A run that was stopped yesterday and is resumed keeps its epoch, and not its pace."""
    yesterday = replace(
        OTHER,
        epoch=RUN.epoch,
        spent=replace(OTHER.spent, started_at=-86_000.0, committed_at=-80_000.0),
    )
    Ledger(store, RUN.epoch, "stopped", every_s=0).add(yesterday)
    Ledger(store, RUN.epoch, lease.holder_id, every_s=0).add(replace(ONE, epoch=RUN.epoch))
    status = read_status(store.root)
    assert (status.left_s, status.shards_committed) == (LEFT_S, 2)
    assert status.metrics == Metrics.of([ONE]).to_json(RUN)


def test_time_passes_between_two_records(store: Store, lease: Lease) -> None:
    Ledger(store, RUN.epoch, lease.holder_id, every_s=0).add(replace(ONE, epoch=RUN.epoch))
    (segment,) = records_of(store, "ledger/*")
    (renewed,) = records_of(store, "lease.json")
    for passed_s, left_s in ((2, LEFT_S - 2), (60, 0.0)):
        written = segment.stat().st_mtime
        os.utime(renewed, (written + passed_s, written + passed_s))
        assert read_status(store.root).left_s == pytest.approx(left_s, abs=0.01)


def test_a_run_without_a_commit_is_running_for_an_unknown_time(store: Store, lease: Lease) -> None:
    status = read_status(store.root)
    assert (status.state, status.left_s) == ("running", None)
    assert status.renewed_s is not None
    (renewed,) = records_of(store, "lease.json")
    os.utime(renewed, (0, 0))
    silent_s = read_status(store.root).renewed_s
    assert silent_s is not None and silent_s > 1e9


def test_nobody_holds_an_output_that_was_released(store: Store) -> None:
    with Lease(store, "digest", 30.0) as lease:
        Ledger(store, RUN.epoch, lease.holder_id, every_s=0).add(replace(ONE, epoch=RUN.epoch))
    status = read_status(store.root)
    assert (status.state, status.holder, status.renewed_s) == ("interrupted", None, None)
    assert (status.left_s, status.metrics) == (None, Metrics.of([ONE]).to_json(RUN))


def test_a_run_that_ended_with_failed_shards_is_not_called_interrupted(store: Store) -> None:
    record_plan(store, shards=1, rows=ONE.num_rows, tokens=1)
    with Lease(store, "digest", 30.0) as lease:
        failed = replace(
            ONE, epoch=RUN.epoch, status=Status.FAILED, stored=None, reason="internal", detail="x"
        )
        Ledger(store, RUN.epoch, lease.holder_id, every_s=0).add(failed)
        assert read_status(store.root).state == "running"
    assert read_status(store.root).state == "failed"
