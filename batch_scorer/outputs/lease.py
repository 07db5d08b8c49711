"""A run's hold on its output: one object, changed by compare-and-swap, renewed by a thread.

The epoch counts the plans that an output has seen. A resumed plan keeps its epoch, because its
shards come out byte for byte the same whoever writes them; a changed plan (an input was
rewritten, other marked rows are tried again) raises it, and a shard of a lower epoch gives way to
one of a higher.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Self

from pydantic import FiniteFloat

from batch_scorer.errors import LeaseLostError, OutputHeldError, StorageError
from batch_scorer.failpoints import failpoint
from batch_scorer.records.reading import read_record, read_record_with_info
from batch_scorer.storage import ObjectChanged, ObjectInfo, ObjectMissing, Store, Version

RECORDS = "_batch_scorer"
"""Folder of everything in an output that is not a scored shard."""

_LEASE_KEY = f"{RECORDS}/lease.json"


@dataclass(frozen=True, slots=True)
class _Holder:
    host: str
    pid: int
    id: str

    @property
    def name(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def is_dead(self) -> bool:
        """Whether it was a process of this machine, and is none any more."""
        return self.is_here and not _is_running(self.pid)


@dataclass(frozen=True, slots=True)
class _Held:
    """What `lease.json` holds."""

    epoch: int
    plan: str
    holder: _Holder
    ttl_s: FiniteFloat
    renewals: int
    closing: bool
    released: bool


@dataclass(frozen=True, slots=True)
class SeenLease:
    """The lease as it was before a plan was made; None where nobody had taken it yet."""

    version: Version | None


class Lease:
    """Taken on entering the context, given back on leaving it.

    Whether another holder is alive is judged without comparing clocks of two machines: the
    lease's age is the store's own time between its last change and that of an object written
    now. A holder on this machine whose process is gone is dead at once.

    Entering raises OutputHeldError if another live run holds the output, and if one has held it,
    with another plan, since it was `seen`: a plan that was made before is old. None: nobody looked.
    """

    def __init__(
        self, store: Store, plan_digest: str, ttl_s: float, seen: SeenLease | None = None
    ) -> None:
        self._store = store
        self._seen = seen
        self._plan_digest = plan_digest
        self._ttl_s = ttl_s
        self._holder = _Holder(socket.gethostname(), os.getpid(), uuid.uuid4().hex)
        self._version: Version | None = None
        self._renewals = 0
        self._lost = threading.Event()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._writing = threading.Lock()
        self._closing = False
        self.epoch = 0

    @property
    def holder_id(self) -> str:
        return self._holder.id

    def __enter__(self) -> Self:
        try:
            self._acquire()
        except OutputHeldError:
            raise
        except BaseException:
            # Taken, perhaps, as with Ctrl-C in a notebook: nobody will leave what was not entered,
            # and as long as this process lives every other run would wait for the term to end.
            if self._is_ours():
                self._release()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._thread.join()
        if not self._lost.is_set():
            failpoint("lease.before_release")
            self._release()

    def check(self) -> None:
        """Raises LeaseLostError if this run no longer holds the output."""
        if self._lost.is_set():
            raise self._lost_error()

    def confirm(self) -> None:
        """`check`, with a look at the store: for what cannot be taken back. Raises StorageError."""
        if read_record(self._store, _LEASE_KEY, _Held).holder.id != self.holder_id:
            self._lost.set()
        self.check()

    def close(self) -> None:
        """Record that this run counts on nothing that it has not found so far: from now on, whoever
        comes too late with a shard of an older plan may take it back. Raises LeaseLostError and
        StorageError."""
        self._closing = True
        self._write_ours(released=False)
        failpoint("lease.after_close")

    def _acquire(self) -> None:
        try:
            held, info = read_record_with_info(self._store, _LEASE_KEY, _Held)
        except ObjectMissing:
            self.epoch = 1
            self._take(None)
            return
        if not held.released:
            self._refuse_if_alive(held, info)
        same_plan = held.plan == self._plan_digest
        is_old = self._seen is not None and self._seen.version != info.version
        if not same_plan and is_old:
            raise OutputHeldError(
                f"{self._store.root}: another run has worked on this output while this one was "
                "planned; run the same command again"
            )
        self.epoch = held.epoch if same_plan else held.epoch + 1
        self._take(info.version)

    def _release(self) -> None:
        with suppress(LeaseLostError, StorageError):  # it will expire by itself
            self._write_ours(released=True)

    def _take(self, version: Version | None) -> None:
        self._version = version
        failpoint("lease.before_take")
        try:
            self._write(released=False)
        except ObjectChanged:
            if not self._is_ours():
                raise OutputHeldError(
                    f"{self._store.root}: another run took this output at the same moment"
                ) from None
        except StorageError:
            # It may have been applied; a hold that nobody knows of keeps every other run waiting.
            if not self._is_ours():
                raise
        failpoint("lease.after_take")

    def _refuse_if_alive(self, held: _Held, info: ObjectInfo) -> None:
        if held.holder.is_dead:
            return
        # A process id may have been given to another process by now; that one does not renew.
        age_s = self._age_s(info)
        if age_s < held.ttl_s:
            raise OutputHeldError(
                f"{self._store.root}: {held.holder.name} is working on this output. Wait until it "
                f"is done; if it is dead, its hold ends {held.ttl_s - age_s:.0f} s from now"
            )

    def _age_s(self, info: ObjectInfo) -> float:
        key = f"{RECORDS}/clock-{self.holder_id}"
        self._store.put(key, b"", instead_of=None)
        now = self._store.head(key).last_modified
        self._store.delete(key)
        return (now - info.last_modified).total_seconds()

    def _write(self, *, released: bool) -> None:
        self._renewals += 1  # also keeps two versions from having the same bytes and entity tag
        held = _Held(
            epoch=self.epoch,
            plan=self._plan_digest,
            holder=self._holder,
            ttl_s=self._ttl_s,
            renewals=self._renewals,
            closing=self._closing,
            released=released,
        )
        data = json.dumps(asdict(held), indent=1).encode()
        self._version = self._store.put(_LEASE_KEY, data, instead_of=self._version)

    def _write_ours(self, *, released: bool) -> None:
        """Raises LeaseLostError if another run holds the lease now, and StorageError."""
        with self._writing:
            while True:
                try:
                    return self._write(released=released)
                except ObjectChanged:
                    # Perhaps changed by ourselves: an earlier write whose answer was lost.
                    if not self._is_ours():
                        self._lost.set()
                        raise self._lost_error() from None

    def _lost_error(self) -> LeaseLostError:
        return LeaseLostError(
            f"{self._store.root}: another run has taken this output over, or the hold on it "
            "could not be renewed in time; this one stops"
        )

    def _keep(self) -> None:
        try:
            self._renew()
        except Exception:  # a run that is not renewed must not go on as if it were
            self._lost.set()
            raise

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._released.wait(self._ttl_s / 3):
            failpoint("lease.before_renew")
            try:
                self._write_ours(released=False)
                renewed = time.monotonic()
                failpoint("lease.after_renew")
            except LeaseLostError:
                return
            except StorageError:
                # The store may be back in time; past the term another run may have begun.
                if time.monotonic() - renewed > self._ttl_s:
                    self._lost.set()
                    return

    def _is_ours(self) -> bool:
        """Whether the write that was refused is our own, applied although its answer was lost."""
        try:
            held, info = read_record_with_info(self._store, _LEASE_KEY, _Held)
        except StorageError:
            return False
        if held.holder.id != self.holder_id:
            return False
        self._version = info.version
        return True


def see_lease(store: Store) -> SeenLease:
    """The lease as it is now."""
    try:
        return SeenLease(store.head(_LEASE_KEY).version)
    except ObjectMissing:
        return SeenLease(None)


@dataclass(frozen=True, slots=True)
class Hold:
    """Who took the lease last, and the epoch; a commit of a lower one must not be made."""

    epoch: int
    holder_id: str


def current_hold(store: Store) -> Hold:
    """What the lease names now. Raises StorageError."""
    held = read_record(store, _LEASE_KEY, _Held)
    return Hold(held.epoch, held.holder.id)


def current_epoch(store: Store) -> int:
    """The epoch of `current_hold`."""
    return current_hold(store).epoch


@dataclass(frozen=True, slots=True)
class LeaseState:
    """How a lease stands: who took it last, in words and by id, and whether it is held now.

    A holder on this machine (`is_here`) that died does not hold it. One on another machine still
    does, until its term ends, and a new run waits for that. `renewed_at` is the store's time.
    `is_over`: the last holder has given it back, or only looks for late shards now.
    """

    holder: str
    holder_id: str
    is_here: bool
    is_held: bool
    is_over: bool
    renewed_at: datetime


def lease_of(store: Store) -> LeaseState | None:
    """How the lease of an output stands; None before anybody has taken it. Raises ObjectDamaged."""
    try:
        held, info = read_record_with_info(store, _LEASE_KEY, _Held)
    except ObjectMissing:
        return None
    return LeaseState(
        holder=held.holder.name,
        holder_id=held.holder.id,
        is_here=held.holder.is_here,
        is_held=not (held.released or held.holder.is_dead),
        is_over=held.released or held.closing,
        renewed_at=info.last_modified,
    )


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no process id is so large
        return False
    except PermissionError:
        return True
    return True
