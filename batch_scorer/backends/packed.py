"""A decoder's body over the token trie of a shard, batch by batch.

Each token of the trie goes through the body once. A batch is a slice of the trie, so all batches
have the same size, whatever the sequences. A later batch needs its ancestors' keys and values from
earlier ones (`attention.Pass`).
"""

import logging
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from batch_scorer.backends.attention import KeysValues, Pass, pool_in_last_layer
from batch_scorer.backends.base import PROBE_TOLERANCE
from batch_scorer.backends.eight_bits import round_linears
from batch_scorer.backends.hf_loader import max_sequence_length, softcap_of
from batch_scorer.backends.kernels import KERNELS, choose_kernel, to_device
from batch_scorer.backends.linear import reorder_linears
from batch_scorer.backends.memory import LEAST_TOKENS, TokenBudget
from batch_scorer.backends.packing import PackedBatch, TokenTrie, build_trie
from batch_scorer.backends.readout import PooledStates
from batch_scorer.errors import ModelError
from batch_scorer.records import Effort, PooledTokens, TokenizedRows

logger = logging.getLogger(__name__)

CPU_TOKEN_BUDGET = 4096
"""Tokens of a forward pass on a CPU: enough to fill its matrix units, few enough for its cache."""

INVARIANT_ROWS = {"cpu": 1024, "cuda": 8192}
"""Rows of every forward pass where shapes are fixed."""

MOST_TOKENS = 32768
"""Tokens of a forward pass on a GPU with memory to spare: more only delay the first result."""

_PROBE_TOKENS = 2048
_INVARIANCE_TOKENS = 300
_MEMORY_SHARE = 0.7
"""Of the memory that is free beside the model: carried keys and odd sizes need the rest."""


