"""View of a page that was written: where it is, and the counts at its top."""

from collections.abc import Iterator

from batch_scorer.reports.blocks import Block, Line
from batch_scorer.reports.page.page import ScoredPage
from batch_scorer.reports.page.write import PageReport


def page_view(report: PageReport) -> Iterator[Block]:
    page = report.page
    if isinstance(page, ScoredPage):
        totals = page.totals
        yield Line(
            f"{totals['rows']:,} rows: {totals['rows_scored']:,} scored, "
            f"{totals['rows_marked']:,} marked, {totals['rows_not_asked']:,} not asked for"
        )
    else:
        yield Line(", ".join(f"{number:,} {name}" for name, number in page.counts.items()))
    yield Line(f"The page is {report.file}")
