"""What is committed: the scored shards, and the records beside them.

    OUT/<input path>[.rowsA-B].parquet     a scored shard; the object is the commit
    OUT/_SUCCESS                           JSON totals; written last
    OUT/_batch_scorer/run.json             what this output is: fingerprint, layout, provenance
                      plan.json            how much the newest run set out to do
                      runs/*.json          what each run had to do, and what it measured
                      engines/*.json       what scored: device, versions, kernel
                      lease.json           who works on it now, and the epoch
                      ledger/*.jsonl       receipts as they come in; only saves reading shards
                      manifests/*.parquet  all commits of a finished run, one row per shard
                      CURRENT              names the newest manifest

Truth is the shards: every record here can be rebuilt from their footers.
"""

import hashlib
import io
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.commits import Commit, Receipt, Status
from batch_scorer.errors import IntegrityError, LeaseLostError, OutputError
from batch_scorer.failpoints import failpoint
from batch_scorer.fingerprint import Fingerprint, digest_of
from batch_scorer.lease import RECORDS
from batch_scorer.metrics import Run
from batch_scorer.storage import (
    AccessDenied,
    ObjectChanged,
    ObjectInfo,
    ObjectMissing,
    Store,
    Version,
    in_threads,
    open_store,
)

SUCCESS_KEY = "_SUCCESS"
GENERATIONS_KEY = f"{RECORDS}/generations.json"
"""Where `nightly` remembers its generations, in the folder above them."""
_RUN_KEY = f"{RECORDS}/run.json"
_CURRENT_KEY = f"{RECORDS}/CURRENT"
_ENGINES = f"{RECORDS}/engines"
_PLAN_KEY = f"{RECORDS}/plan.json"
_RUNS = f"{RECORDS}/runs"
_READERS = 16
_MANIFEST = pa.schema(
    {
        "output_key": pa.string(),
        "input": pa.string(),
        "status": pa.string(),
        "reason": pa.string(),
        "detail": pa.string(),
        "rows": pa.int64(),
        "rows_scored": pa.int64(),
        "rows_marked": pa.int64(),
        "size_bytes": pa.int64(),
        "sha256": pa.string(),
        "receipt": pa.string(),
    }
)
_RECEIPTS_AT_ONCE = 1_000
"""Some 2 kB each while they are written; in a run of 100,000 shards all together were half of the
driver's memory."""


def read_parquet(data: bytes) -> pa.Table:
    """The table in a Parquet file, read by this thread alone.

    `pq.read_table` reads in Arrow's IO threads, whatever `use_threads` says, and a process that
    ends soon after is now and then aborted ("terminate called without an active exception"). Of
    short processes that read four files and ended: 9 of 600, and 0 of 400 with the call below.
    """
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)


def read_commit(store: Store, info: ObjectInfo) -> tuple[Commit | None, str]:
    """The commit in a stored object and the sha256 of its bytes.

    The commit is None if this is not a scored shard of ours.
    """
    data = store.read_whole(info.key, info.version, info.size_bytes)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        schema = pq.read_schema(io.BytesIO(data))
    except (pa.ArrowInvalid, OSError):
        return None, sha256
    return Commit.from_footer(schema.metadata), sha256


class Ledger:
    """Receipts of this run, appended in segments, so that a resumed run need not read shards."""

    def __init__(self, store: Store, epoch: int, holder_id: str, *, every_s: float = 10.0) -> None:
        self._store = store
        self._prefix = f"{RECORDS}/ledger/{epoch:06d}-{holder_id}"
        self._every_s = every_s
        self._flushed = time.monotonic()
        self._segments = 0
        self._pending: list[Receipt] = []

    def add(self, receipt: Receipt) -> None:
        self._pending.append(receipt)
        if time.monotonic() - self._flushed >= self._every_s:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            lines = [json.dumps(receipt.to_json()) for receipt in self._pending]
            key = f"{self._prefix}-{self._segments:06d}.jsonl"
            failpoint("ledger.before_put")
            with suppress(ObjectChanged):  # ours, applied although its answer was lost
                self._store.create(key, "\n".join(lines).encode())
            failpoint("ledger.after_put")
            self._segments += 1
            self._pending.clear()
        self._flushed = time.monotonic()


def known_receipts(store: Store) -> dict[str, Receipt]:
    """Newest receipt per output key, from the current manifest and the ledger after it."""
    receipts = {receipt.output_key: receipt for receipt in current_manifest(store)}
    for segment in read_ledger(store):
        receipts.update((receipt.output_key, receipt) for receipt in segment.receipts)
    return receipts


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the ledger: whose, and when it was written, by the store's clock."""

    holder_id: str
    written_at: datetime
    receipts: list[Receipt]


