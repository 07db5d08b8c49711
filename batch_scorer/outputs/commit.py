"""Scores joined to the untouched input columns, and published with one conditional PUT."""

import hashlib
import io
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.errors import ShardError, ShardReason, StorageError
from batch_scorer.failpoints import failpoint
from batch_scorer.inputs.files import rows_of_shard
from batch_scorer.job import Job
from batch_scorer.outputs.by_source import pair_counts, row_sources, spread_by_source
from batch_scorer.outputs.columns import column_metadata, digest_columns, score_columns
from batch_scorer.outputs.lease import current_epoch, lease_of
from batch_scorer.outputs.manifest import is_in_manifest, read_commit, record_engine
from batch_scorer.records import (
    Commit,
    Format,
    Receipt,
    RowError,
    ScoredRows,
    Shard,
    Status,
    layout_to_json,
)
from batch_scorer.storage import ObjectChanged, ObjectMissing, Store, Version, open_store

_EXAMPLES_PER_SHARD = 3
_COMMIT_TRIES = 5


def commit_shard(job: Job, epoch: int, shard: Shard, scored: ScoredRows) -> Receipt:
    """Join the scores to the untouched input columns and publish the shard with one PUT.

    The file is encoded whole before anything is sent, so a reader never sees a part of it.
    Raises ShardError: SUPERSEDED when a newer run holds the output, INPUT_CHANGED when the
    file is no longer the one that was scored.
    """
    started = time.perf_counter()
    table, _ = rows_of_shard(shard, job.config.store_options, None)
    if table.num_rows != scored.num_rows:
        raise ShardError(
            ShardReason.INTERNAL, f"{scored.num_rows} rows scored, {table.num_rows} rows read back"
        )
    errors = scored.errors_by_row()
    columns = score_columns(
        scored, table, shard.layout, job.config.column_prefix, job.config.over_length
    )
    commit = _describe(job, epoch, shard, scored, table, columns, errors)
    fields = column_metadata(scored.outputs, job.config.column_prefix)
    data = _encode(table, columns, fields, commit)
    version, standing = _publish(job, shard, commit, data)
    return Receipt(
        output_key=shard.output_key,
        input=shard.source.key,
        input_root=shard.source.root,
        num_rows=shard.num_rows,
        status=Status.COMMITTED,
        commit=standing.commit,
        version=version,
        size_bytes=standing.size_bytes,
        sha256=standing.sha256,
        engine=record_engine(job.config.output, job.config.store_options, scored.engine),
        detail=standing.note,
        examples=[
            (shard.first_row + row, error.reason.value, error.detail)
            for row, error in list(errors.items())[:_EXAMPLES_PER_SHARD]
        ],
        epoch=epoch,
        estimated_tokens=shard.estimated_tokens,
        **_reused(scored, table),
        effort=scored.effort,
        committed_at=time.time(),
        score_s=scored.score_s,
        write_s=time.perf_counter() - started,
    )


def _reused(scored: ScoredRows, table: pa.Table) -> dict[str, Any]:
    """The fields of a receipt that tell what did not meet the model, being known before."""
    known = scored.was_known
    if known is None:
        return {}
    asked = ~known & (scored.lengths > 0)  # what has no tokens meets no model either

    def per_row(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.diff(np.concatenate([[0], np.cumsum(mask)])[scored.row_offsets])

    rows = (per_row(known) > 0) & (per_row(asked) == 0)  # bool[R]
    return {
        "reused_sequences": int(known.sum()),
        "reused_tokens": int(scored.lengths[known].sum()),
        "reused_rows": dict(Counter(row_sources(table)[rows].tolist())),
    }


# Committing


def _describe(
    job: Job,
    epoch: int,
    shard: Shard,
    scored: ScoredRows,
    table: pa.Table,
    columns: Mapping[str, pa.Array],
    errors: Mapping[int, RowError],
) -> Commit:
    marked: dict[str, int] = {}
    for error in errors.values():
        marked[error.reason.value] = marked.get(error.reason.value, 0) + 1
    is_pair = (
        shard.layout.format is Format.PREFERENCE_PAIR and scored.outputs.embedding_size is None
    )
    finite = np.isfinite(scored.values[:, 0])
    return Commit(
        identity=shard.identity(job.fingerprint.digest, job.config.column_prefix),
        fingerprint=job.fingerprint.digest,
        epoch=epoch,
        input=shard.source.key,
        input_etag=shard.source.version.etag,
        first_row=shard.first_row,
        num_rows=shard.num_rows,
        rows_scored=shard.num_rows - len(errors),
        rows_marked=len(errors),
        marked=marked,
        sequences=int(finite.sum()),
        tokens=int(scored.lengths[finite].sum()),
        rows_digest=scored.rows_digest,
        scores_digest=digest_columns(columns),
        pairs=pair_counts(scored, table) if is_pair else {},
        layout=layout_to_json(shard.layout),
        added_columns=list(columns),
        spread=spread_by_source(scored, table),
    )


def _encode(
    table: pa.Table,
    columns: Mapping[str, pa.Array],
    fields: Mapping[str, Mapping[str, str]],
    commit: Commit,
) -> bytes:
    """The scored shard as Parquet bytes: input columns as they were, then the added ones.

    `fields` is field metadata by column name.
    """
    for name, column in columns.items():
        field = pa.field(name, column.type, metadata=fields.get(name))
        table = table.append_column(field, column)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **commit.footer()})
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink, compression="zstd")
    except pa.ArrowException as error:
        raise ShardError(ShardReason.WRONG_SCHEMA, f"cannot be written: {error}") from error
    return sink.getvalue()


