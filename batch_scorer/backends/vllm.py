"""Scores from vLLM: it runs the body, and this package's float32 head reads the hidden states.

vLLM's pooling runner returns the hidden state of a sequence's last token, without activation or
normalisation. So every family that has a body runs here, the head is the same as in the hf
backend, and quantisation does not touch the head (docs/decisions/0006). A hidden state inside a
sequence is that of a prefix's last token, because decoders do not attend to later tokens: the
prefix is a separate request, and the prefix cache makes it cheap. Where most tokens are read
(steps, means), all hidden states of a sequence come from one forward pass.

`vllm_engine.py` starts vLLM and sends it requests. On one GPU or a CPU the engine runs in this
process. With more devices vLLM has worker processes, on this machine or, over Ray, on several:
tried on CPUs, not on GPUs yet.

Legend: S sequences, K pooled tokens, R requests, H hidden, O outputs.
"""

import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from batch_scorer.backends.base import (
    PROBE_TOLERANCE,
    EngineDied,
    EngineSettings,
    MakeBackend,
    mark_non_finite,
    unscorable,
)
from batch_scorer.backends.packing import Int64Array
from batch_scorer.backends.readout import Readout
from batch_scorer.backends.vllm_engine import PoolingEngine, engine_config, longest_sequence
from batch_scorer.errors import ModelError
from batch_scorer.models.adapter import Adapter
from batch_scorer.models.registry import choose_adapter
from batch_scorer.records import Effort, PooledTokens, Scores, TokenizedRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Requests:
    """R distinct prompts in prefix order, and int64[n], the request that answers each prompt asked.

    A prompt is its token ids as big-endian int32: bytes that sort and compare as the ids do.
    """

    prompts: list[bytes]
    serving: Int64Array


def plan_requests(rows: TokenizedRows, sequences: Int64Array, stops: Int64Array) -> Requests:
    """Requests for the first `stops[i]` tokens of `sequences[i]`; equal ones are sent once.

    Sorted, so that a prefix is still in the cache when the next request needs it.
    """
    ids = rows.token_ids.astype(">i4").tobytes()
    starts = rows.sequence_offsets[sequences]
    size = np.dtype(">i4").itemsize
    asked = [
        ids[size * start : size * stop]
        for start, stop in zip(starts.tolist(), (starts + stops).tolist(), strict=True)
    ]
    prompts = sorted(set(asked))
    place = {prompt: index for index, prompt in enumerate(prompts)}
    return Requests(prompts, np.array([place[prompt] for prompt in asked], dtype=np.int64))


