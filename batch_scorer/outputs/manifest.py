"""What is committed: the scored shards, and the records beside them.

    OUT/<input path>[.rowsA-B].parquet     a scored shard; the object is the commit
    OUT/_SUCCESS                           JSON totals; written last
    OUT/README.md                          a card for people, where it was asked for
    OUT/_report.html                       a page about the scores, where it was asked for
    OUT/_batch_scorer/run.json             what this output is: fingerprint, layout, provenance
                      plan.json            how much the newest run set out to do
                      runs/*.json          what each run had to do, and what it measured
                      engines/*.json       what scored: device, versions, kernel
                      lease.json           who works on it now, and the epoch
                      ledger/*.jsonl       receipts as they come in; only saves reading shards
                      inputs/*.files       what plans found out about input files (`inputs.known`)
                      manifests/*.manifest all commits of a finished run, one row per shard
                      CURRENT              names the newest manifest

Truth is the shards: every record here can be rebuilt from their footers.
"""

import hashlib
import io
import json
import struct
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.errors import IntegrityError
from batch_scorer.failpoints import failpoint
from batch_scorer.outputs.lease import RECORDS
from batch_scorer.outputs.ledger import READERS, R
from batch_scorer.outputs.puts import compare_and_swap, put
from batch_scorer.quarantine import Bounds, Died, apart
from batch_scorer.records import (
    Commit,
    Judged,
    ModelCounts,
    Outcome,
    PairCounts,
    Receipt,
    Rewarded,
    Status,
    Stored,
    added_up,
)
from batch_scorer.records.digest import digest_of
from batch_scorer.records.reading import parsed, read_record
from batch_scorer.storage import (
    ObjectChanged,
    ObjectDamaged,
    ObjectInfo,
    ObjectMissing,
    Store,
    Version,
    first_line,
    in_threads,
    open_store,
)

