"""The objects below one root, and what can be asked of them.

obstore has all of it for the cloud stores; its local store lacks the conditional replace, which is
added here with a file lock (so on local disks it holds between processes of one machine).
"""

import fcntl
import io
import json
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store, from_url

from batch_scorer.credentials import aws_provider, is_http, wrong_options, wrong_url
from batch_scorer.errors import ConfigError, StorageError
from batch_scorer.failpoints import failpoint
from batch_scorer.storage.faults import (
    AccessDenied,
    ObjectChanged,
    ObjectDamaged,
    ObjectMissing,
    PlaceMissing,
    first_line,
    translated,
)
from batch_scorer.storage.folders import Unusable, is_speakable, printable, walk
from batch_scorer.storage.versions import ObjectInfo, Version, info_of, info_of_file, version_of

log = logging.getLogger("batch_scorer")

T = TypeVar("T")
R = TypeVar("R")

_RETRY = {"max_retries": 8, "retry_timeout": timedelta(minutes=1)}
_PAUSES_S = (0.2, 1.0, 3.0)
"""Before a request to an object store is made again that failed after those retries, or at once:
obstore repeats none whose connection broke in the middle."""
_REQUEST_TIMEOUT = "120s"
_LOCK_TIMEOUT_S = 60.0
_LOCK_POLL_S = 0.002
_BUFFER_BYTES = 1 << 16
_AHEAD = 4
_AWS = ("s3://", "s3a://")
HUB = "hf://"
"""What URLs of the Hugging Face hub begin with."""

Kind: TypeAlias = Literal["local", "s3", "azure", "gcs", "other"]
_KINDS: dict[type, Kind] = {
    LocalStore: "local",
    S3Store: "s3",
    AzureStore: "azure",
    GCSStore: "gcs",
}


def is_remote(url: str) -> bool:
    """Whether `url` names an object store; anything else is a local path."""
    return "://" in url


def place_of(root: str) -> str:
    """The bucket or container of a URL, or the data set of the hub; "" for a local path."""
    parts = 5 if root.startswith(HUB) else 3
    return "/".join(root.split("/")[:parts]) if is_remote(root) else ""


def _as_url(root: str) -> str:
    """A key may hold marks that end the path of a URL."""
    return root.replace("?", "%3F").replace("#", "%23")


