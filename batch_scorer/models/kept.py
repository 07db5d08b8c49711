"""What was found out about a model's files, kept in the user's cache until anything changes that it
came from.

Finding out takes torch and transformers, which take seconds to load, and a run with nothing to do
needs the answer alone. A kept answer is used only where all of this is the same:

- the question;
- the names of all that is in the model's folders, every byte of its small files, and of others what
  `digests` goes by for weights;
- this package's code, and the files of the libraries that read models, by the digests that were
  installed with them.
"""

import hashlib
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from batch_scorer.models.digests import REMEMBERED_BYTES, is_settled, remember, state_of, user_cache
from batch_scorer.models.files import READ
from batch_scorer.records.digest import digest_of
from batch_scorer.records.reading import parsed
from batch_scorer.version import package_digest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)
else:
    T = TypeVar("T")

_LIBRARIES = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "jinja2"),
    *("sentencepiece", "tiktoken", "protobuf", "numpy"),
)
"""What reads models and tokenizers, as far as it is installed."""


def kept(
    shape: type[T],
    folders: Sequence[Path],
    asked: Any,
    find: Callable[[], T],
    holds: Callable[[T], bool] = lambda found: True,
) -> T:
    """What `find` gives for the question `asked` (a JSON value) about the model in these folders,
    or gave before.

    `shape` is the dataclass that it gives, of values that JSON can hold; `holds` says whether a
    kept one will do. Nothing is kept where a file has just changed, or a library is in development.
    Raises what `find` raises.
    """
    question = digest_of([shape.__name__, [ascii(str(folder)) for folder in folders], asked])
    started = time.time()
    code = code_digest()
    try:
        record = user_cache() / "models" / f"{question}.json"
        before = [] if code is None else [code, *_entries(folders, started)]
    except (OSError, RuntimeError):  # a folder that cannot be read, a user without a home
        return find()
    if code is None or None in before:
        return find()
    key = digest_of(before)
    with suppress(OSError, ValueError):
        then, _, value = record.read_text().partition("\n")
        if then == key and holds(found := parsed(value, shape)):
            return found
    found = find()
    with suppress(OSError):
        if [code, *_entries(folders, started)] == before:
            remember(record, f"{key}\n{json.dumps(asdict(found), default=_plain)}")
    return found


def _plain(value: object) -> str:
    if isinstance(value, Path | datetime):
        return str(value)
    raise TypeError(f"{value!r} cannot be kept")


@cache
def code_digest() -> str | None:
    """Digest of the code that answers come from: Python, this package, and the libraries that read
    models. None where it is not known: a library that was not installed from files of its own."""
    digest = hashlib.sha256(f"{sys.version}\n{package_digest()}".encode())
    for name in _LIBRARIES:
        try:
            found = Distribution.from_name(name)
        except PackageNotFoundError:
            continue
        files = found.read_text("RECORD")  # their names and digests
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        if files is None or origin.get("dir_info", {}).get("editable"):
            return None
        digest.update(f"\n{name} {files}".encode())
    return digest.hexdigest()


def _entries(folders: Sequence[Path], now: float) -> Iterator[list[Any] | None]:
    """Each name in the folders, and in theirs, with what tells whether its bytes are the same; None
    for a file that may change again without a trace."""
    for folder in folders:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            yield _entry(entry, now, whole=True)
            if entry.is_dir():
                for inner in sorted(os.scandir(entry), key=lambda entry: entry.name):
                    yield _entry(inner, now, whole=False)


def _entry(entry: "os.DirEntry[str]", now: float, *, whole: bool) -> list[Any] | None:
    name = ascii(entry.path)
    if not entry.name.endswith(READ):
        return [name]
    found = entry.stat()
    if whole and stat.S_ISREG(found.st_mode) and found.st_size < REMEMBERED_BYTES:
        return [name, hashlib.sha256(Path(entry.path).read_bytes()).hexdigest()]
    return [name, state_of(found)] if is_settled(found, now) else None
