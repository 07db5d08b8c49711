"""What a report consists of when people read it: lines and tables of plain text.

The text is shown as it is. It may come from anywhere (file names, sources, models, error details),
and means nothing to a terminal or a browser: only whoever shows a block adds colour.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


class Tone(StrEnum):
    """What a line's label means to its reader."""

    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"
    QUIET = "quiet"


@dataclass(frozen=True, slots=True)
class Line:
    """A line, never broken; `label`, in its `tone`, stands before the text."""

    text: str
    label: str = ""
    tone: Tone = Tone.QUIET


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the columns at the places `words` hold text, all others figures.

    Without `columns` there is no head, and the first column names what the row shows. `total` is a
    last row, set apart; `note` stands below.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Collection[int] = (0,)
    total: Sequence[str] = ()
    note: str = ""


Block: TypeAlias = Line | Table
