"""Scores from a Hugging Face model in this process.

Decoders run packed over a shard's token trie: every distinct prefix goes through the model once,
and the score head reads only the pooled tokens, in float32 (`packed.PackedBody`). Everything else
(encoders, and decoders with another attention implementation) runs as length-sorted rectangles.

Legend: S sequences, L longest of a padded batch, H hidden, O outputs.
"""

import logging
import shutil
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from batch_scorer.backends.answers import AnswerReadout, implicit_scores
from batch_scorer.backends.attention import PACKED_ATTENTION
from batch_scorer.backends.base import (
    EngineSettings,
    MakeBackend,
    mark_non_finite,
    unscorable,
)
from batch_scorer.backends.device import device_name, keep_freed_memory
from batch_scorer.backends.hf_loader import (
    Loader,
    check_rotary_dtype,
    max_sequence_length,
    refuse_company,
    refuse_unsound,
)
from batch_scorer.backends.kernels import to_device
from batch_scorer.backends.lanes import Lanes
from batch_scorer.backends.memory import TokenBudget
from batch_scorer.backends.packed import PackedBody
from batch_scorer.backends.packing import (
    Int64Array,
    TokenTrie,
    build_trie,
    longest_first,
    pad,
    rectangle_stop,
)
from batch_scorer.backends.readout import PooledStates, Readout
from batch_scorer.errors import ConfigError, RowReason
from batch_scorer.models.families.heads import Activated
from batch_scorer.models.registry import choose_adapter
from batch_scorer.models.tokenizer import pair_separator
from batch_scorer.records import Effort, PooledTokens, RowError, Scores, TokenizedRows

logger = logging.getLogger(__name__)

PADDED_TOKEN_BUDGET = {"cpu": 4096, "cuda": 16384}
"""Most tokens of a rectangle, padding included."""

_CPP_COMPILERS = ("g++", "clang++")
_NOTHING_POOLED = PooledTokens(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))


