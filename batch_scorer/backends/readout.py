"""From hidden states to scores, the same for every engine: which tokens are read, and by what.

The engines differ in how they compute a body's hidden states. What is read off them is decided
here: positions by index, the head in float32, steps folded into a score.

Legend: S sequences, K pooled tokens, H hidden, O outputs.
"""

from pathlib import Path
from typing import Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from batch_scorer.models.adapter import Adapter, LastToken
from batch_scorer.models.weights import load_head
from batch_scorer.records import Embedding, PooledTokens, RowError, Scores, TokenizedRows

StepAggregation: TypeAlias = Literal["min", "last", "mean", "product"]


class Readout:
    """The head of one model, or the pooling of an embedding.

    `config` is the body's. `num_outputs` is O: 1 + attributes, or the size of an embedding.
    """

    def __init__(
        self,
        model_dir: Path,
        adapter: Adapter,
        config: PretrainedConfig,
        *,
        step_aggregation: StepAggregation | None = None,
        embedding: Embedding | None = None,
    ) -> None:
        self._config = config.to_dict()
        self._pooling = adapter.pooling
        self._averages = adapter.averages(self._config)
        self.embedding = embedding
        self.step_aggregation = (
            (step_aggregation or adapter.step_aggregation) if adapter.step_aggregation else None
        )
        self._head = None if embedding else load_head(model_dir, adapter)
        self.num_outputs = (
            int(config.hidden_size) if embedding else 1 + len(adapter.attributes(self._config))
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
        return self._averages or self.step_aggregation is not None

    def pooled_tokens(self, rows: TokenizedRows) -> tuple[PooledTokens, dict[int, RowError]]:
        """The tokens to read of every sequence, and the sequences that lack one."""
        lengths = rows.lengths
        counts = np.zeros(rows.num_sequences, dtype=np.int64)
        places: list[npt.NDArray[np.int64]] = []
        errors: dict[int, RowError] = {}
        for sequence in np.flatnonzero(lengths).tolist():
            start = rows.sequence_offsets[sequence]
            ids = rows.token_ids[start : start + lengths[sequence]]
            found = self._positions(ids)
            if isinstance(found, RowError):
                errors[sequence] = found
            else:
                counts[sequence] = len(found)
                places.append(found)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return PooledTokens(np.concatenate([np.zeros(0, np.int64), *places]), offsets), errors

    def _positions(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64] | RowError:
        if self.embedding is None:
            return self._pooling.positions(ids, self._config)
        if self.embedding.pooling == "mean":
            return np.arange(len(ids))
        if self.embedding.pooling == "cls":
            return np.zeros(1, dtype=np.int64)
        return LastToken().positions(ids, self._config)

    @torch.inference_mode()
    def read(self, hidden: Tensor, pooled: PooledTokens) -> Tensor:
        """float32[S, O] of hidden states [K, H] at `pooled`; with steps float32[K, 1]."""
        hidden = hidden.float()
        counts = pooled.counts
        if self.embedding is not None:
            if self.embedding.pooling == "mean":
                hidden = _averaged(hidden, counts)
            return F.normalize(hidden, dim=-1) if self.embedding.normalize else hidden
        head = cast(nn.Module, self._head)
        if self.step_aggregation is not None:
            return cast(Tensor, head(hidden))
        if self._averages:
            return cast(Tensor, head(_averaged(hidden, counts)[:, None]))
        return cast(Tensor, head(hidden.view(len(counts), int(counts[0]), -1)))

    def fill(
        self,
        scores: Scores,
        sequences: npt.NDArray[np.int64],
        outputs: npt.NDArray[np.float32],
        pooled: PooledTokens,
    ) -> None:
        """Put the outputs of `read` for these sequences, all of a shard, into `scores`."""
        if self.step_aggregation is None:
            scores.values[sequences] = outputs
            return
        # The shard's sequences in order, each with the steps that its batch gave.
        order = np.argsort(sequences, kind="stable")
        read_in = pooled.of(sequences)
        places = PooledTokens(np.arange(len(outputs)), read_in.offsets).of(order)
        scores.step_values = outputs[places.positions, 0]
        counts = np.zeros(len(scores.values), dtype=np.int64)
        counts[sequences] = read_in.counts
        scores.step_offsets = np.concatenate([[0], np.cumsum(counts)])
        scores.values[sequences[order], 0] = aggregate_steps(
            scores.step_values, places.offsets, self.step_aggregation
        )


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
