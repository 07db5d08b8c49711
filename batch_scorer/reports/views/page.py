"""View of a page that was written: where it is, and the counts at its top."""

from collections.abc import Iterator

from batch_scorer.reports.blocks import Block, Line
from batch_scorer.reports.page.page import PageReport


def page_view(report: PageReport) -> Iterator[Block]:
    totals = report.page.totals
    yield Line(
        f"{totals['rows']:,} rows: {totals['rows_scored']:,} scored, {totals['rows_marked']:,} "
        f"marked, {totals['rows_not_asked']:,} not asked for"
    )
    yield Line(f"The page is {report.file}")
