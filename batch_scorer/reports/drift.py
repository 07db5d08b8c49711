"""The drift report of a night, printed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from batch_scorer.nightly.drift import Figures, together
from batch_scorer.outputs.by_source import LEVELS

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
_SOURCES_SHOWN = 20


# Showing it


def print_drift(console: Console, report: Mapping[str, Any]) -> None:
    """The report of a night, as `nightly` keeps it (docs/nightly.md)."""
    for line in report["lines"]:
        before = f"night {line['since']}, {line['before']}" if line["since"] else "nothing before"
        console.print(
            f"{line['path']}: night {report['night']} against {before}",
            highlight=False,
            soft_wrap=True,
        )
        console.print(_table(line))
        if line["ranks"] is not None:
            _print_ranks(console, line["ranks"], line["ranks_of"])


def _table(line: Mapping[str, Any]) -> Table:
    table = Table()
    table.add_column("source")
    for name in ("rows", "new", "reused", "gone", "mean", "std", "5 %", "50 %", "95 %", "accuracy"):
        table.add_column(name, justify="right")
    sources = {name: Figures.from_json(value) for name, value in line["sources"].items()}
    earlier = {name: Figures.from_json(value) for name, value in line["sources_before"].items()}
    largest = sorted(sources, key=lambda name: (-sources[name].rows, name))
    for name in largest[:_SOURCES_SHOWN]:
        table.add_row(name, *_cells(sources[name], earlier.get(name, Figures())))
    if more := len(sources) - _SOURCES_SHOWN:
        table.caption = f"and {more} more sources" if more > 0 else None
    if len(sources) > 1:
        table.add_section()
        table.add_row("all", *_cells(together(sources), together(earlier)))
    return table


def _cells(after: Figures, before: Figures) -> list[str]:
    cells = [f"{number:,}" for number in (after.rows, after.new, after.reused, after.gone)]
    values = [(after.mean, before.mean), (after.std, before.std)]
    for level in (0.05, 0.5, 0.95):
        place = LEVELS.index(level)
        pair = [f.quantiles[place] if f.quantiles else None for f in (after, before)]
        values.append((pair[0], pair[1]))
    cells += [_shifted(now, then) for now, then in values]
    return [*cells, _shifted(after.accuracy, before.accuracy)]


def _shifted(now: float | None, then: float | None) -> str:
    if now is None:
        return ""
    return f"{now:.3f}" if then is None else f"{now:.3f} ({now - then:+.3f})"


def _print_ranks(console: Console, found: Mapping[str, Any], other: str) -> None:
    order = "n/a" if found["spearman"] is None else f"{found['spearman']:.3f}"
    console.print(
        f"against {other}: rank correlation {order} over {found['scores']:,} scores of "
        f"{found['rows']:,} rows; of {found['pairs']:,} pairs {found['won']:,} now prefer the "
        f"chosen answer and {found['lost']:,} no longer do",
        highlight=False,
        soft_wrap=True,
    )
    for mover in found["movers"][:5]:
        console.print(
            f"  {mover['input']} row {mover['row']}, sequence {mover['place'] + 1}: "
            f"{mover['before']:.3f} → {mover['after']:.3f}, above {mover['below_before']:.0%} → "
            f"{mover['below_after']:.0%} of the scores",
            highlight=False,
            soft_wrap=True,
        )
