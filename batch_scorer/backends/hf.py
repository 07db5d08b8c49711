"""Scores from a Hugging Face model in this process.

Decoders run packed over the token trie of a shard: every distinct prefix goes through the model
once, and only the pooled tokens meet the score head, in float32 (`packed.PackedBody`). Everything
else (encoders, and decoders with another attention implementation) runs as length-sorted
rectangles.

Legend: S sequences, L longest of a padded batch, H hidden, O outputs.
"""

import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from batch_scorer.backends.attention import PACKED_ATTENTION
from batch_scorer.backends.base import mark_non_finite, unscorable
from batch_scorer.backends.hf_loader import (
    Loader,
    check_rotary_dtype,
    max_sequence_length,
    refuse_unsound,
)
from batch_scorer.backends.kernels import to_device
from batch_scorer.backends.memory import TokenBudget
from batch_scorer.backends.packed import PackedBody
from batch_scorer.backends.readout import PooledStates, Readout, StepAggregation
from batch_scorer.errors import ConfigError, RowReason
from batch_scorer.models.adapter import Adapter
from batch_scorer.models.directory import read_model_files
from batch_scorer.models.registry import choose_adapter
from batch_scorer.packing import Int64Array, build_trie, longest_first, pad, rectangle_stop
from batch_scorer.records import Embedding, PooledTokens, RowError, Scores, TokenizedRows

logger = logging.getLogger(__name__)

PADDED_TOKEN_BUDGET = {"cpu": 4096, "cuda": 16384}
"""Tokens of one forward pass of a rectangle, padding included."""

_NOTHING_POOLED = PooledTokens(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))


