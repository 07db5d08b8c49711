"""Which tensors a model directory has and where each is stored, read from headers only.

Everything that reads weights, engines and reference alike, goes by what is found here, so two of
them cannot read two models from one directory.
"""

import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from batch_scorer.errors import ModelError
from batch_scorer.models.adapter import Source
from batch_scorer.models.files import read_json
from batch_scorer.models.header import MOST_HEADER_BYTES, check_header, unique_keys

WEIGHTS = "*.safetensors"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
HEADS = ("value_head.safetensors", "value_head.bin")
"""Where LLaMA-Factory puts a value head, beside an adapter or a whole model."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_CHUNK_BYTES = 1 << 22

_OTHER_FILES = ("adapter*", "optimizer*", "scheduler*", "consolidated*")
"""Safetensors files that hold no weights under Hugging Face's names: a LoRA adapter, a trainer's
state, and the same weights in Mistral's and Meta's own layout."""

_WRAPPERS = (
    "_orig_mod",  # torch.compile
    "module",  # DDP, DeepSpeed
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "pretrained_model",  # TRL's model with a value head, under ZeRO-3
)
_PEFT = ["base_model", "model"]
"""How a PEFT model calls the model in it; only at the start of a name, where no family has it."""

_MERGE_FSDP = "merge it: accelerate merge-weights FOLDER OUTPUT"
_UNCONVERTED = (
    ("*.nemo", "a NeMo archive", "export it to Hugging Face's layout with NeMo's converter"),
    (
        "model_world_size_*_rank_*.pt",
        "verl's shards",
        "merge them: python -m verl.model_merger merge --backend fsdp --local_dir FOLDER "
        "--target_dir OUTPUT",
    ),
    (
        "mp_rank_[0-9]*_model_states.pt",
        "DeepSpeed's shards",
        "convert them: python zero_to_fp32.py FOLDER OUTPUT --safe_serialization",
    ),
    (
        "global_step[0-9]*",
        "DeepSpeed's shards",
        "convert them: python zero_to_fp32.py FOLDER OUTPUT --safe_serialization",
    ),
    ("mp_rank_*", "Megatron's shards", "export them with Megatron Bridge (AutoBridge.export_ckpt)"),
    ("iter_*", "Megatron's shards", "export them with Megatron Bridge (AutoBridge.export_ckpt)"),
    (
        "weights/*.distcp",
        "NeMo's shards",
        "export them with Megatron Bridge (AutoBridge.export_ckpt) or NeMo-RL's convert_dcp_to_hf",
    ),
    ("model_weights", "an unpacked NeMo archive", "export it with NeMo's converter"),
    ("pytorch_model_fsdp_*", "FSDP's shards", _MERGE_FSDP),
    ("*.distcp", "FSDP's shards (torch distributed checkpoint)", _MERGE_FSDP),
)
"""What trainers leave that is no model yet: pattern, what it is, and what makes a model of it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file's header has it; its bytes are [start, stop) of the file."""

    shape: list[int]
    dtype: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors under the names that the families know; `changes` as in `ModelFiles`."""

    shapes: dict[str, list[int]]
    sources: dict[str, Source]
    changes: tuple[str, ...] = ()


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors of a directory's safetensors files, all of them together.

    transformers would take the single file of a directory that also has shards, and vLLM the
    shards. So a tensor that several files hold must have the same bytes in all of them. What
    training wrappers put into the names is taken out.

    Raises ModelError for files that are damaged or incomplete, that hold two tensors for one name,
    or where there are none.
    """
    found: dict[str, tuple[Source, Stored]] = {}
    repeated: Counter[str] = Counter()
    renamed: Counter[str] = Counter()
    for file in weight_files(path):
        for stored_name, stored in read_header(file).items():
            name, wrappers = unwrapped(stored_name)
            renamed.update(wrappers)
            source = Source(file, stored_name, stored.dtype)
            if name not in found:
                found[name] = (source, stored)
            else:
                _require_equal(path, name, found[name], (source, stored))
                repeated[file.name] += 1
    changes = [
        f"the wrapper's name {wrapper}. was taken out of the names of {count} tensors"
        for wrapper, count in renamed.items()
    ]
    changes += [
        f"{name}: {count} of its tensors are in another file too, with the same values"
        for name, count in repeated.items()
    ]
    changes += _stale_index(path)
    return Checkpoint(
        {name: stored.shape for name, (_, stored) in found.items()},
        {name: source for name, (source, _) in found.items()},
        tuple(changes),
    )


