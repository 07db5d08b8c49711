"""What runs in vLLM's workers: the loader of a model's weights, and the clearing of the cache.

Not part of `vllm.py`, which imports vLLM only once it is known to be installed, while vLLM's
workers, in any process, import this file by name (`worker_extension_cls`).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader

from batch_scorer.errors import ModelError
from batch_scorer.models.directory import read_model_files
from batch_scorer.models.fit import refuse_unused
from batch_scorer.models.hub import on_this_node
from batch_scorer.models.quantised import as_stored
from batch_scorer.models.registry import adapter_named
from batch_scorer.models.weights import model_tensors

LOAD_FORMAT = "batch_scorer"
WORKER_EXTENSION = f"{__name__}.WorkerExtension"

_LANGUAGE_HEAD = "lm_head"
_OF_CACHES = re.compile(r"\.attn\.(q|k|v|prob)_(scale|zero_point)$")
"""Parameters that attention layers of quantised models have and their checkpoints need not."""


class WorkerExtension:
    """Mixed into vLLM's worker class, which also imports the loader below in its process."""

    model_runner: Any

    def try_a_pass(self) -> None:
        """One forward pass of nothing. In its first trial pass vLLM 0.32 makes the room into
        which a stage receives hidden states, and on a CPU it leaves the trial out."""
        self.model_runner.profile_run()

    def clear_kv_cache(self) -> None:
        """Replace all keys and values by zeros."""
        for caches in self.model_runner.kv_caches:
            for cache in caches if isinstance(caches, list | tuple) else [caches]:
                cache.zero_()


@register_model_loader(LOAD_FORMAT)
class CheckpointLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is untyped
    """Loads a body, or with `whole` the language model's head too, as `models.weights` reads them.

    `model_loader_extra_config` names `model_dir` and `lora_dir` as `EngineSettings` does, the
    `adapter`, and `whole`.
    """

    def __init__(self, load_config: Any) -> None:
        asked = load_config.model_loader_extra_config
        # vLLM's workers may be on other nodes than the process that asks.
        self._model_dir, lora_dir = on_this_node(Path(asked["model_dir"])), asked["lora_dir"]
        files = read_model_files(
            self._model_dir, lora_dir=lora_dir and on_this_node(Path(lora_dir))
        )
        self._adapter = adapter_named(asked["adapter"])
        # vLLM computes with quantised weights as they are stored; in most formats not in the head.
        self._files = as_stored(files, but=self._adapter.head)
        self._whole: bool = asked["whole"]
        super().__init__(replace(load_config, model_loader_extra_config={}))

    @torch.no_grad()
    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Raises ModelError for weights that the model has and the checkpoint lacks.

        vLLM 0.32 checks for these itself, but not in linear layers, nor for a part of what it
        fuses. So all weights are NaN until they are loaded.
        """
        for _, weight in _plain_weights(model):
            weight.fill_(math.nan)
        super().load_weights(model, model_config)
        if missing := [name for name, weight in _plain_weights(model) if weight.isnan().any()]:
            raise ModelError(
                f"{self._model_dir} lacks weights, or has some that are NaN: "
                f"{', '.join(missing)} (under vLLM's names)"
            )

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Names as in the checkpoint: `model.layers.0.…`, or `layers.0.…` of a bare body."""
        parts = {name for name, _ in model.named_children()}
        if not self._whole:
            parts -= {_LANGUAGE_HEAD}
        inner = getattr(model, "model", None)
        if isinstance(inner, nn.Module):
            parts |= {name for name, _ in inner.named_children()}
        unused: list[str] = []
        for name, tensor in model_tensors(self._files, self._adapter, own_head=self._whole):
            if name.split(".", 1)[0] in parts:
                yield name, tensor
            else:
                unused.append(name)
        # Embeddings are read from a body, whatever it was trained with.
        if self._whole or self._adapter.head:
            refuse_unused(self._files, self._adapter, sorted(unused))


def _plain_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that are ordinary numbers in memory: while it quantises, vLLM has others too."""
    for name, weight in model.named_parameters():
        if _OF_CACHES.search(name):
            continue
        if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) and not weight.is_meta:
            yield name, weight
