"""The path of a shard: read_shard → score_shard → commit_shard. Start reading here.

    rows, *_ = read_shard(shard, models)                  input columns → token ids, for each model
    scored = score_shard(rows, backend)                   token ids → float32 scores of one
    receipt = commit_shard(job, epoch, shard, scored, …)  scores + untouched columns → one object

A user's reward functions are asked in the last step, which reads the rows again for them
(`outputs/rewarded.py`).

The same three run as Ray Data stages and in a plain loop (`pipeline`). What goes wrong with the
shard as a whole is a ShardError; what goes wrong with a row stays with the row.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batch_scorer import formats
from batch_scorer.backends.base import Backend
from batch_scorer.config import Config
from batch_scorer.errors import RowReason, ShardError, ShardReason
from batch_scorer.inputs.files import columns_of_shard, read_apart
from batch_scorer.job import AnyJob, Judging
from batch_scorer.judges.judgements import judged, judged_rows, unread, with_retried
from batch_scorer.judges.page import Page
from batch_scorer.outputs.reuse import find_known, read_earlier, score_unknown
from batch_scorer.records import (
    ParsedRows,
    RowError,
    ScoredRows,
    Scores,
    Shard,
    TokenizedRows,
)
from batch_scorer.render import renderer_of
from batch_scorer.render.rows import Tokenizing, tokenized_for

FloatArray = npt.NDArray[np.float32]


class Read(NamedTuple):
    """A shard's token ids for each model, one object for all that read the same, and the seconds of
    reading it, and of rendering and tokenising; loading the tokenizers belongs to neither, but for
    the faster ones of `render/readers.py`."""

    rows: list[TokenizedRows]
    read_s: float
    tokenize_s: float


def read_shard(shard: Shard, models: Sequence[Tokenizing]) -> Read:
    """Read the columns that are scored, once, and turn them into the token ids of these models.

    Raises ShardError: the file is unreadable, gone, changed since it was planned, ends the process
    that reads it, or holds an over-long row under the `error` policy.
    """
    config = models[0].config
    return read_apart(config, shard.source.size_bytes, _read, shard, models)


def _read(shard: Shard, models: Sequence[Tokenizing]) -> Read:
    config = models[0].config
    for each in models:
        if not each.model.is_served:
            renderer_of(each.config, each.model)  # loads the tokenizer
    started = time.perf_counter()
    parsed = _parse(shard, config.store_options)
    is_read = time.perf_counter()
    rows = tokenized_for(parsed, models)
    for each, own in zip(models, rows, strict=True):
        if each.model.judge is not None and own.seeds is not None:
            # The same seeds would write the same replies again. Questions that have a verdict keep
            # it: they are found in the object that this shard replaces.
            retries = each.model.judge.generation.retries
            own.seeds = own.seeds + shard.retries * (1 + retries)
    return Read(rows, is_read - started, time.perf_counter() - is_read)


def parse_shard(shard: Shard, config: Config) -> ParsedRows:
    """The shard's rows cut into sequences, before rendering. Raises as `read_shard`."""
    return read_apart(config, shard.source.size_bytes, _parse, shard, config.store_options)


def _parse(shard: Shard, store_options: Mapping[str, str]) -> ParsedRows:
    needed = formats.columns_needed(shard.layout)
    columns, malformed = columns_of_shard(shard, store_options, needed)
    parsed = formats.parse(columns, shard.layout)
    parsed.row_errors.update(malformed)
    return parsed


def read_known(
    job: AnyJob, shard: Shard, rows: Mapping[str, TokenizedRows]
) -> dict[str, TokenizedRows]:
    """The rows of the shard for each model, with the scores that equal sequences got before
    (`reuse`)."""
    read: list[dict[str, tuple[TokenizedRows, Scores]]] = []  # each object once, if it is needed

    def found(name: str) -> Iterator[tuple[TokenizedRows, Scores]]:
        for place, (root, key) in enumerate(shard.earlier):
            if place == len(read):
                read.append(read_earlier(job, root, key, shard.layout))
            if name in read[place]:
                yield read[place][name]

    return {name: replace(own, known=find_known(own, found(name))) for name, own in rows.items()}


def score_shard(
    rows: TokenizedRows, backend: Backend, judging: Judging | None = None
) -> ScoredRows:
    """Score all sequences of the shard whose score is not known yet; with a judge, its questions
    become the scores of the responses that they are about.

    Raises ShardError if the backend loses any.
    """
    return score_shards([rows], backend, judging)[0]


def score_shards(
    shards: Sequence[TokenizedRows], backend: Backend, judging: Judging | None = None
) -> list[ScoredRows]:
    """`score_shard` for several shards, whose sequences the backend gets together: it has work
    until the last of them ends. Time and effort are counted with the first shard.

    Raises ShardError if the backend loses any.
    """
    ask = partial(_ask, backend) if judging is None else partial(_judge, backend, judging.page)
    started = time.perf_counter()
    found = score_unknown(shards, ask)
    score_s = time.perf_counter() - started
    return [
        _scored(rows, scores, backend, judging, 0.0 if number else score_s)
        for number, (rows, scores) in enumerate(zip(shards, found, strict=True))
    ]


