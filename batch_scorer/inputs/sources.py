"""Which files the inputs name."""

import os
import re
import stat
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from posixpath import commonpath

from batch_scorer.config import Config
from batch_scorer.errors import ConfigError, InputError
from batch_scorer.records import Source
from batch_scorer.storage import (
    AccessDenied,
    ObjectInfo,
    ObjectMissing,
    PlaceMissing,
    Unusable,
    Version,
    glob_matches,
    is_remote,
    open_store,
    pinned,
    place_of,
)

_GLOB_MARKS = "*?["


class FileKind(StrEnum):
    """What a file's name says of its contents."""

    PARQUET = "parquet"
    JSON = "json"
    CSV = "csv"
    TSV = "tsv"
    ARROW = "arrow"

    @property
    def has_groups(self) -> bool:
        """Whether parts of it can be read by their number: row groups, record batches."""
        return self in (FileKind.PARQUET, FileKind.ARROW)


SUFFIXES = {
    ".parquet": FileKind.PARQUET,
    ".jsonl": FileKind.JSON,
    ".json": FileKind.JSON,
    ".ndjson": FileKind.JSON,
    ".csv": FileKind.CSV,
    ".tsv": FileKind.TSV,
    ".arrow": FileKind.ARROW,
    ".feather": FileKind.ARROW,
}
"""In upper case or lower case."""
_PACKED = (".gz", ".zst")
"""What may follow the suffix of a file of lines."""
_READ = f"{', '.join(SUFFIXES)} (of lines also {', '.join(_PACKED)})"

_NOT_DATA = re.compile(r"(?:dataset_infos?|dataset_dict|state)\.json|cache-.+\.arrow")
"""What `datasets` puts beside the rows: descriptions, and results that it keeps for later calls,
which hold the same rows once more. Where a file is named by itself, it is data."""
_HIDDEN = re.compile(r"(?:^|/)(?:\.|_[^/=]*(?:/|$))")
"""Parts of a path that begin with a dot, or with an underscore and hold no equals sign."""


def kind_of(key: str) -> FileKind | None:
    """The kind of the file with this name; None: it is not read."""
    name, packing = key.lower(), ""
    if name.endswith(_PACKED):
        name, _, packing = name.rpartition(".")
    kind = SUFFIXES.get(name[dot:]) if (dot := name.rfind(".")) >= 0 else None
    return None if packing and kind and kind.has_groups else kind


@dataclass(frozen=True, slots=True)
class Listing:
    """The input files and the times of their last changes, sorted by key; the URLs of other files
    in their folders, which are not read; and what may be or hold data and cannot be used, with the
    reason."""

    found: list[tuple[Source, datetime]]
    skipped: list[str] = field(default_factory=list)
    unusable: list[tuple[Source, str]] = field(default_factory=list)


def list_inputs(config: Config) -> Listing:
    """All input files but those that `exclude` names.

    Keys are relative to the longest common folder. Raises InputError for an input that is not there
    or holds no files that can be scored, ConfigError for an output that is an input's folder.
    """
    skipped: set[str] = set()
    unusable: dict[str, str] = {}
    expanded = [_expand(spec, config, skipped, unusable) for spec in config.inputs]
    output = _absolute(config.output) if config.output else None
    roots = {root for root, _ in expanded}
    if output in roots:
        raise ConfigError(f"output {config.output} is the input folder; name another one")
    base = _common_root(roots)

    def below(url: str) -> str:
        """The key of a file; without a common root its URL stands for it, as these are sorted."""
        return url if base is None else url.removeprefix(f"{base.rstrip('/')}/")

    named: dict[str, tuple[Source, datetime]] = {}
    for root, infos in expanded:
        folder = root.rstrip("/")
        while infos:  # there may be a million: what is not needed any more is let go
            info = infos.pop()
            url = f"{folder}/{info.key}"
            if not (output and url.startswith(f"{output}/")):
                name = info.key if root == base else below(url)
                key = info.key if base is None else name
                source = Source(base or root, key, info.size_bytes, info.version)
                named[name] = (source, info.last_modified)
    others = sorted(url for url in skipped if below(url) not in named)
    sources = [named.pop(name) for name in sorted(named)]
    if not sources:
        raise InputError(f"{', '.join(config.inputs)}: nothing to score there")
    return Listing(
        sources,
        [url for url in others if not (output and url.startswith(f"{output}/"))],
        [
            (Source(*_split(url, base), 0, Version("")), problem)
            for url, problem in sorted(unusable.items())
            if not (output and f"{url}/".startswith(f"{output}/"))
        ],
    )


