"""A checkpoint's body and head, read separately.

The body may be rounded and quantised by the engine that runs it; the head is read from the
checkpoint in the dtype it was stored in, and computes in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import groupby
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from batch_scorer.errors import ModelError
from batch_scorer.models.adapter import Adapter, Coded, Delta, ModelFiles, Packed, Scale, Source
from batch_scorer.models.files import read_json, read_pickled

ReadTensors: TypeAlias = Callable[[ModelFiles, Callable[[str], bool]], Iterator[tuple[str, Tensor]]]
"""`checkpoint_tensors`, or `header_tensors` in its place."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def body_config(
    files: ModelFiles, adapter: Adapter, *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The config of the body, with weights that are not quantised and without a pad token that the
    embedding does not have. Raises ModelError if there is none."""
    try:
        if adapter.body.model_type is None:
            config = AutoConfig.from_pretrained(
                files.path, local_files_only=True, trust_remote_code=trust_remote_code
            )
        else:
            stored = files.config
            entries = adapter.body.config(stored) if adapter.body.config else dict(stored)
            entries = {k: v for k, v in entries.items() if k not in ("model_type", "auto_map")}
            config = AutoConfig.for_model(adapter.body.model_type, **entries)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{files.path} has no config that transformers can read: {error}"
        ) from error
    for name, value in _changed_entries(files).items():
        if name == "id2label":
            value = {int(label): text for label, text in value.items()}
        setattr(config.get_text_config(), name, value)
    text = config.get_text_config()
    pad, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and size is not None and pad >= size:
        # Added to the tokenizer without a row of the embedding, in which torch would look for it.
        config.pad_token_id = text.pad_token_id = None
    for part in (config, config.get_text_config()):
        # transformers would look for a library that computes with quantised weights.
        for name in ("quantization_config", "compression_config"):
            if hasattr(part, name):
                delattr(part, name)
    return cast(PretrainedConfig, config)


def _changed_entries(files: ModelFiles) -> dict[str, Any]:
    """The config's entries that an adapter has changed (vocabulary, OpenRLHF's mean and std)."""
    if files.lora_dir is None:
        return {}
    stored = read_json(files.path / "config.json")
    changed = {n: v for n, v in files.config.items() if stored.get(n) != v and n != "architectures"}
    return {**changed.pop("text_config", {}), **changed}


def load_head(files: ModelFiles, adapter: Adapter) -> nn.Module:
    """The score head in float32, in evaluation mode.

    Raises ModelError for damaged or missing weights.
    """
    assert adapter.build_head is not None, f"{adapter.name} has no head of its own"
    return adapter.build_head(read_head(files, adapter), files.config).float().eval()


def read_head(files: ModelFiles, adapter: Adapter) -> dict[str, Tensor]:
    """The head's tensors by name, in float32, of a vocabulary's only the rows that are read.

    Raises ModelError for damaged or missing weights.
    """
    tensors = {name: tensor.float() for name, tensor in _head_tensors(files, adapter)}
    for name, stand_in in adapter.tied.items():
        if name not in tensors:
            for _, tensor in checkpoint_tensors(files, stand_in.__eq__, adapter.head_rows):
                tensors[name] = tensor.float()
    if missing := [name for name in adapter.head if name not in tensors]:
        raise ModelError(f"{files.path}: the head lacks {', '.join(missing)}")
    return tensors


def _head_tensors(files: ModelFiles, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    yield from checkpoint_tensors(files, adapter.is_head_tensor, adapter.head_rows)
    for file, prefix in adapter.head_files.items():
        beside = files.path / file
        for stored_name, tensor in read_pickled(beside).items() if beside.is_file() else ():
            name = prefix + stored_name
            for _, other in checkpoint_tensors(files, name.__eq__):
                if not torch.equal(tensor, other):
                    raise ModelError(
                        f"{beside}: {name} has other values in {files.sources[name].file.name}; "
                        "remove the one that is not the model's"
                    )
            yield name, tensor


def body_tensors(
    files: ModelFiles, adapter: Adapter, read: ReadTensors | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The body's tensors, under transformers' names (`model.layers.0.…`)."""
    for name, tensor in (read or checkpoint_tensors)(files, adapter.is_body_tensor):
        if adapter.body.tensors is None:
            yield name, tensor
        else:
            yield from adapter.body.tensors(name, tensor, files.config)


