"""Reports on a terminal. Text becomes `rich.text.Text` here and nowhere else, so that rich never
reads a `[` in it as markup, whatever a report shows."""

from collections.abc import Mapping

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from batch_scorer.reports.blocks import Line, Table, Tone
from batch_scorer.reports.views import Report, blocks_of

_STYLES: Mapping[Tone, str] = {
    Tone.GOOD: "green",
    Tone.WARNING: "yellow",
    Tone.BAD: "red",
    Tone.QUIET: "dim",
}
_GAP = 2
_LEAST_WORDS = 16
"""Characters that a column of text keeps where the terminal is narrow."""


def show(console: Console, report: Report | Line) -> None:
    """Print a report, or a single line."""
    blocks = [report] if isinstance(report, Line) else blocks_of(report)
    for block in blocks:
        # Lines are not broken, so that paths in them can be copied.
        if isinstance(block, Line):
            console.print(rendered(block), soft_wrap=True)
        else:
            console.print(_table(block, console.width))


def rendered(line: Line) -> Text:
    """A line as rich prints it."""
    gap = " " if line.label and line.text else ""
    return Text.assemble(_literal(line.label, _STYLES[line.tone]), gap, _literal(line.text))


def _table(table: Table, width: int) -> RichTable:
    shown = RichTable(
        title=_literal(table.title, "table.title") if table.title else None,
        caption=_literal(table.note, "table.caption") if table.note else None,
        show_header=bool(table.columns),
        title_justify="left",
        # Columns without lines between them: seven of them fit 80 characters.
        box=HORIZONTALS,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    names = table.columns or [""] * len(table.rows[0])
    rows = (names, *table.rows, table.total) if table.total else (names, *table.rows)
    columns = list(zip(*rows, strict=True))
    is_tight = sum(max(map(len, cells)) + _GAP for cells in columns) > width
    for place, cells in enumerate(columns):
        is_words = place in table.words
        longest_word = max(len(word) for cell in cells for word in cell.split() or [""])
        shown.add_column(
            _literal(names[place]),
            justify="left" if is_words else "right",
            style="" if table.columns or place else "dim",
            overflow="fold",
            # Of a narrow terminal figures take what they need, broken between words.
            width=longest_word if is_tight and table.columns and not is_words else None,
            min_width=min(max(map(len, cells)), _LEAST_WORDS) if is_words else None,
        )
    for row in table.rows:
        shown.add_row(*map(_literal, row))
    if table.total:
        shown.add_section()
        shown.add_row(*map(_literal, table.total))
    return shown


def _literal(text: str, style: str = "") -> Text:
    # An escape character in a file name would command the terminal.
    return Text(text.replace("\x1b", "\N{SYMBOL FOR ESCAPE}"), style)
