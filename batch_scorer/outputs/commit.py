"""Scores joined to the untouched input columns, and published with one conditional PUT."""

import hashlib
import io
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.config import Config
from batch_scorer.errors import RowNote, RowReason, ShardError, ShardReason, StorageError
from batch_scorer.failpoints import failpoint
from batch_scorer.formats.shape import shape_of
from batch_scorer.inputs.files import read_apart, row_numbers, rows_of_shard
from batch_scorer.inputs.selection import kept_of
from batch_scorer.job import AnyJob
from batch_scorer.outputs.by_source import Sources, pair_counts, row_sources, spread_by_source
from batch_scorer.outputs.columns import (
    column_metadata,
    digest_columns,
    reward_columns,
    score_columns,
)
from batch_scorer.outputs.lease import Hold, current_epoch, current_hold, lease_of
from batch_scorer.outputs.manifest import is_in_manifest, read_commit, record_engine
from batch_scorer.outputs.rewarded import reward_shard
from batch_scorer.outputs.together import columns_together, joined
from batch_scorer.records import (
    AGGREGATES,
    SCALAR,
    Commit,
    ModelCommit,
    ModelCounts,
    Outputs,
    PairCounts,
    Receipt,
    Reused,
    Rewarded,
    RewardedRows,
    RowError,
    ScoredRows,
    Shard,
    Spent,
    Status,
    Stored,
    family_prefix,
    first_errors,
    layout_to_json,
)
from batch_scorer.rewards.calls import Pace
from batch_scorer.storage import ObjectChanged, ObjectMissing, Store, Version, open_store

BoolArray: TypeAlias = npt.NDArray[np.bool_]

_EXAMPLES_PER_SHARD = 3
_COMMIT_TRIES = 5


