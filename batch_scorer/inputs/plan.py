"""Which shards there are: inputs listed, files inspected, big ones cut.

The cut is a function of the files and the layout settings alone, never of the cluster, so a run
can be resumed with more workers.
"""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from batch_scorer import formats
from batch_scorer.config import Config
from batch_scorer.errors import InputError, ShardError, ShardReason, StorageError
from batch_scorer.formats.shape import shape_of
from batch_scorer.inputs.arrow_files import open_arrow
from batch_scorer.inputs.files import (
    BYTES_PER_TOKEN,
    batches_of,
    open_parquet,
    read_apart,
    scan_lines,
)
from batch_scorer.inputs.footers import check_footer, doubtful_groups, refuse_more
from batch_scorer.inputs.selection import (
    kept_columns,
    matching_rows,
    refuse_unknown,
    rows_of_bits,
    spread,
)
from batch_scorer.inputs.sources import FileKind, kind_of, list_inputs
from batch_scorer.inputs.where import IntArray, where_of
from batch_scorer.records import (
    SCALAR,
    Families,
    Format,
    Layout,
    Receipt,
    Shard,
    Source,
    Status,
    TextStyle,
    layout_to_json,
)
from batch_scorer.records.digest import digest_of
from batch_scorer.storage import Store, in_threads, open_store

log = logging.getLogger("batch_scorer")

_SAMPLE_ROWS = 32
_SAMPLE_BYTES = 1 << 20
_INSPECTORS = 8
_NAMED = 20
"""Files in a line of the log."""
_ONE_SCORE: Families = {"": SCALAR}


@dataclass(frozen=True, slots=True)
class InputFile:
    """What the plan knows of one file. `row_groups` is (rows, estimated tokens) of each, or of each
    record batch, or of each run of `lines` where there are lines; a JSON array counts as one.
    `lost_types` names the columns whose Parquet type the output cannot have.

    `where` is the expression that rows have to match, and `matching` one bit a row
    (`selection.matching_rows`); None without it. With a `limit` only so many of them are asked for.
    """

    source: Source
    schema: pa.Schema
    layout: Layout
    row_groups: tuple[tuple[int, int], ...]
    lines: formats.Lines | None = None
    lost_types: tuple[str, ...] = ()
    where: str | None = None
    matching: bytes | None = field(default=None, repr=False)
    limit: int | None = None

    @property
    def num_rows(self) -> int:
        return sum(rows for rows, _ in self.row_groups)

    def asked(self) -> range | IntArray:
        """The rows that are asked for, in order."""
        if self.matching is None:
            return range(self.num_rows)[: self.limit]
        return rows_of_bits(self.matching, self.num_rows)[: self.limit]

    @property
    def has_groups(self) -> bool:
        kind = kind_of(self.source.key)
        return kind is not None and kind.has_groups


@dataclass(frozen=True, slots=True)
class Plan:
    """All work of a run: what will be scored, and what cannot be, with the reason.

    `aside` are inputs by key that are there but were not looked at. `not_asked` are the files of
    which no row is asked for, each with its rows; `skipped` are the URLs of files beside the inputs
    that are none.
    """

    files: list[InputFile]
    shards: list[Shard]
    failed: list[Receipt]
    aside: Mapping[str, Source] = field(default_factory=dict)
    not_asked: list[Receipt] = field(default_factory=list)
    skipped: Sequence[str] = ()

    @property
    def inputs(self) -> dict[str, str | None]:
        """The entity tags of all inputs that are there, by key; None for one that failed."""
        found: dict[str, str | None] = dict.fromkeys(receipt.input for receipt in self.failed)
        sources = [*self.aside.values(), *(file.source for file in self.files)]
        return found | {source.key: source.version.etag for source in sources}

    @property
    def num_rows(self) -> int:
        """The rows that are asked for."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def rows_not_asked(self) -> int:
        """The other rows of the files."""
        between = sum(shard.rows_not_asked for shard in self.shards)
        return between + sum(receipt.rows_not_asked for receipt in self.not_asked)

    @property
    def estimated_tokens(self) -> int:
        return sum(shard.estimated_tokens for shard in self.shards)

    def digest(self, fingerprint: str, column_prefix: str, retried: Iterable[str] = ()) -> str:
        """Digest of all identities, and of the reasons for which marked rows are `retried`: equal
        plans do equal work."""
        identities = [shard.identity(fingerprint, column_prefix) for shard in self.shards]
        return digest_of([*identities, *sorted(set(retried))])


Choice: TypeAlias = Callable[[Source, datetime], bool | None]
"""Of an input file and the time of its last change: whether it is planned (True), set aside
(False), or passed over as if it were not there (None)."""


LayoutOf: TypeAlias = Callable[[pa.Schema, pa.Table], Layout]
"""Of a file's schema and its first rows: how its rows are read."""


