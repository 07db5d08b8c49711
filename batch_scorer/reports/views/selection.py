"""What `select` kept, and why it did not keep the rest."""

from collections.abc import Iterator, Mapping, Sequence

from batch_scorer.derived.output import Totals
from batch_scorer.derived.state import DerivedStatus, DerivedVerdict
from batch_scorer.errors import ExitCode
from batch_scorer.reports.blocks import Block, Line, Table, Tone
from batch_scorer.selection.recipe import Reason
from batch_scorer.selection.select import Selected

_WHY: Mapping[str, str] = {
    Reason.MARKED: "without a value (marked)",
    Reason.WHERE: "where is not true",
    Reason.MARGIN: "margin too small",
    Reason.QUANTILE: "outside the quantiles",
    Reason.RANK: "rank too low",
    Reason.COLUMNS: "no form in these columns",
    Reason.NO_PAIR: "in no pair",
    Reason.SAMPLE: "not in the sample",
}


def selected_view(selected: Selected) -> Iterator[Block]:
    totals = selected.totals
    yield _counts("Selected", totals)
    written = f"{totals.rows_written:,} rows in {totals.shards:,} shards"
    if selected.output is None:
        yield Line(f"{written} would be written", "dry run", Tone.QUIET)
    else:
        yield Line(f"{written} are in {selected.output}", "done", Tone.GOOD)


def derived_status_view(status: DerivedStatus) -> Iterator[Block]:
    if status.totals is None:
        yield Line(
            f"{status.output}: {status.kind} of {', '.join(status.places)}; {status.shards:,} "
            "shards are there, run the same command again for the others",
            "interrupted",
            Tone.WARNING,
        )
        return
    yield _counts(status.kind.capitalize(), status.totals)
    yield Line(f"{status.totals.rows_written:,} rows in {status.shards:,} shards", "complete")
    yield Line(f"made of {', '.join(status.places)}")
    for name, value in status.recipe.items():
        yield Line(f"{name}: {value}")


def derived_verdict_view(verdict: DerivedVerdict) -> Iterator[Block]:
    for problem in verdict.problems:
        yield Line(problem, "wrong", Tone.BAD)
    for each in verdict.unfinished:
        yield Line(each, "unfinished", Tone.WARNING)
    again = "what it was made of has changed, so it was not made again"
    if verdict.remade is not None:
        again = f"{verdict.remade:,} shards made again"
    yield Line(
        f"{verdict.output}: {verdict.shards:,} shards, {verdict.rows_written:,} rows; {again}"
    )
    if verdict.exit_code == ExitCode.DONE:
        yield Line("", "verified", Tone.GOOD)


def _counts(title: str, totals: Totals) -> Table:
    reasons: Sequence[str] = [*Reason, *sorted(totals.dropped.keys() - set(Reason))]
    dropped = [
        (f"- {_WHY.get(reason, reason)}", f"{totals.dropped[reason]:,}")
        for reason in reasons
        if reason in totals.dropped
    ]
    rows = [("rows", f"{totals.rows:,}"), *dropped]
    return Table(title, (), rows, total=("kept", f"{totals.rows_kept:,}"))
