"""Rows of a rewritten file take the scores that equal sequences got before.

Equal sequences are those of equal token ids under one fingerprint: their scores would come out the
same (for an implicit reward, their answers begin at the same token, too; of a judge's questions,
they are the same vote). So before a scored object is replaced, or deleted because its file is cut
differently now, it is copied aside; whoever reads the file's new rows reads those copies too, turns
their rows into token ids in the same way, and asks a backend only for what it does not find there.

Legend: S sequences, O outputs, K steps.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer import formats
from batch_scorer.config import Config
from batch_scorer.errors import ShardError, StorageError
from batch_scorer.inputs.files import open_parquet, read_apart
from batch_scorer.job import AnyJob
from batch_scorer.judges.judgements import stored_verdicts
from batch_scorer.judges.page import JUDGEMENTS
from batch_scorer.outputs.columns import sequence_scores
from batch_scorer.outputs.lease import RECORDS
from batch_scorer.records import (
    Commit,
    Layout,
    Receipt,
    Scores,
    Shard,
    Source,
    TokenizedRows,
    gather,
    layout_to_json,
)
from batch_scorer.render.rows import tokenized_for
from batch_scorer.storage import ObjectInfo, Store, in_threads, open_store

log = logging.getLogger("batch_scorer")

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

EARLIER = f"{RECORDS}/earlier"
"""Folder of the copies, each under its output key and a suffix: a plain `**/*.parquet` must not
find their rows beside those that replace them."""

_SUFFIX = ".earlier"

MOST_EARLIER = 8
"""Objects that are read for one shard. Each costs as much reading and tokenising as the shard
itself, and rows seldom move farther than into the next shard."""

_REQUESTS = 16


@dataclass(frozen=True, slots=True)
class Earlier:
    """A scored object, at `key` of the store at `root`, some of whose rows may come back."""

    root: str
    key: str
    commit: Commit

    def distance(self, shard: Shard) -> tuple[int, int]:
        """Rows between this object's and the shard's, as they were numbered; then a tie-break."""
        start, stop = self.commit.first_row, self.commit.first_row + self.commit.num_rows
        gap = max(0, start - shard.first_row - shard.num_rows, shard.first_row - stop)
        return gap, abs(start + stop - 2 * shard.first_row - shard.num_rows)


def keep(output: Store, receipts: Iterable[Receipt]) -> list[Earlier]:
    """Copy committed shards aside. Raises StorageError; nothing may be replaced then."""

    def copied(receipt: Receipt) -> Earlier:
        assert receipt.commit is not None
        key = f"{EARLIER}/{receipt.output_key}{_SUFFIX}"
        output.copy(receipt.output_key, key)
        return Earlier(output.root, key, receipt.commit)

    return list(in_threads(copied, receipts, _REQUESTS))


def kept(config: Config, output: Store) -> list[Earlier]:
    """What runs that did not come to their end have copied aside."""

    def described(info: ObjectInfo) -> Earlier | None:
        try:
            commit = read_apart(config, info.size_bytes, _footer, output, info)
        except (StorageError, ShardError, pa.ArrowException, OSError) as error:
            log.warning("%s: its scores are not used: %s", output.url(info.key), error)
            return None
        return None if commit is None else Earlier(output.root, info.key, commit)

    found = in_threads(described, output.list(EARLIER), _REQUESTS)
    return [earlier for earlier in found if earlier is not None]


def nearest(
    shard: Shard, earlier: Sequence[Earlier], fingerprints: Collection[str]
) -> tuple[tuple[str, str], ...]:
    """Root and key of those that may hold the shard's rows with scores it would get, of these
    fingerprints, nearest rows first."""
    layout = layout_to_json(shard.layout)
    fitting = [
        candidate
        for candidate in earlier
        if not candidate.commit.families.keys().isdisjoint(fingerprints)
        and candidate.commit.layout == layout
    ]
    fitting.sort(key=lambda candidate: (candidate.distance(shard), candidate.key))
    return tuple((candidate.root, candidate.key) for candidate in fitting[:MOST_EARLIER])


def read_earlier(
    job: AnyJob, root: str, key: str, layout: Layout
) -> dict[str, tuple[TokenizedRows, Scores]]:
    """The rows of a scored object as token ids, and their scores, for each model of the job that
    has scored them there, by name.

    Empty for an object that does not hold what was scored (`keep_columns`), and, with a line in the
    log, for what cannot be read or was scored otherwise: it is only spared work.
    """
    store = open_store(root, job.config.store_options)
    try:
        info = store.head(key)
        source = Source(store.root, key, info.size_bytes, info.version)
        return read_apart(job.config, info.size_bytes, _earlier, job, store, source, layout)
    except (StorageError, ShardError, pa.ArrowException, OSError) as error:
        log.warning("%s: its scores are not used: %s", store.url(key), error)
        return {}


def _earlier(
    job: AnyJob, store: Store, source: Source, layout: Layout
) -> dict[str, tuple[TokenizedRows, Scores]]:
    file = open_parquet(store, source)
    commit = Commit.from_footer(file.schema_arrow.metadata)
    families = {} if commit is None else commit.families
    members = {
        name: member
        for name, member in job.members.items()
        if member.fingerprint.digest in families
    }
    if commit is None or not members or commit.layout != layout_to_json(layout):
        log.warning("%s holds other scores than expected; not used", source.url)
        return {}
    needed = formats.columns_needed(layout)
    columns = [*needed, *commit.added_columns]
    if not set(columns) <= set(file.schema_arrow.names):
        return {}  # the columns that were scored are not among those that are kept
    table = file.read(columns=columns, use_threads=False)
    values, errors = formats.columns_of(table, needed, layout.bounds)
    parsed = formats.parse(values, layout)
    parsed.row_errors.update(errors)
    found = {}
    rows = tokenized_for(parsed, [*members.values()])
    for (name, member), own in zip(members.items(), rows, strict=True):
        prefix = families[member.fingerprint.digest]
        if member.model.judge is not None:
            column = table[prefix + JUDGEMENTS].combine_chunks()
            scores = stored_verdicts(column, own, member.model.judge)
        else:
            scores = sequence_scores(table, layout, prefix, member.outputs, own.row_offsets)
        found[name] = own, scores
    return found


def find_known(
    rows: TokenizedRows, earlier: Iterable[tuple[TokenizedRows, Scores]]
) -> Scores | None:
    """For each sequence of `rows` the scores of an equal one, NaN where there is none; None where
    nothing is found. Stops reading `earlier` when everything is."""
    wanted: dict[bytes, list[int]] = {}
    for sequence, ids in enumerate(_ids(rows)):
        if ids:
            wanted.setdefault(ids, []).append(sequence)
    parts: list[Scores] = []
    places: list[tuple[list[int], list[int]]] = []  # sequences here, and the equal ones there
    for there, scores in earlier:
        here_of, there_of = [], []
        is_there = scores.is_there
        for sequence, ids in enumerate(_ids(there)):
            if is_there[sequence] and (equal := wanted.pop(ids, None)) is not None:
                here_of += equal
                there_of += [sequence] * len(equal)
        parts.append(scores)
        places.append((here_of, there_of))
        if not wanted:
            break
    if not any(here for here, _ in places):
        return None
    return _joined(
        rows.num_sequences,
        [
            (np.array(here, np.int64), np.array(there, np.int64), scores)
            for (here, there), scores in zip(places, parts, strict=True)
            if here
        ],
    )


def score_unknown(
    shards: Sequence[TokenizedRows], score: Callable[[TokenizedRows], Scores]
) -> list[Scores]:
    """Scores of all sequences of each shard: those in `known`, and the others by `score`, which is
    asked once.

    A sequence's score depends on nothing else, so some of a shard can be scored without the rest.
    """
    places = [_unknown(rows) for rows in shards]
    asked = [
        rows if rows.known is None else rows.take(sequences)
        for rows, sequences in zip(shards, places, strict=True)
        if rows.known is None or len(sequences)
    ]
    fresh: list[Scores] = []
    if asked:
        fresh = score(TokenizedRows.joined(asked)).split([part.num_sequences for part in asked])
    found = iter(fresh)
    return [
        next(found)
        if rows.known is None
        else rows.known
        if not len(sequences)
        else _completed(rows.known, sequences, next(found))
        for rows, sequences in zip(shards, places, strict=True)
    ]


def _unknown(rows: TokenizedRows) -> IntArray:
    """The sequences that have to be asked for."""
    asked = np.ones(rows.num_sequences, np.bool_) if rows.known is None else ~rows.known.is_there
    asked[list(rows.sequence_errors)] = False
    return np.flatnonzero(asked)


def _completed(known: Scores, sequences: IntArray, fresh: Scores) -> Scores:
    """What is known, with the scores of these sequences as they were found."""
    there = np.flatnonzero(known.is_there)
    parts = [(there, there, known)]
    if known.step_values is None or fresh.step_values is not None:  # else it has no score at all
        parts.append((sequences, np.arange(len(sequences)), fresh))
    joined = _joined(len(known.values), parts)
    errors = {int(sequences[place]): error for place, error in fresh.errors.items()}
    return replace(joined, errors=errors, effort=fresh.effort)


_Part = tuple[IntArray, IntArray, Scores]
"""Sequences here, the sequences of some scores that are theirs, and these scores."""


def _joined(num_sequences: int, parts: Sequence[_Part]) -> Scores:
    """The scores of S sequences out of several; NaN and no steps for one that no part has."""
    width = parts[0][2].values.shape[1]
    joined = Scores(np.full((num_sequences, width), np.nan, np.float32))
    for here, there, scores in parts:
        joined.values[here] = scores.values[there]
    if any(scores.replies is not None for _, _, scores in parts):
        joined.replies = [None] * num_sequences
        for here, there, scores in parts:
            for place, at in zip(here.tolist(), there.tolist(), strict=True):
                joined.replies[place] = scores.replies and scores.replies[at]
    if all(scores.prompt_tokens is not None for _, _, scores in parts):
        joined.prompt_tokens = np.zeros(num_sequences, np.int32)
        for here, there, scores in parts:
            assert scores.prompt_tokens is not None
            joined.prompt_tokens[here] = scores.prompt_tokens[there]
    if parts[0][2].step_values is None:
        return joined
    # The steps of all parts end to end, behind an empty list for the sequences that have none.
    values: list[FloatArray] = []
    offsets, lists = np.zeros(2, np.int64), np.zeros(num_sequences, np.int64)
    for here, there, scores in parts:
        assert scores.step_values is not None and scores.step_offsets is not None
        lists[here] = len(offsets) - 1 + there
        offsets = np.concatenate([offsets, offsets[-1] + scores.step_offsets[1:]])
        values.append(scores.step_values)
    places, joined.step_offsets = gather(offsets, lists)
    joined.step_values = np.concatenate(values)[places]
    return joined


def _ids(rows: TokenizedRows) -> list[bytes]:
    """The token ids of each sequence, as bytes; behind them what else counts: where its answer
    begins, for equal ids with another answer have another score, or which vote a question is."""
    ids, size = rows.token_ids.tobytes(), rows.token_ids.itemsize
    bounds = (size * rows.sequence_offsets).tolist()
    found = [ids[start:stop] for start, stop in pairwise(bounds)]
    besides = rows.answer_starts if rows.questions is None else rows.questions.votes
    if besides is None:
        return found
    pairs = zip(found, besides.tolist(), strict=True)
    return [part and part + number.to_bytes(4) for part, number in pairs]


def _footer(output: Store, info: ObjectInfo) -> Commit | None:
    file = output.open(info.key, info.size_bytes, info.version)
    return Commit.from_footer(pq.read_schema(file).metadata)
