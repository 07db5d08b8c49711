"""Digests of a model's files; large files' digests are kept in the user's cache.

A nightly run with nothing to do must not read tens of gigabytes to find that out.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

REMEMBERED_BYTES = 1 << 24
"""Smaller files are digested again each time: it takes milliseconds."""
_SETTLED_S = 10.0
"""A file that changed more recently may change again without a change in its times."""
_CHUNK_BYTES = 1 << 22


def file_digest(file: Path) -> str:
    """sha256 of the file's bytes.

    A kept digest is used only for the same file with the same size, modification time and change
    time: programs cannot set the latter back.
    """
    before = file.stat()
    if before.st_size < REMEMBERED_BYTES:
        return _computed(file)
    try:
        record = _record_of(file)
    except RuntimeError:  # a user without a home
        return _computed(file)
    state = _state(before)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(record.read_text())
        if found["state"] == state:
            return str(found["sha256"])
    started = time.time()
    digest = _computed(file)
    if state == _state(file.stat()) and _settled(before, started):
        _remember(record, {"file": str(file), "state": state, "sha256": digest})
    return digest


def user_cache() -> Path:
    """This program's folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # By the XDG specification relative paths are ignored.
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return root / "batch-scorer"


def _computed(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _record_of(file: Path) -> Path:
    name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()
    return user_cache() / "digests" / f"{name}.json"


def _state(stat: os.stat_result) -> list[int]:
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _settled(stat: os.stat_result, now: float) -> bool:
    return now - max(stat.st_mtime, stat.st_ctime) > _SETTLED_S


def _remember(record: Path, value: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # without a cache the digest only takes longer
        record.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=record.parent)
        with os.fdopen(descriptor, "w") as stream:
            json.dump(value, stream)
        os.replace(name, record)
