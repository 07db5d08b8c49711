"""Places of the commit protocol at which a test can end, fail or pause a run.

    arm("commit.after_put:kill:3")     when the third shard gets there

`kill`: SIGKILL. `raise`: an exception that nobody foresees. `lose`: the connection breaks, as when
the store's answer is lost. `pause`: the whole process stops, its threads too, as on a machine that
is suspended, until it gets SIGCONT.

Nothing but a call of `arm` arms one, and only where the tests have set BATCH_SCORER_TESTING=1: no
setting and no variable on its own ends a run in production.
"""

import os
import signal
import threading
from typing import Literal, TypeAlias, get_args

from batch_scorer.errors import ConfigError

TESTING = "BATCH_SCORER_TESTING"

FAILPOINTS = {
    "put.applied": "a conditional PUT of whatever is applied, and its answer has not come",
    "claim.before_put": "nothing is written",
    "lease.before_take": "run.json is there, the lease is free",
    "lease.after_take": "the lease is ours, and nothing is done with it",
    "lease.before_renew": "the lease grows old",
    "lease.after_renew": "the lease is fresh",
    "lease.before_release": "all is done, and the lease still held",
    "room.before_delete": "what will be replaced is copied aside",
    "room.after_delete": "old pieces of files that are cut in another way are gone",
    "plan.before_put": "it is known what is left to do",
    "commit.before_epoch_check": "a shard is encoded",
    "commit.before_put": "the epoch was right a moment ago",
    "commit.after_put": "the shard is there, and nobody knows",
    "commit.after_refusal": "something is there, and nobody has looked what",
    "ledger.before_put": "shards are there that no record names",
    "ledger.after_put": "receipts are stored",
    "manifest.before_put": "all shards are there",
    "manifest.after_put": "a manifest that nothing points at",
    "current.after_put": "the new manifest counts, the ledger is still there",
    "lease.after_close": "nobody has looked for shards that came late",
    "ledger.after_delete": "everything but _SUCCESS",
    "success.after_put": "everything, and copies that were made aside",
    "earlier.before_delete": "the same",
}
"""What a crash leaves behind at each of them."""

Action: TypeAlias = Literal["kill", "raise", "lose", "pause"]


class FailpointReached(Exception):
    """Raised by a failpoint; nothing catches it by name."""


class _Armed:
    def __init__(self, name: str, action: Action, count: int) -> None:
        self._name, self._action, self._left = name, action, count

    def reach(self, name: str) -> None:
        if name != self._name:
            return
        self._left -= 1
        if self._left != 0:
            return
        if self._action == "raise":
            raise FailpointReached(name)
        if self._action == "lose":
            raise ConnectionResetError(f"the failpoint {name} lost the answer")
        # To this thread, which so does not get a step further; the whole process ends or stops.
        ends = signal.SIGKILL if self._action == "kill" else signal.SIGSTOP
        signal.pthread_kill(threading.get_ident(), ends)


def arm(text: str) -> None:
    """Set the failpoint of this process: NAME:ACTION or NAME:ACTION:N, or "" for none.

    Raises ConfigError outside of tests, and for one that does not exist, because it would quietly
    do nothing.
    """
    global _armed
    if text and os.environ.get(TESTING) != "1":
        raise ConfigError(f"{text}: failpoints are for tests, which set {TESTING}=1")
    name, _, rest = text.partition(":")
    action, _, count = rest.partition(":")
    if text and (name not in FAILPOINTS or action not in get_args(Action)):
        raise ConfigError(
            f"{text}: expected NAME:ACTION[:N], an action of {get_args(Action)}, "
            f"a name of {tuple(FAILPOINTS)}"
        )
    _armed = _Armed(name, action, int(count or 1)) if text else None  # type: ignore[arg-type]


def failpoint(name: str) -> None:
    """A place of `FAILPOINTS`; does nothing unless it is armed."""
    if _armed is not None:
        _armed.reach(name)


_armed: _Armed | None = None
