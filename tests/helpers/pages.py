"""Pages of small outputs; and their tables, as a reader of the HTML sees them."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from batch_scorer import Config, score
from batch_scorer.reports.page.page import ScoredPage, read_page
from tests.helpers.places import Place


def page_of(
    tmp_path: Path, model: Path, files: dict[str, bytes], **settings: Any
) -> tuple[ScoredPage, Place]:
    """The page of these files' output, and the output, scored without the model."""
    place = Place(str(tmp_path))
    (place / "in").write(files)
    output = place / "out"
    score(
        Config(
            model=str(model),
            inputs=((place / "in").url,),
            output=output.url,
            backend="fake",
            use_ray=False,
            **settings,
        )
    )
    return read_page(output.url, {}), output


class _Tables(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self._figure: str | None = None
        self._cell: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "figure":
            self._figure = str(dict(attrs)["id"])
            self.tables[self._figure] = []
        elif tag == "tr" and self._figure:
            self.tables[self._figure].append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self._figure = None
        elif tag in ("td", "th"):
            if self._figure:
                self.tables[self._figure][-1].append(self._cell or "")
            self._cell = None


def tables_of(html: str) -> dict[str, list[list[str]]]:
    """The rows of each figure's table by the figure's name; the first row is the head."""
    reader = _Tables()
    reader.feed(html)
    return reader.tables


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def numbers(table: list[list[str]], column: str) -> list[float]:
    """The values under that head."""
    place = table[0].index(column)
    return [number(row[place]) for row in table[1:]]
