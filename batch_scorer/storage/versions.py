"""What a store shows of an object, in one form, whichever request showed it.

obstore passes on what each request answers, and one object looks different in each: Azure's
listing has the entity tag without its quotes; S3 with versioning gives a version id, and GCS a
generation, with every answer but the listing (docs/commit-protocol.md has the table). So the
entity tag, in quotes, is what a version *is*; the rest only helps with requests.
"""

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Version:
    """Which bytes are stored under a key; equal versions have the same entity tag.

    `generation` is GCS's generation, or the version id of a bucket that keeps old versions; None
    where the store shows none, as in every listing. It does not take part in comparisons.
    A tag without quotes, from a listing or from an old record of one, gets them.
    """

    etag: str
    generation: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.etag and not self.etag.endswith('"'):
            object.__setattr__(self, "etag", f'"{self.etag}"')

    @property
    def conditions(self) -> dict[str, str]:
        """As obstore takes them; GCS compares the generation, the others the entity tag."""
        generation = {"version": self.generation} if self.generation else {}
        return {"e_tag": self.etag, **generation}


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object. `key` is relative to its store's root."""

    key: str
    size_bytes: int
    version: Version
    last_modified: datetime


def version_of(answer: Any) -> Version:
    """The version in obstore's answer to any request."""
    return Version(answer["e_tag"] or "", answer["version"])


def info_of(meta: Any) -> ObjectInfo:
    """The object in obstore's answer to a head, a read or a listing."""
    return ObjectInfo(meta["path"], meta["size"], version_of(meta), meta["last_modified"])


def info_of_file(key: str, about: os.stat_result) -> ObjectInfo:
    """What obstore's local store shows of a file of which the system says this."""
    changed_us = about.st_mtime_ns // 1000
    tag = f"{about.st_ino:x}-{max(0, changed_us):x}-{about.st_size:x}"
    changed = _EPOCH + timedelta(microseconds=changed_us)
    return ObjectInfo(key, about.st_size, Version(tag), changed)
