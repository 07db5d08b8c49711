"""From hidden states to scores, the same for every engine: which tokens are read, and by what.

The engines differ in how they compute a body's hidden states. What is read from these is decided
here: positions by index, the head in float32, step scores combined into one.

Legend: S sequences, K pooled tokens, H hidden, O outputs.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from batch_scorer.backends.base import EngineSettings
from batch_scorer.models.adapter import (
    Adapter,
    Ids,
    LastToken,
    ModelConfig,
    ModelFiles,
    Pooling,
    Positions,
    StepAggregation,
)
from batch_scorer.models.families.heads import Activated
from batch_scorer.models.weights import load_head
from batch_scorer.records import PooledTokens, RowError, Scores, TokenizedRows


class _EveryToken:
    def positions(self, token_ids: Ids, config: ModelConfig) -> Positions:
        return np.arange(len(token_ids))


class _FirstToken:
    def positions(self, token_ids: Ids, config: ModelConfig) -> Positions:
        return np.zeros(1, dtype=np.int64)


_OF_EMBEDDING: dict[str, Pooling] = {
    "last": LastToken(),
    "mean": _EveryToken(),
    "cls": _FirstToken(),
}


ROWS_AT_ONCE = 64
"""What is read together where shapes are fixed."""


class Readout:
    """The head of one model, or the pooling of an embedding.

    `config` is the body's. `num_outputs` is O: the score, if there is one, and the attributes,
    or the size of an embedding.
    """

    def __init__(
        self,
        settings: EngineSettings,
        files: ModelFiles,
        adapter: Adapter,
        config: PretrainedConfig,
    ) -> None:
        embedding = settings.embedding
        self._config = config.to_dict()
        self._pooling = _OF_EMBEDDING[embedding.pooling] if embedding else adapter.pooling
        self._averages = adapter.averages(self._config)
        self._token_scores = settings.token_scores
        self._invariant = settings.invariant
        self.embedding = embedding
        self.step_aggregation = adapter.step_aggregation and (
            settings.step_aggregation or adapter.step_aggregation
        )
        self._head = None if embedding else load_head(files, adapter)
        if self._head is not None and (pairs := adapter.cross_encoder(files)):
            self._head = nn.Sequential(self._head, Activated(pairs.activation)).eval()
        self.num_outputs = (
            int(config.hidden_size) if embedding else adapter.num_outputs(files.config)
        )

    def to(self, device: torch.device) -> "Readout":
        """Move the head to the device."""
        if self._head is not None:
            self._head.to(device)
        return self

    @property
    def reads_all_tokens(self) -> bool:
        """Whether any token of a sequence may be read (steps, means), not only one or two."""
        if self.embedding is not None:
            return self.embedding.pooling == "mean"
        return self._averages or self.reads_tokens_alone

    @property
    def reads_tokens_alone(self) -> bool:
        """Whether the head reads each token by itself (steps, token scores), so that it can be
        applied as soon as a token's state is there (`read_each`)."""
        return self.step_aggregation is not None or self._token_scores

    def pooled_tokens(self, rows: TokenizedRows) -> tuple[PooledTokens, dict[int, RowError]]:
        """The tokens to read from every sequence, and the sequences that lack one.

        With token scores these are all tokens in order, and behind them, once more, the token whose
        score is the sequence's.
        """
        pooled, errors = self._read_tokens(rows)
        if not self._token_scores:
            return pooled, errors
        counts = np.where(pooled.counts > 0, rows.lengths + 1, 0)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
        positions[offsets[1:][counts > 0] - 1] = pooled.positions
        return PooledTokens(positions, offsets), errors

    def _read_tokens(self, rows: TokenizedRows) -> tuple[PooledTokens, dict[int, RowError]]:
        """The tokens that the score is read from, and the sequences that lack one."""
        at_end = self._is_at_end(rows)
        counts = at_end.astype(np.int64)
        found: dict[int, npt.NDArray[np.int64]] = {}
        errors: dict[int, RowError] = {}
        for sequence in np.flatnonzero((rows.lengths > 0) & ~at_end).tolist():
            start, stop = rows.sequence_offsets[sequence : sequence + 2]
            places = self._pooling.positions(rows.token_ids[start:stop], self._config)
            if isinstance(places, RowError):
                errors[sequence] = places
            else:
                found[sequence] = places
                counts[sequence] = len(places)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        positions = np.empty(offsets[-1], dtype=np.int64)
        positions[offsets[:-1][at_end]] = rows.lengths[at_end] - 1
        for sequence, places in found.items():
            positions[offsets[sequence] : offsets[sequence + 1]] = places
        return PooledTokens(positions, offsets), errors

    def _is_at_end(self, rows: TokenizedRows) -> npt.NDArray[np.bool_]:
        """bool[S]: whether only a sequence's last token is read, found for all at once."""
        at_end = np.zeros(rows.num_sequences, dtype=np.bool_)
        if isinstance(self._pooling, LastToken):
            some = np.flatnonzero(rows.lengths)
            last_ids = rows.token_ids[rows.sequence_offsets[some + 1] - 1]
            at_end[some] = self._pooling.is_at_end(last_ids, self._config)
        return at_end

    @torch.inference_mode()
    def read(self, hidden: Tensor, pooled: PooledTokens) -> Tensor:
        """float32[S, O] of hidden states [K, H] at `pooled`; of tokens that are read alone
        `read_each`."""
        if self.reads_tokens_alone:
            return self.read_each(hidden)
        hidden, counts = hidden.float(), pooled.counts
        if self.embedding is not None:
            if self.embedding.pooling == "mean":
                hidden = _averaged(hidden, counts)
            normalize = partial(F.normalize, dim=-1)
            return self._by_row(normalize, hidden) if self.embedding.normalize else hidden
        head = cast(nn.Module, self._head)
        if self._averages:
            return self._by_row(head, _averaged(hidden, counts)[:, None])
        return self._by_row(head, hidden.view(len(counts), int(counts[0]), -1))

    @torch.inference_mode()
    def read_each(self, hidden: Tensor) -> Tensor:
        """float32[K, O], what the head gives at each token alone; of steps float32[K, 1]."""
        head, hidden = cast(nn.Module, self._head), hidden.float()
        return self._by_row(head, hidden if self.step_aggregation else hidden[:, None])

    def _by_row(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """What `function` gives for inputs [N, …], a row for each of theirs.

        A product of another number of rows may have other bits. So where these must not depend on
        what is read together, it gets ROWS_AT_ONCE, the last ones filled up with zeros.
        """
        if not self._invariant:
            return function(*inputs)
        count = len(inputs[0])
        parts = [
            function(*(_filled_up(tensor[start : start + ROWS_AT_ONCE]) for tensor in inputs))
            for start in range(0, max(count, 1), ROWS_AT_ONCE)
        ]
        return torch.cat(parts)[:count]

    def fill(
        self,
        scores: Scores,
        sequences: npt.NDArray[np.int64],
        outputs: npt.NDArray[np.float32],
        pooled: PooledTokens,
    ) -> None:
        """Put the outputs of `read` for these sequences, all of one shard, into `scores`."""
        if not self.reads_tokens_alone:
            scores.values[sequences] = outputs
            return
        # The shard's sequences in order, each with the values that its batch gave.
        order = np.argsort(sequences, kind="stable")
        lists = PooledTokens(np.arange(len(outputs)), pooled.of(sequences).offsets).of(order)
        outputs, counts = outputs[lists.positions], lists.counts
        if self.step_aggregation is not None:
            steps = outputs[:, 0]
            values = aggregate_steps(steps, lists.offsets, self.step_aggregation)[:, None]
        else:
            of_score = lists.offsets[1:] - 1  # behind all tokens of its sequence
            values, counts = outputs[of_score], counts - 1
            steps = np.delete(outputs[:, 0], of_score)
            finite = np.logical_and.reduceat(np.isfinite(steps), np.cumsum(counts) - counts)
            values[~finite] = np.nan
        scores.values[sequences[order]] = values
        scores.step_values = steps
        all_counts = np.zeros(len(scores.values), dtype=np.int64)
        all_counts[sequences[order]] = counts
        scores.step_offsets = np.concatenate([[0], np.cumsum(all_counts)])


def _filled_up(tensor: Tensor) -> Tensor:
    """[ROWS_AT_ONCE, …] of at most as many rows, zeros behind them."""
    missing = tensor.new_zeros(ROWS_AT_ONCE - len(tensor), *tensor.shape[1:])
    return torch.cat([tensor, missing])


def _averaged(hidden: Tensor, counts: npt.NDArray[np.int64]) -> Tensor:
    """float32[S, H]: the mean of each sequence's rows of float32[K, H]."""
    lengths = torch.from_numpy(counts).to(hidden.device)
    return torch.segment_reduce(hidden, "mean", lengths=lengths, unsafe=True)


def aggregate_steps(
    values: npt.NDArray[np.float32], offsets: npt.NDArray[np.int64], how: StepAggregation
) -> npt.NDArray[np.float32]:
    """float32[S]: one score of each sequence's steps; every sequence has at least one."""
    if len(offsets) == 1:
        return np.zeros(0, dtype=np.float32)
    starts = offsets[:-1]
    if how == "last":
        return values[offsets[1:] - 1]
    if how == "min":
        return np.minimum.reduceat(values, starts)
    if how == "product":
        return np.multiply.reduceat(values, starts)
    sums = np.add.reduceat(values.astype(np.float64), starts)
    return (sums / np.diff(offsets)).astype(np.float32)


class PooledStates:
    """The hidden states of a shard's pooled tokens, or what was read of these, collected from the
    batches of its trie.

    A sequence is read once all its states are there; states that no later sequence reads are
    dropped. `places` is int64[K], the place of each `pooled` token in the trie.
    """

    def __init__(self, places: npt.NDArray[np.int64], pooled: PooledTokens) -> None:
        self._places, self._pooled = places, pooled
        last = np.maximum.reduceat(places, pooled.offsets[:-1])  # int64[S], one at least of each
        self._order = np.argsort(last, kind="stable")
        self._complete_at = last[self._order]
        distinct, index = np.unique(places, return_inverse=True)
        needed_until = np.zeros(len(distinct), np.int64)
        np.maximum.at(needed_until, index, np.repeat(last, pooled.counts))
        self._distinct, self._needed_until = distinct, needed_until
        self._held = np.zeros(0, np.int64)
        self._states: Tensor | None = None

    def add(
        self, start: int, stop: int, states: Tensor
    ) -> tuple[npt.NDArray[np.int64], PooledTokens, Tensor]:
        """Take the states [P, H] of the pooled tokens between two places of the trie; return the
        sequences that are complete now, their pooled tokens and the states of these."""
        first, last = np.searchsorted(self._distinct, [start, stop])
        held = np.concatenate([self._held, self._distinct[first:last]])
        if self._states is not None and len(self._held):
            states = torch.cat([self._states, states])
        begin, end = np.searchsorted(self._complete_at, [start, stop])
        complete = self._order[begin:end]
        chosen = self._pooled.of(complete)
        places = PooledTokens(self._places, self._pooled.offsets).of(complete).positions
        index = torch.from_numpy(np.searchsorted(held, places)).to(states.device)
        read = states[index]
        until = self._needed_until[np.searchsorted(self._distinct, held)]
        kept = np.flatnonzero(until >= stop)
        self._held = held[kept]
        self._states = states[torch.from_numpy(kept).to(states.device)]
        return complete, chosen, read
