"""Which shards there are: inputs listed, files inspected, big ones cut.

The cut is a function of the files and the layout settings alone, never of the cluster, so a run
can be resumed with more workers.
"""

import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from posixpath import commonpath
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer import formats
from batch_scorer.columns import SCALAR, Outputs, added_columns
from batch_scorer.commits import Receipt, Shard, Source, Status
from batch_scorer.config import Config
from batch_scorer.errors import ConfigError, InputError, ShardError, ShardReason, StorageError
from batch_scorer.fingerprint import digest_of
from batch_scorer.records import Layout, RowError
from batch_scorer.storage import (
    AccessDenied,
    ObjectInfo,
    ObjectMissing,
    Store,
    glob_pattern,
    in_threads,
    is_remote,
    open_store,
)

PARQUET = (".parquet",)
JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson")
BYTES_PER_TOKEN = 4
"""Of English text, roughly; only for estimates."""

log = logging.getLogger("batch_scorer")

_SAMPLE_ROWS = 32
_SAMPLE_BYTES = 1 << 20
_STREAM_BYTES = 1 << 22
_BATCH_ROWS = 1024
_WHOLE_BYTES = 1 << 22
"""A file up to this size, a few shards at most, is read in one request and not in one for each
column and footer: 3 for a shard of its own instead of 23 (five leaf columns)."""
_INSPECTORS = 16


@dataclass(frozen=True, slots=True)
class InputFile:
    """What the plan knows of one file. `row_groups` is (rows, estimated tokens) of each, and of
    each run of `lines` where there are lines; a JSON array counts as one."""

    source: Source
    schema: pa.Schema
    layout: Layout
    row_groups: tuple[tuple[int, int], ...]
    lines: formats.Lines | None = None

    @property
    def num_rows(self) -> int:
        return sum(rows for rows, _ in self.row_groups)

    @property
    def is_parquet(self) -> bool:
        return self.source.key.endswith(PARQUET)


@dataclass(frozen=True, slots=True)
class Plan:
    """All work of a run: what will be scored, and what cannot be, with the reason.

    `aside` are inputs by key that are there but were not looked at.
    """

    files: list[InputFile]
    shards: list[Shard]
    failed: list[Receipt]
    aside: Mapping[str, Source] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, str | None]:
        """The entity tags of all inputs that are there, by key; None for one that failed."""
        found: dict[str, str | None] = dict.fromkeys(receipt.input for receipt in self.failed)
        sources = [*self.aside.values(), *(file.source for file in self.files)]
        return found | {source.key: source.version.etag for source in sources}

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    @property
    def estimated_tokens(self) -> int:
        return sum(shard.estimated_tokens for shard in self.shards)

    def digest(self, fingerprint: str, column_prefix: str) -> str:
        """Digest of all identities: equal plans do equal work."""
        return digest_of([shard.identity(fingerprint, column_prefix) for shard in self.shards])


Choice: TypeAlias = Callable[[Source, datetime], bool | None]
"""Of an input file and the time of its last change: whether it is planned (True), set aside
(False), or passed over as if it were not there (None)."""


def make_plan(config: Config, outputs: Outputs = SCALAR, choose: Choice | None = None) -> Plan:
    """List and inspect the inputs and cut them into shards, in the order of their keys.

    Raises InputError if there is nothing to score at all. A file that cannot be used is a failed
    receipt; the others go on. With `choose` only some are looked at, perhaps none.
    """
    files: list[InputFile] = []
    failed: list[Receipt] = []
    shared: dict[Any, Any] = {}
    listed = _listed(config)
    sources = [source for source, changed in listed if choose is None or choose(source, changed)]
    aside: dict[str, Source] = {}
    if choose is not None:
        aside = {s.key: s for s, changed in listed if choose(s, changed) is False}
    for found in in_threads(lambda s: _inspect(s, config, outputs), sources, _INSPECTORS):
        if isinstance(found, InputFile):
            files.append(_with_shared_parts(found, shared))
        elif found is not None:
            failed.append(found)
    if not files and not failed and choose is None:
        raise InputError(f"{', '.join(config.inputs)}: all files are empty")
    if not files and failed:
        first = failed[0]
        more = f"\n({len(failed) - 1} more files fail too)" if len(failed) > 1 else ""
        raise InputError(f"{first.input}: {first.detail}{more}")
    shards = [
        shard for file in files for shard in cut(file, config.shard_rows, config.shard_tokens)
    ]
    _refuse_collisions(shards)
    pa.default_memory_pool().release_unused()  # it keeps some 14 MB for each thread that has read
    return Plan(files, shards, failed, aside)


def _with_shared_parts(file: InputFile, shared: dict[Any, Any]) -> InputFile:
    """The file, with one schema and layout for all files that have equal ones: a plan of as many
    files as shards takes 1.6 kB each, instead of 5.6."""
    schema = file.schema.remove_metadata()
    key = (file.layout.format, tuple(file.layout.columns.items()), file.layout.text_style)
    return replace(
        file,
        schema=shared.setdefault(schema, schema),
        layout=shared.setdefault(key, file.layout),
    )


