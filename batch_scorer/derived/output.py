"""A derived output: rows chosen of scored ones, committed shard by shard.

    OUT/<name>.parquet                a shard; the object is the commit
    OUT/_SUCCESS                      JSON totals; written last
    OUT/_batch_scorer/derived.json    what this output is: recipe, digest of what was read, versions
                      planned.json    how many shards it will have
                      shards.jsonl    every shard with its rows, bytes and sha256

A shard depends on the record in `derived.json` alone, which is written once and never changed. So
whoever writes a shard writes the same rows, and no run has to keep others out: a derived output has
no lease and no epochs (docs/decisions/0012).
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.errors import OutputError
from batch_scorer.outputs.claim import claimed, refuse_nights
from batch_scorer.outputs.lease import RECORDS
from batch_scorer.outputs.manifest import SUCCESS_KEY, is_record
from batch_scorer.quarantine import Bounds, Died, apart
from batch_scorer.records.digest import digest_of
from batch_scorer.records.reading import parsed, read_lines, read_record
from batch_scorer.storage import (
    AccessDenied,
    ObjectChanged,
    ObjectInfo,
    ObjectMissing,
    PlaceMissing,
    Store,
    in_threads,
    open_store,
    require_conditional_writes,
)

DERIVED_KEY = f"{RECORDS}/derived.json"
PLANNED_KEY = f"{RECORDS}/planned.json"
SHARDS_KEY = f"{RECORDS}/shards.jsonl"
_FOOTER_KEY = b"batch_scorer.derived"
_FORMAT = 1
_READERS = 8
_BOUNDS = Bounds(seconds=600.0, memory_bytes=1 << 31)
"""For reading a shard's footer."""


@dataclass(frozen=True, slots=True)
class Derivation:
    """What `derived.json` holds. `sources` is `Parts.to_json()`; `provenance` has versions and is
    not compared."""

    format: int
    kind: str
    recipe: dict[str, Any]
    sources: dict[str, Any]
    provenance: dict[str, Any]

    @classmethod
    def of(
        cls,
        kind: str,
        recipe: Mapping[str, Any],
        sources: Mapping[str, Any],
        provenance: Mapping[str, Any] | None = None,
    ) -> Self:
        return cls(_FORMAT, kind, dict(recipe), dict(sources), dict(provenance or {}))

    @property
    def digest(self) -> str:
        return digest_of([self.kind, self.recipe, self.sources["digest"]])


