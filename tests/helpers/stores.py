"""The five kinds of store that the product must be right on, as places for tests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.helpers.places import Place

REMOTE = ("s3", "s3-versioned", "azure", "gcs")
STORES = ("local", *REMOTE)


class Server(Protocol):
    """What the fixtures `s3`, `s3_versioned`, `azure` and `gcs` are."""

    @property
    def endpoint(self) -> str: ...
    @property
    def options(self) -> Mapping[str, str]: ...
    def url(self, path: str) -> str: ...


@dataclass(frozen=True)
class AnyStore:
    """One of `STORES`: a folder of a test's own in it. `server` is None for the local disk."""

    name: str
    place: Place
    server: Server | None = None

    def through(self, endpoint: str) -> Place:
        """The same place, its requests going to this endpoint: a proxy before the server."""
        assert self.server is not None, "a local disk has no endpoint"
        ours = self.server.endpoint
        options = {k: v.replace(ours, endpoint) for k, v in self.place.options.items()}
        return Place(self.place.url, options)


def local_store(folder: Path) -> AnyStore:
    return AnyStore("local", Place(str(folder)))


def remote_store(name: str, server: Server, folder: str) -> AnyStore:
    return AnyStore(name, Place(server.url(folder), server.options), server)