def model_tensors(
    files: ModelFiles, adapter: Adapter, *, own_head: bool, read: ReadTensors | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What transformers' model is made of: its body, or with `own_head` the head too."""
    if own_head:
        return (read or checkpoint_tensors)(
            files, lambda name: adapter.is_body_tensor(name) or adapter.is_head_tensor(name)
        )
    return body_tensors(files, adapter, read)


def checkpoint_tensors(
    files: ModelFiles, wanted: Callable[[str], bool], rows: tuple[int, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors for which `wanted(name)` is true, on the host, in the order of the files.

    Quantised weights come as the float32 numbers that they stand for. A tensor that a LoRA adapter
    changes has the adapter's part in it, and is float32; the others have the dtype that they are
    stored in. With `rows`, only these rows of every tensor are read.
    """
    chosen = sorted((source.file, name) for name, source in files.sources.items() if wanted(name))
    with ExitStack() as stack:
        deltas = next(iter(files.deltas.values()), None)  # all are in one file
        adapter = stack.enter_context(_open(deltas.up.file)) if deltas else None
        for file, group in groupby(chosen, key=itemgetter(0)):
            try:
                with _open(file) as weights:
                    for _, name in group:
                        stored = files.sources[name].name
                        scale, delta = files.scales.get(name), files.deltas.get(name)
                        if rows and not (scale or delta):
                            part = weights.get_slice(stored)
                            yield name, torch.cat([part[row : row + 1] for row in rows])
                            continue
                        tensor = weights.get_tensor(stored)
                        if isinstance(scale, Packed):
                            tensor = _unpacked(tensor, scale)
                        elif isinstance(scale, Coded):
                            tensor = _decoded(tensor, scale)
                        elif scale:
                            tensor = _dequantised(tensor, scale)
                        if delta:
                            tensor = _merged(tensor.float(), delta, adapter)
                        yield name, tensor[list(rows)] if rows else tensor
            except SafetensorError as error:
                raise ModelError(f"{file}: damaged weights: {error}") from error


def header_tensors(
    files: ModelFiles, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors without their values, on torch's `meta` device; reads nothing."""
    for name, shape in files.shapes.items():
        if wanted(name):
            source = files.sources.get(name)
            dtype = _DTYPES.get(source.dtype if source else "", torch.float32)
            yield name, torch.empty(shape, dtype=dtype, device="meta")


class _Pickled(dict[str, Tensor]):
    # Read like a file of safetensors.
    get_tensor = get_slice = dict[str, Tensor].__getitem__


def _open(file: Path) -> AbstractContextManager[Any]:
    if file.suffix == ".safetensors":
        return cast(AbstractContextManager[Any], safe_open(file, framework="pt"))
    return nullcontext(_Pickled(read_pickled(file)))


def _merged(weight: Tensor, delta: Delta, adapter: Any) -> Tensor:
    """The float32 tensor with the adapter's part in it."""

    def read(source: Source) -> Tensor:
        return cast(Tensor, adapter.get_tensor(source.name)).float()

    if delta.down is None:
        return weight + delta.scale * read(delta.up)
    if delta.transposed:
        weight = weight.T
    weight = torch.addmm(weight, read(delta.up), read(delta.down), alpha=delta.scale)
    if delta.magnitude is not None:
        weight *= (read(delta.magnitude) / weight.norm(dim=1))[:, None]
    return (weight.T if delta.transposed else weight).contiguous()


def _dequantised(numbers: Tensor, scale: Scale) -> Tensor:
    """float32, of 8-bit numbers of the same shape."""
    values = numbers.float()
    if scale.zero_point is not None:
        values -= _spread(_stored(scale.zero_point), scale.block, values.shape)
    return values.mul_(_spread(_stored(scale.source) / scale.divisor, scale.block, values.shape))


def _unpacked(words: Tensor, packed: Packed) -> Tensor:
    """float32[out, in]."""
    numbers = _numbers(words, packed, dim=1 if packed.along_outputs else 0)  # [in, out]
    zeros = _numbers(_as_it_is(packed.zeros), packed, dim=1)
    if packed.zero_offset and bool((zeros == 2**packed.bits - 1).any()):
        # It was 0 before 1 was taken off, or is the largest: programs differ in what they read.
        raise ModelError(f"{packed.zeros.file}: {packed.zeros.name} has zero points that overflow")
    scales = _stored(packed.scales)  # [groups, out]
    if packed.groups is None:
        groups = torch.arange(len(numbers)) // (len(numbers) // len(scales))
    else:
        groups = _as_it_is(packed.groups).long()
    weight = (numbers - (zeros + packed.zero_offset)[groups]) * scales[groups]
    return weight.T.contiguous()


def _numbers(words: Tensor, packed: Packed, dim: int) -> Tensor:
    """The small integers in the words along `dim`, int32."""
    places = torch.empty(len(packed.order), dtype=torch.int32)  # of a number, in bits
    places[list(packed.order)] = torch.arange(0, 32, packed.bits, dtype=torch.int32)
    shifts = places[:, None] if dim == 0 else places
    numbers: Tensor = (words.unsqueeze(dim + 1) >> shifts) & (2**packed.bits - 1)
    return numbers.flatten(dim, dim + 1)


def _decoded(codes: Tensor, coded: Coded) -> Tensor:
    """float32 of the shape `coded.shape`."""
    table, byte = _stored(coded.table), torch.arange(256)
    pairs = torch.stack((table[byte >> 4], table[byte & 15]), dim=1)  # [256, 2]
    count = prod(coded.shape)  # one less than there are codes, where it is odd
    values = pairs[codes.flatten().int()].flatten()[:count]
    scales = _as_it_is(coded.scales)
    if nested := coded.nested:
        scales = _stored(nested.table)[scales.int()]
        scales = _times_blocks(scales, _stored(nested.scales), nested.block_size) + nested.offset
    return _times_blocks(values, scales.float(), coded.block_size).reshape(coded.shape)


def _times_blocks(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """The flat values, changed in place: every `size` of them share a scale, the last fewer."""
    whole = len(values) // size
    values[: whole * size].view(whole, size).mul_(scales[:whole, None])
    values[whole * size :].mul_(scales[whole:])
    return values


def _spread(grid: Tensor, block: tuple[int, int] | None, shape: torch.Size) -> Tensor:
    """One number for every element, or for as many as are multiplied alike: [], [..., rows, 1] or
    `shape`."""
    if block is None:
        return grid.reshape(())
    rows, columns = shape[-2:]
    height, width = block
    if width == columns:
        grid = grid.reshape(*shape[:-2], -1, 1)
    else:
        grid = grid.repeat_interleave(width, -1)[..., :columns]
    return grid.repeat_interleave(height, -2)[..., :rows, :]


def _stored(source: Source) -> Tensor:
    """A small tensor beside a weight, in float32."""
    return _as_it_is(source).float()


def _as_it_is(source: Source) -> Tensor:
    with safe_open(source.file, framework="pt") as weights:
        tensor: Tensor = weights.get_tensor(source.name)
    return tensor