class HFBackend:
    """A reward model in transformers; see `Backend` for what it does.

    `adapter` None chooses the model's family from its files. `step_aggregation` None takes the
    family's own; with `embedding` the model's head is left out. `token_budget` None takes what
    suits the device. `compile` has torch compile the layers of a packed model, which takes a
    minute of the first shard. Raises ModelError where the directory cannot give true scores with
    these settings.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str,
        attention: str,
        device: str,
        adapter: Adapter | None = None,
        step_aggregation: StepAggregation | None = None,
        embedding: Embedding | None = None,
        token_budget: int | None = None,
        compile: bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._device = torch.device(device)
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but torch finds no CUDA device; set device to cpu")

        adapter = adapter or choose_adapter(read_model_files(model_dir))
        loader = Loader(model_dir, adapter, trust_remote_code, embeds=embedding is not None)
        implementation = loader.attention_implementation(attention)
        refuse_unsound(loader.skeleton, adapter, dtype, implementation)
        model, unexpected = loader.load(dtype, implementation)
        self._model: PreTrainedModel = model.to(self._device)  # type: ignore[arg-type]  # decorated
        check_rotary_dtype(self._model)

        config = self._model.config.get_text_config()
        self._vocabulary_size = len(cast(Tensor, self._model.get_input_embeddings().weight))
        self._max_length = max_sequence_length(self._model)
        # Any id of the vocabulary will do: the mask hides it, and pooling goes by the length.
        self._pad_id = (
            config.pad_token_id if config.pad_token_id in range(self._vocabulary_size) else 0
        )
        self._separator_id = getattr(config, "sep_token_id", None)
        self._readout: Readout | None = None
        self.num_outputs = 1
        if not loader.scores_itself:
            self._readout = Readout(
                model_dir,
                adapter,
                config,
                step_aggregation=step_aggregation,
                embedding=embedding,
            ).to(self._device)
            self.num_outputs = self._readout.num_outputs
        self._packed: PackedBody | None = None
        if implementation == PACKED_ATTENTION:
            self._packed = PackedBody(self._model, token_budget=token_budget, compile=bool(compile))
            self._budget = self._packed.budget
        elif compile:
            raise ConfigError(f"compile: {model_dir} does not run packed; leave compile out")
        else:
            self._budget = TokenBudget(token_budget or PADDED_TOKEN_BUDGET[device])
        self.provenance: dict[str, Any] = {
            "backend": "hf",
            "adapter": adapter.name,
            "model_class": type(self._model).__name__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": _device_name(self._device),
            "dtype": dtype,
            "attention": self._model.config._attn_implementation,
            "token_budget": self._budget.limit,
            "num_threads": torch.get_num_threads(),
            "unexpected_weights": unexpected,
            "trust_remote_code": trust_remote_code,
        }
        if self._packed is not None:
            self.provenance |= self._packed.provenance
        logger.info("scoring with %s", self.provenance)

    def score(self, rows: TokenizedRows) -> Scores:
        """Scores of all sequences in `rows`, in their order."""
        values = np.full((rows.num_sequences, self.num_outputs), np.nan, dtype=np.float32)
        unscored = unscorable(
            rows, max_tokens=self._max_length, vocabulary_size=self._vocabulary_size
        )
        scores = Scores(values, unscored)
        pooled = _NOTHING_POOLED
        if self._readout is not None:
            pooled, unpooled = self._readout.pooled_tokens(rows)
            scores.errors = unpooled | scores.errors
        lengths = rows.lengths.copy()
        lengths[list(scores.errors)] = 0
        if self._packed is None:
            self._score_padded(rows, lengths, pooled, scores)
            mark_non_finite(scores, np.flatnonzero(lengths))
            return scores
        sequences = np.flatnonzero(lengths)
        self._score_packed(rows, sequences, pooled, scores)
        broken = sequences[~np.isfinite(scores.values[sequences]).all(axis=1)]
        for sequence in sorted({*broken.tolist()} - {*scores.errors}):
            # A masked key weighs nothing, but nothing times no number is no number: what shared a
            # batch with such a sequence is not to blame.
            self._score_packed(rows, np.array([sequence]), pooled, scores)
        mark_non_finite(scores, sequences)
        return scores

    def close(self) -> None:
        """Free the device."""
        del self._model, self._readout, self._packed
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _score_packed(
        self, rows: TokenizedRows, sequences: Int64Array, pooled: PooledTokens, scores: Scores
    ) -> None:
        assert self._packed is not None and self._readout is not None, "only bodies run packed"
        chosen = pooled.of(sequences)
        trie = build_trie(rows, sequences, chosen)
        distinct = np.unique(trie.ends)
        asked = int(trie.position_ids[distinct].sum(dtype=np.int64)) + len(distinct)
        scores.effort.shared_tokens += asked - trie.num_tokens
        states = PooledStates(trie.pooled_index, chosen)
        scored: list[Int64Array] = []
        outputs: list[Tensor] = []
        for start, stop, found in self._packed.states(trie, scores.effort):
            if found is None:
                self._mark_too_large(
                    rows, sequences[(trie.ends >= start) & (trie.ends < stop)], scores
                )
                continue
            complete, places, read = states.add(start, stop, found)
            if len(complete):
                scored.append(sequences[complete])
                outputs.append(self._readout.read(read, places))
        self._fill(scores, scored, outputs, pooled)

    def _score_padded(
        self, rows: TokenizedRows, lengths: Int64Array, pooled: PooledTokens, scores: Scores
    ) -> None:
        order = longest_first(lengths)
        sorted_lengths = lengths[order]
        scored: list[Int64Array] = []
        outputs: list[Tensor] = []
        start = 0
        while start < len(order):
            stop = rectangle_stop(sorted_lengths, start, self._budget.tokens)
            sequences = order[start:stop]
            size = int(sorted_lengths[start]) * len(sequences)
            output = self._budget.attempt(
                lambda: self._padded_forward(rows, sequences, pooled),  # noqa: B023  # called now
                size,
            )
            if output is None and len(sequences) > 1:
                scores.effort.oom_splits += 1
                continue
            start = stop
            if output is None:
                self._mark_too_large(rows, sequences, scores)
                continue
            num_tokens = int(lengths[sequences].sum())
            scores.effort.num_batches += 1
            scores.effort.computed_tokens += num_tokens
            scores.effort.padding_tokens += size - num_tokens
            squares = lengths[sequences] * (lengths[sequences] + 1)
            scores.effort.attended_pairs += int(squares.sum()) // 2
            scored.append(sequences)
            outputs.append(output)
        self._fill(scores, scored, outputs, pooled)

    def _fill(
        self,
        scores: Scores,
        scored: list[Int64Array],
        outputs: list[Tensor],
        pooled: PooledTokens,
    ) -> None:
        if not outputs:
            return
        # One copy per shard: a copy per batch would make the host wait for the device.
        everything = torch.cat(outputs).cpu().numpy()
        if self._readout is None:
            scores.values[np.concatenate(scored)] = everything
        else:
            self._readout.fill(scores, np.concatenate(scored), everything, pooled)

    def _mark_too_large(self, rows: TokenizedRows, sequences: Int64Array, scores: Scores) -> None:
        for sequence in sequences.tolist():
            detail = f"{rows.lengths[sequence]} tokens do not fit the memory on their own"
            scores.errors[sequence] = RowError(RowReason.OUT_OF_MEMORY, detail)

    @torch.inference_mode()
    def _padded_forward(
        self, rows: TokenizedRows, sequences: Int64Array, pooled: PooledTokens
    ) -> Tensor:
        """What `Readout.read` gives for one rectangle; [S, 1] of models that score themselves."""
        batch = pad(rows, sequences, self._pad_id)
        token_ids = to_device(batch.token_ids, self._device).long()  # [S, L]
        lengths = to_device(batch.lengths, self._device)  # [S]
        places = torch.arange(token_ids.shape[1], device=self._device)
        inputs = {"input_ids": token_ids, "attention_mask": (places < lengths[:, None]).long()}
        if self._readout is None:
            inputs |= self._token_types(token_ids)
            return cast(Tensor, self._model(**inputs).logits).float()  # [S, 1]
        hidden = self._model.base_model(**inputs, use_cache=False).last_hidden_state  # [S, L, H]
        chosen = pooled.of(sequences)
        owners = np.repeat(np.arange(len(sequences)), chosen.counts)
        index = [to_device(array, self._device) for array in (owners, chosen.positions)]
        return self._readout.read(hidden[index[0], index[1]], chosen)

    def _token_types(self, token_ids: Tensor) -> dict[str, Tensor]:
        """Of a pair: 0 up to the first separator, 1 after it; nothing for models without types."""
        if self._separator_id is None or not getattr(self._model.config, "type_vocab_size", 0) > 1:
            return {}
        is_separator = token_ids == self._separator_id
        before = is_separator.cumsum(1) - is_separator.long()  # separators left of each token
        return {"token_type_ids": (before > 0).long()}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"
