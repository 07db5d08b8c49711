"""Plain Hugging Face, one sequence at a time: the reference for every faster scoring path."""

import gc
import json
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.hf import HFBackend
from batch_scorer.models.adapter import Prompt
from batch_scorer.models.directory import read_model_files
from batch_scorer.models.registry import choose_adapter
from batch_scorer.records import Scores, SequenceInput, TokenizedRows

_STOCK = "sequence_classifier"
_ROOM = 1.25
"""Factor on the weights' size, for what one short sequence needs beside them."""


def plain_scores(settings: EngineSettings, rows: TokenizedRows) -> Scores:
    """Scores with eager attention, no packing, no padding, every sequence on its own.

    A stock sequence classifier is scored by transformers' own forward, head and pooling
    included; other families by their plain body and the head that `models/families` describes.
    The settings are the engine's; `attention`, `token_budget` and `compile` are ignored.
    """
    adapter = settings.adapter or choose_adapter(read_model_files(settings.model_dir))
    if adapter.name == _STOCK and settings.embedding is None:
        return _own_forward(settings.model_dir, rows, settings.dtype, settings.device)
    # With a budget of one token, every sequence is a batch of its own.
    backend = HFBackend(
        replace(settings, adapter=adapter, attention="eager", token_budget=1, compile=None)
    )
    try:
        return backend.score(rows)
    finally:
        backend.close()


@torch.inference_mode()
def _own_forward(model_dir: Path, rows: TokenizedRows, dtype: str, device: str) -> Scores:
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    load: Any = AutoModelForSequenceClassification.from_pretrained
    model: Any = load(
        model_dir,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        num_labels=1,
        local_files_only=True,
        use_safetensors=True,
    )
    model.eval().to(device)
    scores = Scores(np.full((rows.num_sequences, 1), np.nan, dtype=np.float32))
    bounds = rows.sequence_offsets.tolist()
    for sequence, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            ids = torch.from_numpy(rows.token_ids[start:stop]).long()[None].to(device)
            scores.values[sequence] = model(input_ids=ids).logits[0].float().cpu().numpy()
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return scores


def reference_dtype(model_dir: Path, device: str) -> str:
    """float32 where the model fits the device's free memory in it, otherwise bfloat16."""
    shapes = read_model_files(model_dir).shapes.values()
    needed = _ROOM * 4 * sum(int(np.prod(shape)) for shape in shapes)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else _available_memory()
    return "float32" if needed < free else "bfloat16"


def _available_memory() -> int:
    """Bytes of main memory that can be allocated, as the kernel estimates."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


class PlainTokenizer:
    """Token ids as on a model card: render to text, then tokenise, one row at a time."""

    def __init__(self, model_dir: Path, prompt: Prompt, *, trust_remote_code: bool = False) -> None:
        load: Any = AutoTokenizer.from_pretrained
        self._tokenizer = load(
            str(model_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
        self._prompt = prompt

    def token_ids(self, sequence: SequenceInput) -> list[int] | None:
        """None where a tokenizer has no call for it: ids, pairs, and answers cut into steps."""
        prompt = self._prompt
        if prompt.steps or prompt.suffix_id_of or prompt.bos != "auto" or prompt.eos != "keep":
            return None
        if prompt.reasoning != "template" or prompt.special_text == "literal":
            return None
        text = sequence if isinstance(sequence, str) else self._rendered(sequence)
        if text is None:
            return None
        bos = self._tokenizer.bos_token
        if bos and text.startswith(bos):
            return cast(list[int], self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return cast(list[int], self._tokenizer(text)["input_ids"])

    def _rendered(self, sequence: Any) -> str | None:
        prompt = self._prompt
        template = prompt.template or prompt.template_name or self._tokenizer.chat_template
        if not template or not sequence or not isinstance(sequence[0], dict):
            return None
        messages = list(sequence)
        if self._prompt.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._prompt.system})
        return cast(
            str,
            self._tokenizer.apply_chat_template(
                messages,
                chat_template=prompt.template or prompt.template_name,
                tokenize=False,
                strftime_now=(prompt.date or datetime.now()).strftime,
                **json.loads(prompt.arguments),
            ),
        )