def make_plan(
    config: Config,
    families: Families = _ONE_SCORE,
    choose: Choice | None = None,
    *,
    beside: str | None = None,
    fields: tuple[str, ...] = (),
) -> Plan:
    """List and inspect the inputs and cut them into shards, in the order of their keys. `families`
    are what the models give, by which the added columns are known. `beside` is
    the field that the model reads beside the conversation (`Prompt.column_beside`), `fields` are
    the columns that a judge's questions show.

    Raises InputError if there is nothing to score at all, and ConfigError for a `where` that is no
    expression or a column to keep or drop that no file has. A file that cannot be used is a failed
    receipt; the others go on. With `choose` only some are looked at, perhaps none.
    """
    if config.where is not None:
        where_of(config.where)  # raises, before any file is read
    files: list[InputFile] = []
    shared: dict[Any, Any] = {}
    listing = list_inputs(config)
    listed = listing.found
    failed = [
        Receipt.of_file(source, Status.FAILED, ShardReason.UNREADABLE_FILE, problem)
        for source, problem in listing.unusable
    ]
    sources = [source for source, changed in listed if choose is None or choose(source, changed)]
    aside: dict[str, Source] = {}
    if choose is not None:
        aside = {s.key: s for s, changed in listed if choose(s, changed) is False}
    layout_of = partial(_layout, config=config, families=families, beside=beside, fields=fields)
    look = partial(_look_apart, config=config, layout_of=layout_of)
    for found in _looked_at(sources, look, shared):
        if isinstance(found, InputFile):
            files.append(found)
        elif found is not None:
            failed.append(found)
    if not files and not failed and choose is None:
        raise InputError(f"{', '.join(config.inputs)}: all files are empty")
    if not files and failed:
        first = failed[0]
        more = f"\n({len(failed) - 1} more files fail too)" if len(failed) > 1 else ""
        # What reads a file for scoring, too, names it within its folder.
        detail = (first.detail or "").removeprefix(f"{first.input.rpartition('/')[2]}: ")
        raise InputError(f"{first.input}: {detail}{more}")
    if files and not aside:  # those aside may have them
        columns = [file.schema.names for file in files]
        refuse_unknown(config.keep_columns, config.drop_columns, columns)
    if config.limit is not None:
        shares = spread(config.limit, [len(file.asked()) for file in files])
        files = [replace(file, limit=n) for file, n in zip(files, shares, strict=True)]
    shards = [
        shard for file in files for shard in cut(file, config.shard_rows, config.shard_tokens)
    ]
    if not shards and files and choose is None:
        raise InputError(f"where: no row of {', '.join(config.inputs)} matches {config.where}")
    used = {shard.source.key for shard in shards}
    unused = [file for file in files if file.source.key not in used]
    names = [(shard.output_key, shard.source) for shard in shards]
    _refuse_collisions(names + [(file.source.key, file.source) for file in unused])
    not_asked = [
        Receipt.of_file(file.source, Status.NOT_ASKED, rows_not_asked=file.num_rows)
        for file in unused
    ]
    _warn(files, listing.skipped)
    return Plan(files, shards, failed, aside, not_asked, listing.skipped)


