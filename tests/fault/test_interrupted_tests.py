"""Tests that are interrupted, in whatever way, leave no process behind."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.program import REPOSITORY, wait_until
from tests.watched import descendants

pytestmark = pytest.mark.fault

WITH_A_SERVER = """
import os, subprocess, time
from pathlib import Path

def test_that_waits_for_ever(s3):
    # One that leaves its session and its parent, as schedulers do.
    subprocess.run(["setsid", "--fork", "sleep", "1000"])
    Path(os.environ["READY"]).touch()
    time.sleep(1000)
"""
WITH_RAY = """
import os, time
from pathlib import Path

def test_that_waits_for_ever(s3):
    import ray
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    Path(os.environ["READY"]).touch()
    time.sleep(1000)
"""


class Started:
    """Tests that wait, started as `make` starts them, in a group of their own."""

    def __init__(self, folder: Path, code: str) -> None:
        self._log, ready = folder / "log", folder / "ready"
        (folder / "conftest.py").write_text("from tests.conftest import *\n")
        (folder / "test_waiting.py").write_text(code)
        command = [
            sys.executable, "-m", "tests.watched",
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            f"--rootdir={folder}", str(folder),
        ]  # fmt: skip
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "RAY_"))}
        own = {"READY": str(ready), "RAY_TMPDIR": str(folder), "PYTHONPATH": str(REPOSITORY)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, env=ours | own, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=_hear_ctrl_c,
            )  # fmt: skip
        self._is_ready = ready.exists
        self.started: dict[int, str] = {}

    def wait_until_they_wait(self) -> None:
        def do_they() -> bool:
            assert self._process.poll() is None, self._log.read_text()
            return self._is_ready()

        wait_until(do_they, "the tests wait")
        pids = [self._process.pid, *descendants(self._process.pid)]
        self.started = {pid: born for pid in pids if (born := birth(pid))}

    @property
    def pid(self) -> int:
        """Of what `make` has started."""
        return self._process.pid

    @property
    def pytest_pid(self) -> int:
        (watcher,) = children(self.pid)
        return next(pid for pid in children(watcher) if b"pytest" in command_of(pid))

    def wait_until_gone(self) -> None:
        self._process.wait()
        wait_until(
            lambda: not [pid for pid, born in self.started.items() if birth(pid) == born],
            "all that they have started is gone",
        )

    def end(self) -> None:
        for pid, born in self.started.items():
            if birth(pid) == born:
                os.kill(pid, signal.SIGKILL)


def _hear_ctrl_c() -> None:
    """Shells let what they start in the background ignore it, and so would what that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stat(pid: int) -> list[str]:
    """What the kernel says of a process after its name; nothing of one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def birth(pid: int) -> str:
    """When it began, which tells it from a later one of its number; empty if it is gone."""
    found = stat(pid)
    return found[19] if found and found[0] != "Z" else ""


def children(pid: int) -> list[int]:
    return [child for child in descendants(pid) if stat(child)[1:2] == [str(pid)]]


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.fixture
def start() -> Iterator[Callable[[str], Started]]:
    begun: list[Started] = []
    folders: list[Path] = []

    def begin(code: str) -> Started:
        # A short name: Ray's sockets are in there.
        folders.append(Path(tempfile.mkdtemp(prefix="bs", dir="/tmp")))
        begun.append(Started(folders[-1], code))
        return begun[-1]

    yield begin
    for tests in begun:
        tests.end()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def test_killed_with_the_whole_group_they_leave_neither_ray_nor_server(
    start: Callable[[str], Started],
) -> None:
    tests = start(WITH_RAY)
    tests.wait_until_they_wait()
    commands = b"".join(command_of(pid) for pid in tests.started)
    assert b"raylet" in commands and b"weed" in commands
    os.killpg(tests.pid, signal.SIGKILL)
    tests.wait_until_gone()


def test_interrupted_in_any_other_way_they_leave_nothing(start: Callable[[str], Started]) -> None:
    ctrl_c, stopped, killed = runs = [start(WITH_A_SERVER) for _ in range(3)]
    for tests in runs:
        tests.wait_until_they_wait()
        assert any(b"sleep" in command_of(pid) for pid in tests.started)
    os.killpg(ctrl_c.pid, signal.SIGINT)
    os.kill(stopped.pid, signal.SIGTERM)
    os.kill(killed.pytest_pid, signal.SIGKILL)
    for tests in runs:
        tests.wait_until_gone()