class Store:
    """The objects below one root: a folder, or a bucket and prefix.

    All keys are relative to the root and use `/`. Every method raises StorageError (or its
    subclasses in `faults.py`) and nothing else for what the store does: PlaceMissing and
    AccessDenied where no request can succeed, and what the methods for single objects name.
    """

    def __init__(self, root: str, options: Mapping[str, str], *, create: bool = False) -> None:
        if not root or not is_speakable(root):
            raise ConfigError(f"{printable(root) or repr(root)}: not a path or URL")
        self.root = root.rstrip("/") or "/"
        self._options = dict(options)
        self._local = None if is_remote(root) else Path(root).absolute()
        self._store: Any
        if self._local is not None:
            if os.path.exists(self._local) and not os.path.isdir(self._local):
                raise PlaceMissing(f"{root}: no folder")
            try:
                self._store = LocalStore(str(self._local), mkdir=create)
            except (BaseError, OSError) as error:
                if "Permission denied" in str(error):
                    raise AccessDenied(f"{root}: no permission to create it") from error
                raise PlaceMissing(f"{root}: no such folder") from error
            return
        if why := wrong_url(root):
            raise ConfigError(why)
        if lines := list(wrong_options(options)):
            raise ConfigError("\n".join(f"store_options.{line}" for line in lines))
        # allow_http belongs to the HTTP client and not to the store.
        allow_http = options.get("allow_http") or str(is_http(root, options)).lower()
        # Typed for each kind of store upstream; which one this is, the URL says.
        settings: dict[str, Any] = {
            "config": {key: value for key, value in options.items() if key != "allow_http"},
            "client_options": {"timeout": _REQUEST_TIMEOUT, "allow_http": allow_http == "true"},
            "retry_config": _RETRY,
        }
        if root.startswith(_AWS) and (provider := aws_provider(options)):
            settings["credential_provider"] = provider
        try:
            self._store = from_url(_as_url(self.root), **settings)
        except (BaseError, ValueError) as error:
            raise ConfigError(f"{root}: {first_line(error)}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens its own."""
        return open_store, (self.root, self._options)

    @property
    def kind(self) -> Kind:
        """Which protocol it speaks."""
        return _KINDS.get(type(self._store), "other")

    def url(self, key: str) -> str:
        """The full name of `key`, for people."""
        return f"{self.root.rstrip('/')}/{key}"

    def below(self, folder: str) -> "Store":
        """The store of a folder in this one; raises ObjectMissing for a local one not there."""
        return open_store(self.url(folder), self._options)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key lies in the folder `prefix`, in the store's order.

        An entry of a local folder that cannot be used (`entries`) is named in the log.
        """
        for entry in self.entries(prefix):
            if isinstance(entry, Unusable):
                log.warning("%s: %s; left alone", self.url(entry.key), entry.problem)
            else:
                yield entry

    def entries(self, prefix: str = "") -> Iterator[ObjectInfo | Unusable]:
        """The same, with what of a local folder cannot be used, and why."""
        return self._stored(prefix) if self._local is None else self._walked(self._local, prefix)

    def _walked(self, folder: Path, prefix: str) -> Iterator[ObjectInfo | Unusable]:
        # What a request would show is reckoned from what the system says of a file: a request for
        # each took nine tenths of a listing. The first one is asked for, to see that both agree.
        agrees: bool | None = None
        with self._translated(prefix):
            for found in walk(folder, prefix):
                if isinstance(found, Unusable):
                    yield found
                    continue
                key, about = found
                info = info_of_file(key, about)
                with suppress(ObjectMissing):  # removed in the meantime
                    if agrees is None:
                        agrees = self.head(key) == info
                    yield info if agrees else self.head(key)

    def _stored(self, prefix: str) -> Iterator[ObjectInfo]:
        seen: set[str] = set()
        for try_again in self._tries(prefix):
            with try_again:
                for page in obstore.list(self._store, prefix=prefix or None, chunk_size=1000):
                    for meta in page:
                        if meta["path"] not in seen:
                            seen.add(meta["path"])
                            yield info_of(meta)
                return

    def head(self, key: str) -> ObjectInfo:
        """What is stored under `key`; raises ObjectMissing."""
        return self._asked(key, lambda: info_of(obstore.head(self._store, key)))

    def read(self, key: str, version: Version | None = None) -> bytes:
        """The whole object; with `version`, raises ObjectChanged if it is another one by now."""
        return self._asked(key, lambda: self._get(key, version)[0])

    def read_whole(self, key: str, version: Version, size_bytes: int) -> bytes:
        """The whole object in this version and of this size; less is a fault of the store."""
        return self._asked(key, lambda: self._get(key, version, (0, size_bytes))[0])

    def read_with_info(self, key: str) -> tuple[bytes, ObjectInfo]:
        """The whole object and the version that was read."""
        return self._asked(key, lambda: self._get(key))

    def read_json(self, key: str) -> Any:
        """The value of a small JSON object."""
        return self.read_parsed(key, json.loads)[0]

    def read_parsed(self, key: str, parse: Callable[[bytes], T]) -> tuple[T, ObjectInfo]:
        """What `parse` makes of the whole object, and the version that was read.

        What it refuses with ValueError came damaged, as by any other fault of the store, or is
        stored damaged: it is read again, and at last ObjectDamaged is raised.
        """

        def request() -> tuple[T, ObjectInfo]:
            data, info = self._get(key)
            try:
                return parse(data), info
            except (ValueError, RecursionError) as error:
                raise ObjectDamaged(f"{self.url(key)}: damaged: {first_line(error)}") from None

        return self._asked(key, request)

    def _get(
        self, key: str, version: Version | None = None, part: tuple[int, int] | None = None
    ) -> tuple[bytes, ObjectInfo]:
        """Bytes [start, stop) of the object, or all. A store that sends less has a fault."""
        options: dict[str, Any] = {"if_match": version.etag} if version else {}
        if part and part[0] < part[1]:
            options["range"] = part
        result = obstore.get(self._store, key, options=options)  # type: ignore[arg-type]
        data, info = bytes(result.bytes()), info_of(result.meta)
        if part and len(data) != part[1] - part[0]:
            size_bytes = part[1] - part[0]
            raise StorageError(f"{self.url(key)}: {len(data)} bytes came, {size_bytes} are stored")
        return data, info

    def open(
        self, key: str, size_bytes: int, version: Version, buffer_bytes: int = _BUFFER_BYTES
    ) -> io.BufferedReader:
        """A seekable file over ranged reads that are all pinned to `version`.

        A file that is read from its beginning to its end wants a large buffer: each is a request.
        """
        return io.BufferedReader(_PinnedFile(self, key, size_bytes, version), buffer_bytes)

    def read_range(self, key: str, version: Version, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of exactly this version."""
        return self._asked(key, lambda: self._get(key, version, (start, stop))[0])

    def put(self, key: str, data: bytes, *, instead_of: Version | None) -> Version:
        """Store `data` in place of exactly this version, or of nothing (None); returns the new one.

        A PUT may be applied and its answer lost; made again, it is refused by what it has itself
        stored. So where these very bytes are stored it has succeeded, whoever stored them: they
        must be the caller's own (its name in them, or in the key) or mean the same from anybody.
        ObjectChanged means that somebody else was first. Any other StorageError leaves open
        whether the PUT was applied; the same call made again finds out.
        """
        try:
            if instead_of is None:
                return self.create(key, data)
            return self.replace(key, data, instead_of)
        except ObjectChanged:
            with suppress(ObjectMissing):
                there, info = self.read_with_info(key)
                if there == data:
                    return info.version
            raise

    def create(self, key: str, data: bytes) -> Version:
        """Store `data` under a new key; raises ObjectChanged if the key is taken, perhaps by this
        very request (`put` can tell)."""
        return self._put(key, lambda: obstore.put(self._store, key, data, mode="create"))

    def replace(self, key: str, data: bytes, version: Version) -> Version:
        """Store `data` in place of exactly `version`; raises ObjectChanged if that is gone, perhaps
        by this very request (`put` can tell)."""

        def put() -> Any:
            mode: Any = self._current(key, version).conditions
            return obstore.put(self._store, key, data, mode=mode)

        def put_locally() -> Any:
            with self._lock():
                self._expect(key, version)
                return obstore.put(self._store, key, data, use_multipart=False)

        try:
            return self._put(key, put if self._local is None else put_locally)
        except PlaceMissing:
            raise
        except ObjectMissing as error:
            raise self._changed(key) from error

    def _put(self, key: str, request: Callable[[], Any]) -> Version:
        def put() -> Version:
            version = version_of(request())
            failpoint("put.applied")
            return version

        return self._asked(key, put)

    def _current(self, key: str, version: Version) -> Version:
        """The version as the store can compare it: GCS wants the generation, no listing has it."""
        if version.generation is None and self.kind == "gcs":
            return self._expect(key, version)
        return version

    def _expect(self, key: str, version: Version) -> Version:
        """The version that is stored, which is this one; raises ObjectChanged."""
        stored = info_of(obstore.head(self._store, key)).version
        if stored != version:
            raise self._changed(key)
        return stored

    def _changed(self, key: str) -> ObjectChanged:
        return ObjectChanged(f"{self.url(key)}: changed since it was read")

    def copy(self, key: str, to: str) -> None:
        """Store the same bytes under `to`, over what is there; the store moves them itself."""
        if self._local is not None:
            # A copy is a link there; renaming one over another of the same file leaves both.
            self.delete(to)
        self._asked(key, lambda: obstore.copy(self._store, key, to))

    def delete(self, key: str) -> None:
        """Remove the object; a missing one is fine."""
        with suppress(ObjectMissing):
            self._asked(key, lambda: obstore.delete(self._store, key))

    def delete_version(self, key: str, version: Version) -> None:
        """Remove the object if it is this version; what came in its place is left alone.

        A look before the removal, as stores have no conditional one: some milliseconds are open.
        A bucket with versioning keeps it as an old version, which no listing or read here shows.
        """
        with suppress(ObjectMissing):
            if self.head(key).version == version:
                self.delete(key)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        assert self._local is not None
        # The name carries `#`, which obstore's listing never shows.
        descriptor = os.open(self._local / ".replace#0", os.O_CREAT | os.O_RDWR, 0o666)
        try:
            self._wait_for(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _wait_for(self, descriptor: int) -> None:
        """Lock the file. A dead process holds nothing, but one that sleeps may hold it forever."""
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"{self.root}: another process has been writing a record for "
                        f"{_LOCK_TIMEOUT_S:.0f} s"
                    ) from None
                time.sleep(_LOCK_POLL_S)

    def _asked(self, key: str, request: Callable[[], T]) -> T:
        """The answer of the store; a request that fails is made again."""
        for try_again in self._tries(key):
            with try_again:
                return request()
        raise AssertionError("the last try raises")

    def _tries(self, key: str) -> Iterator[AbstractContextManager[None]]:
        """Contexts in which a request may fail, all but the last."""
        for pause_s in () if self._local else _PAUSES_S:
            yield self._failing(key, pause_s)
        yield self._translated(key)

    @contextmanager
    def _failing(self, key: str, pause_s: float) -> Iterator[None]:
        try:
            with self._translated(key):
                yield
        except (ObjectMissing, ObjectChanged, AccessDenied):
            raise
        except StorageError as error:
            log.info("%s; asked again in %.1f s", error, pause_s)
            time.sleep(pause_s)

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, NotImplementedError) as error:
            raise translated(error, self.url(key), self._place) from error

    @property
    def _place(self) -> str:
        """The bucket or container, or the local folder."""
        return "/".join(self.root.split("/")[:3]) if self._local is None else self.root


