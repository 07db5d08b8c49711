"""Live progress: bars on a terminal, plain lines elsewhere, JSON where logs are JSON."""

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from batch_scorer import formats, logs
from batch_scorer.records import Receipt
from batch_scorer.reports.figures import duration
from batch_scorer.runs.metrics import Metrics
from batch_scorer.runs.remaining import Work
from batch_scorer.runs.run import Listener

log = logging.getLogger("batch_scorer")

_LINE_EVERY_S = 10.0
_LAYOUTS_SHOWN = 8
_MARKED_SHOWN = 20


def progress_listener(console: Console) -> AbstractContextManager[Listener]:
    """Who tells of a run: on the console, or where logs are JSON in a line for each shard."""
    return nullcontext(ProgressLog()) if logs.is_json() else ProgressView(console)


class ProgressView:
    """Shards, rows, speed, time left and marked rows of one run; figures as in `Metrics`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._line_at = 0.0
        self._metrics = Metrics()
        self._shards = self._rows = self._marked = self._failed = self._shown = 0
        self._total_shards = self._estimated_tokens = 0

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
        for line in _plan_lines(work):
            self._console.print(line, highlight=False, soft_wrap=True)
        self._total_shards = len(work.todo)
        self._estimated_tokens = sum(shard.estimated_tokens for shard in work.todo)
        self._line_at = time.monotonic()
        if work.todo and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("scoring"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "starting workers", total=max(1, self._estimated_tokens)
            )
            self._bar.start()
        elif work.todo:
            self._console.print("starting workers")

    def finished(self, receipt: Receipt) -> None:
        self._shards += 1
        self._rows += receipt.num_rows
        self._metrics.add(receipt)
        if receipt.commit is None:
            self._failed += 1
            self._say(f"[red]failed[/] {receipt.input}: {receipt.reason}: {receipt.detail}")
        else:
            self._marked += receipt.commit.rows_marked
            self._show_marked(receipt)
        if self._bar is not None:
            done = self._metrics.estimated_tokens
            self._bar.update(self._task, completed=done, description=self._line())
        elif time.monotonic() - self._line_at >= _LINE_EVERY_S or self._is_last:
            self._line_at = time.monotonic()
            self._console.print(self._line(), highlight=False, soft_wrap=True)

    def _show_marked(self, receipt: Receipt) -> None:
        for row, reason, detail in receipt.examples:
            self._shown += 1
            if self._shown <= _MARKED_SHOWN:
                self._say(f"[yellow]marked[/] {receipt.input} row {row}: {reason}: {detail}")
            elif self._shown == _MARKED_SHOWN + 1:
                self._say("[yellow]marked[/] more rows; the score_error column names them all")

    @property
    def _is_last(self) -> bool:
        return self._shards == self._total_shards

    def _line(self) -> str:
        parts = [f"{self._shards}/{self._total_shards} shards", f"{self._rows:,} rows"]
        metrics = self._metrics
        if metrics.tokens_per_s is not None:
            parts.append(f"{metrics.tokens_per_s:,.0f} tokens/s")
        if metrics.computed_ratio is not None:
            parts.append(f"{metrics.computed_ratio:.0%} computed")
        if metrics.idle_share is not None:
            parts.append(f"{metrics.idle_share:.0%} idle")
        left_s = metrics.left_s(self._estimated_tokens)
        if self._is_last:
            parts.append("done")
        elif left_s is not None:
            parts.append(f"{duration(left_s)} left")
        if self._marked:
            parts.append(f"{self._marked:,} marked")
        if self._failed:
            parts.append(f"{self._failed:,} failed")
        return " · ".join(parts)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


class ProgressLog:
    """The plan, then every shard as it ends, each in a line of the log."""

    def planned(self, work: Work) -> None:
        with logs.fields(
            files=len(work.plan.files),
            shards=len(work.todo),
            shards_done=len(work.done),
            rows=sum(shard.num_rows for shard in work.todo),
            estimated_tokens=sum(shard.estimated_tokens for shard in work.todo),
        ):
            log.info("planned")
        for receipt in work.plan.failed:
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


def _plan_lines(work: Work) -> list[str]:
    files, shards = work.plan.files, work.plan.shards
    rows = f"{work.plan.num_rows:,} rows"
    lines = [f"{len(files)} files, {len(shards)} shards, {rows}; {len(work.done)} shards are done"]
    layouts: dict[str, list[str]] = {}
    for file in files:
        layouts.setdefault(formats.describe(file.layout, file.schema), []).append(file.source.key)
    for layout, keys in list(layouts.items())[:_LAYOUTS_SHOWN]:
        which = keys[0] if len(keys) == 1 else f"{len(keys)} files"
        lines.append(f"  {which}: {layout}")
    if len(layouts) > _LAYOUTS_SHOWN:
        lines.append(f"  … and {len(layouts) - _LAYOUTS_SHOWN} more kinds of rows")
    lines += [f"[red]failed[/] {r.input}: {r.reason}: {r.detail}" for r in work.plan.failed]
    lines += [f"[yellow]its input is gone[/] {receipt.output_key}" for receipt in work.gone]
    return lines