def read_ledger(store: Store) -> Iterator[Segment]:
    """The ledgers of all runs since the current manifest, oldest segment first."""
    infos = sorted(store.list(f"{RECORDS}/ledger"), key=lambda info: info.last_modified)
    contents = in_threads(lambda info: store.read(info.key), infos, _READERS)
    for info, data in zip(infos, contents, strict=True):
        receipts = [Receipt.from_json(json.loads(line)) for line in data.splitlines()]
        yield Segment(info.key.rsplit("-", 2)[1], info.last_modified, receipts)


def committed(
    store: Store, objects: Iterable[ObjectInfo], known: dict[str, Receipt]
) -> Iterator[tuple[ObjectInfo, Receipt | None]]:
    """The receipt of each stored object; None for objects that are not scored shards of ours.

    From `known` where the version agrees, otherwise from the object itself.
    """

    def read_back(info: ObjectInfo) -> tuple[ObjectInfo, Receipt | None]:
        commit, sha256 = read_commit(store, info)
        if commit is None:
            return info, None
        return info, Receipt(
            output_key=info.key,
            input=commit.input,
            input_root="",  # the caller knows it from the plan
            num_rows=commit.num_rows,
            status=Status.COMMITTED,
            commit=commit,
            version=info.version,
            size_bytes=info.size_bytes,
            sha256=sha256,
            reused=True,
        )

    unknown: list[ObjectInfo] = []
    for info in objects:
        receipt = known.get(info.key)
        if receipt is not None and receipt.version == info.version:
            yield info, replace(receipt, reused=True)
        else:
            unknown.append(info)
    yield from in_threads(read_back, unknown, _READERS)


def current_manifest(store: Store) -> list[Receipt]:
    """The receipts of the newest manifest; empty if there is none."""
    try:
        return read_manifest(store, store.read_json(_CURRENT_KEY)["manifest"])
    except ObjectMissing:
        return []


def read_manifest(store: Store, key: str) -> list[Receipt]:
    """The receipts of the manifest that `publish` stored under this key; raises ObjectMissing."""
    data = store.read(key)
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    return [
        Receipt.from_json(json.loads(line))
        for batch in file.iter_batches(_RECEIPTS_AT_ONCE, columns=["receipt"], use_threads=False)
        for line in batch["receipt"].to_pylist()
    ]


@dataclass(frozen=True, slots=True)
class Published:
    """Versions of CURRENT and `_SUCCESS`; None where they are not there."""

    current: Version | None
    success: Version | None


def published(store: Store) -> Published:
    """What is published now. A run looks while it is sure of its lease, and replaces nothing else:
    should it sleep and another run take its place, what that one publishes is safe."""

    def version_of(key: str) -> Version | None:
        try:
            return store.head(key).version
        except ObjectMissing:
            return None

    return Published(version_of(_CURRENT_KEY), version_of(SUCCESS_KEY))


def publish(
    store: Store,
    epoch: int,
    fingerprint: str,
    receipts: list[Receipt],
    found: Published,
) -> dict[str, Any]:
    """Write the manifest and point CURRENT at it.

    Returns the totals, for `conclude`. `found` is what this run may replace; raises LeaseLostError
    where something else is there by now.
    """
    receipts = sorted(receipts, key=lambda receipt: receipt.output_key)
    totals = total(receipts)
    data = _manifest_bytes(receipts)
    key = f"{RECORDS}/manifests/{epoch:06d}-{digest_of(totals | {'bytes': len(data)})[:12]}.parquet"
    failpoint("manifest.before_put")
    put(store, key, data)
    failpoint("manifest.after_put")
    totals |= {"fingerprint": fingerprint, "epoch": epoch, "manifest": key}
    current = json.dumps({"manifest": key, "epoch": epoch})
    _replace(store, _CURRENT_KEY, current.encode(), found.current)
    failpoint("current.after_put")
    return totals


def conclude(store: Store, totals: dict[str, Any], found: Published) -> None:
    """Drop the ledger, now that a manifest says the same; with nothing missing, write `_SUCCESS`.

    Its content are the totals that `publish` gave. Raises as that does.
    """
    segments = list(store.list(f"{RECORDS}/ledger"))
    deque(in_threads(lambda info: store.delete(info.key), segments, _READERS), maxlen=0)
    failpoint("ledger.after_delete")
    if totals["shards_failed"] == totals["shards_left"] == 0:
        success = json.dumps(totals, indent=1, sort_keys=True)
        _replace(store, SUCCESS_KEY, success.encode(), found.success)
        failpoint("success.after_put")


