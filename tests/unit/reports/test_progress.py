"""A run's progress: readable on a narrow console, and whatever its files are called."""

import io
import re
from dataclasses import replace

import pyarrow as pa
import pytest
from rich.console import Console
from rich.text import Text

from batch_scorer.inputs.plan import Plan
from batch_scorer.inputs.tables import FileTable, InputFile, cut
from batch_scorer.reports.pace import Tally, started
from batch_scorer.reports.progress import ProgressView
from batch_scorer.runs.remaining import Work
from tests.helpers.receipts import DONE, FAILED, ONE, SHARD

LONG = replace(
    ONE,
    num_rows=1_234_567,
    estimated_tokens=1,
    spent=replace(ONE.spent, started_at=0.0, committed_at=4_000.0),
)
"""One of ten estimated tokens after 4,000 seconds: ten hours are left."""


def work_of(*names: str, tokens: int = 1) -> Work:
    """A shard to do for each name."""
    schema = pa.schema({"chosen": pa.string(), "rejected": pa.string()})
    sources = [replace(SHARD.source, key=name) for name in names]
    files = FileTable.of(
        [InputFile(source, schema, SHARD.layout, ((10, tokens),)) for source in sources]
    )
    shards = cut(files, shard_rows=10, shard_tokens=tokens)
    failed = [replace(FAILED, input=name) for name in names]
    gone = [replace(DONE, output_key=name) for name in names]
    return Work(Plan(files, shards, failed), todo=shards, done=[], gone=gone, failed=failed)


def screen(width: int, *, is_terminal: bool = True) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(width=width, file=file, force_terminal=is_terminal), file


def text_of(file: io.StringIO) -> str:
    return Text.from_ansi(re.sub(r"\x1b\[\d*[AKJ]|\x1b\[\?25[lh]|\r", "", file.getvalue())).plain


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_time_left_fits_the_terminal_and_so_does_all_else(width: int) -> None:
    """In 80 columns the time left was cut off."""
    console, file = screen(width)
    names = [f"{number}.parquet" for number in range(10)]
    with ProgressView(console) as view:
        view.planned(replace(work_of(*names), gone=[]))
        view.finished(replace(LONG, num_rows=1_234_567))
        view.finished(replace(FAILED, estimated_tokens=0))
    shown = text_of(file)
    last = shown[shown.rindex("scoring") :]
    assert all(len(line) <= width for line in last.splitlines())
    first, *below = last.splitlines()
    assert first.rstrip().endswith("10:00:00 left")
    joined = " ".join(" ".join(below).split())
    for part in ("2/10 shards", "1,234,571 rows", "0 tokens/s", "60% computed", "1 marked"):
        assert part in joined
    assert "1 failed" in joined
    assert "…" not in last


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("name", ["[/INST]", "[math]", "[bold]x[/bold]", "a[/]b", ":warning:"])
def test_names_of_files_appear_as_they_are(name: str, is_terminal: bool) -> None:
    console, file = screen(80, is_terminal=is_terminal)
    with ProgressView(console) as view:
        view.planned(work_of(name))
        marked = [(3, "too_long", name)]
        view.finished(replace(ONE, input=name, estimated_tokens=1, examples=marked))
    shown = text_of(file)
    for line in (
        f"  {name}: ",
        f"failed {name}: unreadable_file: torn",
        f"its input is gone {name}",
        f"marked {name} row 3: too_long: {name}",
    ):
        assert line in shown
    assert "1/1 shards" in shown and "done" in shown


def test_a_failed_file_is_one_line_however_long_its_name() -> None:
    name = "long/" * 40 + "a.parquet"
    console, file = screen(80, is_terminal=False)
    with ProgressView(console) as view:
        view.planned(work_of())
        view.finished(replace(FAILED, input=name))
    assert f"failed {name}: unreadable_file: torn\n" in file.getvalue()


def test_the_pace_counts_what_has_ended() -> None:
    tally = Tally(started(work_of("a", "b", "c", tokens=400)))
    assert (tally.pace.shards, tally.pace.left_s, tally.pace.is_over) == (0, None, False)
    tally.add(ONE)  # 800 of 1,200 estimated tokens in 4 seconds
    tally.add(replace(FAILED, estimated_tokens=200))
    pace = tally.pace
    assert (pace.shards, pace.todo_shards, pace.rows) == (2, 3, 14)
    assert (pace.rows_marked, pace.shards_failed) == (1, 1)
    assert pace.left_s == pytest.approx(0.8)
    tally.add(ONE)
    assert tally.pace.is_over
