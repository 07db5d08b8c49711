"""A checkpoint's body and head, read separately.

The body may be rounded and quantised by the engine that runs it; the head is read from the
checkpoint in the dtype it was stored in, and computes in float32.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from batch_scorer.errors import ModelError
from batch_scorer.models.adapter import Adapter
from batch_scorer.models.directory import read_json

_BODY_PREFIX = "model."


def body_config(
    model_dir: Path, adapter: Adapter, *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The body's transformers config. Raises ModelError if there is none."""
    try:
        if adapter.body.model_type is None:
            config = AutoConfig.from_pretrained(
                model_dir, local_files_only=True, trust_remote_code=trust_remote_code
            )
        else:
            stored = read_json(model_dir / "config.json")
            entries = adapter.body.config(stored) if adapter.body.config else dict(stored)
            entries = {k: v for k, v in entries.items() if k not in ("model_type", "auto_map")}
            config = AutoConfig.for_model(adapter.body.model_type, **entries)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{model_dir} has no config that transformers can read: {error}"
        ) from error
    return cast(PretrainedConfig, config)


def load_head(model_dir: Path, adapter: Adapter) -> nn.Module:
    """The score head in float32, in evaluation mode.

    Raises ModelError for damaged or missing weights.
    """
    assert adapter.build_head is not None, f"{adapter.name} has no head of its own"
    tensors = {name: tensor.float() for name, tensor in _head_tensors(model_dir, adapter)}
    for name, stand_in in adapter.tied.items():
        if name not in tensors:
            for _, tensor in checkpoint_tensors(model_dir, stand_in.__eq__, adapter.head_rows):
                tensors[name] = tensor.float()
    if missing := [name for name in adapter.head if name not in tensors]:
        raise ModelError(f"{model_dir}: the head lacks {', '.join(missing)}")
    return adapter.build_head(tensors, read_json(model_dir / "config.json")).float().eval()


def _head_tensors(model_dir: Path, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    yield from checkpoint_tensors(model_dir, adapter.is_head_tensor, adapter.head_rows)
    for file, prefix in adapter.head_files.items():
        if not (model_dir / file).is_file():
            continue
        try:
            # weights_only refuses everything but tensors: the file cannot run code.
            stored = torch.load(model_dir / file, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise ModelError(f"{model_dir / file}: not a file of tensors: {error}") from error
        yield from ((prefix + name, tensor) for name, tensor in stored.items())


def body_tensors(model_dir: Path, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """The body's tensors, under transformers' names (`model.layers.0.…`)."""
    config = read_json(model_dir / "config.json")
    for name, tensor in checkpoint_tensors(model_dir, adapter.is_body_tensor):
        if adapter.body.tensors is None:
            yield name, tensor
        else:
            yield from adapter.body.tensors(name, tensor, config)


def converted_state(model_dir: Path, adapter: Adapter) -> dict[str, Tensor] | None:
    """The body's state dict where its tensors need renaming; None: transformers reads the files."""
    if adapter.body.tensors is None:
        return None
    tensors = body_tensors(model_dir, adapter)
    return {name.removeprefix(_BODY_PREFIX): tensor for name, tensor in tensors}


def checkpoint_tensors(
    model_dir: Path, wanted: Callable[[str], bool], rows: tuple[int, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors for which `wanted(name)` is true, on the host.

    With `rows`, only these rows of every tensor are read.
    """
    for file in sorted(model_dir.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118  # no mapping
                    if not wanted(name):
                        continue
                    if rows:
                        tensor = weights.get_slice(name)
                        yield name, torch.cat([tensor[row : row + 1] for row in rows])
                    else:
                        yield name, weights.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{file}: damaged weights: {error}") from error
