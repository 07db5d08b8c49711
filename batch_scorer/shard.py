"""The path of a shard: read_shard → score_shard → commit_shard. Start reading here.

    rows = read_shard(job, shard, renderer)      input columns → token ids
    scored = score_shard(rows, backend)          token ids → float32 scores
    receipt = commit_shard(job, shard, scored)   scores + untouched columns → one Parquet object

The same three run as Ray Data stages and in a plain loop (`pipeline`). What goes wrong with the
shard as a whole is a ShardError; what goes wrong with a row stays with the row.
"""

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer import formats
from batch_scorer.backends.base import Backend
from batch_scorer.columns import (
    SCALAR,
    Outputs,
    ScoredRows,
    column_metadata,
    digest_columns,
    pair_counts,
    row_sources,
    score_columns,
    spread_by_source,
)
from batch_scorer.commits import Commit, Receipt, Shard, Status, layout_to_json
from batch_scorer.config import Config, Device
from batch_scorer.errors import RowReason, ShardError, ShardReason, StorageError
from batch_scorer.failpoints import failpoint
from batch_scorer.lease import current_epoch, lease_of
from batch_scorer.manifest import is_in_manifest, read_commit, record_engine
from batch_scorer.models.adapter import Prompt
from batch_scorer.models.registry import adapter_named
from batch_scorer.plan import read_json, read_rows
from batch_scorer.records import (
    Embedding,
    Format,
    ParsedRows,
    RowError,
    Scores,
    TokenizedRows,
)
from batch_scorer.render import Renderer
from batch_scorer.reuse import find_known, read_earlier, score_unknown
from batch_scorer.storage import ObjectChanged, ObjectMissing, Store, Version, open_store

FloatArray = npt.NDArray[np.float32]

_EXAMPLES_PER_SHARD = 3
_COMMIT_TRIES = 5


@dataclass(frozen=True, slots=True)
class Job:
    """A run's settings with everything derived filled in; the same on every worker."""

    config: Config
    model_dir: Path
    adapter: str
    prompt: Prompt
    backend: str
    outputs: Outputs
    embedding: Embedding | None
    device: Device
    dtype: str
    max_tokens: int
    fingerprint: str
    epoch: int


def read_shard(job: Job, shard: Shard, renderer: Renderer) -> TokenizedRows:
    """Read the columns that are scored, and turn them into token ids.

    Raises ShardError: the file is unreadable, gone, changed since it was planned, or holds an
    over-long row under the `error` policy.
    """
    return renderer.tokenize(parse_shard(job, shard))


def parse_shard(job: Job, shard: Shard) -> ParsedRows:
    """The shard's rows cut into sequences, before rendering. Raises as `read_shard`."""
    table, malformed = _read_rows(job, shard, formats.columns_needed(shard.layout))
    parsed = formats.parse(table, shard.layout)
    parsed.row_errors.update(malformed)
    return parsed


def read_known(job: Job, shard: Shard, rows: TokenizedRows, renderer: Renderer) -> TokenizedRows:
    """The rows of the shard, with the scores that equal sequences got before (`reuse`)."""
    found = (
        read_earlier(
            open_store(root, job.config.store_options),
            key,
            shard.layout,
            job.fingerprint,
            job.outputs,
            renderer,
        )
        for root, key in shard.earlier
    )
    return replace(rows, known=find_known(rows, (part for part in found if part is not None)))


def score_shard(rows: TokenizedRows, backend: Backend, outputs: Outputs = SCALAR) -> ScoredRows:
    """Score all sequences of the shard whose score is not known yet.

    Raises ShardError if the backend loses any.
    """
    ask = partial(_ask, backend)
    started = time.perf_counter()
    scores = ask(rows) if rows.known is None else score_unknown(rows, ask)
    score_s = time.perf_counter() - started
    values, errors = _checked(scores, rows)
    return ScoredRows(
        values=values,
        lengths=rows.lengths.astype(np.int32),
        truncated_tokens=rows.truncated_tokens,
        row_offsets=rows.row_offsets,
        sequence_errors=errors,
        row_errors=rows.row_errors,
        rows_digest=_rows_digest(rows),
        # Plain values: torch's version is an object that would load torch wherever it arrives.
        engine=json.loads(json.dumps(backend.provenance)),
        effort=scores.effort,
        score_s=score_s,
        outputs=outputs,
        step_values=scores.step_values if outputs.steps else None,
        step_offsets=scores.step_offsets if outputs.steps else None,
        was_known=None if rows.known is None else rows.known.is_there & (rows.lengths > 0),
    )


def _ask(backend: Backend, rows: TokenizedRows) -> Scores:
    scores = backend.score(rows)
    if scores.values.shape != (rows.num_sequences, backend.num_outputs):
        raise ShardError(
            ShardReason.INTERNAL,
            f"{rows.num_sequences} sequences went in, scores {scores.values.shape} came out",
        )
    return scores


