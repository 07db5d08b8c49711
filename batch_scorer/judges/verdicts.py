"""To be replaced."""

from batch_scorer.judges.page import Page
from batch_scorer.records import Reply, RowError


def read_verdicts(reply: Reply, page: Page, count: int) -> list[float] | RowError:
    raise NotImplementedError