class PackedBody:
    """The body of `model`, whose attention is `attention.packed_attention`.

    `token_budget` None takes CPU_TOKEN_BUDGET, and on a GPU what a probe measures. With `compile`,
    the decoder layers are compiled at their first batch; with `precision` their linear layers
    multiply in 8 bits. `invariant`: a token's state has the same bits in every batch; batches are
    then filled up to INVARIANT_ROWS, and have no more tokens. Raises ModelError for a model that
    lets sequences see each other when packed, and ConfigError for a precision that the device has
    not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        token_budget: int | None,
        compile: bool,
        precision: str | None = None,
        invariant: bool = False,
    ) -> None:
        self._model = model
        self._body: nn.Module = model.base_model
        self._device = model.device
        self._vocabulary_size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        self._precision = precision
        self._in_8_bits = 0 if precision is None else self._round(precision)
        self._kernel_name = self._choose_kernel(invariant)
        self._num_rows: int | None = None
        self._reordered = self._device.type == "cpu" and self._reorder()
        self._layers = self._find_layers()
        self._pools = False
        self._check_isolation()
        self._compiles = compile
        if compile:
            # The last layer stops half-way for most tokens, which no graph can.
            for layer in self._layers[: len(self._layers) - self._pools]:
                layer.compile(dynamic=True)
        if invariant:
            self._num_rows = INVARIANT_ROWS[self._device.type]
            token_budget = min(token_budget or self._num_rows, self._num_rows)
        self.budget = TokenBudget(token_budget or self._probe_budget())

    @property
    def provenance(self) -> dict[str, Any]:
        """The part of the engine's provenance that is known here."""
        return {
            "attention_kernel": self._kernel_name,
            "last_layer": "pooled tokens" if self._pools else "all tokens",
            "compiled": self._compiles,
            "weights_reordered": self._reordered,
            "precision": self._precision,
            "linear_layers_in_8_bits": self._in_8_bits,
        }

    @torch.inference_mode()
    def states(self, trie: TokenTrie, effort: Effort) -> Iterator[tuple[int, int, Tensor | None]]:
        """(start, stop, hidden states [P, H] of the pooled tokens between them), up to the trie's
        end; None in place of the states of tokens that do not fit the memory however they are cut.
        """
        carried: list[KeysValues] = []
        start = 0
        while start < trie.num_tokens:
            stop = min(start + self.budget.tokens, trie.num_tokens)
            batch = trie.batch(start, stop)
            done = self.budget.attempt(lambda: self._forward(batch, carried), batch.num_tokens)  # noqa: B023
            if done is not None:
                states, carried = done
                effort.num_batches += 1
                effort.computed_tokens += batch.num_tokens
                if self._num_rows is not None:
                    effort.padding_tokens += self._num_rows - batch.num_tokens
                effort.attended_pairs += batch.attended_pairs
                yield start, stop, states
            elif batch.num_tokens > LEAST_TOKENS:
                effort.oom_splits += 1
                continue
            else:
                stop = trie.subtree_stop(start)
                depth = int(trie.position_ids[stop]) if stop < trie.num_tokens else 0
                carried = [(keys[:, :depth], values[:, :depth]) for keys, values in carried]
                yield start, stop, None
            start = stop

    def _forward(
        self, batch: PackedBatch, carried: list[KeysValues]
    ) -> tuple[Tensor, list[KeysValues]]:
        """The states [P, H] of the batch's pooled tokens, and the keys for the next batch."""
        missing = 0 if self._num_rows is None else self._num_rows - batch.num_tokens
        ids, positions = (
            to_device(np.pad(array, (0, missing)), self._device).long()[None]
            for array in (batch.token_ids, batch.position_ids)
        )
        with Pass(
            batch,
            KERNELS[self._kernel_name],
            self._device,
            carried,
            pools=self._pools,
            num_rows=self._num_rows,
        ) as current:
            hidden = self._body(input_ids=ids, position_ids=positions, use_cache=False)
        states: Tensor = hidden.last_hidden_state[0]
        if not self._pools:
            states = states[to_device(batch.pooled_index, self._device)]
        return states[: len(batch.pooled_index)], current.kept

    def _choose_kernel(self, invariant: bool) -> str:
        config = self._model.config.get_text_config()
        softcap = softcap_of(self._model) is not None
        head_dim = getattr(config, "head_dim", None)
        name = choose_kernel(
            self._device,
            self._model.dtype,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
            softcap=softcap,
            invariant=invariant,
        )
        if softcap and self._device.type == "cuda" and name == "blocks":
            logger.warning(
                "attn_logit_softcapping without flash-attn: attention runs as plain matrix "
                "products, right but slow; install flash-attn"
            )
        return name

    @torch.inference_mode()
    def _round(self, precision: str) -> int:
        return round_linears(cast(PreTrainedModel, self._body), precision)

    @torch.inference_mode()
    def _reorder(self) -> bool:
        return reorder_linears(self._body) > 0

    def _find_layers(self) -> list[nn.Module]:
        """The decoder layers, first to last; none where they cannot be identified."""
        count = self._model.config.get_text_config().num_hidden_layers
        lists = (m for m in self._body.modules() if isinstance(m, nn.ModuleList))
        return list(next((layers for layers in lists if len(layers) == count), []))

    @torch.inference_mode()
    def _check_isolation(self) -> None:
        """Raise ModelError where another sequence of a batch, or a cut, changes a sequence's
        states; decide whether the last layer may compute the pooled tokens only.

        Another sequence changes them in models that carry state along the row besides attention
        (recurrent or convolutional layers), or that do not take positions from `position_ids`.
        """
        ids = (np.arange(12, dtype=np.int32) * 7 + 1) % self._vocabulary_size
        long, short = ids[:8], np.concatenate([ids[:3], ids[8:]])
        alone = self._probe([short], 16)[0]
        moved = float((self._probe([long, short], 5)[1] - alone).norm() / alone.norm())
        if not np.isfinite(moved):
            raise ModelError(f"hidden states are not finite in {self._dtype}")
        if moved > self._probe_tolerance:
            raise ModelError(
                f"{type(self._model).__name__} lets packed sequences see each other (a probe moved "
                f"by {moved:.1%}); set attention to sdpa or eager"
            )
        if not self._layers:
            return
        forward = self._layers[-1].forward
        pool_in_last_layer(self._layers[-1])
        self._pools = True
        try:
            moved = float((self._probe([long, short], 5)[1] - alone).norm() / alone.norm())
        except (RuntimeError, ValueError, IndexError) as error:
            logger.info("the last layer computes all tokens: %s", error)
            moved = float("inf")
        if not moved <= self._probe_tolerance:
            self._pools = False
            self._layers[-1].forward = forward

    @torch.inference_mode()
    def check_invariance(self) -> None:
        """Raise ModelError where, with this model and on this machine, the bits of a sequence's
        state depend on its place in a batch, on what it shares, or on where batches are cut."""
        length = min(_INVARIANCE_TOKENS, max_sequence_length(self._model) or _INVARIANCE_TOKENS)
        ids = (np.arange(length, dtype=np.int32) * 7 + 1) % self._vocabulary_size
        shared = ids[: -(-length // 8)]
        company = [np.append(shared, shared), shared, ids[-1:]]
        alone = self._probe([ids], length)[0]
        beside = self._probe([*company, ids], -(-length * 3 // 4))[-1]
        if not torch.equal(beside, alone):
            raise ModelError(
                f"invariant: the last bits of {type(self._model).__name__}'s states depend on the "
                "batch on this machine; leave it out"
            )

    def _probe(self, sequences: list[npt.NDArray[np.int32]], token_budget: int) -> list[Tensor]:
        """The last hidden state [H] of each sequence, float32."""
        lengths = np.array([len(ids) for ids in sequences])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        last = PooledTokens(lengths - 1, np.arange(len(sequences) + 1))
        nothing = np.zeros(0, dtype=np.int32)
        rows = TokenizedRows(np.concatenate(sequences), offsets, offsets, nothing, {}, {})
        trie = build_trie(rows, np.arange(len(sequences)), last)
        pooled = PooledStates(trie.pooled_index, last)
        states: dict[int, Tensor] = {}
        carried: list[KeysValues] = []
        for start in range(0, trie.num_tokens, token_budget):
            stop = min(start + token_budget, trie.num_tokens)
            found, carried = self._forward(trie.batch(start, stop), carried)
            complete, _, read = pooled.add(start, stop, found)
            states |= dict(zip(complete.tolist(), read.float(), strict=True))
        return [states[number] for number in range(len(sequences))]

    def _probe_budget(self) -> int:
        """Tokens of a forward pass that fill the memory left beside the model."""
        if self._device.type == "cpu":
            return CPU_TOKEN_BUDGET
        ids = np.arange(_PROBE_TOKENS, dtype=np.int32) % self._vocabulary_size
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self._probe([ids], _PROBE_TOKENS)
        per_token = (torch.cuda.max_memory_allocated(self._device) - before) / _PROBE_TOKENS
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return min(MOST_TOKENS, max(_PROBE_TOKENS, int(_MEMORY_SHARE * free / per_token)))

    @property
    def _probe_tolerance(self) -> float:
        # Rounding to 8 bits makes a step of what differs by a last bit.
        return PROBE_TOLERANCE[self._dtype if self._precision is None else "bfloat16"]

    @property
    def _dtype(self) -> str:
        return str(self._model.dtype).removeprefix("torch.")
