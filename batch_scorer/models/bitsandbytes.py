"""bitsandbytes' layers: 4-bit codes of a table's numbers, with scales for blocks of them, and the
rows of LLM.int8.

A weight in 4 bits (NF4, FP4) has its parts behind its own name: `.absmax`, the scales;
`.quant_map`, the table; `.quant_state.bitsandbytes__nf4` (or `__fp4`), the bytes of a JSON object
with its shape. With double quantisation the scales are codes too, of `.nested_quant_map` and
`.nested_absmax`. An int8 weight has the largest magnitude of each row beside it, `SCB`, which
stands for 127. This is what bitsandbytes 0.41 to 0.50 write.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from math import ceil, isfinite, prod
from typing import Any

from safetensors import SafetensorError, safe_open

from batch_scorer.errors import ModelError, cause_of
from batch_scorer.models.adapter import Coded, CodedScales, ModelFiles, Scale, Source
from batch_scorer.models.sizes import SIZE, Kind

METHOD = "bitsandbytes"
_STATE = ".quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_FLOATS = ("F32", "F16", "BF16")
_MOST_STATE_BYTES = 1 << 16  # bitsandbytes writes some 170
_INT8_MAX = 127.0
_IN_ROWS = 0
"""The `weight_format` of numbers that lie row by row; older GPUs had others."""
_SHAPE: Kind = (
    "a list of whole numbers above 0",
    lambda value: isinstance(value, list) and bool(value) and all(map(SIZE[1], value)),
)
_NUMBER: Kind = (
    "a number",
    lambda value: type(value) in (int, float) and isfinite(value),
)
_OF_STATE: Mapping[str, Kind] = {"shape": _SHAPE, "blocksize": SIZE}
_OF_NESTED: Mapping[str, Kind] = {"nested_blocksize": SIZE, "nested_offset": _NUMBER}


def quantised_weights(files: ModelFiles) -> list[str]:
    """The weights that have the parts of bitsandbytes' layers beside them."""
    in_4_bits = (name.partition(_STATE)[0] for name in files.sources if _STATE in name)
    rows = (n.removesuffix("SCB") + "weight" for n in files.sources if n.endswith(".SCB"))
    return sorted({*in_4_bits, *rows})


def read_bitsandbytes(files: ModelFiles, stated: Mapping[str, Any]) -> ModelFiles:
    """The files with every quantised weight's shape and scales, and without their parts.

    Reads the small tensors that say how a weight is stored. Raises ModelError where a part is
    missing, where the parts do not fit each other or the config, or where they are damaged.
    """
    weights = quantised_weights(files)
    if not weights:
        raise _contradiction(files, f"no tensor *{_STATE}nf4 or *.SCB is there")
    states = [name for name in files.sources if _STATE in name]
    formats = [n for n in files.sources if n.endswith(".weight_format")]
    small = _read_small(files, [*states, *formats])
    scales: dict[str, Scale | Coded] = {}
    shapes = dict(files.shapes)
    parts = {*states, *formats}
    for name in weights:
        own = [state for state in states if state.startswith(name + _STATE)]
        if len(own) > 1:
            raise ModelError(f"{files.path}: {own[0]} is there, and {own[1]} too")
        if own:
            scales[name] = coded = _coded(files, name, own[0], small[own[0]])
            shapes[name] = list(coded.shape)
            parts |= {name + end for end in _PARTS}
        else:
            scales[name] = _int8(files, name, small)
            parts.add(name.removesuffix("weight") + "SCB")
    for bits, is_stated in ((4, stated.get("load_in_4bit")), (8, stated.get("load_in_8bit"))):
        others = [name for name, scale in scales.items() if isinstance(scale, Coded) == (bits == 8)]
        if is_stated is True and others:
            raise _contradiction(files, f"load_in_{bits}bit is true and {others[0]} is not so")
    bare = [n for n, s in files.sources.items() if s.dtype in ("I8", "U8") and n not in scales]
    if bare := [name for name in bare if name not in parts]:
        raise _contradiction(files, f"{bare[0]} has no scales beside it")
    kinds = " and ".join(sorted({kind_of(scale) for scale in scales.values()}))
    line = f"{len(scales)} weights are stored as {kinds} ({METHOD}) and stand for float32 ones"
    return replace(
        files,
        shapes={name: shape for name, shape in shapes.items() if name not in parts},
        sources={name: source for name, source in files.sources.items() if name not in parts},
        scales=scales,
        changes=(*files.changes, line),
    )


def kind_of(scale: Any) -> str:
    """`nf4`, `fp4` or `int8`."""
    return scale.kind if isinstance(scale, Coded) else "int8"


