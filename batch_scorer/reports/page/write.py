"""A page becomes a file, or an object beside `_SUCCESS`."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_scorer.config import expanded
from batch_scorer.errors import ConfigError, OutputError, cause_of
from batch_scorer.outputs.manifest import REPORT_KEY
from batch_scorer.outputs.puts import put
from batch_scorer.reports.page.compare import ComparedPage, read_comparison
from batch_scorer.reports.page.page import ScoredPage, read_page
from batch_scorer.storage import open_store

log = logging.getLogger("batch_scorer")


@dataclass(frozen=True, slots=True)
class PageReport:
    """That a page was written, and what is on it."""

    file: str
    size_bytes: int
    page: ScoredPage | ComparedPage

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file, "bytes": self.size_bytes, **self.page.to_json()}


def write_page(
    output: str, file: Path, store_options: Mapping[str, str], compare: str | None = None
) -> PageReport:
    """Write the page of a scored output, or of a nightly root, into a file on this machine, in a
    folder made if need be; with `compare` the page that compares it with this other output.

    Raises ConfigError for a file in an output, OutputError for one that cannot be written, and as
    `read_page` and `read_comparison`.
    """
    for place in (output, *((compare,) if compare else ())):
        if "://" not in place and file.resolve().is_relative_to(Path(place).resolve()):
            raise ConfigError("--html: a file in the output would be taken for a shard")
    page: ScoredPage | ComparedPage
    if compare is None:
        page = read_page(output, store_options)
    else:
        page = read_comparison(output, compare, store_options)
    data = page.to_html().encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    except OSError as error:
        raise OutputError(f"{file}: the page cannot be written: {cause_of(error)}") from error
    return PageReport(str(file), len(data), page)


def write_beside(output: str, store_options: Mapping[str, str]) -> str | None:
    """Put the page of a scored output, or of a nightly root, into it, as `REPORT_KEY`; its URL.

    None where it cannot be made or stored: then the log has a warning with the cause.
    """
    try:
        page = read_page(output, store_options)
        store = open_store(expanded(output), store_options)
        put(store, REPORT_KEY, page.to_html().encode())
    except Exception as error:  # the scores are committed: whatever the page lacks costs no run
        log.warning("report: %s: the page is not written: %s", output, error)
        return None
    return store.url(REPORT_KEY)