@dataclass(frozen=True, slots=True)
class _Standing:
    """The commit that stands under the key now, ours or an equal one."""

    commit: Commit
    size_bytes: int
    sha256: str
    note: str = ""


def _publish(job: Job, shard: Shard, commit: Commit, data: bytes) -> tuple[Version, _Standing]:
    """One conditional PUT between two looks at the epoch; docs/commit-protocol.md has the table of
    what can happen."""
    store = open_store(job.config.output, job.config.store_options, create=True)
    ours = _Standing(commit, len(data), hashlib.sha256(data).hexdigest())
    expected = shard.replaces
    try:
        for _ in range(_COMMIT_TRIES):
            failpoint("commit.before_epoch_check")
            if current_epoch(store) > commit.epoch:
                raise _superseded()
            failpoint("commit.before_put")
            standing: _Standing | None = ours
            try:
                if expected is None:
                    version: Version | None = store.create(shard.output_key, data)
                else:
                    version = store.replace(shard.output_key, data, expected)
                failpoint("commit.after_put")
            except (ObjectChanged, ObjectMissing):
                failpoint("commit.after_refusal")
                version, standing = _look(store, shard, commit)
            if version is not None and standing is not None:
                if current_epoch(store) > commit.epoch:
                    if expected is None:
                        _withdraw(store, shard.output_key, version)
                    raise _superseded()
                return version, standing
            expected = version
    except StorageError as error:
        raise ShardError(ShardReason.STORE_FAILED, str(error)) from error
    raise ShardError(ShardReason.STORE_FAILED, "the object keeps changing under the commit")


def _withdraw(store: Store, key: str, version: Version) -> None:
    """Remove a shard that was created too late, after a newer run had closed: cut in another way,
    the newer plan has no such name, and a glob would find the rows twice.

    A run at work may count on what it found: it looks for such shards itself when it has closed,
    or, if it dies before, the one that comes after it.
    """
    lease = lease_of(store)
    if lease is not None and lease.is_over and not is_in_manifest(store, key):
        store.delete_version(key, version)


def _look(store: Store, shard: Shard, ours: Commit) -> tuple[Version | None, _Standing | None]:
    """What is stored where our PUT was refused: its version, and the commit if it may stand."""
    try:
        info = store.head(shard.output_key)
        there, sha256 = read_commit(store, info)
    except (ObjectMissing, ObjectChanged):
        return None, None
    if there is None:
        raise ShardError(
            ShardReason.OBJECT_IN_THE_WAY,
            f"{store.url(shard.output_key)} was not written by this program",
        )
    if there.epoch > ours.epoch:
        raise _superseded()
    if there.identity != ours.identity:
        return info.version, None
    note = "" if there.scores_digest == ours.scores_digest else "scores differ from an equal commit"
    return info.version, _Standing(there, info.size_bytes, sha256, note)


def _superseded() -> ShardError:
    return ShardError(ShardReason.SUPERSEDED, "a newer run works on this output")
