"""Which shards there are: inputs listed, files inspected, big ones cut.

The cut is a function of the files and the layout settings alone, never of the cluster, so a run
can be resumed with more workers.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import chain
from typing import TypeAlias

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
from batch_scorer.inputs.known import KnownFiles
from batch_scorer.inputs.selection import kept_columns, matching_rows, refuse_unknown, spread
from batch_scorer.inputs.sources import FileKind, kind_of, list_inputs
from batch_scorer.inputs.tables import (
    Alike,
    Facts,
    FileTable,
    InputFile,
    Numbers,
    ShardTable,
    cut,
)
from batch_scorer.inputs.where import where_of
from batch_scorer.quarantine import Died, apart
from batch_scorer.records import (
    SCALAR,
    Families,
    Format,
    Layout,
    Receipt,
    Source,
    Status,
    TextStyle,
)
from batch_scorer.records.digest import digest_of, digest_of_list
from batch_scorer.storage import Store, in_threads, is_remote, open_store
from batch_scorer.version import package_digest

log = logging.getLogger("batch_scorer")

_SAMPLE_ROWS = 32
_SAMPLE_BYTES = 1 << 20
_INSPECTORS = 8
_TOGETHER = 64
"""Files that a process looks at in one call, which costs as much as looking at one of them."""
_TOGETHER_BYTES = 1 << 24
_TOGETHER_S = 60.0
"""That a call may take; then its files are looked at one by one, each in its own time."""
_REQUESTS = 16
"""Of one call that are waited for together, where a store is not a disk."""
_NAMED = 20
"""Files in a line of the log."""
_ONE_SCORE: Families = {"": SCALAR}


@dataclass(frozen=True, slots=True)
class Plan:
    """All work of a run: what will be scored, and what cannot be, with the reason.

    `aside` are inputs by key that are there but were not looked at. `not_asked` are the files of
    which no row is asked for, each with its rows; `skipped` are the URLs of files beside the inputs
    that are none. `known` is where what was found out is kept for the next plan.
    """

    files: FileTable
    shards: ShardTable
    failed: list[Receipt]
    aside: Mapping[str, Source] = field(default_factory=dict)
    not_asked: list[Receipt] = field(default_factory=list)
    skipped: Sequence[str] = ()
    known: KnownFiles | None = None

    @property
    def inputs(self) -> dict[str, str | None]:
        """The entity tags of all inputs that are there, by key; None for one that failed."""
        found: dict[str, str | None] = dict.fromkeys(receipt.input for receipt in self.failed)
        sources = [*self.aside.values(), *self.files.sources]
        return found | {source.key: source.version.etag for source in sources}

    @property
    def num_rows(self) -> int:
        """The rows that are asked for."""
        return self.shards.total("num_rows")

    @property
    def rows_not_asked(self) -> int:
        """The other rows of the files."""
        between = self.shards.total("rows_not_asked")
        return between + sum(receipt.rows_not_asked for receipt in self.not_asked)

    @property
    def estimated_tokens(self) -> int:
        return self.shards.total("estimated_tokens")

    def digest(self, fingerprint: str, column_prefix: str, retried: Iterable[str] = ()) -> str:
        """Digest of all identities, and of the reasons for which marked rows are `retried`: equal
        plans do equal work."""
        identities = self.shards.identities(fingerprint, column_prefix)
        return digest_of_list(chain(identities, sorted(set(retried))))


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
    known: KnownFiles | None = None,
) -> Plan:
    """List and inspect the inputs and cut them into shards, in the order of their keys. `families`
    are what the models give, by which the added columns are known. `beside` is
    the field that the model reads beside the conversation (`Prompt.column_beside`), `fields` are
    the columns that a judge's questions show. Files that are `known` are not inspected again.

    Raises InputError if there is nothing to score at all, and ConfigError for a `where` that is no
    expression or a column to keep or drop that no file has. A file that cannot be used is a failed
    receipt; the others go on. With `choose` only some are looked at, perhaps none.
    """
    if config.where is not None:
        where_of(config.where)  # raises, before any file is read
    listing = list_inputs(config)
    failed = [
        Receipt.of_file(source, Status.FAILED, ShardReason.UNREADABLE_FILE, problem)
        for source, problem in listing.unusable
    ]
    sources, aside = [], {}
    for source, changed in listing.found:
        chosen = choose is None or choose(source, changed)
        if chosen:
            sources.append(source)
        elif chosen is False:
            aside[source.key] = source
    listing.found.clear()  # there may be a million
    layout_of = partial(_layout, config=config, families=families, beside=beside, fields=fields)
    facts, places = Facts.of([]), np.full(len(sources), -1)
    if known is not None:
        facts, places = known.recall(_question(config, families, beside, fields), sources)
    unknown = np.flatnonzero(places < 0)
    looked = _look_at([sources[at] for at in unknown.tolist()], config, layout_of)
    failed += looked.failed
    places[unknown[looked.places]] = len(facts) + np.arange(len(looked.places))
    there = np.flatnonzero(places >= 0)
    files = FileTable(
        [sources[at] for at in there.tolist()],
        Facts.joined([facts, looked.facts]).take(places[there]),
        config.where,
    )
    if not files and not failed and choose is None:
        raise InputError(f"{', '.join(config.inputs)}: all files are empty")
    if not files and failed:
        first = failed[0]
        more = f"\n({len(failed) - 1} more files fail too)" if len(failed) > 1 else ""
        # What reads a file for scoring, too, names it within its folder.
        detail = (first.detail or "").removeprefix(f"{first.input.rpartition('/')[2]}: ")
        raise InputError(f"{first.input}: {detail}{more}")
    if files and not aside:  # those aside may have them
        columns = [alike.schema.names for alike, _ in files.by_alike()]
        refuse_unknown(config.keep_columns, config.drop_columns, columns)
    if config.limit is not None:
        files = replace(files, limits=spread(config.limit, files.asked()))
    shards = cut(files, config.shard_rows, config.shard_tokens)
    if not shards and files and choose is None:
        raise InputError(f"where: no row of {', '.join(config.inputs)} matches {config.where}")
    unused = np.setdiff1d(np.arange(len(files)), shards.numbers["file"]).tolist()
    _refuse_collisions(shards, [files.sources[at] for at in unused])
    num_rows = files.num_rows
    not_asked = [
        Receipt.of_file(files.sources[at], Status.NOT_ASKED, rows_not_asked=int(num_rows[at]))
        for at in unused
    ]
    _warn(files, listing.skipped)
    return Plan(files, shards, failed, aside, not_asked, listing.skipped, known)


def _question(
    config: Config, families: Families, beside: str | None, fields: tuple[str, ...]
) -> str:
    """Digest of what looking at a file depends on, besides the file: all settings that make scores
    or columns, more of them than it takes, and the code."""
    settings = config.with_role("scores") | config.with_role("layout")
    del settings["limit"]  # it is of all files together
    return digest_of(
        [
            *(package_digest(), pa.__version__, settings, config.store_options),
            *(asdict(config.read_bounds), beside, fields),
            {name: asdict(outputs) for name, outputs in families.items()},
        ]
    )


def _warn(files: FileTable, skipped: Sequence[str]) -> None:
    """What of the inputs will not be in the output."""
    if skipped:
        more = f" and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
        log.info("not read: %s%s", ", ".join(skipped[:_NAMED]), more)
    losing: dict[tuple[str, ...], list[int]] = {}
    for alike, places in files.by_alike():
        if alike.lost_types:
            losing.setdefault(alike.lost_types, []).extend(places.tolist())
    for lost, losers in sorted(losing.items()):
        more = f" and {len(losers) - 1} more files" if len(losers) > 1 else ""
        log.warning(
            "%s%s: %s: the values are kept, but not their type in Parquet",
            files.sources[min(losers)].url,
            more,
            "; ".join(lost),
        )


# Looking at files


@dataclass(frozen=True, slots=True)
class _Looked:
    """What was found out about some files: their places among those that were looked at, in order,
    and the receipts of those that cannot be used."""

    places: Numbers
    facts: Facts
    failed: list[Receipt]


def _look_at(sources: Sequence[Source], config: Config, layout_of: LayoutOf) -> _Looked:
    """What looking at these files shows. What the store refused is asked for again after the rest:
    a moment of its trouble does not leave out a file."""
    places: list[int] = []
    facts: list[Facts] = []
    failed: dict[int, Receipt] = {}
    look = partial(_look_together, config=config, layout_of=layout_of)

    def look_at(which: Sequence[int]) -> None:
        batches = list(_batches(sources, which))
        found = in_threads(look, ([sources[at] for at in batch] for batch in batches), _INSPECTORS)
        for batch, each in zip(batches, found, strict=True):
            files = {at: file for at, file in zip(batch, each, strict=True) if file is not None}
            failed.update((at, f) for at, f in files.items() if isinstance(f, Receipt))
            usable = {at: file for at, file in files.items() if isinstance(file, InputFile)}
            places.extend(usable)
            facts.append(Facts.of([*usable.values()]))

    look_at(range(len(sources)))
    refused = [
        at for at, each in failed.items() if each.reason is not None and each.reason.may_pass
    ]
    for at in refused:
        log.warning("%s: cannot be read; will be tried again", sources[at].url)
        del failed[at]
    look_at(refused)
    order = np.argsort(np.array(places, np.int64), kind="stable")
    return _Looked(
        np.sort(np.array(places, np.int64)),
        Facts.joined(facts).take(order),
        [failed[at] for at in sorted(failed)],
    )


def _batches(sources: Sequence[Source], which: Sequence[int]) -> Iterator[list[int]]:
    """Files that are looked at in one call; few enough that all processes have some."""
    most = min(_TOGETHER, max(1, len(which) // (2 * _INSPECTORS)))
    batch: list[int] = []
    size_bytes = 0
    for at in which:
        size_bytes += sources[at].size_bytes
        if batch and (len(batch) >= most or size_bytes > _TOGETHER_BYTES):
            yield batch
            batch, size_bytes = [], sources[at].size_bytes
        batch.append(at)
    if batch:
        yield batch


def _look_together(
    sources: Sequence[Source], config: Config, layout_of: LayoutOf
) -> list[InputFile | Receipt | None]:
    """`_look` at each of them, in one process. Should it die of one of them, or take long, each is
    looked at by itself."""
    if len(sources) > 1:
        bounds = config.reader_bounds(sum(source.size_bytes for source in sources))
        bounds = replace(bounds, seconds=min(bounds.seconds, _TOGETHER_S))
        try:
            return apart(bounds, _look_at_each, sources, config, layout_of)
        except (Died, MemoryError) as error:
            log.info("%d files are looked at one by one: %s", len(sources), error)
    return [_look_apart(source, config, layout_of) for source in sources]


def _look_at_each(
    sources: Sequence[Source], config: Config, layout_of: LayoutOf
) -> list[InputFile | Receipt | None]:
    look = partial(_look, config=config, layout_of=layout_of)
    if is_remote(sources[0].root):
        found = list(in_threads(look, sources, _REQUESTS))
    else:
        found = [look(source) for source in sources]
    return list(_sharing(found))


def _sharing(
    found: Sequence[InputFile | Receipt | None],
) -> Iterator[InputFile | Receipt | None]:
    """The same; a file that is read as the one before has its very schema and layout, so that they
    are sent once."""
    alike: Alike | None = None
    for each in found:
        if isinstance(each, InputFile):
            own = Alike(each.schema.remove_metadata(), each.layout, each.lost_types)
            if alike != own:
                alike = own
            each = replace(each, schema=alike.schema, layout=alike.layout)
        yield each


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


def _refuse_collisions(shards: ShardTable, unused: Iterable[Source]) -> None:
    """Raise InputError where two files would be written to one object; of `unused` ones there is
    nothing to write, and their receipts have their own keys."""
    sources = shards.files.sources

    def names() -> Iterator[tuple[str, Source]]:
        written = zip(shards.output_keys, shards.numbers["file"].tolist(), strict=True)
        return ((key, sources[file]) for key, file in written)

    if all(key == source.key for key, source in names()):
        return  # no two files have one name
    seen: dict[str, Source] = {}
    for key, source in chain(names(), ((source.key, source) for source in unused)):
        other = seen.setdefault(key, source)
        if other is not source:
            raise InputError(
                f"{other.url} and {source.url} would both be written to {key}; score them to "
                "different outputs"
            )