def cut(file: InputFile, shard_rows: int, shard_tokens: int) -> Iterator[Shard]:
    """Cut a file at row groups, and inside a row group that alone is too large.

    A file that fits is one shard under its own name; an empty file is one empty shard.
    """
    ranges = list(_ranges(file.row_groups, shard_rows, shard_tokens))
    whole = len(ranges) <= 1
    stem = file.source.key.removesuffix(".parquet")
    for first_row, num_rows, groups, skip_rows, tokens in ranges or [(0, 0, (0, 0), 0, 0)]:
        suffix = "" if whole else f".rows{first_row}-{first_row + num_rows}"
        yield Shard(
            source=file.source,
            layout=file.layout,
            first_row=first_row,
            num_rows=num_rows,
            row_groups=groups if file.is_parquet else None,
            skip_rows=skip_rows,
            estimated_tokens=tokens,
            output_key=f"{stem}{suffix}.parquet",
            lines=file.lines and file.lines.part(*groups),
        )


def _ranges(
    row_groups: tuple[tuple[int, int], ...], shard_rows: int, shard_tokens: int
) -> Iterator[tuple[int, int, tuple[int, int], int, int]]:
    """(first row, rows, row groups [start, stop), rows to skip in the first, tokens)."""
    start_group, first_row, rows, tokens = 0, 0, 0, 0
    for group, (group_rows, group_tokens) in enumerate(row_groups):
        if rows and (rows + group_rows > shard_rows or tokens + group_tokens > shard_tokens):
            yield first_row, rows, (start_group, group), 0, tokens
            start_group, first_row, rows, tokens = group, first_row + rows, 0, 0
        if group_rows > shard_rows or group_tokens > shard_tokens:
            pieces = max(-(-group_rows // shard_rows), -(-group_tokens // shard_tokens))
            step = max(1, -(-group_rows // pieces))
            for skip in range(0, group_rows, step):
                part = min(step, group_rows - skip)
                part_tokens = group_tokens * part // group_rows
                yield first_row + skip, part, (group, group + 1), skip, part_tokens
            start_group, first_row = group + 1, first_row + group_rows
        else:
            rows, tokens = rows + group_rows, tokens + group_tokens
    if rows:
        yield first_row, rows, (start_group, len(row_groups)), 0, tokens


def list_sources(config: Config) -> list[Source]:
    """All input files, sorted by key; keys are relative to the longest common folder.

    Raises InputError for an input that is not there or holds no files that can be scored.
    """
    return [source for source, _ in _listed(config)]


def _listed(config: Config) -> list[tuple[Source, datetime]]:
    """The same, with the times of their last changes."""
    found = [(root, info) for spec in config.inputs for root, info in _expand(spec, config)]
    output = _absolute(config.output)
    roots = {root for root, _ in found}
    if output in roots:
        raise ConfigError(f"output {config.output} is the input folder; name another one")
    base = _common_root(roots)
    urls = {f"{root.rstrip('/')}/{info.key}": (root, info) for root, info in found}
    sources = []
    for url, (root, info) in sorted(urls.items()):
        if url.startswith(f"{output}/"):
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
    except ObjectMissing as error:
        what = "bucket" if is_remote(root) else "file or folder"
        raise InputError(f"{root}: no such {what}") from error
    except AccessDenied as error:
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


def _inspect(source: Source, config: Config, outputs: Outputs) -> InputFile | Receipt | None:
    store = open_store(source.root, config.store_options)
    try:
        if source.key.endswith(PARQUET):
            return _inspect_parquet(store, source, config, outputs)
        return _inspect_json(store, source, config, outputs)
    except ShardError as error:
        return Receipt.of_file(source, Status.FAILED, error.reason, error.detail)
    except StorageError as error:
        return Receipt.of_file(source, Status.FAILED, ShardReason.STORE_FAILED, str(error))


def _inspect_json(
    store: Store, source: Source, config: Config, outputs: Outputs
) -> InputFile | None:
    scanned = scan_json(store, source, config.shard_rows, config.shard_tokens)
    if scanned is None:
        lines = None
        data = store.read_whole(source.key, source.version, source.size_bytes)
        table, _ = formats.read_json_table(data, source.key)
        sizes = [(table.num_rows, source.size_bytes // BYTES_PER_TOKEN)]
    else:
        lines, table = scanned
        sizes = [(run.num_rows, (run.stop - run.start) // BYTES_PER_TOKEN) for run in lines.runs]
    if table.num_rows == 0:
        log.warning("%s holds no rows; skipped", source.url)
        return None
    layout = _layout(table.schema, table.slice(0, _SAMPLE_ROWS), config, outputs)
    return InputFile(source, table.schema, layout, tuple(sizes), lines)


def scan_json(
    store: Store, source: Source, max_rows: int, max_tokens: int
) -> tuple[formats.Lines, pa.Table] | None:
    """`formats.scan_lines` of a stored file."""
    with _open_stream(store, source) as file:
        return formats.scan_lines(
            file, source.key, max_rows=max_rows, max_bytes=max_tokens * BYTES_PER_TOKEN
        )


def read_json(
    store: Store, source: Source, lines: formats.Lines
) -> tuple[pa.Table, dict[int, RowError]]:
    """Some of a file's lines as rows, and which of them are no JSON."""
    if not lines.is_gzip:
        data = store.read_range(source.key, source.version, lines.start, lines.stop)
    else:
        with _open_stream(store, source) as file:
            data = formats.unpack_lines(file, source.key, lines)
    return formats.read_lines(data, source.key, lines)


def _open_stream(store: Store, source: Source) -> io.BufferedReader:
    return store.open(source.key, source.size_bytes, source.version, _STREAM_BYTES)


def _inspect_parquet(store: Store, source: Source, config: Config, outputs: Outputs) -> InputFile:
    try:
        file = open_parquet(store, source, _SAMPLE_BYTES)
        schema = file.schema_arrow
        sample = (
            next(file.iter_batches(_SAMPLE_ROWS, use_threads=False), None)
            if file.metadata.num_rows
            else None
        )
    except (pa.ArrowException, OSError) as error:
        raise ShardError(
            ShardReason.UNREADABLE_FILE, f"not readable as Parquet: {error}"
        ) from error
    table = pa.Table.from_batches([sample]) if sample else schema.empty_table()
    layout = _layout(schema, table, config, outputs)
    needed = tuple(formats.columns_needed(layout))
    groups = []
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        columns = (group.column(i) for i in range(group.num_columns))
        needed_bytes = sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema.split(".")[0] in needed
        )
        groups.append((group.num_rows, needed_bytes // BYTES_PER_TOKEN))
    return InputFile(source, schema, layout, tuple(groups))


def open_parquet(
    store: Store,
    source: Source,
    buffer_bytes: int = 0,
    metadata: pq.FileMetaData | None = None,
) -> pq.ParquetFile:
    """The Parquet file behind `source`, every read pinned to the planned version.

    A small one is read at once. Of others each column of a row group is a request; with
    `buffer_bytes` it is read bit by bit. `metadata` spares reading the footer again.
    Not pre-buffered: Arrow's IO threads would do the reading, which aborted 2 of 1600 short
    processes as they ended (0 of 1600 without).
    """
    file: io.BufferedReader | pa.BufferReader
    if source.size_bytes <= _WHOLE_BYTES:
        file = pa.BufferReader(store.read_whole(source.key, source.version, source.size_bytes))
    else:
        file = store.open(source.key, source.size_bytes, source.version)
    return pq.ParquetFile(file, metadata=metadata, pre_buffer=False, buffer_size=buffer_bytes)


def read_rows(
    store: Store,
    source: Source,
    row_groups: tuple[int, int],
    skip_rows: int,
    num_rows: int,
    columns: list[str] | None = None,
) -> pa.Table:
    """Rows of a Parquet file, out of the row groups [start, stop); of all columns, or of some.

    A part of a row group is decoded from its beginning up to there, batch by batch: a group may
    hold a million rows. (1,600 rows from the middle of 103,428: 14 MB and 0.12 s of CPU; the whole
    group at once took 427 MB and 0.24 s.)
    """
    file = open_parquet(store, source)
    groups = list(range(*row_groups))
    if num_rows == sum(file.metadata.row_group(group).num_rows for group in groups):
        return file.read_row_groups(groups, columns=columns, use_threads=False)
    if source.size_bytes > _WHOLE_BYTES:
        file = open_parquet(store, source, _STREAM_BYTES, file.metadata)
    batches: list[pa.RecordBatch] = []
    missing = num_rows
    for batch in file.iter_batches(_BATCH_ROWS, groups, columns, use_threads=False):
        part = batch.slice(skip_rows, missing)
        skip_rows -= min(skip_rows, batch.num_rows)
        if part.num_rows:
            batches.append(part)
            missing -= part.num_rows
        if not missing:
            break
    return pa.Table.from_batches(batches, file.read_row_groups([], columns=columns).schema)


def _layout(schema: pa.Schema, sample: pa.Table, config: Config, outputs: Outputs) -> Layout:
    layout = formats.detect(
        schema,
        sample,
        format=config.format,
        columns=config.columns,
        text_style=config.text_style,
    )
    taken = sorted(
        set(added_columns(layout.format, config.column_prefix, config.over_length, outputs))
        & set(schema.names)
    )
    if taken:
        raise ShardError(
            ShardReason.COLUMN_COLLISION,
            f"the file already has {', '.join(taken)}; choose a name for the new columns, "
            "e.g. --column-prefix rm_",
        )
    return layout


def _refuse_collisions(shards: list[Shard]) -> None:
    seen: dict[str, Shard] = {}
    for shard in shards:
        other = seen.setdefault(shard.output_key, shard)
        if other is not shard:
            raise InputError(
                f"{other.source.url} and {shard.source.url} would both be written to "
                f"{shard.output_key}; score them to different outputs"
            )
