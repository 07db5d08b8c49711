"""The program under test as a process, and the processes that it leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
_POLL_S = 0.05
# Ends a test that hangs; far beyond what a loaded machine takes.
_TIMEOUT_S = 600


Models = Path | dict[str, Path]
"""One model, or several by name."""


def model_flags(models: Models) -> list[object]:
    if isinstance(models, Path):
        return ["--model", models]
    return [part for name, path in models.items() for part in ("--model", f"{name}={path}")]


@dataclass(frozen=True)
class Ended:
    """A process that ended, and what it said."""

    exit_code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """What `--json` printed."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found

    @property
    def error(self) -> str:
        """The message after `error:`, with `--json` that of its object; fails the test where it is
        not there once, or is a trace."""
        assert "Traceback" not in self.err, self.err
        *_, last = self.err.splitlines() or [""]
        if last.startswith("{") and "error: " not in self.err.partition(last)[0]:
            told = json.loads(last)
            assert told["exit_code"] == self.exit_code, told
            return str(told["message"])
        messages = f"\n{self.err}".split("\nerror: ")[1:]
        assert len(messages) == 1, self.err
        return messages[0].strip()


class Running:
    """A started program; output goes to files, so that it never waits for a reader."""

    def __init__(self, command: list[str], environment: Mapping[str, str], folder: Path) -> None:
        self._files = [
            Path(tempfile.mkstemp(dir=folder, suffix=name)[1]) for name in ("out", "err")
        ]
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self._process = subprocess.Popen(
                command, env=environment, cwd=REPOSITORY, stdout=out, stderr=err
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_over(self) -> bool:
        return self._process.poll() is not None

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float = _TIMEOUT_S) -> Ended:
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"still running after {timeout_s} s: {self.said()}") from None
        return Ended(code, *self.said())

    def said(self) -> list[str]:
        return [file.read_text() for file in self._files]


class Program:
    """`batch-scorer` with a Ray of its own in `home`; credentials come from our environment."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def start(self, *arguments: object, **environment: str) -> Running:
        command = [sys.executable, "-m", "batch_scorer.cli", *map(str, arguments)]
        ours = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return Running(command, {**ours, "RAY_TMPDIR": str(self.home), **environment}, self.home)

    def run(self, *arguments: object, **environment: str) -> Ended:
        return self.start(*arguments, **environment).wait()

    def processes(self) -> dict[int, str]:
        """Command line by process id of all that runs from `home`."""
        return processes_of(self.home)

    def wait_until_gone(self) -> None:
        """A killed process of Ray may take a moment to give its memory back."""
        wait_until(lambda: not self.processes(), "nothing of the run is left")


@contextmanager
def temporary_ray_home() -> Iterator[Path]:
    """A folder with a short name: Ray puts sockets there, whose paths end at 107 bytes."""
    home = Path(tempfile.mkdtemp(prefix="bs", dir="/tmp"))
    try:
        yield home
    finally:
        end_processes(home)
        shutil.rmtree(home, ignore_errors=True)


def end_processes(home: Path) -> None:
    """Kill by process id what runs from `home`, and wait until it is gone."""

    def all_gone() -> bool:
        for pid in processes_of(home):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not processes_of(home)

    wait_until(all_gone, "all processes of the test are gone")


def processes_of(home: Path) -> dict[int, str]:
    """Command line by process id of everything that was started with `home` or has a file there.

    Ray's workers overwrite their environment with their title, but their log files tell.
    """
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with suppress(OSError):  # it may end while we look
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                files = [os.readlink(link) for link in (folder / "fd").iterdir()]
                environment = (folder / "environ").read_bytes().decode(errors="replace")
                if command and any(str(home) in text for text in (command, environment, *files)):
                    found[int(folder.name)] = command
    return found


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = _TIMEOUT_S) -> None:
    """Poll until the condition holds; fails the test at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s until {what}"
        time.sleep(_POLL_S)
