"""Live progress: a bar on a terminal, plain lines elsewhere, JSON where logs are JSON."""

import logging
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from batch_scorer import logs
from batch_scorer.records import Receipt
from batch_scorer.reports.blocks import Line, Tone
from batch_scorer.reports.console import rendered, show
from batch_scorer.reports.pace import MarkedRow, Pace, Tally, started
from batch_scorer.reports.results import failed_shard
from batch_scorer.reports.views.runs import pace_parts, time_left
from batch_scorer.runs.remaining import Work
from batch_scorer.runs.run import Listener

log = logging.getLogger("batch_scorer")

_LINE_EVERY_S = 10.0
_MARKED_SHOWN = 20


def progress_listener(console: Console) -> AbstractContextManager[Listener]:
    """A run's progress on the console; where logs are JSON, a line in the log for each shard."""
    return nullcontext(ProgressLog()) if logs.is_json() else ProgressView(console)


class _Bar(Progress):
    """A bar with the time left beside it, and below it all else that is known of the pace.

    The time left has a place of its own, so that a narrow terminal breaks the rest and not it.
    """

    def __init__(self, console: Console, tokens: int) -> None:
        self._below = Line("starting workers")
        super().__init__(
            TextColumn("scoring"),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            expand=True,
        )
        self._task: TaskID = self.add_task("", total=max(1, tokens))

    def move(self, pace: Pace, tokens: int) -> None:
        self._below = Line(" · ".join(pace_parts(pace)))
        self.update(self._task, completed=tokens, description=time_left(pace))

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield rendered(self._below)


class ProgressView:
    """A run on a console: its plan, its pace (`Pace`), and its failed shards and marked rows."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: _Bar | None = None
        self._tally: Tally | None = None
        self._line_at = 0.0
        self._shown = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def planned(self, work: Work) -> None:
        start = started(work)
        show(self._console, start)
        self._tally = Tally(start)
        self._line_at = time.monotonic()
        if not start.todo_shards:
            return
        if self._console.is_terminal:
            self._bar = _Bar(self._console, start.todo_tokens)
            self._bar.start()
        else:
            show(self._console, Line("starting workers"))

    def finished(self, receipt: Receipt) -> None:
        assert self._tally is not None, "planned comes first"
        self._tally.add(receipt)
        if receipt.commit is None:
            show(self._console, failed_shard(receipt))
        else:
            self._show_marked(receipt)
        pace = self._tally.pace
        if self._bar is not None:
            self._bar.move(pace, self._tally.estimated_tokens)
        elif time.monotonic() - self._line_at >= _LINE_EVERY_S or pace.is_over:
            self._line_at = time.monotonic()
            show(self._console, pace)

    def _show_marked(self, receipt: Receipt) -> None:
        for row, reason, detail in receipt.examples:
            self._shown += 1
            if self._shown <= _MARKED_SHOWN:
                show(self._console, MarkedRow(receipt.input, row, reason, detail))
            elif self._shown == _MARKED_SHOWN + 1:
                text = "more rows; the score_error column names them all"
                show(self._console, Line(text, "marked", Tone.WARNING))


class ProgressLog:
    """The plan, then every shard as it ends, each in a line of the log."""

    def planned(self, work: Work) -> None:
        start = started(work)
        with logs.fields(
            files=start.files,
            shards=start.todo_shards,
            shards_done=start.shards_done,
            rows=start.todo_rows,
            rows_not_asked=start.rows_not_asked,
            estimated_tokens=start.todo_tokens,
        ):
            log.info("planned")
        for receipt in work.failed:
            _log_failed(receipt)
        for receipt in work.gone:
            with logs.fields(shard=receipt.output_key):
                log.warning("its input is gone")

    def finished(self, receipt: Receipt) -> None:
        if receipt.commit is None:
            _log_failed(receipt)
            return
        with _of_shard(receipt):
            with logs.fields(
                rows_scored=receipt.commit.rows_scored,
                rows_marked=receipt.commit.rows_marked,
                tokens=receipt.commit.tokens,
                score_s=round(receipt.spent.score_s, 3),
            ):
                log.info("committed")
            for row, reason, detail in receipt.examples:
                with logs.fields(row=row, reason=reason):
                    log.warning("marked: %s", detail)


def _of_shard(receipt: Receipt) -> AbstractContextManager[None]:
    attempt = receipt.spent.retries + 1
    return logs.fields(shard=receipt.output_key, attempt=attempt, rows=receipt.num_rows)


def _log_failed(receipt: Receipt) -> None:
    with _of_shard(receipt), logs.fields(reason=str(receipt.reason)):
        log.warning("failed: %s: %s", receipt.input, receipt.detail)
