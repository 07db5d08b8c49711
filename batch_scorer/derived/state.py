"""What a derived output holds, recounted from its data."""

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.derived.output import (
    Counts,
    Derivation,
    Totals,
    mark_of,
    read_derivation,
    read_planned,
    read_shards,
    read_totals,
)
from batch_scorer.errors import ExitCode
from batch_scorer.outputs.manifest import is_record
from batch_scorer.quarantine import Bounds, Died, apart
from batch_scorer.storage import AccessDenied, ObjectMissing, PlaceMissing, Store, open_store

_BOUNDS = Bounds(seconds=600.0, memory_bytes=4 << 30)


@dataclass(frozen=True, slots=True)
class DerivedStatus:
    """How far a derived output is: `shards` are there, of the `shards_planned`, which is None until
    all that decides about the rows has been read. `totals` is None until it is complete."""

    output: str
    kind: str
    recipe: dict[str, Any]
    places: tuple[str, ...]
    shards: int
    shards_planned: int | None
    totals: Totals | None

    @property
    def shards_left(self) -> int | None:
        return None if self.shards_planned is None else max(0, self.shards_planned - self.shards)

    def to_json(self) -> dict[str, Any]:
        more = {"shards_left": self.shards_left, "complete": self.totals is not None}
        return {**asdict(self), **more}


@dataclass(slots=True)
class DerivedVerdict:
    """What a second look found. `rows_written` is recounted; `remade` counts the shards whose rows
    were chosen again and compared, and `counts` are what became of all rows in that; both are None
    where what they were made of has changed since."""

    output: str
    kind: str
    shards: int = 0
    rows_written: int = 0
    remade: int | None = None
    problems: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    counts: Counts | None = None

    @property
    def exit_code(self) -> ExitCode:
        if self.problems:
            return ExitCode.INTEGRITY
        return ExitCode.INCOMPLETE if self.unfinished else ExitCode.DONE

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.exit_code == ExitCode.DONE}


def derived_store(output: str, options: Mapping[str, str]) -> tuple[Store, Derivation] | None:
    """A derived output; None where something else is at that place, or nothing."""
    try:
        store = open_store(output, options)
        derivation = read_derivation(store)
    except (AccessDenied, PlaceMissing, ObjectMissing):
        return None
    return None if derivation is None else (store, derivation)


def read_derived_status(store: Store, derivation: Derivation) -> DerivedStatus:
    shards = [info for info in store.list() if not is_record(info.key)]
    planned = read_planned(store)
    return DerivedStatus(
        output=store.root,
        kind=derivation.kind,
        recipe=derivation.recipe,
        places=tuple(derivation.sources["places"]),
        shards=len(shards),
        shards_planned=None if planned is None else planned.shards,
        totals=read_totals(store),
    )


def recount(store: Store, derivation: Derivation) -> DerivedVerdict:
    """Read every shard again: its bytes, its rows, and that no other object is among them."""
    verdict = DerivedVerdict(store.root, derivation.kind)
    totals = read_totals(store)
    if totals is None:
        verdict.unfinished.append(f"{store.root} is not complete; run the same command again")
        return verdict
    shards = {shard.key: shard for shard in read_shards(store)}
    there = {info.key: info for info in store.list() if not is_record(info.key)}
    verdict.problems += [f"{store.url(key)} is gone" for key in sorted(shards.keys() - there)]
    verdict.problems += [
        f"{store.url(key)} is no shard of this output" for key in sorted(there.keys() - shards)
    ]
    for key in sorted(shards.keys() & there):
        shard, info = shards[key], there[key]
        data = store.read_whole(key, info.version, info.size_bytes)
        verdict.shards += 1
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            verdict.problems.append(f"{store.url(key)} has other bytes than were committed")
            continue
        mark = mark_of(data)
        rows = _rows(data)
        if mark is None or (mark.derivation, mark.key) != (derivation.digest, key):
            verdict.problems.append(f"{store.url(key)} is of another derivation")
        if rows != shard.rows:
            verdict.problems.append(f"{store.url(key)} has {rows} rows and not {shard.rows}")
        verdict.rows_written += rows or 0
    if verdict.rows_written != totals.rows_written and not verdict.problems:
        verdict.problems.append(f"_SUCCESS says {totals.rows_written} rows were written")
    if totals.rows != totals.rows_kept + sum(totals.dropped.values()):
        verdict.problems.append("_SUCCESS: rows are not those kept and those dropped")
    if sum(totals.prompts_without_pair.values()) > (totals.prompts or 0):
        verdict.problems.append("_SUCCESS: more prompts have no pair than there are")
    return verdict


def compare_shards(
    verdict: DerivedVerdict, store: Store, made: Iterable[tuple[str, bytes]]
) -> None:
    """Compare every shard with that which was made again: key and bytes."""
    verdict.remade = 0
    for key, data in made:
        verdict.remade += 1
        if not _has_rows(store, key, data):
            verdict.problems.append(f"{store.url(key)} has other rows than the recipe keeps")
    if verdict.remade != verdict.shards and not verdict.problems:
        verdict.problems.append(
            f"{store.root} has {verdict.shards} shards and not {verdict.remade}"
        )


def compare_counts(verdict: DerivedVerdict, store: Store, counts: Counts) -> None:
    """Compare what `_SUCCESS` says with what was counted again."""
    verdict.counts = counts
    totals = read_totals(store)
    if totals is not None and totals.counts != counts:
        verdict.problems.append(f"_SUCCESS has other counts: {totals.counts}, {counts}")


def _has_rows(store: Store, key: str, made: bytes) -> bool:
    """Whether a stored shard has the rows of one that was made again. Their bytes may differ:
    another version of Arrow may encode the same rows in another way."""
    try:
        info = store.head(key)
    except ObjectMissing:
        return False
    stored = store.read_whole(key, info.version, info.size_bytes)
    return stored == made or apart(_BOUNDS, _are_equal, stored, made)


def _are_equal(stored: bytes, made: bytes) -> bool:
    tables = [pq.read_table(io.BytesIO(data)).replace_schema_metadata() for data in (stored, made)]
    return bool(tables[0].equals(tables[1]))


def _rows(data: bytes) -> int | None:
    try:
        return apart(_BOUNDS, _count, data)
    except (Died, MemoryError, pa.ArrowException, OSError):
        return None


def _count(data: bytes) -> int:
    """Of the rows themselves, not of what the footer says."""
    batches = pq.ParquetFile(io.BytesIO(data)).iter_batches(use_threads=False)
    return sum(batch.num_rows for batch in batches)