def commit_shard(job: Job, shard: Shard, scored: ScoredRows) -> Receipt:
    """Join the scores to the untouched input columns and publish the shard with one PUT.

    The file is encoded whole before anything is sent, so a reader never sees a part of it.
    Raises ShardError: SUPERSEDED when a newer run holds the output, INPUT_CHANGED when the
    file is no longer the one that was scored.
    """
    started = time.perf_counter()
    table, _ = _read_rows(job, shard, None)
    if table.num_rows != scored.num_rows:
        raise ShardError(
            ShardReason.INTERNAL, f"{scored.num_rows} rows scored, {table.num_rows} rows read back"
        )
    errors = scored.errors_by_row()
    columns = score_columns(
        scored, table, shard.layout, job.config.column_prefix, job.config.over_length
    )
    commit = _describe(job, shard, scored, table, columns, errors)
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
        epoch=job.epoch,
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


@lru_cache(maxsize=4)
def _cached_renderer(
    model_dir: Path, max_tokens: int, over_length: Any, prompt: Prompt, trust_remote_code: bool
) -> Renderer:
    """One renderer per process: loading a tokenizer takes seconds."""
    return Renderer(model_dir, max_tokens, over_length, prompt, trust_remote_code=trust_remote_code)


def renderer_of(job: Job) -> Renderer:
    config = job.config
    return _cached_renderer(
        job.model_dir, job.max_tokens, config.over_length, job.prompt, config.trust_remote_code
    )


def make_backend(job: Job) -> Backend:
    """The engine of this run. Raises ModelError, or MissingExtraError for what is not installed."""
    if job.backend == "fake":
        from batch_scorer.backends.fake import FakeBackend

        return FakeBackend()
    config = job.config
    shared: dict[str, Any] = {
        "adapter": adapter_named(job.adapter),
        "dtype": job.dtype,
        "device": job.device,
        "step_aggregation": config.step_aggregation,
        "embedding": job.embedding,
        "token_budget": config.token_budget,
        "compile": config.compile,
        "trust_remote_code": config.trust_remote_code,
    }
    if job.backend == "vllm":
        from batch_scorer.backends.vllm import VLLMBackend

        return VLLMBackend(
            job.model_dir,
            max_tokens=job.max_tokens,
            quantization=config.quantization,
            tensor_parallel=config.tensor_parallel,
            **shared,
        )
    from batch_scorer.backends.hf import HFBackend

    return HFBackend(job.model_dir, attention=config.attention, **shared)


# Reading


def _read_rows(
    job: Job, shard: Shard, columns: list[str] | None
) -> tuple[pa.Table, dict[int, RowError]]:
    """The shard's rows, and the rows that were no JSON; `columns=None` reads all columns."""
    source = shard.source
    store = open_store(source.root, job.config.store_options)
    try:
        if shard.row_groups is None:
            if shard.lines is not None:
                table, malformed = read_json(store, source, shard.lines)
            else:
                data = store.read_whole(source.key, source.version, source.size_bytes)
                table, malformed = formats.read_json_table(data, source.key)
            table = table if columns is None else table.select(columns)
            start, stop = shard.skip_rows, shard.skip_rows + shard.num_rows
            kept = {row - start: error for row, error in malformed.items() if start <= row < stop}
            return table.slice(start, shard.num_rows), kept
        return read_rows(
            store, source, shard.row_groups, shard.skip_rows, shard.num_rows, columns
        ), {}
    except ObjectChanged as error:
        raise ShardError(
            ShardReason.INPUT_CHANGED, "the file changed after the run was planned; run again"
        ) from error
    except ObjectMissing as error:
        raise ShardError(ShardReason.INPUT_GONE, "the file is gone") from error
    except StorageError as error:
        raise ShardError(ShardReason.STORE_FAILED, str(error)) from error
    except (pa.ArrowException, OSError) as error:
        raise ShardError(
            ShardReason.UNREADABLE_FILE,
            f"rows {shard.first_row} to {shard.first_row + shard.num_rows}: {error}",
        ) from error


def _rows_digest(rows: TokenizedRows) -> str:
    """Digest of what was scored: token ids, how they group into rows, and what was marked."""
    digest = hashlib.sha256()
    for array in (rows.token_ids, rows.sequence_offsets, rows.row_offsets, rows.truncated_tokens):
        digest.update(np.ascontiguousarray(array).tobytes())
    marks = {**rows.sequence_errors, **{-1 - row: error for row, error in rows.row_errors.items()}}
    digest.update(repr(sorted((i, error.reason.value) for i, error in marks.items())).encode())
    return digest.hexdigest()


def _checked(scores: Scores, rows: TokenizedRows) -> tuple[FloatArray, dict[int, RowError]]:
    """float32[S, O] and the errors of all sequences without a finite score."""
    values = scores.values.astype(np.float32)
    errors = {**scores.errors, **rows.sequence_errors}
    for index in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
        errors.setdefault(index, RowError(RowReason.NON_FINITE_SCORE, "the model gave no number"))
    values[list(errors)] = np.nan
    return values, errors


# Committing


def _describe(
    job: Job,
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
        identity=shard.identity(job.fingerprint, job.config.column_prefix),
        fingerprint=job.fingerprint,
        epoch=job.epoch,
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
            if current_epoch(store) > job.epoch:
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
                if current_epoch(store) > job.epoch:
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
