"""A conditional PUT that is applied and whose answer is lost: neither won nor refused, until the
store is asked what is there."""

from collections.abc import Iterator

import pytest

from batch_scorer.errors import StorageError
from batch_scorer.failpoints import arm
from batch_scorer.storage import ObjectChanged, Store
from tests.fault.proxy import Faults, Kind, fault_proxy
from tests.helpers.stores import REMOTE, AnyStore

pytestmark = pytest.mark.fault


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm("")


@pytest.mark.parametrize("any_store", REMOTE, indirect=True)
@pytest.mark.parametrize("kind", [Kind.LOST, Kind.TWICE])
def test_a_put_whose_answer_is_lost_is_known_as_ours(any_store: AnyStore, kind: Kind) -> None:
    """At each PUT of the object's life, on the wire."""
    assert any_store.server is not None
    store = any_store.place.store
    with fault_proxy(any_store.server.endpoint) as proxy:
        behind = any_store.through(proxy.endpoint).store
        version = None
        for data in (b"1", b"22", b"333"):
            with proxy.breaking(Faults((kind,), seed=1, burst=1, burst_within=1)):
                version = behind.put("k", data, instead_of=version)
                assert [one.kind for one in proxy.injected] == [kind]
            data_there, info = store.read_with_info("k")
            assert (data_there, info.version) == (data, version)


def test_an_answer_can_be_lost_on_purpose(any_store: AnyStore) -> None:
    """The failpoint, at the first and at the second PUT."""
    store = any_store.place.store
    arm("put.applied:lose:2")
    first = put(store, b"1", None)
    second = put(store, b"22", first)
    assert store.read_with_info("k")[0] == b"22"
    assert store.head("k").version == second


def put(store: Store, data: bytes, found: object) -> object:
    """A PUT, made again by the caller where the store does not repeat it itself: a local disk,
    which loses no answer."""
    try:
        return store.put("k", data, instead_of=found)  # type: ignore[arg-type]
    except StorageError:
        assert store.kind == "local"
        return store.put("k", data, instead_of=found)  # type: ignore[arg-type]


def test_what_somebody_else_has_stored_is_not_ours(any_store: AnyStore) -> None:
    store = any_store.place.store
    first = store.put("k", b"theirs", instead_of=None)
    with pytest.raises(ObjectChanged):
        store.put("k", b"ours", instead_of=None)
    store.put("k", b"theirs too", instead_of=first)
    with pytest.raises(ObjectChanged):
        store.put("k", b"ours", instead_of=first)
    assert store.read("k") == b"theirs too"
    store.delete("k")
    with pytest.raises(ObjectChanged):
        store.put("k", b"ours", instead_of=first)


def test_the_same_bytes_from_anybody_count(any_store: AnyStore) -> None:
    store = any_store.place.store
    first = store.put("k", b"1", instead_of=None)
    assert store.put("k", b"1", instead_of=None) == first
    second = store.put("k", b"22", instead_of=first)
    assert store.put("k", b"22", instead_of=first) == second
