"""What became of each question: from an engine's answers to verdicts, and to a judge's columns.

Legend: R rows, S responses, Q questions.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_scorer.errors import RowReason
from batch_scorer.judges.fold import Folded, Verdicts, fold
from batch_scorer.judges.page import CONSISTENCY, JUDGEMENTS, Page
from batch_scorer.judges.verdicts import read_verdicts
from batch_scorer.records import Judged, Questions, Reply, RowError, Scores, TokenizedRows

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

_FIELDS: tuple[tuple[str, pa.DataType], ...] = (
    ("shown", pa.list_(pa.int32())),
    ("criterion", pa.int32()),
    ("vote", pa.int32()),
    ("worths", pa.list_(pa.float32())),
    ("probabilities", pa.list_(pa.float32())),
    ("reason", pa.string()),
    ("prompt_tokens", pa.int32()),
)
_OF_REPLIES: tuple[tuple[str, pa.DataType], ...] = (
    ("ended", pa.string()),
    ("generated_tokens", pa.int32()),
    ("tries", pa.int32()),
)
_TEXTS: tuple[tuple[str, pa.DataType], ...] = (("reply", pa.string()), ("reasoning", pa.string()))

UNREAD = frozenset({RowReason.NO_VERDICT, RowReason.VERDICT_OUT_OF_RANGE, RowReason.CUT_OFF})
"""Why a reply holds no verdict that can be read. A judge that samples may write another one."""


# From an engine to verdicts


def judged(scores: Scores, page: Page, counts: Sequence[int] | None) -> Scores:
    """An engine's answers to Q questions as verdicts.

    `values` is float32[Q, 1], the mean worth of a question's verdicts, NaN where it has none, and
    `step_values` are the worths one by one, or, of a judge by probability, those of its choices.
    `counts` are how many verdicts each reply holds.
    """
    if not page.generates:
        return _by_probability(scores, page)
    assert scores.replies is not None and counts is not None
    errors = dict(scores.errors)
    found: list[list[float]] = []
    for question, (reply, count) in enumerate(zip(scores.replies, counts, strict=True)):
        verdicts: Verdicts = [] if reply is None else read_verdicts(reply, page, count)
        if isinstance(verdicts, RowError):
            errors.setdefault(question, verdicts)
            verdicts = []
        found.append(verdicts)
    values = np.array([np.mean(each) if each else np.nan for each in found], np.float32)
    return replace(scores, values=values[:, None], errors=errors, **_ragged(found))


def _by_probability(scores: Scores, page: Page) -> Scores:
    """From float32[Q, choices], how probable each choice is."""
    probabilities = scores.values.astype(np.float64)
    worths = np.array([*page.verdict.choices.values()])
    mass = probabilities.sum(axis=1)
    errors = dict(scores.errors)
    # A mass of 0 is none, whatever the page asks for.
    for question in np.flatnonzero((mass < page.verdict.least_mass) | (mass == 0)).tolist():
        detail = f"its choices have {mass[question]:.3g} of the probability together"
        errors.setdefault(question, RowError(RowReason.NO_VERDICT, detail))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (probabilities @ worths / mass).astype(np.float32)
    values[list(errors)] = np.nan
    count = len(worths)
    return replace(
        scores,
        values=values[:, None],
        errors=errors,
        step_values=scores.values.ravel(),
        step_offsets=np.arange(0, count * len(values) + 1, count, dtype=np.int64),
    )


def unread(scores: Scores) -> IntArray:
    """int64[n]: the questions whose reply held no verdict that could be read."""
    lost = (q for q, error in scores.errors.items() if error.reason in UNREAD)
    return np.array(sorted(lost), np.int64)


def with_retried(scores: Scores, asked: IntArray, fresh: Scores, tries: int) -> Scores:
    """The verdicts with those of some questions that were asked again in their place."""
    assert scores.replies is not None and fresh.replies is not None
    found = [each.tolist() for each in _steps_of(scores)]
    errors, replies, values = dict(scores.errors), list(scores.replies), scores.values.copy()
    for place, (question, steps) in enumerate(zip(asked.tolist(), _steps_of(fresh), strict=True)):
        found[question], values[question] = steps.tolist(), fresh.values[place]
        errors.pop(question)
        if place in fresh.errors:
            errors[question] = fresh.errors[place]
        reply, earlier = fresh.replies[place], scores.replies[question]
        assert reply is not None and earlier is not None
        generated = reply.generated_tokens + earlier.generated_tokens
        replies[question] = replace(reply, tries=tries, generated_tokens=generated)
    scores.effort.add(fresh.effort)
    return replace(scores, values=values, errors=errors, replies=replies, **_ragged(found))


def _steps_of(scores: Scores) -> list[FloatArray]:
    assert scores.step_values is not None and scores.step_offsets is not None
    return np.split(scores.step_values, scores.step_offsets[1:-1])


def _ragged(lists: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Lists end to end, as `Scores` has steps."""
    sizes = [len(each) for each in lists]
    return {
        "step_values": np.array([value for each in lists for value in each], np.float32),
        "step_offsets": np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64),
    }