def _replace(store: Store, key: str, data: bytes, found: Version | None) -> None:
    """Store a record in place of exactly what the run found there."""
    try:
        if found is None:
            store.create(key, data)
        else:
            store.replace(key, data, found)
    except (ObjectChanged, ObjectMissing):
        with suppress(ObjectMissing):
            if store.read(key) == data:  # perhaps this very PUT, whose answer was lost
                return
        raise LeaseLostError(
            f"{store.root}: another run has finished here meanwhile; this one stops"
        ) from None


def total(receipts: Iterable[Receipt]) -> dict[str, Any]:
    """Sums over shards. `rows == rows_scored + rows_marked + rows_failed + rows_left`, always."""
    totals: dict[str, Any] = dict.fromkeys(
        ("shards", "shards_failed", "shards_left", "rows", "rows_scored", "rows_marked",
         "rows_failed", "rows_left", "sequences", "tokens"),
        0,
    )  # fmt: skip
    marked: dict[str, int] = {}
    pairs: dict[str, list[int]] = {}
    for receipt in receipts:
        if receipt.status is Status.INPUT_GONE:
            continue
        totals["shards"] += 1
        totals["rows"] += receipt.num_rows
        commit = receipt.commit
        if commit is None:
            how = "left" if receipt.status is Status.LEFT else "failed"
            totals[f"shards_{how}"] += 1
            totals[f"rows_{how}"] += receipt.num_rows
            continue
        if commit.rows_scored + commit.rows_marked != receipt.num_rows:
            raise IntegrityError(
                f"{receipt.output_key}: {receipt.num_rows} rows went in, "
                f"{commit.rows_scored} scored + {commit.rows_marked} marked came out"
            )
        for name in ("rows_scored", "rows_marked", "sequences", "tokens"):
            totals[name] += getattr(commit, name)
        for reason, count in commit.marked.items():
            marked[reason] = marked.get(reason, 0) + count
        for source, counts in commit.pairs.items():
            so_far = pairs.get(source, [0, 0, 0])
            pairs[source] = [a + b for a, b in zip(so_far, counts, strict=True)]
    return totals | {"marked": marked, "pairs": pairs}


def put(store: Store, key: str, data: bytes) -> None:
    """Store a record of ours, whatever was there; only the holder of the lease writes these."""
    try:
        store.create(key, data)
    except ObjectChanged:
        there, info = store.read_with_info(key)
        if there != data:  # otherwise this very PUT, whose answer was lost
            _replace(store, key, data, info.version)


def claim_output(
    store: Store, fingerprint: Fingerprint, layout: dict[str, Any], provenance: dict[str, Any]
) -> None:
    """Make sure this output is for this work: `run.json` is created, or agrees.

    Raises OutputError that names what differs.
    """
    body = {"fingerprint": fingerprint.parts, "layout": layout, "provenance": provenance}
    failpoint("claim.before_put")
    try:
        store.create(_RUN_KEY, json.dumps(body, indent=1, sort_keys=True).encode())
        return
    except (AccessDenied, ObjectMissing) as error:
        raise OutputError(str(error)) from error
    except ObjectChanged:
        there = store.read_json(_RUN_KEY)
    differences = fingerprint.differences(Fingerprint(there["fingerprint"]))
    differences += Fingerprint(layout).differences(Fingerprint(there["layout"]))
    if differences:
        raise OutputError(
            f"{store.root} belongs to another run. Use another output, or the same settings:\n  "
            + "\n  ".join(differences)
        )


def claimed(store: Store) -> dict[str, Any]:
    """What `claim_output` wrote when this output was begun; {} before. Raises OutputError."""
    return _read_claim(store, _RUN_KEY)


def _read_claim(store: Store, key: str) -> dict[str, Any]:
    try:
        claim: dict[str, Any] = store.read_json(key)
    except ObjectMissing:
        return {}
    except AccessDenied as error:
        raise OutputError(str(error)) from error
    return claim


def claimed_fingerprint(store: Store) -> dict[str, Any]:
    """The parts of the fingerprint that this output is for; {} before any run has claimed it."""
    parts: dict[str, Any] = claimed(store).get("fingerprint", {})
    return parts


