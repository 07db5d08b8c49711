"""Ends a process whose engine hangs, so that a hang counts as a death of the worker."""

import faulthandler
import time
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2
_REARM_SHARE = 0.1
"""Share of the limit within which the timer is not set again: setting it takes 50 us."""

_limit_s: float | None = None
_armed_at = 0.0


@contextmanager
def watch(hang_s: float) -> Iterator[None]:
    """End this process, with a trace of all its threads on stderr, after `hang_s` without a
    `sign_of_life`.

    A native thread does it, because native code that hangs may hold the interpreter's lock.
    """
    global _limit_s
    _limit_s = hang_s
    _arm()
    try:
        yield
    finally:
        _limit_s = None
        faulthandler.cancel_dump_traceback_later()


def sign_of_life() -> None:
    """Engines call this after each forward pass."""
    if _limit_s is not None and time.monotonic() - _armed_at > _REARM_SHARE * _limit_s:
        _arm()


def _arm() -> None:
    global _armed_at
    assert _limit_s is not None
    _armed_at = time.monotonic()
    faulthandler.dump_traceback_later(_limit_s, exit=True, file=_STDERR)