@lru_cache(maxsize=64)
def _cached_store(root: str, options: tuple[tuple[str, str], ...], create: bool) -> Store:
    if root.startswith(HUB):
        from batch_scorer.storage.hub import HubStore  # which is made of Store

        return HubStore(root, create=create)
    return Store(root, dict(options), create=create)


def open_store(root: str, options: Mapping[str, str], *, create: bool = False) -> Store:
    """The store at `root`; one per process, so connections are reused.

    `create` makes a missing local folder; without it that is ObjectMissing.
    """
    return _cached_store(root, tuple(sorted(options.items())), create)


def in_threads(work: Callable[[T], R], items: Iterable[T], num_threads: int) -> Iterator[R]:
    """`work` of each item, in order, for requests that wait for the store.

    Items are taken as results are, a few ahead: there may be a hundred thousand.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > _AHEAD * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


_GLOB = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_GLOB_TOKENS = re.compile(r"(\*\*/|\*\*|\*|\?|\[!?[^\]/]+\])")


def glob_matches(pattern: str, keys: Iterable[str]) -> set[str]:
    """The keys that a glob matches: `*` and `?` stay in a folder, `**` does not. Brackets mean
    themselves where a key has them, else one of the characters between them, or with `[!…]` one
    other character. Raises ConfigError where they hold a range that runs backwards."""
    keys = list(keys)
    for spelled in (re.escape, _characters):
        # Text and tokens take turns; a bracket that is not closed is text.
        parts = [
            (_GLOB.get(part) or spelled(part)) if place % 2 else re.escape(part)
            for place, part in enumerate(_GLOB_TOKENS.split(pattern))
        ]
        try:
            matches = re.compile("".join(parts)).fullmatch
        except re.error as error:
            raise ConfigError(f"{pattern}: no pattern of file names: {error.msg}") from None
        if found := {key for key in keys if matches(key)}:
            return found
    return set()


def _characters(brackets: str) -> str:
    """`[…]` of a glob as that of a regular expression; a slash is never one of them."""
    is_other = brackets[1] in "!^"
    inside = "".join(c if c == "-" else re.escape(c) for c in brackets[1 + is_other : -1])
    return f"(?!/)[^{inside}]" if is_other else f"[{inside}]"


class _PinnedFile(io.RawIOBase):
    """Random access to one version of an object, for readers that want a file."""

    def __init__(self, store: Store, key: str, size_bytes: int, version: Version) -> None:
        self._store = store
        self._key = key
        self._size_bytes = size_bytes
        self._version = version
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}
        self._position = base[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._size_bytes)
        if stop <= self._position:
            return 0
        data = self._store.read_range(self._key, self._version, self._position, stop)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
