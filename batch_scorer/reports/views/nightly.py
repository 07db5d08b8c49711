"""Views of nightly runs: what one would do, what it did, how it moved the scores."""

from collections.abc import Iterator
from dataclasses import asdict

from batch_scorer.nightly.drift import Ranks
from batch_scorer.nightly.record import (
    DriftReport,
    ModelDrift,
    NightlyRecord,
    SeriesDrift,
    Shift,
    SourceDrift,
)
from batch_scorer.nightly.status import NightlyStatus
from batch_scorer.reports.blocks import Block, Line, Table, Tone
from batch_scorer.reports.results import NightlyPlan, NightlyReport
from batch_scorer.reports.views.runs import heartbeat, status_view

_SOURCES_SHOWN = 20
_MOVERS_SHOWN = 5


def nightly_plan_view(plan: NightlyPlan) -> Iterator[Block]:
    each = plan.prospect
    yield Line(f"{each.model}: {each.path or 'a new generation'}")
    yield Line(
        f"  {each.files:,} files, {each.files_aside:,} of other days, "
        f"{each.files_failed:,} that cannot be scored"
    )
    for text, shards, rows in (
        ("committed", each.shards_committed, each.rows_committed),
        ("to do", each.shards_to_do, each.rows_to_do),
        ("left", each.shards_left, each.rows_left),
    ):
        yield Line(f"  {text}: {shards:,} shards, {rows:,} rows")
    if each.rows_not_asked:
        yield Line(f"  not asked for: {each.rows_not_asked:,} rows")


def nightly_view(report: NightlyReport) -> Iterator[Block]:
    if report.held_by is not None:
        yield Line(f"Nothing done: another nightly run holds this output. {report.held_by}")
    elif report.record is None or report.drift is None:
        yield Line(f"{report.root}: nothing to do")
    else:
        yield from nightly_record_view(report.record)
        yield from drift_view(report.drift)


def nightly_record_view(record: NightlyRecord) -> Iterator[Block]:
    counts = [asdict(each.rows) for each in record.series]
    names = ("total", "new", "reused", "kept", "gone", "marked", "not_asked", "failed", "left")
    yield Table(
        f"Nightly run {record.night}",
        ("rows", *(each.path for each in record.series)),
        [(name.replace("_", " "), *(f"{rows[name]:,}" for rows in counts)) for name in names],
    )
    if record.latest:
        path = list(record.latest.values())[-1]
        since = ", since this run" if record.has_moved else ""
        yield Line(f"latest.json points to {path}{since}")
    for reason in record.lacking or ():
        yield Line(reason, "not yet:", Tone.WARNING)


def nightly_status_view(status: NightlyStatus) -> Iterator[Block]:
    running = "a nightly run is running" if status.holder else "no nightly run is running"
    yield Line(f"{status.root}: {running}{heartbeat(status.holder, status.renewed_s)}")
    for series, path in (status.latest or {}).items():
        yield Line(f"latest.json points to {path} ({series})")
    if status.latest is None:
        yield Line("latest.json does not exist yet: no generation is complete")
    for path, generation in status.generations.items():
        if generation is None:
            yield Line(f"{path}: nothing is scored yet")
        else:
            yield from status_view(generation)
    if status.night is not None:
        yield from nightly_record_view(status.night)


def drift_view(report: DriftReport) -> Iterator[Block]:
    for each in report.series:
        then = "nothing before"
        if each.since is not None:
            then = f"run {each.since}, {each.before}"
        yield Line(f"{each.path}: nightly run {report.night} against {then}")
        yield from _moved(each)
        if each.ranks is not None:
            yield from _ranks(each.ranks, each.ranks_of or "")
        for name, own in each.models.items():
            yield from _moved(own, f"Scores of {name}")
            if own.ranks is not None and own.ranks.scores:
                yield from _ranks(own.ranks, f"{name} of {each.ranks_of}")


def _moved(moved: SeriesDrift | ModelDrift, of_model: str | None = None) -> Iterator[Table]:
    """Rows and scores by source, in two tables, so that they fit a terminal; of one of several
    models the scores."""
    found, everything = moved.by_source(), moved.all_sources()
    shown = found[:_SOURCES_SHOWN]
    more = len(found) - len(shown)
    scores = (of_model or "Scores", tuple(everything.shifts), _shift_cells)
    rows = ("Rows", ("rows", "new", "reused", "kept", "gone"), _row_cells)
    for title, columns, cells_of in (rows, scores) if of_model is None else (scores,):
        yield Table(
            title,
            ("source", *columns),
            [(each.name, *cells_of(each)) for each in shown],
            total=(everything.name, *cells_of(everything)) if len(found) > 1 else (),
            note=f"and {more} more sources" if more else "",
        )


def _row_cells(source: SourceDrift) -> list[str]:
    now = source.now
    return [f"{number:,}" for number in (now.rows, now.new, now.reused, now.kept, now.gone)]


def _shift_cells(source: SourceDrift) -> list[str]:
    return [_shifted(shift) for shift in source.shifts.values()]


def _shifted(shift: Shift) -> str:
    if shift.now is None:
        return ""
    return f"{shift.now:.3f}" if shift.change is None else f"{shift.now:.3f} ({shift.change:+.3f})"


def _ranks(ranks: Ranks, other: str) -> Iterator[Line]:
    order = "n/a" if ranks.spearman is None else f"{ranks.spearman:.3f}"
    yield Line(
        f"against {other}: rank correlation {order} over {ranks.scores:,} scores of "
        f"{ranks.rows:,} rows; of {ranks.pairs:,} pairs {ranks.won:,} now prefer the chosen answer "
        f"and {ranks.lost:,} no longer do"
    )
    for mover in ranks.movers[:_MOVERS_SHOWN]:
        yield Line(
            f"  {mover.input} row {mover.row}, sequence {mover.place + 1}: "
            f"{mover.before:.3f} → {mover.after:.3f}, above {mover.below_before:.0%} → "
            f"{mover.below_after:.0%} of the scores"
        )