def _looked_at(
    sources: Sequence[Source],
    look: Callable[[Source], InputFile | Receipt | None],
    shared: dict[Any, Any],
) -> list[InputFile | Receipt | None]:
    """What the plan knows of each file. What the store refused is asked for again after the rest: a
    moment of its trouble does not leave out a file."""

    def looks(at: Sequence[Source]) -> Iterator[InputFile | Receipt | None]:
        for found in in_threads(look, at, _INSPECTORS):
            yield _with_shared_parts(found, shared) if isinstance(found, InputFile) else found

    looked = list(looks(sources))
    refused = [
        place
        for place, found in enumerate(looked)
        if isinstance(found, Receipt) and found.reason is not None and found.reason.may_pass
    ]
    for place in refused:
        log.warning("%s: cannot be read; will be tried again", sources[place].url)
    again = looks([sources[place] for place in refused])
    for place, found in zip(refused, again, strict=True):
        looked[place] = found
    return looked


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
    key = digest_of(layout_to_json(file.layout))
    return replace(
        file,
        schema=shared.setdefault(schema, schema),
        layout=shared.setdefault(key, file.layout),
    )


def cut(file: InputFile, shard_rows: int, shard_tokens: int) -> Iterator[Shard]:
    """Cut the rows that are asked for at row groups, and inside a group that alone is too large.

    A file that fits is one shard under its own name; an empty file is one empty shard. A file of
    which nothing is asked for has none.
    """
    rows = file.asked()
    ends = list(accumulate(num_rows for num_rows, _ in file.row_groups))
    counts = np.diff([0, *(bisect_left(rows, end) for end in ends)]).tolist()
    groups = [
        (asked, tokens * asked // num_rows if num_rows else tokens)
        for asked, (num_rows, tokens) in zip(counts, file.row_groups, strict=True)
    ]
    ranges = list(_ranges(groups, shard_rows, shard_tokens))
    if not file.num_rows:
        ranges = [(0, 0, 0)]
    key, suffix = file.source.key, ".parquet"
    stem = key[: -len(suffix)] if key.lower().endswith(suffix) else key
    for place, num_rows, tokens in ranges:
        first, last = (int(rows[i]) for i in (place, place + num_rows - 1)) if num_rows else (0, -1)
        after = int(rows[place + num_rows]) if place + num_rows < len(rows) else file.num_rows
        start, stop = parts_holding(ends, first, last + 1)
        piece = "" if len(ranges) == 1 else f".rows{first}-{last + 1}"
        yield Shard(
            source=file.source,
            layout=file.layout,
            first_row=first,
            num_rows=num_rows,
            row_groups=(start, stop) if file.has_groups else None,
            skip_rows=first - (ends[start - 1] if start else 0),
            estimated_tokens=tokens,
            output_key=f"{stem}{piece}{suffix}",
            lines=file.lines and file.lines.part(start, stop),
            where=file.where,
            rows_not_asked=after - (first if place else 0) - num_rows,
        )


def parts_holding(ends: Sequence[int], first_row: int, stop_row: int) -> tuple[int, int]:
    """Which parts [start, stop) of a file hold the rows [first_row, stop_row); `ends` has for each
    part the number of rows up to its end."""
    if stop_row <= first_row:
        return 0, 0
    return bisect_right(ends, first_row), bisect_right(ends, stop_row - 1) + 1


def _ranges(
    groups: Sequence[tuple[int, int]], shard_rows: int, shard_tokens: int
) -> Iterator[tuple[int, int, int]]:
    """(first row, rows, tokens) of each shard, out of (rows, tokens) of each row group."""
    first_row, rows, tokens = 0, 0, 0
    for group_rows, group_tokens in groups:
        if rows and (rows + group_rows > shard_rows or tokens + group_tokens > shard_tokens):
            yield first_row, rows, tokens
            first_row, rows, tokens = first_row + rows, 0, 0
        if group_rows > shard_rows or group_tokens > shard_tokens:
            pieces = max(-(-group_rows // shard_rows), -(-group_tokens // shard_tokens))
            step = max(1, -(-group_rows // pieces))
            for skip in range(0, group_rows, step):
                part = min(step, group_rows - skip)
                yield first_row + skip, part, group_tokens * part // group_rows
            first_row += group_rows
        else:
            rows, tokens = rows + group_rows, tokens + group_tokens
    if rows:
        yield first_row, rows, tokens


def _look_apart(source: Source, config: Config, layout_of: LayoutOf) -> InputFile | Receipt | None:
    """`_look`, which may die of the file."""
    try:
        return read_apart(config, source.size_bytes, _look, source, config, layout_of)
    except ShardError as error:
        return Receipt.of_file(source, Status.FAILED, error.reason, error.detail)


def _look(source: Source, config: Config, layout_of: LayoutOf) -> InputFile | Receipt | None:
    """What the plan knows of a file, the rows that match `where` among it."""
    found = _inspect(source, config, layout_of)
    if config.where is None or not isinstance(found, InputFile):
        return found
    where, store = where_of(config.where), open_store(source.root, config.store_options)
    try:
        where.check(found.schema)
        bits = matching_rows(store, source, found.num_rows, where, found.lines, config.read_bounds)
        return replace(found, where=config.where, matching=bits)
    except ShardError as error:
        return Receipt.of_file(source, Status.FAILED, error.reason, error.detail)
    except StorageError as error:
        return Receipt.of_file(source, Status.FAILED, ShardReason.STORE_FAILED, str(error))
    except MemoryError:  # Arrow's is an ArrowException too
        raise
    except (pa.ArrowException, OSError) as error:
        detail = f"where: cannot be read: {error}"
        return Receipt.of_file(source, Status.FAILED, ShardReason.UNREADABLE_FILE, detail)


def _inspect(source: Source, config: Config, layout_of: LayoutOf) -> InputFile | Receipt | None:
    store = open_store(source.root, config.store_options)
    kind = kind_of(source.key)
    most_bytes = config.read_bounds.most_unpacked(source.size_bytes)
    try:
        if kind is FileKind.PARQUET:
            return _inspect_parquet(store, source, layout_of, most_bytes)
        if kind is FileKind.ARROW:
            return _inspect_arrow(store, source, layout_of, most_bytes)
        return _inspect_lines(store, source, config, layout_of)
    except ShardError as error:
        return Receipt.of_file(source, Status.FAILED, error.reason, error.detail)
    except StorageError as error:
        return Receipt.of_file(source, Status.FAILED, ShardReason.STORE_FAILED, str(error))


def _inspect_lines(
    store: Store, source: Source, config: Config, layout_of: LayoutOf
) -> InputFile | None:
    scanned = scan_lines(store, source, config.shard_rows, config.shard_tokens, config.read_bounds)
    if scanned is None:
        lines = None
        data = store.read_whole(source.key, source.version, source.size_bytes)
        table, _ = formats.read_json_table(data, source.key, config.read_bounds)
        sizes = [(table.num_rows, source.size_bytes // BYTES_PER_TOKEN)]
    else:
        lines, table = scanned
        sizes = [(run.num_rows, (run.stop - run.start) // BYTES_PER_TOKEN) for run in lines.runs]
    if not any(rows for rows, _ in sizes):
        log.warning("%s holds no rows; skipped", source.url)
        return None
    layout = layout_of(table.schema, table.slice(0, _SAMPLE_ROWS))
    return InputFile(source, table.schema, layout, tuple(sizes), lines)


def _inspect_parquet(
    store: Store, source: Source, layout_of: LayoutOf, most_bytes: int
) -> InputFile:
    with _parsing("Parquet"):
        file = open_parquet(store, source, _SAMPLE_BYTES)
        check_footer(file.metadata, source.size_bytes, most_bytes)
        schema = file.schema_arrow
        for group, column, batch_rows in doubtful_groups(file.metadata):
            for _ in batches_of(file, [group], [column], batch_rows):
                pass  # it raises at a wrong count
        batches = batches_of(file, range(file.metadata.num_row_groups), None, _SAMPLE_ROWS)
        table = _first_rows(batches, schema)
    layout = layout_of(schema, table)
    metadata = file.metadata
    needed = tuple(f"{name}." for name in formats.columns_needed(layout))
    paths = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
    leaves = [leaf for leaf, path in enumerate(paths) if f"{path}.".startswith(needed)]
    groups = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        needed_bytes = sum(group.column(leaf).total_uncompressed_size for leaf in leaves)
        groups.append((group.num_rows, needed_bytes // BYTES_PER_TOKEN))
    return InputFile(source, schema, layout, tuple(groups), lost_types=formats.lost_types(file))


def _inspect_arrow(store: Store, source: Source, layout_of: LayoutOf, most_bytes: int) -> InputFile:
    with _parsing("Arrow"), open_arrow(store, source) as file:
        schema = formats.stored_schema(file.schema)
        sample = formats.as_stored(_first_rows(file.batches(), file.schema))
        layout = layout_of(schema, sample)
        groups = []
        num_rows = 0
        for batch in file.batches(columns=formats.columns_needed(layout)):
            groups.append((batch.num_rows, batch.nbytes // BYTES_PER_TOKEN))
            num_rows += batch.num_rows
            refuse_more(num_rows, "rows", source.size_bytes, most_bytes)
            refuse_more(batch.nbytes, "unpacked bytes", source.size_bytes, most_bytes)
    return InputFile(source, schema, layout, tuple(groups))


@contextmanager
def _parsing(kind: str) -> Iterator[None]:
    """What is wrong with a file that is none of this kind, as ShardError."""
    try:
        yield
    except MemoryError:  # one of Arrow's is an ArrowException, too
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # of a column's name
        detail = f"not readable as {kind}: {error}"
        raise ShardError(ShardReason.UNREADABLE_FILE, detail) from error


def _first_rows(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """The sample of a file with these batches."""
    found: list[pa.RecordBatch] = []
    missing = _SAMPLE_ROWS
    while missing and (batch := next(batches, None)) is not None:
        found.append(batch.slice(0, missing))
        missing -= found[-1].num_rows
    return pa.Table.from_batches(found, schema)


def _layout(
    schema: pa.Schema,
    sample: pa.Table,
    config: Config,
    families: Families,
    beside: str | None,
    fields: tuple[str, ...],
) -> Layout:
    judged = formats.columns_judged(schema, config.columns)
    columns, _ = formats.columns_of(sample, judged, config.read_bounds)
    layout = formats.detect(
        schema,
        columns,
        format=config.format,
        columns=config.columns,
        text_style=config.text_style,
        ignore=config.ignore_columns,
        beside=beside,
        bounds=config.read_bounds,
    )
    if any(outputs.judge for outputs in families.values()):
        _require_judgeable(layout, schema, fields)
        watched = tuple(name for name in layout.watched if name not in fields)
        layout = replace(layout, fields=fields, watched=watched)
    shape = shape_of(layout.format)
    added = shape.all_columns(config.column_prefix, config.over_length, families)
    written = kept_columns(schema.names, config.keep_columns, config.drop_columns)
    taken = set(added) & set(written)
    for name in config.rewards:
        own = shape.reward_columns(f"{config.column_prefix}{name}_")
        taken |= {*added, *written}.intersection(own)
    if taken:
        raise ShardError(
            ShardReason.COLUMN_COLLISION,
            f"the file already has {', '.join(sorted(taken))}; choose a name for the new columns, "
            "e.g. --column-prefix rm_",
        )
    return layout


def _require_judgeable(layout: Layout, schema: pa.Schema, fields: tuple[str, ...]) -> None:
    """Raise ShardError where the rows are no conversations, or lack a column that a judge's
    questions show."""
    is_one = layout.format in (Format.TEXT, Format.TOKEN_IDS, Format.STEPS)
    if is_one or layout.text_style is TextStyle.RENDERED:
        raise ShardError(
            ShardReason.WRONG_SCHEMA,
            f"a judge reads conversations, and the rows are {formats.describe(layout, schema)}",
        )
    if missing := sorted(set(fields) - set(schema.names)):
        raise ShardError(
            ShardReason.WRONG_SCHEMA,
            f"no column {', '.join(missing)}, which the judge's page shows",
        )


def _refuse_collisions(names: Iterable[tuple[str, Source]]) -> None:
    seen: dict[str, Source] = {}
    for key, source in names:
        other = seen.setdefault(key, source)
        if other is not source:
            raise InputError(
                f"{other.url} and {source.url} would both be written to {key}; score them to "
                "different outputs"
            )
