"""Log probabilities of answers, and what becomes of two models' (`models/families/implicit.py`).

The log probability of a token is read at the token before it, in float32 from the body's hidden
state; those of an answer's tokens are added up in float64.

Legend: S sequences, K tokens of all answers, H hidden.
"""

from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from batch_scorer.backends.base import ImplicitReward
from batch_scorer.backends.kernels import to_device
from batch_scorer.backends.readout import Readout
from batch_scorer.records import PooledTokens, RowError, Scores, TokenizedRows


class AnswerReadout(Readout):
    """The vocabulary's head of one model: one output, the log probability of the answer."""

    num_outputs = 1

    def pooled_tokens(self, rows: TokenizedRows) -> tuple[PooledTokens, dict[int, RowError]]:
        """The tokens before each token of every answer, and the ids that follow them.

        `rows.answer_starts` is at least 1 for every sequence that has tokens.
        """
        assert rows.answer_starts is not None, "the rows do not say where their answers begin"
        starts = rows.answer_starts.astype(np.int64)
        counts = np.where(rows.lengths > 0, rows.lengths - starts, 0)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        in_answer = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
        positions = in_answer + np.repeat(starts - 1, counts)
        next_ids = rows.token_ids[positions + 1 + np.repeat(rows.sequence_offsets[:-1], counts)]
        return PooledTokens(positions, offsets, next_ids), {}

    @torch.inference_mode()
    def read(self, hidden: Tensor, pooled: PooledTokens) -> Tensor:
        """float32[S, 1] of hidden states [K, H] at `pooled`."""
        assert pooled.next_ids is not None
        next_ids = to_device(pooled.next_ids, hidden.device).long()
        log_probs = self._by_row(cast(nn.Module, self._head), hidden, next_ids)
        counts = to_device(pooled.counts, hidden.device)
        sums = torch.segment_reduce(log_probs.double(), "sum", lengths=counts, unsafe=True)
        return sums.float()[:, None]


def implicit_scores(
    policy: Scores,
    reference: Scores | None,
    answer_tokens: npt.NDArray[np.int64],
    asked: ImplicitReward,
) -> Scores:
    """The policy's log probabilities float32[S, 1] and the reference's, if there is one, as
    float32[S, 2 or 3]: the score, then both.

    `answer_tokens` is int64[S]. The effort is that of one model's pass over the tokens, since a
    token's cost is that of both models; the batches of both count.
    """
    ratio = policy.values[:, 0].astype(np.float64)
    columns, errors, effort = [policy.values[:, 0]], policy.errors, policy.effort
    if reference is not None:
        ratio -= reference.values[:, 0]
        columns.append(reference.values[:, 0])
        errors = reference.errors | errors
        effort = replace(
            effort,
            num_batches=effort.num_batches + reference.effort.num_batches,
            oom_splits=effort.oom_splits + reference.effort.oom_splits,
        )
    if asked.length_normalize:
        ratio /= np.maximum(answer_tokens, 1)
    values = np.stack([asked.beta * ratio, *columns], axis=1).astype(np.float32)
    values[list(errors)] = np.nan
    return Scores(values, errors, effort=effort)
