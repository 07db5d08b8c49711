"""Functions that end, hang or fill the process they are called in, called apart."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pytest

from batch_scorer import quarantine
from batch_scorer.errors import ShardError, ShardReason
from batch_scorer.quarantine import Bounds, Died, TimedOut, apart
from tests.helpers.program import wait_until

BOUNDS = Bounds(seconds=300, memory_bytes=1 << 30)
GENEROUS_S = 60.0

log = logging.getLogger("batch_scorer")


# What is called apart


def add(a: int, b: int) -> int:
    return a + b


def process() -> int:
    return os.getpid()


def end_by_signal() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def end_with_words() -> NoReturn:
    os.write(2, b"a first line\nfree(): what native code says last\n\n")
    os._exit(7)


def hang() -> None:
    time.sleep(10 * GENEROUS_S)


def fill(num_bytes: int) -> int:
    return int(np.ones(num_bytes, np.uint8).sum())


def load_a_library() -> None:
    import duckdb  # the template has not loaded it

    assert duckdb


def fill_arrow(num_bytes: int) -> int:
    return pa.allocate_buffer(num_bytes).size


def fail() -> NoReturn:
    raise ShardError(ShardReason.WRONG_SCHEMA, "no such format")


def fail_oddly() -> NoReturn:
    class Odd(Exception):
        pass

    raise Odd("cannot be sent")


def warn(what: str) -> None:
    log.warning("%s is odd", what)
    log.debug("not wanted")


def variable(name: str) -> str | None:
    return os.environ.get(name)


def folder() -> str:
    return os.getcwd()


def call_apart(function: Callable[[], int]) -> tuple[int, int]:
    return os.getpid(), apart(BOUNDS, function)


def end_the_first_times(counter: Path, deaths: int) -> str:
    with counter.open("a") as file:
        file.write(".")
    if len(counter.read_text()) <= deaths:
        os._exit(1)
    return "passed"


def table(num_rows: int) -> pa.Table:
    return pa.table({"x": np.arange(num_rows), "text": ["é"] * num_rows})


def slowly(number: int) -> tuple[int, int]:
    time.sleep(0.01)
    return number, os.getpid()


# The tests


def test_a_function_is_called_in_another_process_and_gives_its_result() -> None:
    assert apart(BOUNDS, add, 2, b=3) == 5
    there = apart(BOUNDS, process)
    assert there != os.getpid()
    assert apart(BOUNDS, process) == there, "one process serves many calls"


def test_rows_come_back_as_they_were() -> None:
    assert apart(BOUNDS, table, 100_000).equals(table(100_000))
    assert apart(BOUNDS, table, 1).equals(table(1)), "after a larger answer"


def test_in_a_child_the_function_is_called_there() -> None:
    here, there = apart(BOUNDS, call_apart, process)
    assert here == there != os.getpid()


def test_a_death_by_a_signal_is_told_by_its_name() -> None:
    with pytest.raises(Died, match="was ended by SIGKILL"):
        apart(BOUNDS, end_by_signal)
    assert apart(BOUNDS, add, 1, 1) == 2


def test_an_exit_is_told_with_the_last_words() -> None:
    with pytest.raises(Died, match=r"exit code 7: free\(\): what native code says last$"):
        apart(BOUNDS, end_with_words)


def test_what_takes_too_long_is_ended() -> None:
    with pytest.raises(Died, match=r"takes longer than 0\.05 s"):
        apart(Bounds(0.05, BOUNDS.memory_bytes), hang)


@pytest.mark.skipif(sys.platform != "linux", reason="the bound on memory is the kernel's")
def test_memory_is_bounded_whatever_was_read_before() -> None:
    bounds = Bounds(GENEROUS_S, 100 << 20)
    assert apart(bounds, fill, 60 << 20) == 60 << 20
    with pytest.raises(MemoryError):
        apart(bounds, fill, 140 << 20)
    assert apart(bounds, fill, 60 << 20) == 60 << 20
    assert apart(BOUNDS, fill, 140 << 20) == 140 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="the bound on memory is the kernel's")
@pytest.mark.skipif(sys.platform != "linux", reason="the bound on memory is the kernel's")
def test_a_library_for_which_there_is_no_memory_is_one_too_much() -> None:
    with pytest.raises(MemoryError):
        apart(replace(BOUNDS, memory_bytes=4096), load_a_library)
    apart(BOUNDS, load_a_library)


def test_memory_of_arrow_counts_as_it_is_used() -> None:
    bounds = Bounds(GENEROUS_S, 100 << 20)
    assert apart(bounds, fill_arrow, 60 << 20) == 60 << 20
    with pytest.raises(MemoryError):
        apart(bounds, fill_arrow, 140 << 20)


def test_an_exception_comes_with_its_type() -> None:
    with pytest.raises(ShardError) as raised:
        apart(BOUNDS, fail)
    assert raised.value.reason is ShardReason.WRONG_SCHEMA


def test_an_exception_that_cannot_be_sent_comes_as_its_words() -> None:
    with pytest.raises(RuntimeError) as raised:
        apart(BOUNDS, fail_oddly)
    assert str(raised.value) == "Odd: cannot be sent"
    assert "in fail_oddly" in raised.value.__notes__[0]


def test_what_is_logged_there_is_logged_here(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=log.name):
        apart(BOUNDS, warn, "row 7")
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "row 7 is odd")
    ]


def test_a_change_of_the_environment_or_the_folder_reaches_the_child(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert apart(BOUNDS, variable, "BATCH_SCORER_TOLD") is None
    monkeypatch.setenv("BATCH_SCORER_TOLD", "yes")
    monkeypatch.chdir(tmp_path)
    assert apart(BOUNDS, variable, "BATCH_SCORER_TOLD") == "yes"
    assert apart(BOUNDS, folder) == str(tmp_path)
    monkeypatch.undo()
    assert apart(BOUNDS, variable, "BATCH_SCORER_TOLD") is None


def test_a_process_that_dies_once_is_tried_again(tmp_path: Path) -> None:
    counter = tmp_path / "tries"
    assert apart(BOUNDS, end_the_first_times, counter, 1) == "passed"
    assert counter.read_text() == ".."


def test_it_is_tried_twice_and_not_more_often(tmp_path: Path) -> None:
    counter = tmp_path / "tries"
    with pytest.raises(Died, match="exit code 1"):
        apart(BOUNDS, end_the_first_times, counter, 2)
    assert counter.read_text() == ".."


def test_threads_have_a_process_each_and_few_stay() -> None:
    most = quarantine._MOST_IDLE
    with ThreadPoolExecutor(2 * most) as pool:
        found = list(pool.map(lambda number: apart(BOUNDS, slowly, number), range(8 * most)))
    assert [number for number, _ in found] == list(range(8 * most))
    used = {there for _, there in found}
    assert len(used) > 1
    wait_until(lambda: sum(map(_is_there, used)) <= most, "the surplus processes to end")


def test_a_fork_has_children_of_its_own(tmp_path: Path) -> None:
    ours = apart(BOUNDS, process)
    told = tmp_path / "told"
    if not (fork := os.fork()):
        told.write_text(str(apart(BOUNDS, process)))
        os._exit(0)
    assert os.waitpid(fork, 0)[1] == 0
    assert int(told.read_text()) not in (ours, os.getpid(), fork)
    assert apart(BOUNDS, process) == ours


def test_children_end_with_their_parent_even_in_the_middle_of_a_call(tmp_path: Path) -> None:
    told = tmp_path / "told"
    code = (
        "from tests.unit.test_quarantine import BOUNDS, apart, tell_and_hang\n"
        f"from pathlib import Path\napart(BOUNDS, tell_and_hang, Path({str(told)!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_until(lambda: told.exists() and told.read_text(), "the child to begin")
    finally:
        parent.kill()
        parent.wait()
    there = [int(number) for number in told.read_text().split()]
    wait_until(lambda: not any(map(_is_there, there)), "child and template to end")


def tell_and_hang(file: Path) -> None:
    file.write_text(f"{os.getpid()} {os.getppid()}")
    hang()


def _is_there(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_child_answers_calls_of_one_kind() -> None:
    first, second = (replace(BOUNDS, kind=kind) for kind in ("first", "second"))
    ours, others = apart(first, os.getpid), apart(second, os.getpid)
    assert ours != others


def test_a_call_may_have_one_try_alone(tmp_path: Path) -> None:
    counter = tmp_path / "tries"
    with pytest.raises(Died) as raised:
        apart(replace(BOUNDS, tries=1), end_the_first_times, counter, 1)
    assert raised.value.how == "ended with exit code 1"
    assert counter.read_text() == "."


def test_that_time_was_up_is_told_apart() -> None:
    with pytest.raises(TimedOut) as raised:
        apart(replace(BOUNDS, seconds=0.05, tries=1), hang)
    assert raised.value.how == "takes longer than 0.05 s"


def test_a_child_may_answer_one_call_alone() -> None:
    once = replace(BOUNDS, kind="once", is_kept=False)
    ours, others = apart(once, process), apart(once, process)
    assert ours != others
    wait_until(lambda: not _is_there(ours) and not _is_there(others), "both to end")


def test_the_only_child_of_its_kind_stays_while_many_of_another_come() -> None:
    own = replace(BOUNDS, kind="own")
    ours = apart(own, process)
    most = quarantine._MOST_IDLE
    with ThreadPoolExecutor(2 * most) as pool:
        list(pool.map(lambda number: apart(BOUNDS, slowly, number), range(8 * most)))
    assert apart(own, process) == ours
