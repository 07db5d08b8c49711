"""What the engine of a judge writes, and what plain Hugging Face writes, token by token.

Both write the most probable tokens behind the sampled questions, without sampling, schema, stop
text or end: these are the page's, the tokens are the model's. They are compared up to the first
place where the two best logits are so close that rounding may make them change places; behind it
two sound engines may write different texts. So the engine is given the reference's text up to
there, and goes on from it to the next such place.

Legend: S sampled questions, N tokens written behind each.
"""

from dataclasses import dataclass, replace

import numpy as np

from batch_scorer.backends.base import WritingBackend
from batch_scorer.backends.registry import settings_of
from batch_scorer.job import Job
from batch_scorer.judges.page import Generation
from batch_scorer.parity.report import ParityReport, common_facts, finite_number
from batch_scorer.parity.sample import Sample
from batch_scorer.records import TokenizedRows

MOST_TOKENS, LEAST_TOKENS, ALL_TOKENS = 24, 8, 384
"""Tokens that are written behind a question, and behind all of them about: plain Hugging Face runs
the model once for each."""
EXACT_NOISE = 1e-3
"""How close the two best logits may be in float32, as a share of the logits' spread. Plain Hugging
Face's own were at most 1e-5 off, and vLLM wrote no other token (`benchmarks/written_tokens.py`)."""
ROUNDING_FACTOR = 2.0
"""The same in half precision: a factor on the most by which plain Hugging Face's own rounding
changes the distance of the two. In bfloat16, as shares of the spread: in SmolLM2-135M by 0.12 at
most and 0.02 in the mean of 288 places, and vLLM wrote another token at 7 of them, where the two
were up to 0.04 apart; in a tiny random model 0.05, 0.01, 6 and 0.02 (the same benchmark)."""
LEAST_HALF_NOISE = 0.1
"""What half precision may have, as a share of the spread, even where plain Hugging Face happens to
be closer: of few places the most is chance. It lies between those of the two models above."""
UNMEASURED_NOISE = 0.3
"""The same where that rounding is not measured (the model fits the memory in half precision only,
or the engine computes with quantised weights): more than twice the most above."""


@dataclass(frozen=True, slots=True)
class WrittenReference:
    """What plain Hugging Face writes, [S][N]; `gaps` are how far the second best logit lies below
    the best one, [S][N]. Where they are below `noise`, the engine may write another token."""

    dtype: str
    ids: list[list[int]]
    gaps: list[list[float]]
    noise: float

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.ids[0])


@dataclass(frozen=True, slots=True)
class ComparedReply:
    """One question: the tokens of its prompt, how many written tokens were compared, and the place
    of the first of these that differs, None where none does. What the engine does not take is not
    compared."""

    name: str
    tokens: int
    compared: int
    differs_at: int | None

    @property
    def difference(self) -> str:
        """In words."""
        return "-" if self.differs_at is None else f"from token {self.differs_at + 1} on"


@dataclass(frozen=True, slots=True, kw_only=True)
class RepliesReport(ParityReport):
    """`noise`: the two best logits are at least so far apart wherever tokens were compared."""

    noise: float
    tokens_compared: int
    tokens_written: int
    compared: tuple[ComparedReply, ...]