def _coded(files: ModelFiles, name: str, state_name: str, state_bytes: bytes) -> Coded:
    kind = state_name.removeprefix(name + _STATE)
    state = _state(files, state_name, state_bytes)
    if kind not in _TYPES or state.get("quant_type") != kind:
        raise ModelError(
            f"{files.path}: {state_name} is of type {str(state.get('quant_type'))[:40]!r}; read "
            f"are {' and '.join(_TYPES)}"
        )
    _require(files, state_name, state, _OF_STATE)
    shape = tuple(state["shape"])
    _part(files, name, ("U8",), [ceil(prod(shape) / 2), 1])
    blocks = ceil(prod(shape) / state["blocksize"])
    nested = None
    if is_nested := f"{name}.nested_absmax" in files.sources or "nested_blocksize" in state:
        _require(files, state_name, state, _OF_NESTED)
        grid = [ceil(blocks / state["nested_blocksize"])]
        nested = CodedScales(
            table=_part(files, f"{name}.nested_quant_map", _FLOATS, [256]),
            scales=_part(files, f"{name}.nested_absmax", _FLOATS, grid),
            block_size=state["nested_blocksize"],
            offset=float(state["nested_offset"]),
        )
    return Coded(
        kind=kind,
        shape=shape,
        table=_part(files, f"{name}.quant_map", _FLOATS, [16]),
        scales=_part(files, f"{name}.absmax", ("U8",) if is_nested else _FLOATS, [blocks]),
        block_size=state["blocksize"],
        nested=nested,
    )


def _int8(files: ModelFiles, name: str, small: Mapping[str, bytes]) -> Scale:
    layer = name.removesuffix("weight")
    shape = files.shapes.get(name, [])
    if len(shape) != 2 or files.sources[name].dtype != "I8":
        found = f"{files.sources[name].dtype} {shape}" if name in files.sources else "not there"
        raise ModelError(f"{files.path}: {name} has {layer}SCB beside it, and is {found}")
    form = small.get(f"{layer}weight_format", bytes([_IN_ROWS]))
    if form != bytes([_IN_ROWS]):
        raise ModelError(
            f"{files.path}: {name} does not lie row by row (weight_format), which is not supported"
        )
    return Scale(
        _part(files, f"{layer}SCB", _FLOATS, [shape[0]]), block=(1, shape[1]), divisor=_INT8_MAX
    )


def _part(files: ModelFiles, name: str, dtypes: tuple[str, ...], shape: list[int]) -> Source:
    """A tensor that has to be there, of one of these dtypes and this shape."""
    source = files.sources.get(name)
    if source is None:
        raise ModelError(f"{files.path}: the quantised weights lack {name}")
    if source.dtype not in dtypes or files.shapes[name] != shape:
        raise ModelError(
            f"{files.path}: {name} is {source.dtype} {files.shapes[name]}, and should be "
            f"{' or '.join(dtypes)} {shape}"
        )
    return source


def _state(files: ModelFiles, name: str, text: bytes) -> dict[str, Any]:
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{files.path}: {name} is no JSON: {cause_of(error)}") from error
    if not isinstance(state, dict):
        raise ModelError(f"{files.path}: {name} is no JSON object")
    return state


def _require(
    files: ModelFiles, name: str, state: Mapping[str, Any], kinds: Mapping[str, Kind]
) -> None:
    for entry, (words, is_right) in kinds.items():
        if not is_right(value := state.get(entry)):
            raise ModelError(
                f"{files.path}: {name}: {entry} is {str(value)[:40]!r}, and should be {words}"
            )


def _read_small(files: ModelFiles, names: Iterable[str]) -> dict[str, bytes]:
    """The bytes of these tensors, by name; every file is opened once."""
    found: dict[str, bytes] = {}
    places = sorted((files.sources[name].file, name) for name in names)
    for file, group in groupby(places, key=lambda place: place[0]):
        try:
            with safe_open(file, framework="np") as tensors:
                for _, name in group:
                    shape = files.shapes[name]
                    if files.sources[name].dtype != "U8" or prod(shape) > _MOST_STATE_BYTES:
                        dtype = files.sources[name].dtype
                        raise ModelError(
                            f"{files.path}: {name} is {dtype} {shape}, and should be a few bytes"
                        )
                    found[name] = tensors.get_tensor(files.sources[name].name).tobytes()
        except SafetensorError as error:
            raise ModelError(f"{file}: damaged weights: {error}") from error
    return found


def _contradiction(files: ModelFiles, what: str) -> ModelError:
    return ModelError(
        f"{files.path}: the weights are quantised ({METHOD}) by config.json, but {what}; use the "
        "checkpoint that they were made from"
    )
