"""A night in a few lines: what was new, and what readers have now."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_night(console: Console, record: Mapping[str, Any]) -> None:
    """The record of a night, as `nightly` keeps it (docs/nightly.md)."""
    table = Table(title=f"Night {record['night']}", title_justify="left")
    table.add_column("generation", overflow="fold")
    names = ("total", "new", "reused", "kept", "gone", "marked", "failed", "left")
    for name in names:
        table.add_column("rows" if name == "total" else name, justify="right")
    for line in record["lines"]:
        table.add_row(line["path"], *(f"{line['rows'][name]:,}" for name in names))
    console.print(table)
    if record["latest"]:
        path = list(record["latest"].values())[-1]
        moved = " from now on" if record["has_moved"] else ""
        console.print(f"readers have {path}{moved}", highlight=False, soft_wrap=True)
    for reason in record["lacking"] or ():
        console.print(f"[yellow]not yet:[/] {reason}", highlight=False, soft_wrap=True)


def print_prospects(console: Console, prospects: Sequence[Mapping[str, Any]]) -> None:
    """What a night would do, model by model."""
    for each in prospects:
        where = each["path"] or "a new generation"
        console.print(f"{each['model']}: {where}", highlight=False, soft_wrap=True)
        if each["follows"]:
            console.print("  the shards of the model above, once they are scored")
            continue
        console.print(
            f"  {each['files']:,} files, {each['files_aside']:,} of other days, "
            f"{each['files_failed']:,} that cannot be scored",
            highlight=False,
        )
        for name, text in (("committed", "committed"), ("to_do", "to do"), ("left", "left")):
            shards, rows = each[f"shards_{name}"], each[f"rows_{name}"]
            console.print(f"  {text}: {shards:,} shards, {rows:,} rows", highlight=False)
