"""Digests of a model's files; large files' digests are kept in the user's cache.

A nightly run with nothing to do must not read tens of gigabytes to find that out. While a file is
read, its weights are looked through for values that are no numbers: they make every score NaN.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from batch_scorer.errors import ModelError
from batch_scorer.models.checkpoint import read_header

REMEMBERED_BYTES = 1 << 24
"""Smaller files are digested again each time: it takes milliseconds."""
_SETTLED_S = 10.0
"""A file that changed more recently may change again without a change in its times."""
_CHUNK_BYTES = 1 << 17
_FLOATS = {"F32": "<f4", "F64": "<f8"}
_HALVES = {"BF16": 0x7F80, "F16": 0x7C00}
"""Bits of infinity; those of NaN are larger. numpy has no bfloat16 and a slow float16."""
_MASK = "mask"
"""In the names of stored attention masks, which may hold -inf."""


def file_digest(file: Path) -> str:
    """sha256 of the file's bytes. Raises ModelError for weights with NaN or infinity among them.

    A kept digest is used only for the same file with the same size, modification time and change
    time: programs cannot set the latter back.
    """
    digest, broken = _kept_or_read(file)
    if broken is not None:
        raise ModelError(
            f"{file}: {broken} holds NaN or infinity: the training diverged, or the file is damaged"
        )
    return digest


def _kept_or_read(file: Path) -> tuple[str, str | None]:
    """The digest, and the first tensor with values that are no numbers."""
    before = file.stat()
    if before.st_size < REMEMBERED_BYTES:
        return _read(file)
    try:
        record = _record_of(file)
    except RuntimeError:  # a user without a home
        return _read(file)
    state = state_of(before)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(record.read_text())
        if found["state"] == state:
            return str(found["sha256"]), found["broken"]
    started = time.time()
    digest, broken = _read(file)
    if state == state_of(file.stat()) and is_settled(before, started):
        kept = {"file": str(file), "state": state, "sha256": digest, "broken": broken}
        remember(record, json.dumps(kept))
    return digest, broken


def user_cache() -> Path:
    """This program's folder in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # By the XDG specification relative paths are ignored.
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return root / "batch-scorer"


def _read(file: Path) -> tuple[str, str | None]:
    digest = hashlib.sha256()
    broken: str | None = None
    with file.open("rb") as stream:
        for size, dtype, name in _parts(file):
            while size > 0 and (chunk := stream.read(min(size, _CHUNK_BYTES))):
                size -= len(chunk)
                digest.update(chunk)
                if broken is None and dtype and not _are_numbers(chunk, dtype):
                    broken = name
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest(), broken


def _parts(file: Path) -> Iterator[tuple[int, str, str]]:
    """Bytes, dtype and name of what a safetensors file holds one after the other: its header, and
    the tensors without a gap (`check_header`). The dtype is empty where nothing is looked for."""
    if file.suffix != ".safetensors":
        return
    stored = sorted((t.start, t.stop, t.dtype, name) for name, t in read_header(file).items())
    header = [(stored[0][0], "", "")] if stored else []
    tensors = (
        (stop - start, dtype if dtype in _FLOATS | _HALVES and _MASK not in name else "", name)
        for start, stop, dtype, name in stored
    )
    yield from chain(header, tensors)


def _are_numbers(chunk: bytes, dtype: str) -> bool:
    if dtype in _FLOATS:
        return bool(np.isfinite(np.frombuffer(chunk, _FLOATS[dtype])).all())
    without_sign = np.frombuffer(chunk, "<u2") & 0x7FFF
    return bool(without_sign.max() < _HALVES[dtype])


def _record_of(file: Path) -> Path:
    name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()
    return user_cache() / "digests" / f"{name}.json"


def state_of(stat: os.stat_result) -> list[int]:
    """What is another after any change of a file that has settled."""
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def is_settled(stat: os.stat_result, now: float) -> bool:
    """Whether a file's last change is so long ago that its times show the next one."""
    return now - max(stat.st_mtime, stat.st_ctime) > _SETTLED_S


def remember(record: Path, text: str) -> None:
    """Write a record of the user's cache, whole or not at all."""
    with contextlib.suppress(OSError):  # without a cache everything only takes longer
        record.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=record.parent)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
        os.replace(name, record)