def _scored(
    rows: TokenizedRows,
    scores: Scores,
    backend: Backend,
    judging: Judging | None,
    score_s: float,
) -> ScoredRows:
    if judging is not None and rows.questions is not None:
        return _scored_responses(rows, scores, judging, backend, score_s)
    lengths = rows.lengths.astype(np.int32)
    lengths[list(rows.too_long)] = list(rows.too_long.values())
    return ScoredRows(
        scores=_checked(scores, rows),
        lengths=lengths,
        truncated_tokens=rows.truncated_tokens,
        row_offsets=rows.row_offsets,
        row_errors=rows.row_errors,
        rows_digest=_rows_digest(rows),
        # Plain values: torch's version is an object that would load torch wherever it arrives.
        engine=json.loads(json.dumps(backend.provenance)),
        score_s=score_s,
        was_known=None if rows.known is None else rows.known.is_there & (rows.lengths > 0),
        notes=rows.notes,
        special_tokens=rows.special_tokens,
    )


def _judge(backend: Backend, page: Page, rows: TokenizedRows) -> Scores:
    """Verdicts on the questions; a judge that samples is asked again where it gave none."""
    counts = None if rows.verdicts is None else rows.verdicts.tolist()
    scores = judged(_ask(backend, rows), page, counts)
    retries = page.generation.retries if page.samples else 0
    for tried in range(1, retries + 1):
        lost = unread(scores)
        if not len(lost):
            break
        again = rows.take(lost)
        assert again.seeds is not None and again.verdicts is not None
        again.seeds = again.seeds + tried
        fresh = judged(_ask(backend, again), page, again.verdicts.tolist())
        scores = with_retried(scores, lost, fresh, tried + 1)
    return scores


def _scored_responses(
    rows: TokenizedRows, scores: Scores, judging: Judging, backend: Backend, score_s: float
) -> ScoredRows:
    scores.errors = {**scores.errors, **rows.sequence_errors}
    made = judged_rows(rows, scores, judging.page, keeps_replies=judging.keeps_replies)
    assert rows.questions is not None
    was_known = None
    if rows.known is not None:
        # A response whose questions were all known: none of them was asked.
        asked = np.zeros(len(made.lengths), np.int64)
        shown_known = np.repeat(rows.known.is_there, np.diff(rows.questions.shown_offsets))
        np.add.at(asked, rows.questions.shown, ~shown_known)
        was_known = (asked == 0) & (made.lengths > 0)
    return ScoredRows(
        scores=made.scores,
        lengths=made.lengths,
        truncated_tokens=np.zeros(len(made.lengths), np.int32),
        row_offsets=rows.questions.response_offsets,
        row_errors=rows.row_errors,
        rows_digest=_rows_digest(rows),
        engine=json.loads(json.dumps(backend.provenance)),
        score_s=score_s,
        was_known=was_known,
        notes=rows.notes,
        special_tokens=rows.special_tokens,
        added=made.columns,
        judged=made.counts,
    )


def _ask(backend: Backend, rows: TokenizedRows) -> Scores:
    scores = backend.score(rows)
    if scores.values.shape != (rows.num_sequences, backend.num_outputs):
        raise ShardError(
            ShardReason.INTERNAL,
            f"{rows.num_sequences} sequences went in, scores {scores.values.shape} came out",
        )
    return scores


def _rows_digest(rows: TokenizedRows) -> str:
    """Digest of what was scored: token ids, how they group into rows, and what was marked."""
    digest = hashlib.sha256()
    for array in (rows.token_ids, rows.sequence_offsets, rows.row_offsets, rows.truncated_tokens):
        digest.update(np.ascontiguousarray(array).tobytes())
    if rows.answer_starts is not None:
        digest.update(rows.answer_starts.tobytes())
    marks = {**rows.sequence_errors, **{-1 - row: error for row, error in rows.row_errors.items()}}
    digest.update(repr(sorted((i, error.reason.value) for i, error in marks.items())).encode())
    return digest.hexdigest()


def _checked(scores: Scores, rows: TokenizedRows) -> Scores:
    """The same as float32, all sequences without a finite score NaN and named in the errors, as are
    those with a step that is none; one with another number of step scores than its row has steps
    gets none."""
    values = scores.values.astype(np.float32)
    errors = {**scores.errors, **rows.sequence_errors}
    for index in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
        errors.setdefault(index, RowError(RowReason.NON_FINITE_SCORE, "the model gave no number"))
    if scores.step_values is not None and scores.step_offsets is not None:
        found = np.diff(scores.step_offsets)
        # The score of the last step, say, is a number whatever those before it are.
        wrong = np.repeat(np.arange(len(found)), found)[~np.isfinite(scores.step_values)]
        for index in np.unique(wrong).tolist():
            detail = "the model gave no number for a step"
            errors.setdefault(index, RowError(RowReason.NON_FINITE_SCORE, detail))
        for index, given in rows.given_steps.items():
            if found[index] != given:
                detail = f"{given} steps in the row, {found[index]} step scores"
                errors.setdefault(index, RowError(RowReason.STEPS_DIFFER, detail))
    values[list(errors)] = np.nan
    return replace(scores, values=values, errors=errors)
