"""Plain Hugging Face, every sequence by itself: the reference for every faster scoring path."""

import copy
import gc
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.hf import HFBackend
from batch_scorer.backends.hf_loader import Loader, has_own_forward
from batch_scorer.backends.lanes import Lanes
from batch_scorer.backends.packing import longest_first
from batch_scorer.backends.plain_answers import plain_answers, plain_verdicts
from batch_scorer.backends.streaming import can_stream, streamed_scores
from batch_scorer.models.registry import choose_adapter
from batch_scorer.records import Scores, TokenizedRows

_ROOM = 1.25
"""Factor on the weights' size, for what one short sequence needs beside them."""
_MOST_TOGETHER = 1024
"""Tokens of a sequence that runs beside others: eager attention takes their square in memory."""


@dataclass(frozen=True, slots=True)
class Road:
    """How the reference is computed: in which dtype, and whether `streamed`, with one layer of the
    model in memory at a time (`streaming.py`)."""

    dtype: str
    streamed: bool

    def scores(self, settings: EngineSettings, rows: TokenizedRows) -> Scores:
        """Plain Hugging Face's scores, in the settings' dtype."""
        return (streamed_scores if self.streamed else plain_scores)(settings, rows)


def reference_road(settings: EngineSettings) -> Road:
    """Whole in float32 where the device's free memory has room for that; else layer by layer in
    float32; else, for a model that cannot be streamed, whole in bfloat16."""
    models = [settings]
    if settings.implicit is not None and settings.implicit.reference is not None:
        models.append(settings.implicit.reference)  # loaded after the other one is gone
    needed = _ROOM * max(map(_float32_bytes, models))
    free = torch.cuda.mem_get_info()[0] if settings.own_device == "cuda" else _available_memory()
    if needed < free:
        return Road("float32", streamed=False)
    if can_stream(settings):
        return Road("float32", streamed=True)
    return Road("bfloat16", streamed=False)


def plain_scores(settings: EngineSettings, rows: TokenizedRows) -> Scores:
    """Scores with eager attention, no packing, no padding, every sequence on its own, several at a
    time on as many cores.

    A stock sequence classifier is scored by transformers' own forward, head and pooling
    included, and what is read off a vocabulary comes from transformers' own language model. It has
    no scores of other tokens; where these are asked for, and in other families, scores come from
    the plain body and the head that `models/families` describes. The settings are the engine's;
    `attention`, `token_budget`, `compile` and `precision` are ignored.
    """
    settings = replace(settings, device=settings.own_device)
    files = settings.read_files()
    adapter = settings.adapter or choose_adapter(files)
    if adapter.log_probs:
        return plain_answers(replace(settings, adapter=adapter), rows)
    if adapter.verdicts:
        return plain_verdicts(replace(settings, adapter=adapter), rows)
    if has_own_forward(files, adapter, settings):
        loader = Loader(files, adapter, settings.trust_remote_code, embeds=False, own_head=True)
        return _own_forward(loader, rows, settings.dtype, settings.device)
    # With a budget of one token, every sequence is a batch of its own.
    backend = HFBackend(
        replace(
            settings,
            adapter=adapter,
            attention="eager",
            token_budget=1,
            compile=None,
            precision=None,
        )
    )
    try:
        return backend.score(rows)
    finally:
        backend.close()


def _own_forward(loader: Loader, rows: TokenizedRows, dtype: str, device: str) -> Scores:
    model: Any = loader.load(dtype, "eager")
    model.to(device)
    scores = Scores(np.full((rows.num_sequences, 1), np.nan, dtype=np.float32))
    lanes = Lanes(torch.device(device))
    # Some models keep what they made of the last sequence's length: each lane has a copy of that,
    # and the weights in common with the others.
    weights = {id(weight): weight for weight in model.parameters()}
    idle = [copy.deepcopy(model, dict(weights)) for _ in range(lanes.count)]

    @torch.inference_mode()
    def score(sequence: int) -> None:
        own = idle.pop()
        start, stop = rows.sequence_offsets[sequence : sequence + 2].tolist()
        ids = torch.from_numpy(rows.token_ids[start:stop]).long()[None].to(device)
        scores.values[sequence] = own(input_ids=ids).logits[0].float().cpu().numpy()
        idle.append(own)

    ordered = longest_first(rows.lengths)
    is_short = rows.lengths[ordered] <= _MOST_TOGETHER
    for sequence in ordered[~is_short].tolist():
        score(sequence)
    deque(lanes.map(score, ordered[is_short].tolist()), maxlen=0)
    lanes.close()
    idle.clear()
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return scores


def _float32_bytes(settings: EngineSettings) -> int:
    return 4 * sum(int(np.prod(shape)) for shape in settings.read_files().shapes.values())


def _available_memory() -> int:
    """Bytes of main memory that can be allocated, as the kernel estimates."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")
