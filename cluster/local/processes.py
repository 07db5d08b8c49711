"""Processes that were started in a folder, found by where their output goes, and their end."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

_END_TIMEOUT_S = 30
_POLL_S = 0.02


def processes_in(folder: Path) -> set[int]:
    """Process ids of all whose output goes to a file under the folder, and of the groups they lead.

    Ray's workers overwrite their command line and environment with their title, and leave their
    group, as drivers of jobs leave their session; but their standard output stays. Ray's agents
    write to a pipe; they are in the group of their `ray start`. A process that merely reads
    a log, or has the folder in an environment variable, is not found.
    """
    inside = f"{folder.resolve()}/"
    writing, group_of = set(), {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            pid = int(process.name)
            with suppress(OSError):  # it may end while we look, or not be ours to look at
                if (process / "cmdline").read_bytes():  # a zombie has none
                    group_of[pid] = os.getpgid(pid)
                if os.readlink(process / "fd" / "1").startswith(inside):
                    writing.add(pid)
    return {pid for pid, group in group_of.items() if pid in writing or group in writing}


def end_processes_in(folder: Path) -> int:
    """SIGKILL them by process id and wait until they are gone; returns how many there were.

    Raises RuntimeError if some cannot be ended.
    """
    ended: set[int] = set()
    deadline = time.monotonic() + _END_TIMEOUT_S
    while left := processes_in(folder):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes that cannot be ended: {sorted(left)}")
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):  # somebody else's child
                os.waitpid(pid, 0)
        ended |= left
        time.sleep(_POLL_S)
    return len(ended)
