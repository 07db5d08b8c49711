"""Which shards there are: inputs listed, files inspected, big ones cut.

The cut is a function of the files and the layout settings alone, never of the cluster, so a run
can be resumed with more workers.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, TypeAlias

import pyarrow as pa

from batch_scorer import formats
from batch_scorer.config import Config
from batch_scorer.errors import InputError, ShardError, ShardReason, StorageError
from batch_scorer.formats.shape import shape_of
from batch_scorer.inputs.arrow_files import open_arrow
from batch_scorer.inputs.files import BYTES_PER_TOKEN, open_parquet, scan_lines
from batch_scorer.inputs.sources import FileKind, kind_of, list_inputs
from batch_scorer.records import SCALAR, Layout, Outputs, Receipt, Shard, Source, Status
from batch_scorer.records.digest import digest_of
from batch_scorer.storage import Store, in_threads, open_store

log = logging.getLogger("batch_scorer")

_SAMPLE_ROWS = 32
_SAMPLE_BYTES = 1 << 20
_INSPECTORS = 16
_NAMED = 20
"""Files in a line of the log."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """What the plan knows of one file. `row_groups` is (rows, estimated tokens) of each, or of each
    record batch, or of each run of `lines` where there are lines; a JSON array counts as one.
    `lost_types` names the columns whose Parquet type the output cannot have."""

    source: Source
    schema: pa.Schema
    layout: Layout
    row_groups: tuple[tuple[int, int], ...]
    lines: formats.Lines | None = None
    lost_types: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(rows for rows, _ in self.row_groups)

    @property
    def has_groups(self) -> bool:
        kind = kind_of(self.source.key)
        return kind is not None and kind.has_groups


@dataclass(frozen=True, slots=True)
class Plan:
    """All work of a run: what will be scored, and what cannot be, with the reason.

    `aside` are inputs by key that are there but were not looked at; `skipped` are the URLs of files
    beside the inputs that are none.
    """

    files: list[InputFile]
    shards: list[Shard]
    failed: list[Receipt]
    aside: Mapping[str, Source] = field(default_factory=dict)
    skipped: Sequence[str] = ()

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
    listing = list_inputs(config)
    listed = listing.found
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
    _warn(files, listing.skipped)
    return Plan(files, shards, failed, aside, listing.skipped)


def _warn(files: Sequence[InputFile], skipped: Sequence[str]) -> None:
    """What of the inputs will not be in the output."""
    if skipped:
        more = f" and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
        log.info("not read: %s%s", ", ".join(skipped[:_NAMED]), more)
    for lost in sorted({file.lost_types for file in files if file.lost_types}):
        (first, *others) = [file.source.url for file in files if file.lost_types == lost]
        more = f" and {len(others)} more files" if others else ""
        log.warning(
            "%s%s: %s: the values are kept, but not their type in Parquet",
            first,
            more,
            "; ".join(lost),
        )


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
    key, suffix = file.source.key, ".parquet"
    stem = key[: -len(suffix)] if key.lower().endswith(suffix) else key
    for first_row, num_rows, groups, skip_rows, tokens in ranges or [(0, 0, (0, 0), 0, 0)]:
        rows = "" if whole else f".rows{first_row}-{first_row + num_rows}"
        yield Shard(
            source=file.source,
            layout=file.layout,
            first_row=first_row,
            num_rows=num_rows,
            row_groups=groups if file.has_groups else None,
            skip_rows=skip_rows,
            estimated_tokens=tokens,
            output_key=f"{stem}{rows}{suffix}",
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


def _inspect(source: Source, config: Config, outputs: Outputs) -> InputFile | Receipt | None:
    store = open_store(source.root, config.store_options)
    kind = kind_of(source.key)
    try:
        if kind is FileKind.PARQUET:
            return _inspect_parquet(store, source, config, outputs)
        if kind is FileKind.ARROW:
            return _inspect_arrow(store, source, config, outputs)
        return _inspect_lines(store, source, config, outputs)
    except ShardError as error:
        return Receipt.of_file(source, Status.FAILED, error.reason, error.detail)
    except StorageError as error:
        return Receipt.of_file(source, Status.FAILED, ShardReason.STORE_FAILED, str(error))


def _inspect_lines(
    store: Store, source: Source, config: Config, outputs: Outputs
) -> InputFile | None:
    scanned = scan_lines(store, source, config.shard_rows, config.shard_tokens)
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
    return InputFile(source, schema, layout, tuple(groups), lost_types=formats.lost_types(file))


def _inspect_arrow(store: Store, source: Source, config: Config, outputs: Outputs) -> InputFile:
    try:
        with open_arrow(store, source) as file:
            schema = formats.stored_schema(file.schema)
            filled = (batch for batch in file.batches() if batch.num_rows)
            first = next(filled, None)
            sample = schema.empty_table()
            if first is not None:
                rows = pa.Table.from_batches([first.slice(0, _SAMPLE_ROWS)])
                sample = formats.as_stored(rows)
            layout = _layout(schema, sample, config, outputs)
            groups = []
            for batch in file.batches(columns=formats.columns_needed(layout)):
                batch.validate(full=True)  # a torn file ends the process that reads it
                groups.append((batch.num_rows, batch.nbytes // BYTES_PER_TOKEN))
    except (pa.ArrowException, OSError) as error:
        raise ShardError(ShardReason.UNREADABLE_FILE, f"not readable as Arrow: {error}") from error
    return InputFile(source, schema, layout, tuple(groups))


def _layout(schema: pa.Schema, sample: pa.Table, config: Config, outputs: Outputs) -> Layout:
    layout = formats.detect(
        schema,
        sample,
        format=config.format,
        columns=config.columns,
        text_style=config.text_style,
    )
    added = shape_of(layout.format).added_columns(config.column_prefix, config.over_length, outputs)
    taken = sorted(set(added) & set(schema.names))
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
