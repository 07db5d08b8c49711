"""Which sequences share a forward pass, and how a batch is laid out. Decides; runs nothing.

Legend: S sequences, N nodes of a packed batch, T its tokens, K its gathered keys, P its pooled
tokens, L the longest sequence of a padded batch.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from batch_scorer.records import PooledTokens, TokenizedRows

Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]


def plan_batches(
    lengths: Int64Array, token_budget: int, *, padded: bool = False
) -> list[Int64Array]:
    """Batches of sequence indices, the longest sequences first.

    A packed batch costs the sum of its lengths, a padded one its longest length times its
    sequences; no batch costs more than `token_budget`, save that a sequence longer than the
    budget is a batch of its own. Sequences without tokens are left out. The plan is a pure
    function of its arguments: equal lengths keep their order.
    """
    order = np.argsort(-lengths, kind="stable")  # int64[S]
    order = order[lengths[order] > 0]
    ends = np.cumsum(lengths[order])  # tokens up to and including each sequence
    batches: list[Int64Array] = []
    start = 0
    while start < len(order):
        if padded:
            stop = start + token_budget // int(lengths[order[start]])
        else:
            tokens_before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, tokens_before + token_budget, side="right"))
        stop = max(stop, start + 1)
        batches.append(order[start:stop])
        start = stop
    return batches


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """N nodes laid end to end in one row without padding, and what each may attend to.

    A node is a run of tokens that go through the model once. Its queries are its own tokens;
    its keys are its ancestors' tokens and its own, causal and aligned at the bottom right: a
    node's last query sees all of its keys. Today every node is a whole sequence, so its keys
    are its own tokens, which is what `key_index` None says; otherwise it is int64[K], the
    token behind each key, node after node.
    """

    sequences: Int64Array
    """int64[S], indices of the sequences in the shard."""
    token_ids: Int32Array
    """int32[T]"""
    position_ids: Int32Array
    """int32[T], place of each token in its sequence: starts again at every sequence."""
    query_offsets: Int32Array
    """int32[N+1], bounds of the nodes' own tokens in T."""
    key_offsets: Int32Array
    """int32[N+1], bounds of the nodes' keys, in K (in T when `key_index` is None)."""
    key_index: Int64Array | None
    pooled_index: Int64Array
    """int64[P], the tokens that the score head reads, sequence after sequence."""


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """S sequences, one per row, padded on the right to the longest."""

    sequences: Int64Array
    """int64[S], indices of the sequences in the shard."""
    token_ids: Int32Array
    """int32[S, L]"""
    lengths: Int64Array
    """int64[S]"""


def pack(rows: TokenizedRows, sequences: Int64Array, pooled: PooledTokens) -> PackedBatch:
    """The chosen sequences of a shard laid end to end; `pooled` are those of the shard."""
    lengths = rows.lengths[sequences]
    offsets = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    chosen = pooled.of(sequences)
    return PackedBatch(
        sequences=sequences,
        token_ids=np.concatenate(_token_slices(rows, sequences)),
        position_ids=np.arange(offsets[-1], dtype=np.int32) - np.repeat(offsets[:-1], lengths),
        query_offsets=offsets,
        key_offsets=offsets,
        key_index=None,
        pooled_index=chosen.positions + np.repeat(offsets[:-1].astype(np.int64), chosen.counts),
    )


def last_tokens(rows: TokenizedRows) -> PooledTokens:
    """The last token of every sequence that has any: what is pooled where nothing else is said."""
    lengths = rows.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths > 0)])
    return PooledTokens(lengths[lengths > 0] - 1, offsets)


def pad(rows: TokenizedRows, sequences: Int64Array, pad_id: int) -> PaddedBatch:
    """The chosen sequences of a shard as rows of one rectangle."""
    lengths = rows.lengths[sequences]
    token_ids = np.full((len(sequences), int(lengths.max())), pad_id, dtype=np.int32)
    for row, tokens in zip(token_ids, _token_slices(rows, sequences), strict=True):
        row[: len(tokens)] = tokens
    return PaddedBatch(sequences, token_ids, lengths)


def _token_slices(rows: TokenizedRows, sequences: Int64Array) -> list[Int32Array]:
    starts = rows.sequence_offsets[sequences].tolist()
    stops = rows.sequence_offsets[sequences + 1].tolist()
    return [rows.token_ids[start:stop] for start, stop in zip(starts, stops, strict=True)]
