"""View of what `normalize` did."""

from collections.abc import Iterator

from batch_scorer.normalization.result import Normalized
from batch_scorer.reports.blocks import Block, Line, Table, Tone


def normalized_view(done: Normalized) -> Iterator[Block]:
    yield Table(
        "Normalised",
        ("prefix", "scores", "normalised", "groups", "without a spread"),
        [
            (
                prefix or "(none)",
                *(f"{number:,}" for number in (c.scores, c.normalized, c.groups)),
                f"{c.groups_without_spread:,}",
            )
            for prefix, c in done.families.items()
        ],
    )
    totals = done.totals
    yield Line(
        f"{totals.rows_written:,} rows in {totals.shards:,} shards are in {done.output}",
        "done",
        Tone.GOOD,
    )