def open_scored(output: str, store_options: Mapping[str, str]) -> tuple[Store, dict[str, Any]]:
    """An output of ours and its `run.json`; raises OutputError if there is none at `output`."""
    try:
        store = open_store(output, store_options)
    except ObjectMissing:
        raise OutputError(f"{output}: no scored output here (there is no such place)") from None
    except AccessDenied as error:
        raise OutputError(str(error)) from error
    if not (claim := claimed(store)):
        refuse_nights(store)
        raise OutputError(f"{output}: no scored output here ({_RUN_KEY} is missing)")
    return store, claim


def refuse_nights(store: Store) -> None:
    """Raise OutputError where `nightly` keeps its generations: each of them is an output."""
    if found := _read_claim(store, GENERATIONS_KEY):
        names = ", ".join(generation["path"] for generation in found["generations"])
        raise OutputError(f"{store.root} belongs to `nightly`; its outputs are {names}")


def record_plan(store: Store, shards: int, rows: int, tokens: int) -> None:
    """How much the run sets out to do, for `status`. `tokens` is an estimate."""
    body = {"shards": shards, "rows": rows, "estimated_tokens": tokens}
    failpoint("plan.before_put")
    put(store, _PLAN_KEY, json.dumps(body).encode())


def record_engine(output: str, store_options: Mapping[str, str], engine: Mapping[str, Any]) -> str:
    """Keep what a worker scores with, once for all workers alike; returns the record's name."""
    return _record_engine_text(
        output, tuple(sorted(store_options.items())), json.dumps(engine, indent=1, sort_keys=True)
    )


@lru_cache(maxsize=16)
def _record_engine_text(output: str, options: tuple[tuple[str, str], ...], text: str) -> str:
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    with suppress(ObjectChanged):  # another worker was first, with the same words
        open_store(output, dict(options)).create(f"{_ENGINES}/{name}.json", text.encode())
    return name


def read_engine(store: Store, name: str) -> dict[str, Any]:
    """What `record_engine` kept under this name."""
    engine: dict[str, Any] = store.read_json(f"{_ENGINES}/{name}.json")
    return engine


def read_plan(store: Store) -> dict[str, int]:
    """What `record_plan` wrote; raises ObjectMissing before any run has planned."""
    plan: dict[str, int] = store.read_json(_PLAN_KEY)
    return plan


def record_run(store: Store, run: Run, metrics: dict[str, Any] | None) -> None:
    """Keep what a run has to do and, once it has ended, its `Metrics.to_json`."""
    body = {"run": run.to_json(), "metrics": metrics}
    put(store, f"{_RUNS}/{run.epoch:06d}.json", json.dumps(body, indent=1).encode())


def newest_run(store: Store) -> tuple[Run, dict[str, Any] | None] | None:
    """The newest run that had anything to score, and its figures; None for those of a run that
    has not ended."""
    key = max((info.key for info in store.list(_RUNS)), default=None)
    if key is None:
        return None
    record = store.read_json(key)
    return Run.from_json(record["run"]), record["metrics"]


def read_success(store: Store) -> dict[str, Any] | None:
    """The totals in `_SUCCESS`; None while the output is not complete."""
    try:
        success: dict[str, Any] = store.read_json(SUCCESS_KEY)
    except ObjectMissing:
        return None
    return success


def is_in_manifest(store: Store, key: str) -> bool:
    """Whether the newest manifest has a shard of that name."""
    return any(receipt.output_key == key for receipt in current_manifest(store))


def is_record(key: str) -> bool:
    """Whether the key is one of ours that is not a scored shard."""
    return key == SUCCESS_KEY or key.startswith(f"{RECORDS}/")


def _manifest_bytes(receipts: list[Receipt]) -> bytes:
    """One row per shard: the columns people query, and the whole receipt as JSON."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, _MANIFEST, compression="zstd") as writer:
        for start in range(0, len(receipts), _RECEIPTS_AT_ONCE):
            writer.write_table(_manifest_rows(receipts[start : start + _RECEIPTS_AT_ONCE]))
    return sink.getvalue()


def _manifest_rows(receipts: list[Receipt]) -> pa.Table:
    commits = [receipt.commit for receipt in receipts]
    return pa.table(
        {
            "output_key": [r.output_key for r in receipts],
            "input": [r.input for r in receipts],
            "status": [r.status.value for r in receipts],
            "reason": [r.reason for r in receipts],
            "detail": [r.detail for r in receipts],
            "rows": [r.num_rows for r in receipts],
            "rows_scored": [c and c.rows_scored for c in commits],
            "rows_marked": [c and c.rows_marked for c in commits],
            "size_bytes": [r.size_bytes for r in receipts],
            "sha256": [r.sha256 for r in receipts],
            "receipt": [json.dumps(r.to_json()) for r in receipts],
        },
        schema=_MANIFEST,
    )
