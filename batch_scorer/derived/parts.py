"""What a derived output is made of: the scored shards of outputs, or plain Parquet files."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa

from batch_scorer.derived.output import Derivation, read_derivation, read_totals
from batch_scorer.errors import (
    BatchScorerError,
    ConfigError,
    IncompleteError,
    InputError,
    OutputError,
)
from batch_scorer.inputs.files import open_parquet
from batch_scorer.nightly.generations import read_latest
from batch_scorer.nightly.status import nightly_root
from batch_scorer.outputs.claim import claimed, open_scored
from batch_scorer.outputs.manifest import is_record
from batch_scorer.outputs.state import OutputState
from batch_scorer.quarantine import Bounds, Died, apart
from batch_scorer.records import Commit, Source, Status
from batch_scorer.records.digest import digest_of
from batch_scorer.storage import (
    AccessDenied,
    ObjectInfo,
    PlaceMissing,
    Store,
    in_threads,
    open_store,
)

T = TypeVar("T")

_READERS = 8
_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Part:
    """One Parquet file that is read as a whole: a scored shard with its `commit`, or a file that no
    record describes.

    `key` is its name in the derived output.
    """

    source: Source
    key: str
    num_rows: int
    commit: Commit | None = None
    sha256: str = ""
    beside: tuple[tuple[str, "Part"], ...] = ()
    """Shards of other outputs with the same rows: their score columns come with these rows, each
    with this prefix in front of its name."""

    @property
    def content(self) -> str:
        """What says that it is the same part: its digest where that is known, else its version."""
        own = self.sha256 or self.source.version.etag
        return "".join([own, *(f"+{prefix}{part.content}" for prefix, part in self.beside)])

    @property
    def url(self) -> str:
        return self.source.url


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts in the order of the rows that were scored, and from where."""

    parts: tuple[Part, ...]
    places: tuple[str, ...]
    beside: tuple[tuple[str, str], ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """What the record of a derived output keeps: another digest, and it is another output."""
        facts = [[part.key, part.content, part.num_rows] for part in self.parts]
        return {
            "places": list(self.places),
            "beside": dict(self.beside),
            "shards": len(self.parts),
            "rows": self.num_rows,
            "digest": digest_of(facts),
        }


def list_parts(
    places: Sequence[str],
    store_options: Mapping[str, str],
    beside: Mapping[str, str] | None = None,
) -> Parts:
    """The parts of scored outputs, nightly roots (the newest generation), and folders of Parquet
    files that were never scored. `beside` are outputs of the same inputs by the prefix that their
    score columns get.

    With several places, each part is named below its place's last folder. Raises OutputError and
    InputError for a place without rows, IncompleteError for an output that is not complete, and
    ConfigError where an output beside has other shards.
    """
    if not places:
        raise ConfigError("name at least one scored output")
    found: list[Part] = []
    for place in places:
        folder = f"{place.rstrip('/').rpartition('/')[2]}/" if len(places) > 1 else ""
        found += _parts_of(place, folder, store_options)
    name, times = Counter(part.key for part in found).most_common(1)[0]
    if times > 1:
        raise ConfigError(
            f"{name} is in {times} of the places; their last folders need other names"
        )
    for prefix, output in (beside or {}).items():
        found = _joined(found, prefix, output, store_options)
    return Parts(tuple(found), tuple(places), tuple((beside or {}).items()))


def unchanged_parts(derivation: Derivation, options: Mapping[str, str]) -> Parts | None:
    """What a derived output was made of; None where that has changed since, or is gone."""
    sources = derivation.sources
    try:
        parts = list_parts(sources["places"], options, sources["beside"])
    except BatchScorerError:
        return None
    return parts if parts.to_json()["digest"] == sources["digest"] else None


def _joined(
    parts: Sequence[Part], prefix: str, output: str, options: Mapping[str, str]
) -> list[Part]:
    """The parts, each with the shard of `output` that has the same rows."""
    others = {_rows_of(part): part for part in _parts_of(output, "", options) if part.commit}
    joined = []
    for part in parts:
        if part.commit is None or (other := others.get(_rows_of(part))) is None:
            raise ConfigError(
                f"beside: {output} has no shard with the rows of {part.url}; score the same inputs "
                "with the same shard_rows, limit and where"
            )
        joined.append(replace(part, beside=(*part.beside, (prefix, other))))
    return joined


def _rows_of(part: Part) -> tuple[Any, ...]:
    """What two shards share that have the same rows."""
    commit = part.commit
    if commit is None:
        return (part.key,)
    return (commit.input, commit.input_etag, commit.first_row, commit.num_rows, commit.where)


def _parts_of(place: str, folder: str, options: Mapping[str, str]) -> list[Part]:
    if (root := nightly_root(place, options)) is not None:
        if (latest := read_latest(root)) is None:
            raise IncompleteError(f"{place}: no generation is complete yet")
        *_, last = latest.paths.values()
        return _scored(f"{root.root.rstrip('/')}/{last}", folder, options)
    try:
        store = open_store(place, options)
    except (AccessDenied, PlaceMissing) as error:
        raise OutputError(str(error)) from error
    if claimed(store) is not None:
        return _scored(place, folder, options)
    if read_derivation(store) is not None and read_totals(store) is None:
        raise IncompleteError(f"{place} is not complete; run the command that began it again")
    return _plain(store, folder)


def _scored(output: str, folder: str, options: Mapping[str, str]) -> list[Part]:
    store, _ = open_scored(output, options)
    state = OutputState(store)
    if state.success is None:
        raise IncompleteError(f"{output} is not complete; finish it first (batch-scorer status)")
    parts = [
        Part(
            Source(store.root, receipt.output_key, stored.size_bytes, stored.version),
            folder + receipt.output_key,
            receipt.num_rows,
            stored.commit,
            stored.sha256,
        )
        for receipt in state.manifest
        if receipt.status is Status.COMMITTED and (stored := receipt.stored)
    ]

    def place_of(part: Part) -> tuple[str, int]:
        assert part.commit is not None
        return part.commit.input, part.commit.first_row

    return sorted(parts, key=place_of)


def _plain(store: Store, folder: str) -> list[Part]:
    infos = [
        info
        for info in store.list()
        if info.key.lower().endswith(".parquet") and not is_record(info.key)
    ]
    if not infos:
        raise InputError(f"{store.root}: neither a scored output nor a folder of Parquet files")

    def part_of(info: ObjectInfo) -> Part:
        source = Source(store.root, info.key, info.size_bytes, info.version)
        return Part(source, folder + info.key, read_apart(source, _num_rows, store, source))

    return list(in_threads(part_of, sorted(infos, key=lambda info: info.key), _READERS))


def _num_rows(store: Store, source: Source) -> int:
    num_rows: int = open_parquet(store, source).metadata.num_rows
    return num_rows


def read_apart(source: Source, read: Callable[..., T], *args: Any) -> T:
    """What `read` returns, which parses this file, from a process that may die of it.

    Raises InputError where it dies, or the file is no Parquet file that can be read.
    """
    bounds = Bounds.of_file(source.size_bytes, _MEMORY_BYTES)
    try:
        return apart(bounds, read, *args)
    except (Died, MemoryError, pa.ArrowException, OSError) as error:
        raise InputError(f"{source.url}: {error}") from None


class OpenPart:
    """A part that is being read, in a process that may die of it. Raises ObjectChanged where it is
    no longer the version that was listed."""

    def __init__(self, part: Part, options: Mapping[str, str]) -> None:
        self._part = part
        self._file = open_parquet(open_store(part.source.root, options), part.source)
        self._beside = [
            (prefix, OpenPart(other, options), other.commit.added_columns)
            for prefix, other in part.beside
            if other.commit is not None
        ]

    @property
    def schema(self) -> pa.Schema:
        schema = self._file.schema_arrow
        for prefix, other, added in self._beside:
            for name in added:
                schema = schema.append(other.schema.field(name).with_name(prefix + name))
        return schema

    def groups(self, columns: Collection[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """The rows of each row group, in all columns or those that are named and there, with the
        number of rows before them. One group at a time is in memory."""
        first = 0
        beside = [self._columns_beside(*other, columns) for other in self._beside]
        for group in range(self._file.metadata.num_row_groups):
            names = None
            if columns is not None:
                names = [name for name in self._file.schema_arrow.names if name in columns]
            table = self._file.read_row_group(group, names, use_threads=False)
            if table.num_rows != self._file.metadata.row_group(group).num_rows:
                raise InputError(f"{self._part.url}: row group {group} ends early")
            for other in beside:
                rows = other.slice(first, table.num_rows)
                for field, column in zip(rows.schema, rows.columns, strict=True):
                    table = table.append_column(field, column)
            yield first, table
            first += self._file.metadata.row_group(group).num_rows

    def _columns_beside(
        self,
        prefix: str,
        other: "OpenPart",
        added: Sequence[str],
        columns: Collection[str] | None,
    ) -> pa.Table:
        """Score columns of a whole part: they are small."""
        names = [name for name in added if columns is None or prefix + name in columns]
        table = pa.concat_tables(table for _, table in other.groups(names))
        if table.num_rows != self._part.num_rows:
            raise InputError(f"{other._part.url}: not the rows of {self._part.url}")
        fields = [field.with_name(prefix + field.name) for field in table.schema]
        return pa.table(table.columns, schema=pa.schema(fields))


def read_part(part: Part, options: Mapping[str, str]) -> pa.Table:
    """All rows of a part; called in a process that may die of it. Raises ObjectChanged where it is
    no longer the version that was listed."""
    store = open_store(part.source.root, options)
    return open_parquet(store, part.source).read(use_threads=False)