# From verdicts to the scores of responses, and columns


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """Of S responses: their scores, float32[S, 1], and int32[S], the tokens of the longest question
    that each was in. `columns` are the added ones, R values each; `counts` is of the questions."""

    scores: Scores
    lengths: npt.NDArray[np.int32]
    columns: dict[str, pa.Array]
    counts: Judged


def judged_rows(
    rows: TokenizedRows, scores: Scores, page: Page, *, keeps_replies: bool
) -> JudgedRows:
    """What a shard's verdicts (`judged`) make of its responses."""
    questions = rows.questions
    assert questions is not None
    lengths = rows.lengths.astype(np.int32)
    lengths[list(rows.too_long)] = list(rows.too_long.values())
    if scores.prompt_tokens is not None:
        lengths = scores.prompt_tokens
    folded = fold(_verdicts(scores, page), questions, rows.row_offsets, page)
    longest = np.zeros(len(folded.scores), np.int32)
    shown_tokens = np.repeat(lengths, np.diff(questions.shown_offsets))
    np.maximum.at(longest, questions.shown, shown_tokens)
    columns = {JUDGEMENTS: _judgements(rows, scores, page, lengths, keeps_replies)}
    if page.mode == "pairwise":
        columns[CONSISTENCY] = pa.array(folded.consistency, mask=np.isnan(folded.consistency))
    of_responses = Scores(folded.scores[:, None], folded.errors, effort=scores.effort)
    counts = _counts(questions, scores, page, lengths, folded)
    return JudgedRows(of_responses, longest, columns, counts)


def _counts(
    questions: Questions,
    scores: Scores,
    page: Page,
    lengths: npt.NDArray[np.int32],
    folded: Folded,
) -> Judged:
    replies = [reply for reply in scores.replies or () if reply is not None]
    counts = Judged(
        questions=len(scores.values),
        verdicts=int(scores.is_there.sum()),
        lost=dict(sorted(Counter(e.reason.value for e in scores.errors.values()).items())),
        prompt_tokens=int(lengths.sum()),
        generated_tokens=sum(reply.generated_tokens for reply in replies),
        tries=sum(reply.tries for reply in replies),
        comparisons=folded.comparisons,
        disagree=folded.disagree,
    )
    return counts + _preferences(questions, scores) if page.mode == "pairwise" else counts


def _preferences(questions: Questions, scores: Scores) -> Judged:
    """Which of two answers the decisive verdicts of a pairwise judge are for."""
    is_decisive = scores.is_there & (scores.values[:, 0] != 0.5)
    is_first = scores.values[is_decisive, 0] > 0.5
    characters = questions.characters[questions.shown].reshape(-1, 2)[is_decisive]
    lead = characters[:, 0] - characters[:, 1]  # of the answer that was shown first
    return Judged(
        decisive=len(is_first),
        first_preferred=int(is_first.sum()),
        unequal=int((lead != 0).sum()),
        longer_preferred=int((is_first & (lead > 0) | ~is_first & (lead < 0)).sum()),
    )


def _verdicts(scores: Scores, page: Page) -> list[Verdicts]:
    """The worths of each question's verdicts, or its error."""
    assert scores.step_values is not None and scores.step_offsets is not None
    if page.generates:
        steps = scores.step_values.tolist()
        found: list[Verdicts] = [steps[a:b] for a, b in pairwise(scores.step_offsets.tolist())]
    else:
        found = [[worth] for worth in scores.values[:, 0].tolist()]
    for question, error in scores.errors.items():
        found[question] = error
    return found


def judgement_type(page: Page, *, keeps_replies: bool) -> pa.DataType:
    """A question's struct."""
    fields = _FIELDS + (_OF_REPLIES if page.generates else ())
    return pa.struct([*fields, *(_TEXTS if page.generates and keeps_replies else ())])


