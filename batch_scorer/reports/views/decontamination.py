"""What `decontaminate` found, as people read it."""

from collections.abc import Iterator

from batch_scorer.decontamination.result import Decontaminated
from batch_scorer.reports.blocks import Block, Line, Table, Tone


def decontaminated_view(found: Decontaminated) -> Iterator[Block]:
    yield Table(
        title="Rows by source",
        columns=("source", "rows", "removed"),
        rows=[
            (name, f"{counts.rows:,}", f"{counts.removed:,}")
            for name, counts in found.sources.items()
        ],
        total=("all", f"{found.rows:,}", f"{found.removed:,}"),
    )
    if found.entries:
        yield Line(f"{found.entries:,} different entries were looked for")
    if found.entries_without_text:
        yield Line(
            f"{found.entries_without_text:,} entries left nothing to look for", "note", Tone.WARNING
        )
    if found.rows_without_text:
        yield Line(f"{found.rows_without_text:,} rows without text are kept", "note", Tone.WARNING)
    if found.totals is None:
        yield Line("dry run: nothing was written")
    else:
        yield Line(f"{found.totals.rows_written:,} rows are in {found.output}")