def _split(url: str, base: str | None) -> tuple[str, str]:
    """Root and key."""
    root = base if base is not None else url.rpartition("/")[0]
    return root, url.removeprefix(root.rstrip("/") + "/")


def _expand(
    spec: str, config: Config, skipped: set[str], unusable: dict[str, str]
) -> tuple[str, list[ObjectInfo]]:
    """The files that one input names, after the root their keys are relative to; adds the URLs of
    the others beside them to `skipped`, and of what cannot be used to `unusable`."""
    try:
        url = pinned(_absolute(spec))
    except (AccessDenied, PlaceMissing) as error:
        raise InputError(str(error)) from error
    file = _file(spec, url, config)
    entries: list[ObjectInfo | Unusable]
    if file is not None:
        root, entries, problem = url.rpartition("/")[0] or "/", [file], ""
    elif _has_marks(url):
        root, entries = _matching(url, config)
        problem = "no file matches"
    else:
        root, entries = url, _list(url, config)
        problem = f"holds no {_READ} files"
    listed = [entry for entry in entries if isinstance(entry, ObjectInfo)]
    missed = [entry for entry in entries if isinstance(entry, Unusable)]
    hits = listed
    if config.exclude:
        keys = [entry.key for entry in entries]
        excluded = {key for pattern in config.exclude for key in glob_matches(pattern, keys)}
        hits = [info for info in listed if info.key not in excluded]
        missed = [entry for entry in missed if entry.key not in excluded]
    lost = [entry for entry in missed if _may_be_data(entry)]
    data, others = hits, list[str]()
    if file is None:
        data = [info for info in hits if _is_data(info.key)]
        others = [info.key for info in hits if not _is_data(info.key)]
    if not data and file is None:
        if lost:
            problem = f"{lost[0].key}: {lost[0].problem}"
        is_excluded = bool(listed) and not hits
        raise InputError(f"{spec}: {'every file is excluded' if is_excluded else problem}")
    folder = root.rstrip("/")
    unusable.update((f"{folder}/{entry.key}", entry.problem) for entry in lost)
    others += [entry.key for entry in missed if entry not in lost]
    skipped.update(f"{folder}/{key}" for key in others if _is_shown(key))
    return root, data


def _file(spec: str, url: str, config: Config) -> ObjectInfo | None:
    """The file of this name, if there is one. Raises InputError where it is of no kind we read."""
    found = None
    if not is_remote(url) and _is_special(url):
        raise InputError(f"{spec}: is a device, a pipe or a socket")
    if kind_of(url) or _has_marks(url):
        folder, _, name = url.rpartition("/")
        found = _head(folder, name, config)
    is_there = found is not None or (not is_remote(url) and Path(url).is_file())
    if is_there and kind_of(url) is None:
        raise InputError(f"{spec}: unknown file type; {_READ} are read")
    return found


def _is_special(path: str) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _matching(url: str, config: Config) -> tuple[str, list[ObjectInfo | Unusable]]:
    """What a folder of this very name holds, or what the pattern matches; and the root of both."""
    if listed := _list_if_there(url, config):
        return url, listed
    root, pattern = _split_glob(url)
    listed = _list(root, config)
    found = glob_matches(pattern, (entry.key for entry in listed))
    return root, [
        entry
        for entry in listed
        if entry.key in found
        or (isinstance(entry, Unusable) and entry.is_folder and _leads_below(pattern, entry.key))
    ]