def tokens_written(num_questions: int, generation: Generation) -> int:
    """How many tokens are written behind each question: no more than the page leaves room for."""
    share = min(MOST_TOKENS, max(LEAST_TOKENS, ALL_TOKENS // num_questions))
    return min(share, generation.thinking_tokens + generation.max_tokens)


def compute_written(job: Job, sample: Sample) -> WrittenReference:
    """What plain Hugging Face writes, in float32 where that is possible, and its rounding in the
    engine's dtype behind the same tokens."""
    from batch_scorer.backends.plain import reference_road
    from batch_scorer.backends.plain_answers import plain_gaps, plain_greedy

    assert job.model.judge is not None
    settings, rows = settings_of(job), sample.rows
    dtype = reference_road(settings).dtype
    count = tokens_written(rows.num_sequences, job.model.judge.generation)
    greedy = plain_greedy(replace(settings, dtype=dtype), rows, count)
    if job.computes_quantised or dtype != "float32":
        noise = UNMEASURED_NOISE * greedy.spread
    elif job.dtype == "float32":
        noise = EXACT_NOISE * greedy.spread
    else:
        moved = np.abs(plain_gaps(settings, rows, greedy) - greedy.gaps).max()
        noise = float(np.maximum(LEAST_HALF_NOISE * greedy.spread, ROUNDING_FACTOR * moved))
    return WrittenReference(dtype, greedy.ids.tolist(), greedy.gaps.tolist(), noise)


def compare_replies(
    job: Job, sample: Sample, reference: WrittenReference, backend: WritingBackend
) -> RepliesReport:
    """Let the engine write, and compare its tokens with plain Hugging Face's."""
    stretches = [
        (question, start, stop)
        for question, gaps in enumerate(reference.gaps)
        for start, stop in clear_stretches(gaps, reference.noise)
    ]
    begun = [(question, reference.ids[question][:start]) for question, start, _ in stretches]
    found = backend.greedy(_continued(sample.rows, begun), reference.num_tokens) if begun else []
    counts, differing = [0] * len(sample.names), [list[int]() for _ in sample.names]
    for (question, start, stop), written in zip(stretches, found, strict=True):
        if written is None:
            continue
        counts[question] += stop - start
        place = first_difference(reference.ids[question][start:stop], written)
        if place is not None:
            differing[question].append(start + place)
    compared = [
        ComparedReply(name, int(tokens), count, min(places, default=None))
        for name, tokens, count, places in zip(
            sample.names, sample.rows.lengths, counts, differing, strict=True
        )
    ]
    problems = []
    if wrong := [reply for reply in compared if reply.differs_at is not None]:
        problems.append(
            f"{len(wrong)} of {len(compared)} questions are answered with other tokens than in "
            f"plain Hugging Face; {wrong[0].name} {wrong[0].difference}"
        )
    if not any(reply.compared for reply in compared):
        problems.append(
            "nothing that is written could be compared: the two best tokens are within rounding "
            "everywhere, or no question is taken"
        )
    return RepliesReport(
        **common_facts(job, sample),
        reference_dtype=reference.dtype,
        noise=finite_number(reference.noise),
        tokens_compared=sum(reply.compared for reply in compared),
        tokens_written=reference.num_tokens * len(compared),
        compared=tuple(compared),
        problems=tuple(problems),
    )


def clear_stretches(gaps: list[float], noise: float) -> list[tuple[int, int]]:
    """Where tokens stand that rounding cannot change, from the first to before the last place of
    each stretch of them."""
    is_clear = np.array([False, *(gap >= noise for gap in gaps), False])  # NaN is not
    bounds: list[int] = np.flatnonzero(is_clear[1:] != is_clear[:-1]).tolist()
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def _continued(rows: TokenizedRows, begun: list[tuple[int, list[int]]]) -> TokenizedRows:
    """Some of the sequences, each with more tokens behind it."""
    prompts = np.split(rows.token_ids, rows.sequence_offsets[1:-1])
    parts = [np.array([*prompts[sequence], *ids], np.int32) for sequence, ids in begun]
    return TokenizedRows(
        token_ids=np.concatenate(parts),
        sequence_offsets=np.cumsum([0, *map(len, parts)]),
        row_offsets=np.arange(len(parts) + 1),
        truncated_tokens=np.zeros(len(parts), np.int32),
        sequence_errors={},
        row_errors={},
    )


def first_difference(wanted: list[int], found: list[int]) -> int | None:
    """The first place in `wanted` where `found` has another token, or none."""
    places = (i for i, token in enumerate(wanted) if i >= len(found) or found[i] != token)
    return next(places, None)
