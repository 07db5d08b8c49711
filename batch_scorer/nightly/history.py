"""The records of nightly runs: read, computed and written.

    ROOT/nights/<number>.json          the record of each nightly run that changed anything
    ROOT/nights/<number>-drift.json    its drift report

Both are computed from manifests: the one that the newest record names, and the current one. So what
a nightly run committed before it was killed is counted by the next one.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from batch_scorer.errors import OutputError
from batch_scorer.nightly import drift
from batch_scorer.nightly.generations import MAIN, Generation, Latest
from batch_scorer.nightly.record import (
    DriftReport,
    ModelDrift,
    NightlyRecord,
    RowCounts,
    SeriesDrift,
    SeriesRecord,
    ShardCounts,
)
from batch_scorer.outputs.manifest import current_manifest, read_manifest
from batch_scorer.outputs.puts import put
from batch_scorer.records import Receipt
from batch_scorer.records.reading import read_record as read_one
from batch_scorer.runs.run import Summary
from batch_scorer.storage import ObjectMissing, Store

_FOLDER = "nights"
_RECORD = re.compile(rf"{_FOLDER}/(\d+)\.json")


@dataclass(frozen=True, slots=True)
class Step:
    """What a nightly run did: its generation, and how the scoring ended."""

    generation: Generation
    model: str
    summary: Summary
    store: Store


def numbers(root: Store) -> list[int]:
    """The numbers of all nightly runs that left a record, the newest first."""
    found = (_RECORD.fullmatch(info.key) for info in root.list(_FOLDER))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def read_record(root: Store, number: int) -> NightlyRecord:
    """Raises ObjectDamaged."""
    return read_one(root, f"{_FOLDER}/{number:05d}.json", NightlyRecord)


def newest_record(root: Store) -> NightlyRecord | None:
    """The record of the last nightly run that changed anything; None before there was one."""
    return next((read_record(root, number) for number in numbers(root)), None)


def newest_drift(root: Store) -> DriftReport:
    """The newest drift report. Raises OutputError where there is none."""
    for number in numbers(root):
        return read_one(root, f"{_FOLDER}/{number:05d}-drift.json", DriftReport)
    raise OutputError(f"{root.root}: no drift report here; name an output of `nightly`")


def write(root: Store, record: NightlyRecord, report: DriftReport) -> None:
    """Keep a record; its drift report is written first, so that no record is without one."""
    bodies: dict[str, dict[str, Any]] = {"-drift": report.to_json(), "": record.to_json()}
    for suffix, body in bodies.items():
        key = f"{_FOLDER}/{record.night:05d}{suffix}.json"
        put(root, key, json.dumps(body, indent=1).encode())


def describe(root: Store, step: Step) -> SeriesRecord:
    """A generation after a nightly run: its rows, and which of them the run changed."""
    totals = step.summary.totals
    before = _newest_of(root, step.generation.series, step.generation.path)
    shards: dict[str, drift.Before] = {}
    if before is not None:
        with suppress(ObjectMissing):  # somebody has removed the generation, and it begins anew
            shards = drift.committed_before(read_manifest(step.store, before.record.manifest))
    sources = drift.figures_by_source(step.summary.receipts, shards)
    everything = drift.together(sources)
    return SeriesRecord(
        series=step.generation.series,
        model=step.model,
        path=step.generation.path,
        manifest=totals["manifest"],
        rows=RowCounts(
            total=totals["rows"],
            new=everything.new,
            reused=everything.reused,
            kept=everything.kept,
            gone=everything.gone,
            marked=totals["rows_marked"],
            failed=totals["rows_failed"],
            left=totals["rows_left"],
            not_asked=totals["rows_not_asked"],
        ),
        shards=ShardCounts(
            total=totals["shards"], failed=totals["shards_failed"], left=totals["shards_left"]
        ),
        sources=sources,
        metrics=step.summary.metrics.to_json(step.summary.run),
        models={
            name: drift.figures_by_source(step.summary.receipts, shards, name)
            for name in totals.get("models", {})
        },
    )


def has_changed(root: Store, series: SeriesRecord) -> bool:
    """Whether a description differs from the newest record of the same generation."""
    before = _newest_of(root, series.series, series.path)
    if before is None:
        return True
    rows, then = series.rows, before.record.rows
    return (
        bool(rows.new or rows.reused or rows.gone)
        or (rows.total, rows.failed, rows.left) != (then.total, then.failed, then.left)
        or series.shards != before.record.shards
    )


def drift_report(
    root: Store,
    number: int,
    step: Step,
    after: SeriesRecord,
    latest: Latest | None,
) -> DriftReport:
    """How the scores have moved: the generation of nightly run `number` against the one that
    `latest.json` named before it, as its newest record describes it.

    Where the run worked on another generation, the ranks of the rows that both hold are compared
    too.
    """
    named = latest.paths.get(after.series) if latest else None
    before = _newest_of(root, after.series, named or after.path)
    there = None if named == after.path else _receipts_of(root, named)
    here = step.store, step.summary.receipts

    def ranks_of(model: str = "") -> drift.Ranks | None:
        return None if there is None else drift.compare(drift.read_both(there, here, model))

    ranks = ranks_of()
    models = {
        name: ModelDrift(
            sources=sources,
            sources_before=before.record.models.get(name, {}) if before else {},
            ranks=ranks_of(name),
        )
        for name, sources in after.models.items()
    }
    moved = SeriesDrift(
        series=after.series,
        path=after.path,
        since=before.night if before else None,
        before=before.record.path if before else None,
        sources=after.sources,
        sources_before=before.record.sources if before else {},
        ranks_of=named if ranks else None,
        ranks=ranks,
        models=models,
    )
    return DriftReport(number, (moved,))


def latest_receipts(root: Store, latest: Latest) -> list[Receipt]:
    """The receipts of the generation that `latest` names; empty if somebody has removed it."""
    found = _receipts_of(root, latest.paths.get(MAIN))
    return [] if found is None else found[1]


def _receipts_of(root: Store, path: str | None) -> tuple[Store, list[Receipt]] | None:
    if path is None:
        return None
    try:
        store = root.below(path)
    except ObjectMissing:
        return None
    return store, current_manifest(store)


@dataclass(frozen=True, slots=True)
class _Past:
    """What an earlier nightly run recorded of a series."""

    night: int
    record: SeriesRecord


def _newest_of(root: Store, series: str, path: str) -> _Past | None:
    """The newest record of a generation; None if no nightly run has recorded it."""
    for number in numbers(root):
        for each in read_record(root, number).series:
            if (each.series, each.path) == (series, path):
                return _Past(number, each)
    return None
