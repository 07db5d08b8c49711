"""What `select` kept, and why it did not keep the rest."""

from collections.abc import Iterator, Mapping

from batch_scorer.derived.output import Counts
from batch_scorer.derived.state import DerivedStatus, DerivedVerdict
from batch_scorer.errors import ExitCode
from batch_scorer.reports.blocks import Block, Line, Table, Tone
from batch_scorer.selection.recipe import NoPair, Reason
from batch_scorer.selection.result import Selected

_WHY: Mapping[str, str] = {
    Reason.MARKED: "without a value (marked)",
    Reason.WHERE: "where is not true",
    Reason.MARGIN: "margin too small",
    Reason.SAME_TEXT: "both texts are the same",
    Reason.COLUMNS: "no form in these columns",
    Reason.QUANTILE: "outside the quantiles",
    Reason.RANK: "rank too low",
    Reason.NO_PAIR: "in no pair",
    Reason.SAMPLE: "not in the sample",
}
_NO_PAIR: Mapping[str, str] = {
    NoPair.ONE_RESPONSE: "fewer than two different responses",
    NoPair.EQUAL: "all values are equal",
    NoPair.MARGIN: "margin too small",
    NoPair.TOO_LONG: "pairs too long",
    NoPair.SAMPLE: "pairs not in the sample",
}


def selected_view(selected: Selected) -> Iterator[Block]:
    totals = selected.totals
    yield from _counts("Selected", totals.counts)
    written = f"{totals.rows_written:,} rows in {totals.shards:,} shards"
    if selected.output is None:
        yield Line(f"{written} would be written", "dry run", Tone.QUIET)
    else:
        yield Line(f"{written} are in {selected.output}", "done", Tone.GOOD)


def derived_status_view(status: DerivedStatus) -> Iterator[Block]:
    if status.totals is None:
        left = "how many are left is not known yet"
        if status.shards_planned is not None:
            left = f"{status.shards_left:,} of {status.shards_planned:,} are left"
        yield Line(
            f"{status.output}: {status.kind} of {', '.join(status.places)}; {status.shards:,} "
            f"shards are committed, {left}; run the same command again for the others",
            "not complete",
            Tone.WARNING,
        )
        return
    yield from _counts(status.kind.capitalize(), status.totals.counts)
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
    if verdict.counts is not None:
        yield from _counts("Counted again", verdict.counts)
    if verdict.exit_code == ExitCode.DONE:
        yield Line("", "verified", Tone.GOOD)


def _counts(title: str, counts: Counts) -> Iterator[Table]:
    rows = [("rows", f"{counts.rows:,}"), *_reasons(counts.dropped, _WHY)]
    yield Table(title, (), rows, total=("kept", f"{counts.rows_kept:,}"))
    if counts.prompts is not None:
        without = counts.prompts_without_pair
        rows = [("prompts", f"{counts.prompts:,}"), *_reasons(without, _NO_PAIR)]
        left = counts.prompts - sum(without.values())
        yield Table("Pairs of prompts", (), rows, total=("with a pair", f"{left:,}"))


def _reasons(counts: Mapping[str, int], names: Mapping[str, str]) -> list[tuple[str, str]]:
    """A line for each reason, in the order of the steps."""
    reasons = [*names, *sorted(counts.keys() - names)]
    return [(f"- {names.get(r, r)}", f"{counts[r]:,}") for r in reasons if r in counts]
