"""Which files the inputs name."""

import os
from collections.abc import Iterable, Iterator
from datetime import datetime
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
    glob_pattern,
    is_remote,
    open_store,
)

PARQUET = (".parquet",)
JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson")


def list_inputs(config: Config) -> list[tuple[Source, datetime]]:
    """All input files and the times of their last changes, sorted by key.

    Keys are relative to the longest common folder. Raises InputError for an input that is not there
    or holds no files that can be scored, ConfigError for an output that is an input's folder.
    """
    found = [(root, info) for spec in config.inputs for root, info in _expand(spec, config)]
    output = _absolute(config.output) if config.output else None
    roots = {root for root, _ in found}
    if output in roots:
        raise ConfigError(f"output {config.output} is the input folder; name another one")
    base = _common_root(roots)
    urls = {f"{root.rstrip('/')}/{info.key}": (root, info) for root, info in found}
    sources = []
    for url, (root, info) in sorted(urls.items()):
        if output and url.startswith(f"{output}/"):
            continue
        key_root = base or root
        key = url.removeprefix(key_root.rstrip("/") + "/")
        source = Source(key_root, key, info.size_bytes, info.version)
        sources.append((source, info.last_modified))
    if not sources:
        raise InputError(f"{', '.join(config.inputs)}: nothing to score there")
    return sources


def _expand(spec: str, config: Config) -> Iterator[tuple[str, ObjectInfo]]:
    """The files that one input names, with the root their keys are relative to."""
    url = _absolute(spec)
    if any(mark in url for mark in "*?["):
        folder, pattern = _split_glob(url)
        matches = glob_pattern(pattern)
        hits = [(folder, i) for i in _list(folder, config) if matches.fullmatch(i.key)]
        problem = "no file matches"
    else:
        if url.endswith(PARQUET + JSON):
            folder, _, name = url.rpartition("/")
            try:
                yield folder, open_store(folder, config.store_options).head(name)
                return
            except ObjectMissing:
                pass  # a folder may have such a name (Spark writes them)
        elif not is_remote(url) and Path(url).is_file():
            raise InputError(f"{spec}: unknown file type; {_suffixes()} are read")
        hits = [(url, info) for info in _list(url, config)]
        problem = f"holds no {_suffixes()} files"
    hits = [(r, i) for r, i in hits if i.key.endswith(PARQUET + JSON) and not _is_hidden(i.key)]
    if not hits:
        raise InputError(f"{spec}: {problem}")
    yield from hits


def _list(root: str, config: Config) -> Iterable[ObjectInfo]:
    try:
        return list(open_store(root, config.store_options).list())
    except (AccessDenied, PlaceMissing) as error:
        if isinstance(error, PlaceMissing) and not is_remote(root):
            raise InputError(f"{root}: no such file or folder") from error
        raise InputError(str(error)) from error


def _split_glob(url: str) -> tuple[str, str]:
    parts = url.split("/")
    first = next(i for i, part in enumerate(parts) if any(mark in part for mark in "*?["))
    return "/".join(parts[:first]) or "/", "/".join(parts[first:])


def _absolute(spec: str) -> str:
    return spec.rstrip("/") if is_remote(spec) else os.path.abspath(os.path.expanduser(spec))


def _common_root(roots: set[str]) -> str | None:
    """The deepest folder above all roots; None where they lie in different stores."""
    if len(roots) == 1:
        return next(iter(roots))
    places = {root.split("/")[2] if is_remote(root) else "" for root in roots}
    schemes = {root.split("://")[0] if is_remote(root) else "" for root in roots}
    if len(places) > 1 or len(schemes) > 1:
        return None
    if schemes == {""}:
        return commonpath(roots)
    scheme = next(iter(schemes))
    return f"{scheme}://{commonpath([root.split('://', 1)[1] for root in roots])}"


def _is_hidden(key: str) -> bool:
    return any(part.startswith(("_", ".")) for part in key.split("/"))


def _suffixes() -> str:
    return ", ".join(PARQUET + JSON)
