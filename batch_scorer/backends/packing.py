"""Which tokens share a forward pass, and a batch's layout. Pure functions: no model runs here.

Decoders run over the token trie of a shard: every distinct prefix of its sequences goes through
the model once, in batches that are slices of the trie. Encoders run in padded rectangles.

Legend: S sequences, U tokens of a trie, T tokens of a batch, C tokens carried into it, P its
pooled tokens, K pooled tokens of a shard, L the longest sequence of a padded batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from batch_scorer.records import PooledTokens, TokenizedRows

Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenTrie:
    """The distinct prefixes of some sequences, each once, depth first.

    A token is followed by its longest continuation; where the position falls back to d, another
    sequence begins to differ after d tokens. So the ancestors of a token are the last tokens
    before it at positions 0, 1, … below its own, and the positions are all that is needed to find
    them. Two sequences that are equal end at the same token.
    """

    token_ids: Int32Array
    """int32[U]"""
    position_ids: Int32Array
    """int32[U], ancestors of each token: its place in every sequence that goes through it."""
    ends: Int64Array
    """int64[S], where the last token of each sequence lies in U."""
    pooled_index: Int64Array
    """int64[K], where each pooled token of the sequences lies in U, sequence after sequence."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def shared_tokens(self) -> int:
        """Tokens of the distinct sequences that are there once for several of them."""
        ends = np.unique(self.ends)
        return int(self.position_ids[ends].sum(dtype=np.int64)) + len(ends) - self.num_tokens

    def parts(self, count: int) -> list[Int64Array]:
        """The sequences in at most `count` parts of like many tokens, cut where they share least:
        each is a trie of its own, which computes what it shares with others again."""
        starts = np.unique(self.ends)[:-1] + 1  # of what each sequence adds to the one before
        if not len(starts):
            return [np.arange(len(self.ends))]
        aims = self.num_tokens * np.arange(1, count) / count
        costs = np.abs(starts - aims[:, None]) + self.position_ids[starts]
        cuts = np.unique(starts[costs.argmin(axis=1)])
        part = np.searchsorted(cuts, self.ends, side="right")
        return [np.flatnonzero(part == number) for number in range(len(cuts) + 1)]

    def subtree_stop(self, start: int) -> int:
        """Where the tokens end that descend from token `start`, itself included."""
        falls_back = np.flatnonzero(self.position_ids[start + 1 :] <= self.position_ids[start])
        return start + 1 + int(falls_back[0]) if len(falls_back) else self.num_tokens

    @property
    def attended_pairs(self) -> int:
        """Pairs of a token and one that it attends to, its own included."""
        return int(self.position_ids.sum(dtype=np.int64)) + self.num_tokens

    def batch(self, start: int, stop: int) -> "PackedBatch":
        """The tokens from `start` to `stop`."""
        inside = self.pooled_index[(self.pooled_index >= start) & (self.pooled_index < stop)]
        return PackedBatch(
            token_ids=self.token_ids[start:stop],
            position_ids=self.position_ids[start:stop],
            num_kept=int(self.position_ids[stop]) if stop < self.num_tokens else 0,
            pooled_index=np.unique(inside) - start,
        )