SUCCESS_KEY = "_SUCCESS"
CARD_KEY = "README.md"
"""The card that `score --card` writes (`runs.card`)."""
REPORT_KEY = "_report.html"
"""The page that `score --report` writes (`reports.page.write`)."""
_CURRENT_KEY = f"{RECORDS}/CURRENT"
_ENGINES = f"{RECORDS}/engines"
_PLAN_KEY = f"{RECORDS}/plan.json"
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
        "rows_not_asked": pa.int64(),
        "size_bytes": pa.int64(),
        "sha256": pa.string(),
        "receipt": pa.string(),
    }
)
_BOUNDS = Bounds(seconds=600.0, memory_bytes=1 << 31)
"""For reading a footer, or a part of a manifest."""
_TAIL = struct.Struct("<I4s")
"""What a Parquet file ends with: the length of its footer, and its mark."""
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

    The commit is None if this is not a scored shard of ours, or a damaged one.
    """
    data = store.read_whole(info.key, info.version, info.size_bytes)
    return commit_in(data), hashlib.sha256(data).hexdigest()


def commit_in(data: bytes) -> Commit | None:
    """The commit in a Parquet file; None if there is none."""
    if len(data) < _TAIL.size:
        return None
    length, _ = _TAIL.unpack(data[-_TAIL.size :])
    try:
        return apart(_BOUNDS, _commit_of, data[-length - _TAIL.size :])
    except (pa.ArrowException, OSError, MemoryError, Died):
        return None


def _commit_of(footer: bytes) -> Commit | None:
    return Commit.from_footer(pq.read_schema(io.BytesIO(footer)).metadata)


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
            rows_not_asked=commit.rows_not_asked,
            status=Status.COMMITTED,
            stored=Stored(commit, info.version, info.size_bytes, sha256),
        )

    unknown: list[ObjectInfo] = []
    for info in objects:
        receipt = known.get(info.key)
        stored = None if receipt is None else receipt.stored
        if receipt is not None and stored is not None and stored.version == info.version:
            yield info, receipt
        else:
            unknown.append(info)
    yield from in_threads(read_back, unknown, READERS)


def current_manifest(store: Store) -> list[Receipt]:
    """The receipts of the newest manifest; empty if there is none."""
    return outcomes_of_manifest(store, Receipt)


def outcomes_of_manifest(store: Store, shape: type[R]) -> list[R]:
    """The same, read as far as `shape` has them."""
    try:
        current = read_record(store, _CURRENT_KEY, _Current)
        return _read_manifest(store, current.manifest, shape)
    except ObjectMissing:
        return []


def read_manifest(store: Store, key: str) -> list[Receipt]:
    """The receipts of the manifest that `publish` stored under this key; raises ObjectMissing and
    ObjectDamaged."""
    return _read_manifest(store, key, Receipt)


def _read_manifest(store: Store, key: str, shape: type[R]) -> list[R]:
    data = store.read(key)
    receipts: list[R] = []
    try:
        for size_bytes, packed in apart(_BOUNDS, _lines_of, data):
            lines = pa.decompress(packed, size_bytes, codec="zstd", asbytes=True).split(b"\n")
            receipts += (parsed(line, shape).compact() for line in lines)
    except (ValueError, KeyError, OSError, pa.ArrowException, MemoryError, Died) as error:
        raise ObjectDamaged(f"{store.url(key)}: damaged: {first_line(error)}") from None
    return receipts


def _lines_of(manifest: bytes) -> list[tuple[int, bytes]]:
    """The receipts in each row group of a manifest, a line each: the size of the text, and the text
    packed. All of it plain may not fit in memory."""
    file = pq.ParquetFile(pa.BufferReader(manifest), pre_buffer=False)
    found = []
    for group in range(file.num_row_groups):
        column = file.read_row_group(group, columns=["receipt"], use_threads=False)["receipt"]
        if column.null_count:
            raise ValueError("a shard without a receipt")
        if len(column):
            text = "\n".join(column.cast(pa.string()).to_pylist()).encode()
            found.append((len(text), pa.compress(text, codec="zstd", asbytes=True)))
    return found


@dataclass(frozen=True, slots=True)
class _Current:
    """What `CURRENT` holds."""

    manifest: str
    epoch: int


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
    digest = digest_of(totals | {"bytes": len(data)})[:12]
    key = f"{RECORDS}/manifests/{epoch:06d}-{digest}.manifest"  # `**/*.parquet` must not find it
    failpoint("manifest.before_put")
    put(store, key, data)
    failpoint("manifest.after_put")
    totals |= {"fingerprint": fingerprint, "epoch": epoch, "manifest": key}
    current = json.dumps(asdict(_Current(key, epoch)))
    compare_and_swap(store, _CURRENT_KEY, current.encode(), found.current)
    failpoint("current.after_put")
    return totals


def conclude(store: Store, totals: dict[str, Any], found: Published) -> None:
    """Drop the ledger, now that a manifest holds the same; with nothing missing, write `_SUCCESS`.

    Its content are the totals that `publish` gave. Raises as that does.
    """
    segments = list(store.list(f"{RECORDS}/ledger"))
    deque(in_threads(lambda info: store.delete(info.key), segments, READERS), maxlen=0)
    failpoint("ledger.after_delete")
    if totals["shards_failed"] == totals["shards_left"] == 0:
        success = json.dumps(totals, indent=1, sort_keys=True)
        compare_and_swap(store, SUCCESS_KEY, success.encode(), found.success)
        failpoint("success.after_put")


def total(receipts: Collection[Receipt]) -> dict[str, Any]:
    """`counted`, with the rows by note, and the pairs by source; `models` is there for several
    models: of each one the marked rows, and its pairs."""
    notes: dict[str, int] = {}
    pairs: dict[str, PairCounts] = {}
    models: dict[str, ModelCounts] = {}
    for receipt in receipts:
        commit = receipt.commit
        if commit is None or receipt.status is Status.INPUT_GONE:
            continue
        for note, count in commit.notes.items():
            notes[note] = notes.get(note, 0) + count
        for source, counts in commit.pairs.items():
            pairs[source] = pairs.get(source, PairCounts()) + counts
        for name, own in commit.models.items():
            models[name] = models[name] + own.counts if name in models else own.counts
    totals = counted(receipts) | {
        "notes": notes,
        "pairs": {source: asdict(counts) for source, counts in pairs.items()},
    }
    if models:
        totals["models"] = {name: asdict(own) for name, own in models.items()}
    return totals


def counted(receipts: Iterable[Receipt | Outcome]) -> dict[str, Any]:
    """Sums over shards. `rows` are those of the input files, and always `rows == rows_scored +
    rows_marked + rows_not_asked + rows_failed + rows_left`. `judged` is there for judges only,
    `rewards`, by function, where there are any."""
    totals: dict[str, Any] = dict.fromkeys(
        ("shards", "shards_failed", "shards_left", "rows", "rows_scored", "rows_marked",
         "rows_not_asked", "rows_failed", "rows_left", "sequences", "tokens"),
        0,
    )  # fmt: skip
    marked: dict[str, int] = {}
    judged: Judged | None = None
    rewards: dict[str, Rewarded] = {}
    for receipt in receipts:
        if receipt.status is Status.INPUT_GONE:
            continue
        totals["rows"] += receipt.num_rows + receipt.rows_not_asked
        totals["rows_not_asked"] += receipt.rows_not_asked
        if receipt.status is Status.NOT_ASKED:
            continue
        totals["shards"] += 1
        commit = receipt.commit
        if commit is None:
            how = "left" if receipt.status is Status.LEFT else "failed"
            totals[f"shards_{how}"] += 1
            totals[f"rows_{how}"] += receipt.num_rows
            continue
        parts = (commit.rows_scored, commit.rows_marked, commit.rows_not_asked)
        if sum(parts) != receipt.num_rows + receipt.rows_not_asked:
            raise IntegrityError(
                f"{receipt.output_key}: {receipt.num_rows + receipt.rows_not_asked} rows went in, "
                "{} scored + {} marked + {} not asked for came out".format(*parts)
            )
        for name in ("rows_scored", "rows_marked", "sequences", "tokens"):
            totals[name] += getattr(commit, name)
        for reason, count in commit.marked.items():
            marked[reason] = marked.get(reason, 0) + count
        if commit.judged is not None:
            judged = commit.judged if judged is None else judged + commit.judged
        rewards = added_up(rewards, commit.rewards)
    if judged is not None:
        totals["judged"] = asdict(judged)
    if rewards:
        totals["rewards"] = {name: asdict(counts) for name, counts in rewards.items()}
    return totals | {"marked": marked}


def record_plan(store: Store, shards: int, rows: int, tokens: int) -> None:
    """How much the run sets out to do, for `status`. `tokens` is an estimate."""
    body = json.dumps(asdict(Planned(shards, rows, tokens)))
    failpoint("plan.before_put")
    put(store, _PLAN_KEY, body.encode())


def record_engine(
    output: str, store_options: Mapping[str, str], engine: Mapping[str, Any], holder_id: str
) -> str:
    """Keep what a worker scores with, once for all workers alike; returns the record's name.

    `holder_id` is that of the lease: a process remembers what it has recorded under this hold.
    Before another one, the output may have been deleted and begun again.
    """
    text = json.dumps(engine, indent=1, sort_keys=True)
    return _record_engine_text(output, tuple(sorted(store_options.items())), text, holder_id)


@lru_cache(maxsize=16)
def _record_engine_text(
    output: str, options: tuple[tuple[str, str], ...], text: str, holder_id: str
) -> str:
    name = hashlib.sha256(text.encode()).hexdigest()[:12]
    with suppress(ObjectChanged):  # another worker was first, with the same words
        open_store(output, dict(options)).create(f"{_ENGINES}/{name}.json", text.encode())
    return name


def read_engine(store: Store, name: str) -> dict[str, Any]:
    """What `record_engine` kept under this name."""
    return read_record(store, f"{_ENGINES}/{name}.json", dict[str, Any])


@dataclass(frozen=True, slots=True)
class Planned:
    """How much a run set out to do; `estimated_tokens` is an estimate."""

    shards: int
    rows: int
    estimated_tokens: int


def read_plan(store: Store) -> Planned:
    """What `record_plan` wrote; raises ObjectMissing before any run has planned."""
    return read_record(store, _PLAN_KEY, Planned)


@dataclass(frozen=True, slots=True)
class Success:
    """Those of the totals in `_SUCCESS` that are compared with the data."""

    rows: int
    rows_scored: int


def read_success(store: Store) -> Success | None:
    """What `_SUCCESS` says; None while the output is not complete."""
    try:
        return read_record(store, SUCCESS_KEY, Success)
    except ObjectMissing:
        return None


def is_in_manifest(store: Store, key: str) -> bool:
    """Whether the newest manifest has a shard of that name."""
    return any(receipt.output_key == key for receipt in current_manifest(store))


def is_record(key: str) -> bool:
    """Whether the key is one of ours that is not a scored shard."""
    return key in (SUCCESS_KEY, CARD_KEY, REPORT_KEY) or key.startswith(f"{RECORDS}/")


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
            "rows_not_asked": [r.rows_not_asked for r in receipts],
            "size_bytes": [r.stored.size_bytes if r.stored else 0 for r in receipts],
            "sha256": [r.stored.sha256 if r.stored else "" for r in receipts],
            "receipt": [r.to_line() for r in receipts],
        },
        schema=_MANIFEST,
    )