class VLLMBackend:
    """A reward model whose body runs in vLLM; see `Backend` for what it does.

    `token_budget` and `compile` None take what `Engine` takes on this device. Raises ModelError
    where the directory cannot give true scores here, MissingExtraError without a vLLM that fits.
    """

    def __init__(self, settings: EngineSettings) -> None:
        model_dir, device = settings.model_dir, settings.device
        files = settings.read_files()
        adapter = settings.adapter or choose_adapter(files)
        _refuse_unsupported(settings, adapter)
        config = engine_config(settings, files, adapter)
        text_config = config.get_text_config()
        self._readout = Readout(settings, files, adapter, text_config)
        self.num_outputs = self._readout.num_outputs
        self._vocabulary_size: int = text_config.vocab_size
        self._max_tokens = longest_sequence(settings, text_config)
        all_tokens = self._readout.reads_all_tokens
        # Requests for all tokens do not read the cache, so it would only cost time.
        caches = settings.prefix_caching and not all_tokens
        self._engine = PoolingEngine(
            replace(settings, prefix_caching=caches),
            files,
            adapter,
            config,
            task="token_embed" if all_tokens else "embed",
            max_tokens=self._max_tokens,
        )
        # vLLM's worker processes leave this process no memory on the device.
        self._head_device = torch.device("cpu" if self._engine.has_workers else device)
        self._readout.to(self._head_device)
        self._effort = Effort()
        self.provenance: dict[str, Any] = {
            "backend": "vllm",
            "head_dtype": "float32",
            **self._engine.facts,
        }
        try:
            self._check_engine()
        except (ModelError, EngineDied) as error:
            self.close()
            if isinstance(error, EngineDied):  # at the first tokens: vLLM cannot run this model
                raise ModelError(f"{model_dir}: {error}; set backend to hf") from error
            raise
        logger.info("scoring with %s", self.provenance)

    def score(self, rows: TokenizedRows) -> Scores:
        """Scores of all sequences in `rows`, in their order."""
        values = np.full((rows.num_sequences, self.num_outputs), np.nan, dtype=np.float32)
        unscored = unscorable(
            rows, max_tokens=self._max_tokens, vocabulary_size=self._vocabulary_size
        )
        pooled, unpooled = self._readout.pooled_tokens(rows)
        scores = Scores(values, unpooled | unscored)
        lengths = rows.lengths.copy()
        lengths[list(scores.errors)] = 0
        sequences = np.flatnonzero(lengths)
        if not len(sequences):
            return scores
        self._effort = Effort()
        chosen = pooled.of(sequences)
        read = self._read_all_tokens if self._readout.reads_all_tokens else self._read_last_tokens
        self._readout.fill(scores, sequences, read(rows, sequences, chosen), pooled)
        mark_non_finite(scores, sequences)
        scores.effort = self._effort
        return scores

    def close(self) -> None:
        """Free the device."""
        self._engine.close()
        del self._engine, self._readout
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _read_last_tokens(
        self, rows: TokenizedRows, sequences: Int64Array, chosen: PooledTokens
    ) -> npt.NDArray[np.float32]:
        """What `Readout.read` returns, from one request for each distinct prefix."""
        owners = np.repeat(sequences, chosen.counts)  # int64[K]
        requests = plan_requests(rows, owners, chosen.positions + 1)
        hidden = torch.empty(len(requests.prompts), self._engine.hidden_size)  # [R, H]
        for indices, states in self._states(requests.prompts):
            hidden[indices] = torch.stack(states).float()
        return self._read(hidden[torch.from_numpy(requests.serving)], chosen)

    def _read_all_tokens(
        self, rows: TokenizedRows, sequences: Int64Array, chosen: PooledTokens
    ) -> npt.NDArray[np.float32]:
        """The same from one request for each distinct sequence, read as soon as it is done."""
        requests = plan_requests(rows, sequences, rows.lengths[sequences])
        served = dict(zip(requests.serving.tolist(), range(len(sequences)), strict=True))
        outputs: dict[int, npt.NDArray[np.float32]] = {}
        for indices, states in self._states(requests.prompts):
            for index, state in zip(indices, states, strict=True):  # [tokens, H]
                pooled = chosen.of(np.array([served[index]]))
                outputs[index] = self._read(state[torch.from_numpy(pooled.positions)], pooled)
        return np.concatenate([outputs[index] for index in requests.serving.tolist()])

    def _read(self, hidden: Tensor, pooled: PooledTokens) -> npt.NDArray[np.float32]:
        read = self._readout.read(hidden.to(self._head_device), pooled).cpu().numpy()
        return read.astype(np.float32, copy=False)

    def _states(self, prompts: Sequence[bytes]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Indices and hidden states of all prompts, in no order.

        A sequence whose states are not finite leaves such numbers in vLLM's cache. The next request
        in the same block multiplies them by zero, which gives NaN. So every prompt with states
        that are not finite is computed again, alone and on a clean cache. These come last, and
        replace the first ones.
        """
        suspects: list[int] = []
        for indices, states in self._engine.run(prompts, self._effort):
            finite = _are_finite(states)
            suspects += [index for index, well in zip(indices, finite, strict=True) if not well]
            yield indices, states
        for index in suspects:
            self._engine.clear_cache()
            for _, states in self._engine.run([prompts[index]], self._effort):
                yield [index], states
        if suspects:
            self._engine.clear_cache()

    def _check_engine(self) -> None:
        """Raise ModelError where vLLM normalises, attends to later tokens, or lets sequences see
        each other."""
        name = self.provenance["model_class"]
        if self._engine.looks_ahead:
            raise ModelError(f"{name} attends to later tokens in vLLM; set backend to hf")
        ids = (np.arange(12, dtype=np.int64) * 7 + 1) % self._vocabulary_size
        probes = [ids[:8].astype(">i4").tobytes(), ids[8:].astype(">i4").tobytes()]
        beside = self._probe(probes)
        self._engine.clear_cache()
        (alone,) = self._probe(probes[1:])
        norms = torch.cat([states.view(-1) for states in beside])  # all states, end to end
        norms = norms.view(-1, self._engine.hidden_size).norm(dim=-1)
        moved = float((beside[1] - alone).norm() / alone.norm())
        dtype = self.provenance["dtype"]
        if not np.isfinite(moved):
            raise ModelError(f"hidden states are not finite in {dtype}")
        if bool(((norms - 1).abs() < 1e-3).all()):
            raise ModelError(f"vLLM normalises the hidden states of {name}; set backend to hf")
        if moved > PROBE_TOLERANCE[dtype]:
            raise ModelError(
                f"{name} lets sequences see each other in vLLM (a probe moved by {moved:.1%}); "
                "set backend to hf"
            )

    def _probe(self, prompts: Sequence[bytes]) -> list[Tensor]:
        """These prompts' hidden states, in float32."""
        states: dict[int, Tensor] = {}
        for indices, done in self._engine.run(prompts, Effort()):
            states.update(zip(indices, done, strict=True))
        return [states[index].float() for index in range(len(prompts))]


BACKEND: MakeBackend = VLLMBackend


def _are_finite(states: list[Tensor]) -> list[bool]:
    """Which prompts' hidden states are finite. A check takes 5 us, however few the numbers, so
    prompts with few numbers each, [H], are checked together."""
    if states[0].dim() == 1:
        finite: list[bool] = torch.stack(states).isfinite().all(dim=1).tolist()
        return finite
    return [bool(state.isfinite().all()) for state in states]


def _refuse_unsupported(settings: EngineSettings, adapter: Adapter) -> None:
    """Raise for what is known without vLLM."""
    has_no_body = adapter.build_head is None and settings.embedding is None
    if "vllm" not in adapter.engines or has_no_body:
        raise ModelError(
            f"{settings.model_dir}: {adapter.name} models do not run in vLLM; set backend to hf"
        )