def _leads_below(pattern: str, folder: str) -> bool:
    """Whether a glob could match something in this folder."""
    parts, depth = pattern.split("/"), folder.count("/") + 1
    deep = next((i for i, part in enumerate(parts[:depth]) if "**" in part), None)
    if deep is None and len(parts) <= depth:
        return False
    above = parts[:depth] if deep is None else [*parts[:deep], "**"]
    return bool(glob_matches("/".join(above), [folder]))


def _may_be_data(entry: Unusable) -> bool:
    return not _is_hidden(entry.key) and (entry.is_folder or _is_data(entry.key))


def _head(folder: str, name: str, config: Config) -> ObjectInfo | None:
    """The file, if there is one; a folder may have such a name (Spark writes them)."""
    try:
        return open_store(folder or "/", config.store_options).head(name)
    except ObjectMissing:
        return None
    except AccessDenied:  # S3 says so of what is not there to those who may not list
        if not _has_marks(name):
            raise
        return None


def _list(root: str, config: Config) -> list[ObjectInfo | Unusable]:
    try:
        return list(open_store(root, config.store_options).entries())
    except (AccessDenied, PlaceMissing) as error:
        if isinstance(error, PlaceMissing) and not is_remote(root):
            raise InputError(f"{root}: no such file or folder") from error
        raise InputError(str(error)) from error


def _list_if_there(root: str, config: Config) -> list[ObjectInfo | Unusable]:
    """What a folder holds whose own name has glob marks; nothing if there is no such folder."""
    if not is_remote(root):
        return _list(root, config) if Path(root).is_dir() else []
    try:
        return list(open_store(root, config.store_options).entries())
    except (AccessDenied, ObjectMissing):
        return []


def _has_marks(url: str) -> bool:
    return any(mark in url for mark in _GLOB_MARKS)


def _split_glob(url: str) -> tuple[str, str]:
    """The folder above the first glob mark, and the pattern below it. A part of the path with
    marks in its name that is there as it is written is no pattern."""
    parts = url.split("/")
    patterns = (i for i, part in enumerate(parts) if _has_marks(part) and not _is_there(parts, i))
    first = next(patterns, len(parts) - 1)
    return "/".join(parts[:first]) or "/", "/".join(parts[first:])


def _is_there(parts: list[str], last: int) -> bool:
    folder = "/".join(parts[: last + 1])
    return last < len(parts) - 1 and not is_remote(folder) and Path(folder).is_dir()


def _absolute(spec: str) -> str:
    return spec.rstrip("/") if is_remote(spec) else os.path.abspath(os.path.expanduser(spec))


def _common_root(roots: set[str]) -> str | None:
    """The deepest folder above all roots; None where they lie in different stores."""
    if len(roots) == 1:
        return next(iter(roots))
    places = {place_of(root) for root in roots}
    if len(places) != 1:
        return None
    (place,) = places
    below = commonpath([f"/{root.removeprefix(place).lstrip('/')}" for root in roots])
    return (place + below).rstrip("/") or "/"


def _is_data(key: str) -> bool:
    is_known = _NOT_DATA.fullmatch(key.rpartition("/")[2].lower())
    return kind_of(key) is not None and not is_known and not _is_hidden(key)


def _is_shown(key: str) -> bool:
    """Whether a file that is not read is named: all but hidden ones, unless they look like data."""
    folder, _, name = key.rpartition("/")
    return not _is_hidden(key) or (kind_of(name) is not None and not _is_hidden(folder))


def _is_hidden(key: str) -> bool:
    """As Spark has it: a folder `_day=2026-11-28` is a part of the data."""
    return _HIDDEN.search(key) is not None