def commit_shard(
    job: AnyJob, epoch: int, shard: Shard, scored: Mapping[str, ScoredRows], pace: Pace
) -> Receipt:
    """Join the scores of all models, by name, to the untouched input columns, or to those that are
    kept, and publish the shard with one PUT.

    The file is encoded whole before anything is sent, so a reader never sees a part of it.
    Before that the job's reward functions are asked about its rows, each when `pace` lets it;
    the receipt says how long they took.
    Raises ShardError: SUPERSEDED when a newer run holds the output, INPUT_CHANGED when the
    file is no longer the one that was scored, REWARD_UNUSABLE where a function cannot be loaded.
    """
    config, size_bytes = job.config, shard.source.size_bytes
    rewarded, reward_s = None, 0.0
    if job.rewards:
        started = time.perf_counter()
        rewarded = reward_shard(job, shard, pace)
        reward_s = time.perf_counter() - started
    encoded = read_apart(config, size_bytes, _encode_shard, job, epoch, shard, scored, rewarded)
    try:
        store = open_store(config.output, config.store_options, create=True)
        stands, hold = publish_shard(
            store, shard.output_key, encoded.data, encoded.commit, shard.replaces
        )
    except StorageError as error:
        raise ShardError(ShardReason.STORE_FAILED, str(error)) from error
    return Receipt(
        output_key=shard.output_key,
        input=shard.source.key,
        input_root=shard.source.root,
        num_rows=shard.num_rows,
        status=Status.COMMITTED,
        stored=stands.stored,
        detail=stands.note,
        engine=record_engine(config.output, config.store_options, encoded.engine, hold.holder_id),
        examples=encoded.examples,
        epoch=epoch,
        estimated_tokens=shard.estimated_tokens,
        reused=encoded.reused,
        spent=Spent(reward_s=reward_s),
        rows_not_asked=shard.rows_not_asked,
    )


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A scored shard, ready to be published. `examples` and `reused` are the receipt's, `engine`
    describes what scored it."""

    data: bytes
    commit: Commit
    engine: dict[str, Any]
    examples: list[tuple[int, str, str]]
    reused: Reused


def _encode_shard(
    job: AnyJob,
    epoch: int,
    shard: Shard,
    scored: Mapping[str, ScoredRows],
    rewarded: RewardedRows | None,
) -> _Encoded:
    """Read the input columns again and put the scores beside them. In one process, so that the
    rows, whose parts nobody has looked into, do not come out of it."""
    config = job.config
    table, _ = rows_of_shard(shard, config.store_options, None)
    for own in scored.values():
        if not table.num_rows == own.num_rows == shard.num_rows:
            raise ShardError(
                ShardReason.WRONG_ROW_COUNT,
                f"{shard.num_rows} rows planned, {own.num_rows} scored, {table.num_rows} read back",
            )
    whole = scored[""] if "" in scored else joined(scored)
    columns, fields = _columns(job, shard, scored, whole, table)
    sources = row_sources(table)
    counted: dict[str, Rewarded] = {}
    if rewarded is not None:
        added, counted = reward_columns(rewarded, table, shard.layout, config.column_prefix)
        columns |= added
    commit = _describe(job, epoch, shard, scored, whole, columns, sources, counted)
    kept = kept_of(table, config.keep_columns, config.drop_columns)
    return _Encoded(
        data=_encode(kept, columns, fields, commit),
        commit=commit,
        engine=whole.engine,
        examples=_examples(config, shard, whole, rewarded),
        reused=_reused([*scored.values()], sources),
    )


def _examples(
    config: Config, shard: Shard, whole: ScoredRows, rewarded: RewardedRows | None
) -> list[tuple[int, str, str]]:
    """A few rows without a score, and a few that each reward function has no value for where the
    row itself is not to blame, as `Receipt` has them."""
    errors = whole.errors_by_row()
    found = list(islice(errors.items(), _EXAMPLES_PER_SHARD))
    if rewarded is not None:
        for name, own in rewarded.errors.items():
            named = [
                (row, replace(error, detail=f"{name}: {error.detail}"))
                for row, error in first_errors(rewarded.row_offsets, {}, own).items()
                if row not in errors
            ]
            found += named[:_EXAMPLES_PER_SHARD]
    numbers = row_numbers(shard, config.store_options) if found else ()
    return [(numbers[row], error.reason.value, error.detail) for row, error in found]


def _columns(
    job: AnyJob,
    shard: Shard,
    scored: Mapping[str, ScoredRows],
    whole: ScoredRows,
    table: pa.Table,
) -> tuple[dict[str, pa.Array], dict[str, dict[str, str]]]:
    """All added columns by name, R values each, and their field metadata. `table` holds the input
    rows, `whole` is what all models made of them together."""
    columns: dict[str, pa.Array] = {}
    fields: dict[str, dict[str, str]] = {}
    if "" not in scored:
        columns = columns_together(scored, whole, table, shard.layout, job.config.column_prefix)
    for name, own in scored.items():
        member = job.members[name]
        prefix = family_prefix(job.config.column_prefix, name)
        over_length = member.config.over_length
        columns |= score_columns(own, member.outputs, table, shard.layout, prefix, over_length)
        fields |= column_metadata(member.outputs, prefix)
    return columns, fields


def _reused(scored: Sequence[ScoredRows], sources: Sources) -> Reused:
    """What was not scored by the models, because its scores were known before; of rows, those that
    no model was asked about."""
    if all(own.was_known is None for own in scored):
        return Reused()
    sequences = tokens = 0
    rows = np.ones(len(sources), np.bool_)  # bool[R]
    for own in scored:
        known, asked = _known_and_asked(own)
        sequences += int(known.sum())
        tokens += int(own.lengths[known].sum())
        rows &= (_per_row(known, own) > 0) & (_per_row(asked, own) == 0)
    return Reused(sequences, tokens, dict(Counter(sources[rows].tolist())))


def _known_and_asked(scored: ScoredRows) -> tuple[BoolArray, BoolArray]:
    """bool[S] each: the sequences that were known before, and those that the model was asked for.
    It is not asked for what has no tokens, or too many."""
    known = scored.was_known
    if known is None:
        known = np.zeros(len(scored.lengths), np.bool_)
    asked = ~known & (scored.lengths > 0)
    errors = scored.scores.errors
    asked[[s for s, error in errors.items() if error.reason is RowReason.TOO_LONG]] = False
    return known, asked


def _per_row(mask: BoolArray, scored: ScoredRows) -> npt.NDArray[np.int64]:
    return np.diff(np.concatenate([[0], np.cumsum(mask)])[scored.row_offsets])


def _notes(scored: ScoredRows) -> dict[str, int]:
    """Rows by note, and those whose messages spell special tokens."""
    notes = Counter(note.value for found in scored.notes.values() for note in found)
    if scored.special_tokens:
        notes["special_tokens"] = len(scored.special_tokens)
    return dict(notes)


def _describe(
    job: AnyJob,
    epoch: int,
    shard: Shard,
    scored: Mapping[str, ScoredRows],
    whole: ScoredRows,
    columns: Mapping[str, pa.Array],
    sources: Sources,
    rewards: dict[str, Rewarded],
) -> Commit:
    errors, prefix = whole.errors_by_row(), job.config.column_prefix
    finite = {name: np.isfinite(own.scores.values[:, 0]) for name, own in scored.items()}
    outputs = SCALAR if "" not in scored else job.members[""].outputs

    def pairs_of(family: str, own: ScoredRows) -> dict[str, PairCounts]:
        return _pairs(shard, outputs, columns, family_prefix(prefix, family), own, sources)

    models: dict[str, ModelCommit] = {}
    for name, own in scored.items() if "" not in scored else ():
        marked = own.errors_by_row().values()
        models[name] = ModelCommit(
            fingerprint=job.members[name].fingerprint.digest,
            counts=ModelCounts(len(marked), _by_reason(marked), pairs_of(name, own)),
            spread=spread_by_source(own, sources),
        )
    return Commit(
        identity=shard.identity(job.fingerprint.digest, prefix),
        fingerprint=job.fingerprint.digest,
        epoch=epoch,
        input=shard.source.key,
        input_etag=shard.source.version.etag,
        first_row=shard.first_row,
        num_rows=shard.num_rows,
        rows_scored=shard.num_rows - len(errors),
        rows_marked=len(errors),
        marked=_by_reason(errors.values()),
        notes=_notes(whole),
        sequences=sum(int(each.sum()) for each in finite.values()),
        tokens=sum(int(own.lengths[finite[name]].sum()) for name, own in scored.items()),
        rows_digest=whole.rows_digest,
        scores_digest=digest_columns(columns),
        pairs=pairs_of(AGGREGATES[0] if models else "", whole),
        layout=layout_to_json(shard.layout),
        added_columns=list(columns),
        spread=spread_by_source(whole, sources, has_scores=outputs.has_score),
        where=shard.where,
        rows_not_asked=shard.rows_not_asked,
        retries=shard.retries,
        judged=whole.judged,
        models=models,
        rewards=rewards,
    )


def _by_reason(errors: Iterable[RowError]) -> dict[str, int]:
    return dict(Counter(error.reason.value for error in errors))


def _pairs(
    shard: Shard,
    outputs: Outputs,
    columns: Mapping[str, pa.Array],
    prefix: str,
    scored: ScoredRows,
    sources: Sources,
) -> dict[str, PairCounts]:
    """Of the scores in the columns with this prefix."""
    shape = shape_of(shard.layout.format)
    if not shape.has_margin(outputs):
        return {}
    (names,) = shape.value_columns(SCALAR)
    chosen, rejected = (columns[prefix + name] for name in names)
    same = [row for row, notes in scored.notes.items() if RowNote.SAME_TOKENS in notes]
    return pair_counts(chosen, rejected, sources, same)


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
    except MemoryError:  # Arrow's is an ArrowException too
        raise
    except pa.ArrowException as error:
        raise ShardError(ShardReason.WRONG_SCHEMA, f"cannot be written: {error}") from error
    return sink.getvalue()


# Publishing


@dataclass(frozen=True, slots=True)
class Stands:
    """The commit that stands under the key now, ours or an equal one."""

    stored: Stored
    note: str = ""


@dataclass(frozen=True, slots=True)
class Stale:
    """Another commit is stored there, or one with fewer retries of its marked rows, which may be
    replaced."""

    version: Version


def publish_shard(
    store: Store, key: str, data: bytes, commit: Commit, expected: Version | None
) -> tuple[Stands, Hold]:
    """One conditional PUT between two looks at the lease; docs/commit-protocol.md has the table of
    what can happen.

    `expected` is the stale object to be replaced, None where there should be none. Returns what
    stands there now, and the lease as the second look found it. Raises ShardError and StorageError.
    """
    ours = hashlib.sha256(data).hexdigest()
    for _ in range(_COMMIT_TRIES):
        failpoint("commit.before_epoch_check")
        if current_epoch(store) > commit.epoch:
            raise _superseded()
        failpoint("commit.before_put")
        there: Stands | Stale | None
        try:
            version = store.put(key, data, instead_of=expected)
            failpoint("commit.after_put")
            there = Stands(Stored(commit, version, len(data), ours))
        except ObjectChanged:
            failpoint("commit.after_refusal")
            there = _look(store, key, commit)
        if isinstance(there, Stands):
            if (hold := current_hold(store)).epoch > commit.epoch:
                if expected is None:
                    _withdraw(store, key, there.stored.version)
                raise _superseded()
            return there, hold
        expected = None if there is None else there.version
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


def _look(store: Store, key: str, ours: Commit) -> Stands | Stale | None:
    """What is stored where our PUT was refused; None where nothing is there any more."""
    try:
        info = store.head(key)
        there, sha256 = read_commit(store, info)
    except (ObjectMissing, ObjectChanged):
        return None
    if there is None:
        raise ShardError(
            ShardReason.OBJECT_IN_THE_WAY, f"{store.url(key)} was not written by this program"
        )
    if there.epoch > ours.epoch:
        raise _superseded()
    if there.identity != ours.identity or there.retries < ours.retries:
        return Stale(info.version)
    note = "" if there.scores_digest == ours.scores_digest else "scores differ from an equal commit"
    return Stands(Stored(there, info.version, info.size_bytes, sha256), note)


def _superseded() -> ShardError:
    return ShardError(ShardReason.SUPERSEDED, "a newer run works on this output")