@dataclass(frozen=True, slots=True)
class DerivedShard:
    """A committed shard, as `shards.jsonl` has it."""

    key: str
    rows: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Planned:
    """What `planned.json` holds: how many shards a complete output has."""

    shards: int


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the rows that were read: `dropped` has those that are not kept, by reason.

    Where pairs are made, `prompts` are those with a response that can be in one, and
    `prompts_without_pair` those of which none is written, by reason.
    """

    rows: int
    dropped: dict[str, int]
    prompts: int | None = None
    prompts_without_pair: dict[str, int] = field(default_factory=dict)

    @property
    def rows_kept(self) -> int:
        return self.rows - sum(self.dropped.values())


@dataclass(frozen=True, slots=True)
class Totals:
    """What `_SUCCESS` holds. Always `rows == rows_kept + sum(dropped.values())`, rows of what was
    read. `rows_written` are those of the shards: fewer or more than `rows_kept` where rows are put
    together (a pair is made of two). `prompts` and `prompts_without_pair` are those of `Counts`."""

    rows: int
    rows_kept: int
    dropped: dict[str, int]
    rows_written: int
    shards: int
    derivation: str
    prompts: int | None = None
    prompts_without_pair: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, counts: Counts, shard_rows: Sequence[int], derivation: str) -> Self:
        """`shard_rows` are the rows of each shard."""
        return cls(
            rows=counts.rows,
            rows_kept=counts.rows_kept,
            dropped=_without_zeros(counts.dropped),
            rows_written=sum(shard_rows),
            shards=len(shard_rows),
            derivation=derivation,
            prompts=counts.prompts,
            prompts_without_pair=_without_zeros(counts.prompts_without_pair),
        )

    @property
    def counts(self) -> Counts:
        return Counts(self.rows, self.dropped, self.prompts, self.prompts_without_pair)


class DerivedOutput:
    """The output of one derivation, of which nobody takes hold.

    Creating it raises OutputError where something else is at that place.
    """

    def __init__(
        self,
        output: str,
        store_options: Mapping[str, str],
        kind: str,
        recipe: Mapping[str, Any],
        sources: Mapping[str, Any],
        provenance: Mapping[str, Any],
    ) -> None:
        try:
            self.store = open_store(output, store_options, create=True)
            if claimed(self.store) is not None:
                raise OutputError(f"{output} holds scores; name another output")
            refuse_nights(self.store)
            ours = Derivation.of(kind, recipe, sources, provenance)
            self.derivation = _claim(self.store, ours)
        except (AccessDenied, PlaceMissing) as error:
            raise OutputError(str(error)) from error
        self.digest = self.derivation.digest

    @cached_property
    def committed(self) -> dict[str, DerivedShard]:
        """The shards that are there: they need not be made again. They are read for it, once."""
        return {shard.key: shard for shard in self._read_back()}

    def plan(self, shards: int) -> None:
        """Record how many shards there will be, so that `status` can say how many are left."""
        self.record(PLANNED_KEY, json.dumps(asdict(Planned(shards))).encode())

    def commit(self, key: str, encoded: bytes, rows: int) -> None:
        """Publish a shard of `encode_shard` with one conditional PUT. Raises OutputError where an
        object of others has that name."""
        shard = DerivedShard(key, rows, len(encoded), hashlib.sha256(encoded).hexdigest())
        try:
            self.store.put(key, encoded, instead_of=None)
        except ObjectChanged:
            there = self._read_shard(self.store.head(key))
            if there is None or there.rows != rows:
                raise OutputError(
                    f"{self.store.url(key)} is in the way: it is no shard of this output"
                ) from None
            shard = there
        self.committed[key] = shard

    def record(self, key: str, data: bytes) -> None:
        """Store a record over what is there. Another run that does so at the same time has made the
        same rows: whoever is first, its record is right."""
        try:
            self.store.put(key, data, instead_of=None)
        except ObjectChanged:
            with suppress(ObjectChanged):
                self.store.put(key, data, instead_of=self.store.head(key).version)

    def conclude(self, counts: Counts) -> Totals:
        """Write the list of shards and `_SUCCESS`."""
        shards = [self.committed[key] for key in sorted(self.committed)]
        lines = "".join(json.dumps(asdict(shard)) + "\n" for shard in shards)
        self.record(SHARDS_KEY, lines.encode())
        totals = Totals.of(counts, [shard.rows for shard in shards], self.digest)
        self.record(SUCCESS_KEY, json.dumps(asdict(totals), indent=1).encode())
        return totals

    def _read_back(self) -> list[DerivedShard]:
        infos = [info for info in self.store.list() if not is_record(info.key)]
        found = in_threads(self._read_shard, infos, _READERS)
        return [shard for shard in found if shard is not None]

    def _read_shard(self, info: ObjectInfo) -> DerivedShard | None:
        """None for what is no shard of this derivation."""
        data = self.store.read_whole(info.key, info.version, info.size_bytes)
        mark = mark_of(data)
        if mark is None or (mark.derivation, mark.key) != (self.digest, info.key):
            return None
        return DerivedShard(info.key, mark.rows, len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, slots=True)
class Mark:
    """What the footer of a derived shard holds."""

    derivation: str
    key: str
    rows: int


def encode_shard(table: pa.Table, derivation: str, key: str) -> bytes:
    """The shard as Parquet bytes; the same bytes for the same rows.

    Called where the rows were read, so that they do not travel.
    """
    mark = json.dumps(asdict(Mark(derivation, key, table.num_rows)))
    kept = {
        name: value
        for name, value in (table.schema.metadata or {}).items()
        if not name.startswith(b"batch_scorer")
    }
    table = table.replace_schema_metadata({**kept, _FOOTER_KEY: mark.encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def mark_of(data: bytes) -> Mark | None:
    """What says whose shard this is; None for anything else."""
    try:
        return apart(_BOUNDS, _mark_of, data)
    except (Died, MemoryError, pa.ArrowException, OSError, ValueError):
        return None


def _mark_of(data: bytes) -> Mark | None:
    metadata = pq.read_schema(pa.BufferReader(data)).metadata or {}
    text = metadata.get(_FOOTER_KEY)
    return None if text is None else parsed(text, Mark)


def read_derivation(store: Store) -> Derivation | None:
    """What a derived output is; None where there is none. Raises ObjectDamaged."""
    try:
        return read_record(store, DERIVED_KEY, Derivation)
    except ObjectMissing:
        return None


def read_planned(store: Store) -> Planned | None:
    """None before it is known."""
    try:
        return read_record(store, PLANNED_KEY, Planned)
    except ObjectMissing:
        return None


def read_totals(store: Store) -> Totals | None:
    """None while the output is not complete."""
    try:
        return read_record(store, SUCCESS_KEY, Totals)
    except ObjectMissing:
        return None


def read_shards(store: Store) -> list[DerivedShard]:
    """The shards of a complete output."""
    return read_lines(store, SHARDS_KEY, DerivedShard)


def _without_zeros(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in sorted(counts.items()) if count}


def _claim(store: Store, ours: Derivation) -> Derivation:
    """`derived.json`, written now or found and the same."""
    there = read_derivation(store)
    if there is None:
        require_conditional_writes(store, RECORDS)
        try:
            data = json.dumps(asdict(ours), indent=1, sort_keys=True)
            store.put(DERIVED_KEY, data.encode(), instead_of=None)
            return ours
        except ObjectChanged:
            there = read_record(store, DERIVED_KEY, Derivation)
    if (there.format, there.digest) != (ours.format, ours.digest):
        raise OutputError(
            f"{store.root} holds another {there.kind}: "
            + "; ".join(_differences(asdict(there), asdict(ours)))
            + ". Use another output, or the same settings and inputs"
        )
    return there


def _differences(there: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    found = [name for name in ("format", "kind") if there[name] != ours[name]]
    found += [
        f"{name} was {there['recipe'].get(name)!r}, now {ours['recipe'].get(name)!r}"
        for name in sorted(there["recipe"].keys() | ours["recipe"].keys())
        if there["recipe"].get(name) != ours["recipe"].get(name)
    ]
    if there["sources"].get("digest") != ours["sources"]["digest"]:
        found.append("what was read has changed since")
    return found
