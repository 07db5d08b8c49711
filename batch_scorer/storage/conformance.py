"""What the commit protocol needs of a store, as checks against a real one.

`examine` makes them all, in a scratch folder; the tests do so with every kind of store.
`require_conditional_writes` makes the one check without which no run may write.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

from batch_scorer.errors import OutputError, StorageError
from batch_scorer.storage.faults import AccessDenied, ObjectChanged, ObjectMissing
from batch_scorer.storage.store import Store, in_threads, is_remote
from batch_scorer.storage.versions import Version

_SCRATCH = "_batch_scorer-doctor-"
_RIVALS = 4
_NAMES = [f"listing/{name}" for name in ("a.parquet", "b c.parquet", "d/é+%.parquet", "d/z", "e")]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that the protocol needs; `problem` is what was seen instead, "" where it holds."""

    name: str
    need: str
    problem: str = ""

    @property
    def holds(self) -> bool:
        return not self.problem


@dataclass(frozen=True, slots=True)
class Conformance:
    """What a store was seen to do. `keeps_old_versions` is None where the store does not show it:
    a deleted object may stay, out of sight, until a rule of the bucket removes it."""

    url: str
    keeps_old_versions: bool | None
    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def examine(url: str, store_options: Mapping[str, str]) -> Conformance:
    """Make all checks in a scratch folder below `url`, which is removed afterwards: some 120
    requests, small objects only.

    Raises StorageError (PlaceMissing, AccessDenied) where the first object cannot be written.
    """
    with _scratch_folder(url, store_options) as store:
        first = store.create("first", b"")
        shown = None if store.kind == "gcs" else first.generation is not None
        return Conformance(url, shown, tuple(_made(check, store) for check in _CHECKS))


def require_conditional_writes(store: Store, folder: str) -> None:
    """Prove that the store refuses conditional writes, by five requests for an object of its own in
    `folder`; raises OutputError where it does not, and StorageError."""
    key = f"{folder}/probe-{uuid.uuid4().hex}"
    first = store.put(key, b"1", instead_of=None)  # and no refusal where an answer is lost
    try:
        store.put(key, b"22", instead_of=first)
        if not _is_refused(lambda: store.create(key, b"333")):
            ignored = "a PUT of what is there already (If-None-Match)"
        elif not _is_refused(lambda: store.replace(key, b"4444", first)):
            ignored = "a PUT in place of an old version (If-Match)"
        else:
            return
    finally:
        store.delete(key)
    raise OutputError(
        f"{store.root}: this store does not refuse {ignored}, so two runs could overwrite each "
        "other's scores; use a store with conditional writes"
    )


@contextmanager
def _scratch_folder(url: str, options: Mapping[str, str]) -> Iterator[Store]:
    if not is_remote(url):
        Store(url, options)  # is it there?
        try:
            with TemporaryDirectory(prefix=_SCRATCH, dir=url) as folder:
                yield Store(folder, options)
        except PermissionError as error:
            raise AccessDenied(f"{url}: no permission") from error
        return
    store = Store(f"{url.rstrip('/')}/{_SCRATCH}{uuid.uuid4().hex[:12]}", options)
    try:
        yield store
    finally:
        with suppress(StorageError):  # a check has found out that nothing can be deleted
            for info in list(store.list()):
                store.delete(info.key)


class _Broken(Exception):
    """A check's finding."""


def _made(check: tuple[str, str, Callable[[Store], None]], store: Store) -> Check:
    name, need, make = check
    try:
        make(store)
    except (_Broken, StorageError) as problem:
        return Check(name, need, str(problem))
    return Check(name, need)


