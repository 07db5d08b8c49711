"""Reports on a terminal. Text becomes `rich.text.Text` here and nowhere else, so that rich never
reads a `[` in it as markup, whatever a report shows."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from batch_scorer.reports.blocks import Block, Line, Table, Tone
from batch_scorer.reports.views import Report, blocks_of

_STYLES: Mapping[Tone, str] = {
    Tone.GOOD: "green",
    Tone.WARNING: "yellow",
    Tone.BAD: "red",
    Tone.QUIET: "dim",
}
_WORD_WIDTH = 16
"""A column of text keeps so many characters where the terminal is narrow; figures give way."""


def show(console: Console, report: Report | Line) -> None:
    """Print a report, or a single line."""
    blocks = [report] if isinstance(report, Line) else blocks_of(report)
    for block in blocks:
        # Lines are not broken, so that paths in them can be copied.
        console.print(rendered(block), soft_wrap=isinstance(block, Line))


def rendered(block: Block) -> Text | RichTable:
    """A block as rich prints it."""
    return _line(block) if isinstance(block, Line) else _table(block)


def _line(line: Line) -> Text:
    gap = " " if line.label and line.text else ""
    return Text.assemble(_literal(line.label, _STYLES[line.tone]), gap, _literal(line.text))


def _table(table: Table) -> RichTable:
    shown = RichTable(
        title=_literal(table.title, "table.title") if table.title else None,
        caption=_literal(table.note, "table.caption") if table.note else None,
        show_header=bool(table.columns),
        title_justify="left",
    )
    names = table.columns or [""] * len(table.rows[0])
    for place, name in enumerate(names):
        cells = [row[place] for row in (*table.rows, table.total) if place < len(row)]
        longest = max((len(cell) for cell in (name, *cells)), default=0)
        is_words = place in table.words
        shown.add_column(
            _literal(name),
            justify="left" if is_words else "right",
            style="" if table.columns or place else "dim",
            overflow="fold",
            min_width=min(longest, _WORD_WIDTH) if is_words else None,
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
