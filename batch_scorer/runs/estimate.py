"""A run's work, estimated before it starts from a tokenised sample of its rows."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from batch_scorer.backends.packing import build_trie
from batch_scorer.config import ENGINES, Config, EngineFacts
from batch_scorer.errors import ShardError
from batch_scorer.job import Member, attention_of
from batch_scorer.models.directory import ModelFacts
from batch_scorer.models.embedding import is_decoder
from batch_scorer.models.registry import EMBEDDING, adapter_named
from batch_scorer.records import Shard, TokenizedRows
from batch_scorer.runs.engine_choice import supported_engines
from batch_scorer.shard import read_shard

log = logging.getLogger("batch_scorer")

SAMPLE_ROWS = 2_000
SAMPLE_TOKENS = 1_000_000
"""Most tokens by the plan's estimate: a few seconds of tokenising."""
SAMPLE_SHARDS = 8


@dataclass(frozen=True, slots=True)
class RowWork:
    """The work of some rows: their tokens as if each sequence were alone, those that go through
    the model, and the pairs that these attend to."""

    row_tokens: float
    computed_tokens: float
    attended_pairs: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """The work of all rows of a plan, from `sampled_rows` of them.

    `flop` are its floating-point operations, None where the model's cost is not known. A prefix
    that is shared by rows far from each other counts once for each. `common` is the share of the
    sampled rows' computed tokens that would not be computed if the rows of different shards were in
    one: only of the sample, since no other row is read.
    """

    sampled_rows: int
    row_tokens: int
    computed_tokens: int
    flop: float | None
    common: float

    def plus(self, other: "Estimate") -> "Estimate":
        """That of two models which score the same rows."""
        flop = None
        if self.flop is not None and other.flop is not None:
            flop = self.flop + other.flop
        computed = self.computed_tokens + other.computed_tokens
        shared = self.common * self.computed_tokens + other.common * other.computed_tokens
        return Estimate(
            sampled_rows=self.sampled_rows,
            row_tokens=self.row_tokens + other.row_tokens,
            computed_tokens=computed,
            flop=flop,
            common=shared / computed,
        )


def estimate(config: Config, model: ModelFacts, shards: Sequence[Shard]) -> Estimate | None:
    """Tokenise rows of evenly chosen shards; None if none of them has a token.

    The shards are cut into groups of consecutive ones; the first rows of the middle shard
    represent the group. Raises ModelError if no engine runs the job.
    """
    engine = ENGINES[supported_engines(config, model)[0]]
    shares = shares_prefixes(config, model, engine)
    num_rows = np.array([shard.num_rows for shard in shards], np.int64)
    filled = np.flatnonzero(num_rows)
    num_groups = min(SAMPLE_SHARDS, len(filled))
    sampled_rows = covered_rows = 0
    sums = np.zeros(3)  # as the fields of RowWork
    parts: list[TokenizedRows] = []
    apart = 0.0  # computed tokens of the parts, each for itself
    for group in np.array_split(filled, num_groups) if num_groups else ():
        part = _first_rows(shards[int(group[len(group) // 2])], num_groups)
        try:
            (rows,) = read_shard(part, [Member(config, model)]).rows
        except ShardError as error:
            log.warning("%s: not sampled: %s", part.source.key, error)
            continue
        group_rows = int(num_rows[group].sum())
        work = work_of(rows, shares=shares, is_causal=is_causal(model))
        scale = group_rows / part.num_rows
        sums += scale * np.array([work.row_tokens, work.computed_tokens, work.attended_pairs])
        parts.append(rows)
        apart += work.computed_tokens
        sampled_rows += part.num_rows
        covered_rows += group_rows
    if not sums[0]:
        return None
    row_tokens, computed_tokens, pairs = (sums * num_rows.sum() / covered_rows).tolist()
    cost = model.cost if engine.runs_model else None
    together = build_trie(TokenizedRows.joined(parts)).num_tokens if shares else apart
    return Estimate(
        sampled_rows=sampled_rows,
        row_tokens=round(row_tokens),
        computed_tokens=round(computed_tokens),
        flop=None if cost is None else cost.flops(computed_tokens, pairs),
        common=1 - together / apart,
    )


def _first_rows(shard: Shard, parts: int) -> Shard:
    """The shard's first rows, at most as many as one of `parts` parts of the sample may have."""
    tokens_per_row = max(1.0, shard.estimated_tokens / shard.num_rows)
    most = min(SAMPLE_ROWS, SAMPLE_TOKENS / tokens_per_row) / parts
    return replace(shard, num_rows=min(shard.num_rows, max(1, int(most))))


def work_of(rows: TokenizedRows, *, shares: bool, is_causal: bool) -> RowWork:
    """The work of a shard's rows; with `shares`, common prefixes are computed once."""
    if shares:
        trie = build_trie(rows)
        return RowWork(rows.num_tokens, trie.num_tokens, trie.attended_pairs)
    lengths = rows.lengths.astype(np.float64)
    pairs = lengths * (lengths + 1) / 2 if is_causal else lengths**2
    return RowWork(rows.num_tokens, rows.num_tokens, float(pairs.sum()))


def is_causal(model: ModelFacts) -> bool:
    """Whether a token attends only to those before it; decided without loading the model."""
    if model.adapter == EMBEDDING.name:
        return is_decoder(model.path)
    return adapter_named(model.adapter).build_head is not None


def shares_prefixes(config: Config, model: ModelFacts, engine: EngineFacts) -> bool:
    """Whether the engine computes a prefix once that several sequences of a shard have."""
    reads_all = model.has_steps or config.token_scores
    shares = engine.shares_in_steps if reads_all else engine.shares_prefixes
    return shares and is_causal(model) and attention_of(config, model, "hf") == "packed"