def _demand(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise _Broken(otherwise)


def _is_refused(request: Callable[[], object]) -> bool:
    try:
        request()
    except ObjectChanged:
        return True
    return False


def _is_missing(request: Callable[[], object]) -> bool:
    try:
        request()
    except ObjectMissing:
        return True
    return False


def _listed(store: Store, folder: str) -> list[str]:
    return sorted(info.key for info in store.list(folder))


def _only(store: Store, folder: str) -> Version:
    """The version of the only object in the folder, as the listing shows it."""
    listed = list(store.list(folder))
    _demand(len(listed) == 1, f"{len(listed)} objects are listed where one is")
    return listed[0].version


# The checks


def _create(store: Store) -> None:
    store.create("create/k", b"1")
    refused = _is_refused(lambda: store.create("create/k", b"22"))
    _demand(refused, "a create was not refused although the key was taken")
    _demand(store.read("create/k") == b"1", "a refused create has changed the object")


def _replace(store: Store) -> None:
    first = store.create("replace/k", b"1")
    store.replace("replace/k", b"22", first)
    refused = _is_refused(lambda: store.replace("replace/k", b"333", first))
    _demand(refused, "a replacement was not refused although the version was an old one")
    _demand(store.read("replace/k") == b"22", "a refused replacement has changed the object")


def _race(store: Store) -> None:
    found = store.create("race/old", b"1")

    def winners(write: Callable[[bytes], object]) -> int:
        rivals = [b"rival %d" % number for number in range(_RIVALS)]
        won = in_threads(lambda data: not _is_refused(lambda: write(data)), rivals, _RIVALS)
        return sum(won)

    created = winners(lambda data: store.create("race/new", data))
    _demand(created == 1, f"{created} of {_RIVALS} creates at the same moment succeeded")
    replaced = winners(lambda data: store.replace("race/old", data, found))
    _demand(replaced == 1, f"{replaced} of {_RIVALS} replacements at the same moment succeeded")


def _versions(store: Store) -> None:
    key = "versions/k"
    version = store.create(key, b"1")
    for data in (b"22", b"333"):
        listed = _only(store, "versions")
        shown = {
            "head": store.head(key).version,
            "read": store.read_with_info(key)[1].version,
            "list": listed,
        }
        for request, other in shown.items():
            _demand(other == version, f"put shows {version.etag}, {request} {other.etag}")
        version = store.replace(key, data, listed)
        _demand(version != listed, "an object with other bytes has the same entity tag")


def _pinned(store: Store) -> None:
    first = store.create("pinned/k", b"abcdef")
    _demand(store.read("pinned/k", first) == b"abcdef", "other bytes came than were stored")
    _demand(store.read_range("pinned/k", first, 2, 4) == b"cd", "another range came than asked for")
    store.replace("pinned/k", b"ABCDEFG", first)
    for read in (
        lambda: store.read("pinned/k", first),
        lambda: store.read_range("pinned/k", first, 2, 4),
    ):
        _demand(_is_refused(read), "a read of an old version was not refused")


def _deletion(store: Store) -> None:
    key = "deletion/k"
    first = store.create(key, b"1")
    second = store.replace(key, b"22", first)
    store.delete_version(key, first)
    _demand(store.read(key) == b"22", "the deletion of an old version removed the new one")
    listed = _only(store, "deletion")
    _demand(listed == second, "the listing shows another version than put")
    store.delete_version(key, listed)
    _demand(_is_missing(lambda: store.head(key)), "a deleted version is still there")


def _listing(store: Store) -> None:
    for name in _NAMES:
        store.create(name, name.encode())
    _demand(_listed(store, "listing") == sorted(_NAMES), "not what was written is listed")
    _demand(_listed(store, "listing/d") == sorted(_NAMES[2:4]), "not what is in a folder is listed")
    for name in _NAMES[::2]:
        store.delete(name)
    _demand(_listed(store, "listing") == sorted(_NAMES[1::2]), "what was deleted is listed")


def _deleted(store: Store) -> None:
    key = "deleted/k"
    for data in (b"1", b"22"):
        version = store.create(key, data)
        store.delete(key)
        store.delete(key)  # of nothing: on a bucket with versioning it leaves another marker
        _demand(_listed(store, "deleted") == [], "a deleted object is listed")
        _demand(_is_missing(lambda: store.read(key)), "a deleted object can be read")
        replaced = not _is_refused(lambda: store.replace(key, b"333", version))  # noqa: B023
        _demand(not replaced, "a deleted object was replaced")
    store.create(key, b"4444")
    _demand(_listed(store, "deleted") == [key], "an object is not listed once after its deletion")


def _copy(store: Store) -> None:
    store.create("copy/from", b"1")
    store.create("copy/to", b"22")
    store.copy("copy/from", "copy/to")
    _demand(store.read("copy/to") == b"1", "a copy has other bytes")
    _demand(store.read("copy/from") == b"1", "a copied object has changed")


def _times(store: Store) -> None:
    store.create("times/a", b"1")
    store.create("times/b", b"1")
    earlier, later = (store.head(f"times/{name}").last_modified for name in "ab")
    _demand(earlier <= later, f"written first at {earlier}, the next at {later}")


_CHECKS: list[tuple[str, str, Callable[[Store], None]]] = [
    ("create", "a create is refused where something is stored", _create),
    ("replace", "a replacement is refused where another version is stored", _replace),
    ("race", "of many writers at the same moment, one succeeds", _race),
    ("versions", "put, head, read and list show the same version", _versions),
    ("pinned reads", "a read of an old version is refused", _pinned),
    ("deletion", "exactly the version seen is deleted", _deletion),
    ("listing", "a listing shows at once what was written and deleted", _listing),
    ("deleted keys", "a deleted key is as if it had never been written", _deleted),
    ("copy", "a copy has the same bytes", _copy),
    ("times", "the store's clock does not run backwards", _times),
]