def has_weights(path: Path) -> bool:
    """Whether there are weights of a whole model, not only of an adapter and its head."""
    return any(file.name not in HEADS for file in _of_model(path))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold the weights. Raises ModelError if one is missing."""
    files = _of_model(path)
    if not files:
        refuse_unconverted(path)
        every = sorted(path.glob(WEIGHTS))
        pickled = [f.name for pattern in _PICKLED for f in path.glob(pattern)]
        hint = f" (only {pickled[0]}: pickled weights can run code)" if pickled else ""
        hint = f" (only {every[0].name}, which has another layout)" if every else hint
        raise ModelError(f"{path}: no safetensors weights{hint}")
    if not (path / _SINGLE).exists() and (absent := _absent(path)):
        raise ModelError(f"{path}: incomplete download: {', '.join(absent)} not there")
    return files


def _of_model(path: Path) -> list[Path]:
    others = [f for pattern in _OTHER_FILES for f in path.glob(pattern)]
    return sorted(file for file in path.glob(WEIGHTS) if file not in others)


def refuse_unconverted(path: Path) -> None:
    """Raise ModelError where a directory without weights has a trainer's own shards."""
    if any(path.glob(WEIGHTS)):
        return
    for pattern, what, how in _UNCONVERTED:
        # A folder deeper too: the trainer's folder holds one for each part that it trains.
        if there := sorted([*path.glob(pattern), *path.glob(f"*/{pattern}")]):
            raise ModelError(f"{path}: {there[0].relative_to(path)} is {what}, no model yet; {how}")


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors by name. A file starts with 8 bytes, the length of the JSON that follows.

    Raises ModelError.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise ModelError(f"{file}: damaged safetensors file (header is cut off)")
        if length > MOST_HEADER_BYTES:
            raise ModelError(f"{file}: damaged safetensors file (a header of {length} bytes)")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{file}: damaged safetensors header: {error}") from error
    first = 8 + length
    check_header(file, header, size - first)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {
        name: Stored(
            entry["shape"],
            entry["dtype"],
            first + entry["data_offsets"][0],
            first + entry["data_offsets"][1],
        )
        for name, entry in tensors.items()
    }


def unwrapped(name: str) -> tuple[str, list[str]]:
    """The name as it was before the model was wrapped, and which wrappers were in it."""
    parts = name.split(".")
    wrappers = [part for part in dict.fromkeys(parts) if part in _WRAPPERS]
    parts = [part for part in parts if part not in _WRAPPERS]
    if parts[:2] == _PEFT:
        parts, wrappers = parts[2:], [*wrappers, ".".join(_PEFT)]
    return ".".join(parts), wrappers


def _require_equal(
    path: Path, name: str, first: tuple[Source, Stored], second: tuple[Source, Stored]
) -> None:
    """Raise ModelError unless both are one tensor that two files hold."""
    (one, there), (other, here) = first, second
    if one.name != other.name:
        raise ModelError(
            f"{path}: {one.name} in {one.file.name} and {other.name} in {other.file.name} are both "
            f"{name} of the model; remove one of them"
        )
    if (there.shape, there.dtype) != (here.shape, here.dtype) or not _same_bytes(
        one.file, there, other.file, here
    ):
        raise ModelError(
            f"{path}: {one.file.name} and {other.file.name} hold different values of {name}: two "
            "models were saved into one folder; remove the files of the other one"
        )


def _same_bytes(one: Path, there: Stored, other: Path, here: Stored) -> bool:
    with one.open("rb") as left, other.open("rb") as right:
        left.seek(there.start)
        right.seek(here.start)
        remaining = there.stop - there.start
        while remaining > 0:
            size = min(_CHUNK_BYTES, remaining)
            if left.read(size) != right.read(size):
                return False
            remaining -= size
    return True


def _stale_index(path: Path) -> list[str]:
    """A line about an index that names files which are not there, beside a single file."""
    if absent := _absent(path):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        return [f"{_INDEX} was not followed: it names {absent[0]}{more}, which is not there"]
    return []


def _absent(path: Path) -> list[str]:
    """Files that the index names and that are not there."""
    index = path / _INDEX
    listed = set(read_json(index).get("weight_map", {}).values()) if index.exists() else set()
    if outside := [name for name in listed if not isinstance(name, str) or Path(name).name != name]:
        raise ModelError(f"{index}: {outside[0]!r} is no file of this directory")
    return sorted(name for name in listed if not (path / name).exists())