class HFBackend:
    """A reward model in transformers; see `Backend` for what it does.

    `compile` has torch compile the layers of a packed model, which takes a minute of the first
    shard; `precision` has its linear layers multiply in 8 bits. Without packing either is a
    ConfigError. With `invariant` a packed model runs in fixed shapes, every other one sequence at a
    time. Raises ModelError where the directory cannot give true scores with these settings.
    """

    def __init__(self, settings: EngineSettings) -> None:
        model_dir, dtype, device = settings.model_dir, settings.dtype, settings.device
        self._device = torch.device(device)
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but torch finds no CUDA device; set device to cpu")
        if settings.compile and device == "cpu" and not any(map(shutil.which, _CPP_COMPILERS)):
            raise ConfigError("compile: there is no C++ compiler here; leave compile out")
        if device == "cpu":
            keep_freed_memory()

        files = settings.read_files()
        adapter = settings.adapter or choose_adapter(files)
        loader = Loader(
            files,
            adapter,
            settings.trust_remote_code,
            embeds=settings.embedding is not None,
        )
        implementation = loader.attention_implementation(settings.attention)
        refuse_unsound(loader.skeleton, adapter, dtype, implementation)
        model = loader.load(dtype, implementation)
        self._model: PreTrainedModel = model.to(self._device)  # type: ignore[arg-type]  # decorated
        check_rotary_dtype(self._model)
        if settings.invariant:
            refuse_company(self._model, packed=implementation == PACKED_ATTENTION)

        config = self._model.config.get_text_config()
        self._vocabulary_size = len(cast(Tensor, self._model.get_input_embeddings().weight))
        self._max_length = max_sequence_length(self._model)
        # Any id of the vocabulary is right: the mask hides it, and pooling goes by the length.
        self._pad_id = (
            config.pad_token_id if config.pad_token_id in range(self._vocabulary_size) else 0
        )
        self._readout: Readout | None = None
        self._activated: Activated | None = None
        self._separator_id: int | None = None
        self.num_outputs = 1
        if loader.scores_itself:
            if getattr(config, "type_vocab_size", 0) > 1:
                self._separator_id = pair_separator(
                    model_dir, getattr(config, "sep_token_id", None)
                )
            if pairs := adapter.cross_encoder(files):
                self._activated = Activated(pairs.activation)
                self.num_outputs = 2
        else:
            make = AnswerReadout if adapter.log_probs else Readout
            self._readout = make(settings, files, adapter, config).to(self._device)
            self.num_outputs = self._readout.num_outputs
        self._packed: PackedBody | None = None
        self._lanes = Lanes(self._device, single=settings.invariant)
        if implementation == PACKED_ATTENTION:
            self._packed = PackedBody(
                self._model,
                token_budget=settings.token_budget,
                compile=bool(settings.compile),
                precision=settings.precision,
                invariant=settings.invariant,
            )
            self._budget = self._packed.budget
            if settings.invariant:
                list(self._lanes.map(PackedBody.check_invariance, [self._packed]))
        elif settings.compile:
            raise ConfigError(f"compile: {model_dir} does not run packed; leave compile out")
        elif settings.precision:
            raise ConfigError(f"precision: {model_dir} does not run packed; leave precision out")
        elif settings.invariant:
            self._budget = TokenBudget(1)  # a longer sequence is a batch of its own
        else:
            self._budget = TokenBudget(settings.token_budget or PADDED_TOKEN_BUDGET[device])
        self.provenance: dict[str, Any] = {
            "backend": "hf",
            "adapter": adapter.name,
            "model_class": type(self._model).__name__,
            "torch": str(torch.__version__),  # a plain string: it is unpickled without torch
            "transformers": transformers.__version__,
            "device": device_name(device),
            "dtype": dtype,
            "attention": self._model.config._attn_implementation,
            "token_budget": self._budget.limit,
            "num_threads": torch.get_num_threads(),
            "lanes": self._lanes.count,
            "invariant": settings.invariant,
            "trust_remote_code": settings.trust_remote_code,
        }
        if self._packed is not None:
            self.provenance |= self._packed.provenance
        self._implicit = settings.implicit
        self._reference: HFBackend | None = None
        if self._implicit is not None:
            self.num_outputs = 2
            if self._implicit.reference is not None:
                self._reference = HFBackend(self._implicit.reference)
                self._share_limits(self._reference)
                self.num_outputs = 3
                self.provenance["reference"] = self._reference.provenance
        logger.info("scoring with %s", self.provenance)

    def _share_limits(self, other: "HFBackend") -> None:
        """Take only what both models can, in batches that fit both: whichever was loaded last has
        seen how little memory is left."""
        limits = [limit for limit in (self._max_length, other._max_length) if limit is not None]
        self._max_length = other._max_length = min(limits, default=None)
        self._vocabulary_size = min(self._vocabulary_size, other._vocabulary_size)
        self._budget = other._budget = TokenBudget(min(self._budget.limit, other._budget.limit))
        for backend in (self, other):
            if backend._packed is not None:
                backend._packed.budget = self._budget
            backend.provenance["token_budget"] = self._budget.limit

    def score(self, rows: TokenizedRows) -> Scores:
        """Scores of all sequences in `rows`, in their order."""
        work = self._lay_out(rows)
        scores = self._run(rows, work)
        if self._implicit is None:
            return scores
        reference = None if self._reference is None else self._reference._run(rows, work)
        return implicit_scores(scores, reference, work.pooled.counts, self._implicit)

    def _lay_out(self, rows: TokenizedRows) -> "_Work":
        """What of the rows goes through the model: the same for every model that runs them."""
        errors = unscorable(
            rows, max_tokens=self._max_length, vocabulary_size=self._vocabulary_size
        )
        pooled = _NOTHING_POOLED
        if self._readout is not None:
            pooled, unpooled = self._readout.pooled_tokens(rows)
            errors = unpooled | errors
        lengths = rows.lengths.copy()
        lengths[list(errors)] = 0
        sequences = np.flatnonzero(lengths)
        lots: list[_Lot] = []
        if self._packed is not None:
            cut = partial(_lot, rows, pooled)
            lots = list(self._lanes.map(cut, self._parts(rows, sequences)))
        return _Work(errors, pooled, sequences, lots)

    def _run(self, rows: TokenizedRows, work: "_Work") -> Scores:
        """What this model alone makes of the rows."""
        pooled, sequences, lengths = work.pooled, work.sequences, rows.lengths
        num_outputs = (self._readout or self).num_outputs
        values = np.full((rows.num_sequences, num_outputs), np.nan, dtype=np.float32)
        scores = Scores(values, dict(work.errors))
        if self._packed is None:
            parts = [self._score_padded(rows, sequences, pooled)]
        else:
            parts = list(self._lanes.map(partial(self._score_lot, rows), work.lots))
        self._fill(scores, parts, pooled)
        broken = sequences[~np.isfinite(scores.values[sequences]).all(axis=1)]
        broken = np.setdiff1d(broken, list(scores.errors))
        if self._packed is not None and len(broken):
            # A masked key has weight 0, but 0 times infinity is NaN: sequences that shared a batch
            # with a broken one may be sound, so each is scored again on its own.
            lots = [_lot(rows, pooled, broken[i : i + 1]) for i in range(len(broken))]
            alone = list(self._lanes.map(partial(self._score_lot, rows), lots))
            by_token = self._readout is not None and self._readout.reads_tokens_alone
            counts = pooled.counts if by_token else np.ones_like(lengths)
            self._fill(scores, [*(part.without(broken, counts) for part in parts), *alone], pooled)
        mark_non_finite(scores, sequences)
        return scores

    def close(self) -> None:
        """Free the device."""
        if self._reference is not None:
            self._reference.close()
        self._lanes.close()
        del self._model, self._readout, self._packed
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _parts(self, rows: TokenizedRows, sequences: Int64Array) -> list[Int64Array]:
        """The sequences in parts with about the same number of tokens, one for each lane."""
        if self._lanes.count == 1 or len(sequences) < 2:
            return [sequences]
        parts = build_trie(rows, sequences).parts(self._lanes.count)
        return [sequences[part] for part in parts]

    def _score_lot(self, rows: TokenizedRows, lot: "_Lot") -> "_Part":
        """The outputs of some sequences, over their own trie."""
        assert self._packed is not None and self._readout is not None, "only bodies run packed"
        trie = lot.trie
        part = _Part(Effort(shared_tokens=trie.shared_tokens))
        states = PooledStates(trie.pooled_index, lot.pooled)
        by_token = self._readout.reads_tokens_alone
        for start, stop, found in self._packed.states(trie, part.effort):
            if found is None:
                lost = lot.sequences[(trie.ends >= start) & (trie.ends < stop)]
                part.errors |= _too_large(rows, lost)
                continue
            # What is read alone is read at once: then no hidden state has to be kept, and a prefix
            # is read once for all its sequences.
            kept = self._readout.read_each(found) if by_token else found
            complete, places, read = states.add(start, stop, kept)
            if len(complete):
                part.scored.append(lot.sequences[complete])
                part.outputs.append(read if by_token else self._readout.read(read, places))
        return part

    def _score_padded(
        self, rows: TokenizedRows, sequences: Int64Array, pooled: PooledTokens
    ) -> "_Part":
        """The outputs of some sequences, in rectangles."""
        part = _Part()
        sequences = sequences[longest_first(rows.lengths[sequences])]
        lengths = rows.lengths[sequences]
        start = 0
        while start < len(sequences):
            stop = rectangle_stop(lengths, start, self._budget.tokens)
            forward = partial(self._padded_forward, rows, sequences[start:stop], pooled)
            size = int(lengths[start]) * (stop - start)
            output = self._budget.attempt(forward, size)
            if output is not None:
                num_tokens = int(lengths[start:stop].sum())
                part.effort.num_batches += 1
                part.effort.computed_tokens += num_tokens
                part.effort.padding_tokens += size - num_tokens
                squares = lengths[start:stop] * (lengths[start:stop] + 1)
                part.effort.attended_pairs += int(squares.sum()) // 2
                part.scored.append(sequences[start:stop])
                part.outputs.append(output)
            elif stop > start + 1:
                part.effort.oom_splits += 1
                continue
            else:
                part.errors |= _too_large(rows, sequences[start:stop])
            start = stop
        return part

    def _fill(self, scores: Scores, parts: "list[_Part]", pooled: PooledTokens) -> None:
        """Put the outputs, errors and effort of all parts of the shard into `scores`."""
        for part in parts:
            scores.errors |= part.errors
            scores.effort.add(part.effort)
        outputs = [output for part in parts for output in part.outputs]
        if not outputs:
            return
        scored = np.concatenate([some for part in parts for some in part.scored])
        # One copy per shard: a copy per batch would make the host wait for the device.
        everything = torch.cat(outputs).cpu().numpy()
        if self._readout is None:
            scores.values[scored] = everything
        else:
            self._readout.fill(scores, scored, everything, pooled)

    @torch.inference_mode()
    def _padded_forward(
        self, rows: TokenizedRows, sequences: Int64Array, pooled: PooledTokens
    ) -> Tensor:
        """What `Readout.read` returns for one rectangle; [S, O] of models with their own head."""
        batch = pad(rows, sequences, self._pad_id)
        token_ids = to_device(batch.token_ids, self._device).long()  # [S, L]
        lengths = to_device(batch.lengths, self._device)  # [S]
        places = torch.arange(token_ids.shape[1], device=self._device)
        inputs = {"input_ids": token_ids, "attention_mask": (places < lengths[:, None]).long()}
        if self._readout is None:
            inputs |= self._token_types(token_ids)
            logits = cast(Tensor, self._model(**inputs).logits).float()  # [S, 1]
            return logits if self._activated is None else self._activated(logits)
        hidden = self._model.base_model(**inputs, use_cache=False).last_hidden_state  # [S, L, H]
        chosen = pooled.of(sequences)
        owners = np.repeat(np.arange(len(sequences)), chosen.counts)
        index = [to_device(array, self._device) for array in (owners, chosen.positions)]
        return self._readout.read(hidden[index[0], index[1]], chosen)

    def _token_types(self, token_ids: Tensor) -> dict[str, Tensor]:
        """A pair's token types: 0 up to the first separator, 1 after it. Empty for models without
        types."""
        if self._separator_id is None:
            return {}
        is_separator = token_ids == self._separator_id
        before = is_separator.cumsum(1) - is_separator.long()  # separators left of each token
        return {"token_type_ids": (before > 0).long()}