def build_trie(
    rows: TokenizedRows,
    sequences: Int64Array | None = None,
    pooled: PooledTokens | None = None,
) -> TokenTrie:
    """The trie of the chosen `sequences` of a shard, by default of all that have tokens.

    `pooled` are the pooled tokens of these sequences, in their order; by default none.
    """
    if sequences is None:
        sequences = np.flatnonzero(rows.lengths)
    starts = rows.sequence_offsets[sequences].tolist()
    stops = rows.sequence_offsets[sequences + 1].tolist()
    # As bytes with the highest first, ids sort and compare as the numbers do.
    keys = [
        rows.token_ids[start:stop].astype(">i4").tobytes()
        for start, stop in zip(starts, stops, strict=True)
    ]
    ends = np.empty(len(keys), np.int64)
    places = np.zeros(0, np.int64) if pooled is None else np.empty(len(pooled.positions), np.int64)
    longest = max((len(key) // 4 for key in keys), default=0)
    path = np.empty(longest, np.int64)  # where in the trie the newest sequence's tokens lie
    ids: list[Int32Array] = [np.zeros(0, np.int32)]
    positions: list[Int32Array] = [np.zeros(0, np.int32)]
    counting = np.arange(longest, dtype=np.int32)
    before, tokens_before = b"", np.zeros(0, np.int32)
    size = 0
    for number in sorted(range(len(keys)), key=keys.__getitem__):
        if keys[number] != before or not size:
            before = keys[number]
            tokens = rows.token_ids[starts[number] : stops[number]]
            shared = _shared_prefix(tokens_before, tokens)
            ids.append(tokens[shared:])
            positions.append(counting[shared : len(tokens)])
            path[shared : len(tokens)] = np.arange(size, size + len(tokens) - shared)
            size += len(tokens) - shared
            tokens_before = tokens
        ends[number] = size - 1
        if pooled is not None:
            here = slice(pooled.offsets[number], pooled.offsets[number + 1])
            places[here] = path[pooled.positions[here]]
    return TokenTrie(np.concatenate(ids), np.concatenate(positions), ends, places)


def _shared_prefix(one: Int32Array, other: Int32Array) -> int:
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A slice of a trie: T tokens that go through the model together, without padding.

    Its keys are numbered from the C tokens carried into it, the ancestors of its first token that
    earlier batches computed, to its own: token t is key C + t. The next batch carries on with
    `num_kept` of these keys, the ancestors of its own first token.
    """

    token_ids: Int32Array
    """int32[T]"""
    position_ids: Int32Array
    """int32[T], place of each token in its sequences."""
    num_kept: int
    pooled_index: Int64Array
    """int64[P], ascending: the tokens whose hidden states are read."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_carried(self) -> int:
        """C."""
        return int(self.position_ids[0])

    @property
    def kept_keys(self) -> Int64Array:
        """int64[num_kept], the keys that the next batch carries on with, first position first."""
        return next(self.ancestors([self.num_tokens]))

    @property
    def attended_pairs(self) -> int:
        """Pairs of a token and one that it attends to, its own included."""
        return int(self.position_ids.sum(dtype=np.int64)) + self.num_tokens

    @property
    def run_starts(self) -> Int64Array:
        """int64[N], the first token of each run: of consecutive tokens of one sequence."""
        steps = np.diff(self.position_ids)
        return np.concatenate([[0], np.flatnonzero(steps != 1) + 1])

    def ancestors(self, tokens: Sequence[int]) -> Iterator[Int64Array]:
        """For each of the ascending `tokens` the keys before its own, first position first.

        Token number T is the first of the next batch.
        """
        carried = self.num_carried
        starts = [*self.run_starts.tolist(), self.num_tokens]
        newest = np.zeros(int(self.position_ids.max()) + 1, np.int64)  # key at each position
        newest[:carried] = np.arange(carried)
        run = done = 0
        for token in tokens:
            while done < token:
                stop = min(starts[run + 1], token)
                first = int(self.position_ids[done])
                newest[first : first + stop - done] = np.arange(carried + done, carried + stop)
                run, done = run + (stop == starts[run + 1]), stop
            depth = int(self.position_ids[token]) if token < self.num_tokens else self.num_kept
            yield newest[:depth].copy()


def longest_first(lengths: Int64Array) -> Int64Array:
    """The sequences that have tokens, in the order in which rectangles take them: neighbours pad
    each other least, and what does not fit the memory shows early. Equal lengths keep theirs."""
    order = np.argsort(-lengths, kind="stable")
    return order[lengths[order] > 0]


def rectangle_stop(lengths: Int64Array, start: int, token_budget: int) -> int:
    """Where the padded batch that starts with sequence `start` of the longest-first `lengths`
    ends: it costs its first length times its sequences, at most `token_budget`, save that a longer
    sequence is a batch of its own."""
    return min(len(lengths), start + max(1, token_budget // int(lengths[start])))


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """S sequences, one per row, padded on the right to the longest."""

    token_ids: Int32Array
    """int32[S, L]"""
    lengths: Int64Array
    """int64[S]"""


def pad(rows: TokenizedRows, sequences: Int64Array, pad_id: int) -> PaddedBatch:
    """The chosen sequences of a shard as rows of one rectangle."""
    lengths = rows.lengths[sequences]
    token_ids = np.full((len(sequences), int(lengths.max())), pad_id, dtype=np.int32)
    starts = rows.sequence_offsets[sequences].tolist()
    for row, start, length in zip(token_ids, starts, lengths.tolist(), strict=True):
        row[:length] = rows.token_ids[start : start + length]
    return PaddedBatch(token_ids, lengths)
