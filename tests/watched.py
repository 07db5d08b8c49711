"""Run a command, and when it has ended, however it did, end all that it has started.

    python -m tests.watched pytest tests/e2e

Tests start servers, clusters and schedulers, and end them themselves. Where the tests are killed,
nobody would: so a watcher stands between the shell and them. Its children's orphans become its own
(Linux: a subreaper), whatever session or group they have put themselves in. It has a process group
of its own, so that a signal to the group of `make` leaves it alive; it ends when its starter does.
On other systems the command just runs.
"""

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    """The command's exit code, or 128 plus the signal that ended it."""
    if sys.platform != "linux":
        return subprocess.run(command, check=False).returncode
    starter, group = os.getpid(), os.getpgrp()
    watcher = os.fork()
    if watcher == 0:
        os._exit(_watch(command, starter, group))
    # Ctrl-C goes to the command too, which is in our group, and ends by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(watcher, signal.SIGTERM))
    return os.waitstatus_to_exitcode(os.waitpid(watcher, 0)[1])


def _watch(command: list[str], starter: int, group: int) -> int:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, _stop)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for option, value in ((_PR_SET_CHILD_SUBREAPER, 1), (_PR_SET_PDEATHSIG, signal.SIGTERM)):
        if prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option})")
    try:
        if os.getppid() != starter:  # it ended before we could ask to be told
            return 128 + signal.SIGTERM
        process = subprocess.Popen(command, process_group=group)
        while True:
            pid, status = os.wait()
            if pid == process.pid:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_descendants()


def _stop(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _end_descendants() -> None:
    """SIGKILL until there are none: what one of them forked meanwhile is ours by then."""
    while True:
        for pid in descendants(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def descendants(ancestor: int) -> list[int]:
    """Process ids of all children, and of theirs."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # it may end while we look
                # After the name, in parentheses, which may hold anything: the state, the parent.
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found = list(children.get(ancestor, ()))
    for pid in found:
        found += children.get(pid, ())
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