BACKEND: MakeBackend = HFBackend


@dataclass(frozen=True, slots=True)
class _Lot:
    """Some sequences of a shard, their pooled tokens, and the trie of both."""

    sequences: Int64Array
    pooled: PooledTokens
    trie: TokenTrie


def _lot(rows: TokenizedRows, pooled: PooledTokens, sequences: Int64Array) -> _Lot:
    chosen = pooled.of(sequences)
    return _Lot(sequences, chosen, build_trie(rows, sequences, chosen))


@dataclass(frozen=True, slots=True)
class _Work:
    """A shard's sequences that go through a model, in lots where it is packed; `errors` names the
    others. `pooled` are the pooled tokens of all."""

    errors: dict[int, RowError]
    pooled: PooledTokens
    sequences: Int64Array
    lots: list[_Lot]


@dataclass(slots=True)
class _Part:
    """The result for some sequences of a shard; `outputs` belong to `scored`, in order."""

    effort: Effort = field(default_factory=Effort)
    errors: dict[int, RowError] = field(default_factory=dict)
    scored: list[Int64Array] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def without(self, sequences: Int64Array, counts: Int64Array) -> "_Part":
        """The same without these sequences, and without the effort, which is counted already.
        `counts` are the output rows of each of the shard's sequences."""
        kept = [~np.isin(some, sequences) for some in self.scored]
        rows = [
            torch.from_numpy(np.repeat(keep, counts[some]))
            for keep, some in zip(kept, self.scored, strict=True)
        ]
        return _Part(
            scored=[some[keep] for some, keep in zip(self.scored, kept, strict=True)],
            outputs=[
                output[row.to(output.device)]
                for output, row in zip(self.outputs, rows, strict=True)
            ],
        )


def _too_large(rows: TokenizedRows, sequences: Int64Array) -> dict[int, RowError]:
    return {
        sequence: RowError(
            RowReason.OUT_OF_MEMORY,
            f"{rows.lengths[sequence]} tokens do not fit the memory on their own",
        )
        for sequence in sequences.tolist()
    }
