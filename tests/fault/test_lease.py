"""Who may work on an output: the living holder, and nobody beside it."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_scorer.errors import LeaseLostError, OutputHeldError
from batch_scorer.failpoints import FailpointReached, arm
from batch_scorer.outputs.lease import Lease, current_epoch, lease_of
from cluster.local.seaweed import S3Server
from tests.helpers.places import Place
from tests.helpers.program import wait_until

pytestmark = pytest.mark.fault

KEY = "_batch_scorer/lease.json"
TTL_S = 30.0
RENEWED_TTL_S = 3.0
SHORT_TTL_S = 1.5
"""Only where something is waited for: nothing may have to happen within it."""


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(str(tmp_path))
    s3: S3Server = request.getfixturevalue("s3")
    return Place(s3.url(f"lease/{tmp_path.name}"), s3.options)


@pytest.fixture
def dead_pid() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    yield process.pid


def leave_lease(place: Place, *, host: str, pid: int, ttl_s: float, epoch: int = 3) -> None:
    """What a holder leaves behind that never gave its lease back."""
    body = {
        "epoch": epoch,
        "plan": "a plan",
        "holder": {"host": host, "pid": pid, "id": "another"},
        "ttl_s": ttl_s,
        "renewals": 7,
        "closing": False,
        "released": False,
    }
    place.write({KEY: json.dumps(body).encode()})


def lease_body(place: Place) -> dict[str, Any]:
    return place.read_json(KEY)


def test_a_living_holder_keeps_others_out_until_it_lets_go(place: Place) -> None:
    with Lease(place.store, "a plan", TTL_S):
        held = lease_of(place.store)
        assert held is not None and held.is_held
        assert held.holder == f"process {os.getpid()} on {socket.gethostname()}"
        with (
            pytest.raises(OutputHeldError, match="is working on this output"),
            Lease(place.store, "a plan", TTL_S),
        ):
            pass
    released = lease_of(place.store)
    assert released is not None and not released.is_held
    with Lease(place.store, "a plan", TTL_S) as second:
        assert second.epoch == 1
    with Lease(place.store, "another plan", TTL_S) as third:
        assert third.epoch == current_epoch(place.store) == 2


def test_a_hold_whose_answer_was_lost_is_known_and_given_back(tmp_path: Path) -> None:
    """On a disk nobody asks again; a hold that its holder did not know of would stay for a term."""
    place = Place(str(tmp_path))
    for epoch, plan in enumerate(("a plan", "another plan"), start=1):
        arm("put.applied:lose")
        try:
            with Lease(place.store, plan, TTL_S) as lease:
                assert lease.epoch == epoch
                held = lease_of(place.store)
                assert held is not None and held.is_held
        finally:
            arm("")
        released = lease_of(place.store)
        assert released is not None and not released.is_held


@pytest.mark.parametrize("step", ["lease.before_take", "put.applied", "lease.after_take"])
def test_a_hold_that_was_never_entered_is_given_back(place: Place, step: str) -> None:
    """As when Ctrl-C comes while it is taken, in a process that lives on."""
    with Lease(place.store, "a plan", TTL_S):
        pass
    arm(f"{step}:raise")
    try:
        with pytest.raises(FailpointReached), Lease(place.store, "another plan", TTL_S):
            pass
    finally:
        arm("")
    released = lease_of(place.store)
    assert released is not None and not released.is_held
    with Lease(place.store, "a third plan", TTL_S) as lease:
        assert lease.epoch == (2 if step == "lease.before_take" else 3)


def test_a_living_holder_is_not_taken_for_dead_after_its_term(place: Place) -> None:
    with Lease(place.store, "a plan", RENEWED_TTL_S):
        # Tried right after a renewal, so that a machine may be slow at both.
        renewals = lease_body(place)["renewals"]
        wait_until(lambda: lease_body(place)["renewals"] > renewals + 3, "more than a term is over")
        with pytest.raises(OutputHeldError), Lease(place.store, "a plan", RENEWED_TTL_S):
            pass


def test_a_holder_whose_process_is_dead_is_replaced_at_once(place: Place, dead_pid: int) -> None:
    leave_lease(place, host=socket.gethostname(), pid=dead_pid, ttl_s=3600)
    with Lease(place.store, "a plan", TTL_S) as lease:
        assert lease.epoch == 3
    leave_lease(place, host=socket.gethostname(), pid=dead_pid, ttl_s=3600)
    with Lease(place.store, "another plan", TTL_S) as lease:
        assert lease.epoch == 4


def take_when_it_ends(place: Place) -> int:
    """Taken once the left lease's term is over by the store's clock."""
    store = place.store
    left = store.head(KEY).last_modified
    taken = []

    def try_to_take() -> bool:
        try:
            with Lease(store, "a plan", TTL_S) as lease:
                taken.append((lease.epoch, store.head(KEY).last_modified))
        except OutputHeldError:
            return False
        return True

    wait_until(try_to_take, "the lease ends")
    epoch, when = taken[0]
    assert (when - left).total_seconds() >= SHORT_TTL_S - 1  # S3 gives whole seconds
    return epoch


def test_a_holder_on_another_machine_is_waited_for(place: Place) -> None:
    leave_lease(place, host="elsewhere", pid=1, ttl_s=TTL_S)
    with pytest.raises(OutputHeldError), Lease(place.store, "a plan", TTL_S):
        pass
    leave_lease(place, host="elsewhere", pid=1, ttl_s=SHORT_TTL_S)
    assert take_when_it_ends(place) == 3


def test_a_process_id_that_was_given_to_another_process_holds_nothing_for_ever(
    place: Place,
) -> None:
    """A restarted container has its old name, and often its driver the same process id again."""
    leave_lease(place, host=socket.gethostname(), pid=os.getpid(), ttl_s=SHORT_TTL_S)
    assert take_when_it_ends(place) == 3


def test_a_run_notices_that_its_output_was_taken_over(place: Place) -> None:
    def is_lost(lease: Lease) -> bool:
        try:
            lease.check()
        except LeaseLostError:
            return True
        return False

    with Lease(place.store, "a plan", SHORT_TTL_S) as lease:
        assert not is_lost(lease)
        leave_lease(place, host="elsewhere", pid=1, ttl_s=TTL_S)
        wait_until(lambda: is_lost(lease), "the loss is noticed")
    assert lease_body(place)["holder"]["host"] == "elsewhere"
    assert not lease_body(place)["released"]
