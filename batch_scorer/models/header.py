"""What a safetensors header must be, whoever wrote it.

safetensors checks the same when it opens a file; here it is checked before the output is claimed,
and the message names the tensor.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from batch_scorer.errors import ModelError

MOST_HEADER_BYTES = 100_000_000
"""safetensors itself reads no longer one."""
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8,
    "C64": 64, "BOOL": 8,
}  # fmt: skip
"""Bits of one value, by the names that safetensors 0.8 knows."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object, in which no key may come twice. Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is there twice")
    return found


def check_header(file: Path, header: Any, data_bytes: int) -> None:
    """Raise ModelError unless the tensors have known types, and fill the data from end to end, none
    of them over another."""
    if not isinstance(header, Mapping):
        raise ModelError(f"{file}: damaged safetensors header: not a JSON object")
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            _check_framework(file, entry)
            continue
        problem = _problem(entry)
        if problem:
            raise ModelError(f"{file}: damaged safetensors header: {name}: {problem}")
        places.append((*entry["data_offsets"], name))
    end = 0
    for start, stop, name in sorted(places):
        if start != end:
            how = "lies over another tensor" if start < end else "has a gap before it"
            raise ModelError(f"{file}: damaged safetensors header: {name} {how}")
        end = stop
    if end != data_bytes:
        raise ModelError(
            f"{file}: incomplete download: {data_bytes} bytes of data, its header promises {end}"
        )


def _check_framework(file: Path, metadata: Any) -> None:
    """Weights that another framework wrote have other names and transposed matrices."""
    framework = metadata.get("format") if isinstance(metadata, Mapping) else None
    if framework not in (None, "pt", "np", "mlx"):
        raise ModelError(
            f"{file}: its tensors are laid out for {framework!r}, not for PyTorch; save the model "
            "with transformers' save_pretrained"
        )


def _problem(entry: Any) -> str | None:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            if dtype not in BITS:
                return f"unknown dtype {dtype!r}"
            if not all(type(size) is int and size >= 0 for size in shape):
                return f"the shape is {shape}"
            if not 0 <= start <= stop:
                return f"the offsets are {start} and {stop}"
            if 8 * (stop - start) != prod(shape) * BITS[dtype]:
                return f"{stop - start} bytes are not a {dtype} tensor of shape {shape}"
            return None
    return "no dtype, shape and data_offsets"