def _judgements(
    rows: TokenizedRows,
    scores: Scores,
    page: Page,
    lengths: npt.NDArray[np.int32],
    keeps_replies: bool,
) -> pa.Array:
    """list[R] of structs, a row's questions in order; null for a row without any."""
    questions = rows.questions
    assert questions is not None and scores.step_values is not None
    assert scores.step_offsets is not None
    owners = np.repeat(np.arange(rows.num_rows), np.diff(rows.row_offsets))
    firsts = questions.response_offsets[:-1][owners]  # int64[Q]
    within = questions.shown - np.repeat(firsts, np.diff(questions.shown_offsets))
    is_there = scores.is_there
    steps = pa.array(scores.step_values, mask=np.isnan(scores.step_values))
    in_steps = pa.array(scores.step_offsets.astype(np.int32))
    by_question = pa.ListArray.from_arrays(in_steps, steps, mask=_mask(~is_there))
    if page.generates:
        worths, probabilities = by_question, pa.nulls(len(lengths), pa.list_(pa.float32()))
    else:
        values = pa.array(np.nan_to_num(scores.values[:, 0]))
        ones = pa.array(np.arange(len(values) + 1, dtype=np.int32))
        worths = pa.ListArray.from_arrays(ones, values, mask=_mask(~is_there))
        finite = np.isfinite(scores.step_values).reshape(-1, len(page.verdict.choices))
        has_steps: npt.NDArray[np.bool_] = np.asarray(finite.all(axis=1))
        probabilities = pa.ListArray.from_arrays(in_steps, steps, mask=_mask(~has_steps))
    reasons = [None] * len(lengths)
    for question, error in scores.errors.items():
        reasons[question] = error.reason.value  # type: ignore[call-overload]
    columns: dict[str, pa.Array] = {
        "shown": pa.ListArray.from_arrays(
            pa.array(questions.shown_offsets.astype(np.int32)), pa.array(within.astype(np.int32))
        ),
        "criterion": pa.array(questions.criteria.astype(np.int32), mask=questions.criteria < 0),
        "vote": pa.array(questions.votes.astype(np.int32)),
        "worths": worths,
        "probabilities": probabilities,
        "reason": pa.array(reasons, pa.string()),
        "prompt_tokens": pa.array(lengths),
    }
    if page.generates:
        columns |= _reply_columns(scores.replies or [None] * len(lengths), keeps_replies)
    kind = judgement_type(page, keeps_replies=keeps_replies)
    structs = pa.StructArray.from_arrays([columns[each.name] for each in kind], fields=[*kind])
    offsets = pa.array(rows.row_offsets.astype(np.int32))
    return pa.ListArray.from_arrays(offsets, structs, mask=_mask(np.diff(rows.row_offsets) == 0))


def _reply_columns(replies: Sequence[Reply | None], keeps_replies: bool) -> dict[str, pa.Array]:
    def of(name: str, kind: pa.DataType, attribute: str | None = None) -> pa.Array:
        return pa.array([reply and getattr(reply, attribute or name) for reply in replies], kind)

    found = {name: of(name, kind) for name, kind in _OF_REPLIES}
    if keeps_replies:
        texts = of("reply", pa.string(), "text"), of("reasoning", pa.string())
        found |= dict(zip(("reply", "reasoning"), texts, strict=True))
    return found


def _mask(flags: npt.NDArray[np.bool_]) -> pa.Array:
    return pa.array(flags)


# And back


def stored_verdicts(column: pa.Array, rows: TokenizedRows, page: Page) -> Scores:
    """What `judged_rows` has written of Q questions, as `judged` gave it; NaN where there is no
    verdict, and for all questions of a row that holds another number of them."""
    count = rows.num_sequences
    values = np.full((count, 1), np.nan, np.float32)
    steps: list[list[float]] = [[] for _ in range(count)]
    replies: list[Reply | None] = [None] * count
    prompt_tokens = np.zeros(count, np.int32)
    for cell, (start, stop) in zip(
        column.to_pylist(), pairwise(rows.row_offsets.tolist()), strict=True
    ):
        if cell is None or len(cell) != stop - start:
            continue
        for question, stored in enumerate(cell, start):
            if stored["worths"] is None:
                continue
            values[question] = np.float32(np.mean(stored["worths"]))
            prompt_tokens[question] = stored["prompt_tokens"]
            steps[question] = stored["worths"] if page.generates else stored["probabilities"]
            if page.generates:
                replies[question] = _stored_reply(stored)
    return Scores(
        values,
        replies=replies if page.generates else None,
        prompt_tokens=prompt_tokens,
        **_ragged(steps),
    )


def _stored_reply(stored: dict[str, Any]) -> Reply:
    return Reply(
        text=stored.get("reply") or "",
        ended=stored["ended"],
        reasoning=stored.get("reasoning") or "",
        generated_tokens=stored["generated_tokens"],
        tries=stored["tries"],
    )
