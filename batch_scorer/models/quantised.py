"""Checkpoints whose weights are stored quantised: what their numbers stand for.

A weight in 8 bits is a tensor of floats or integers with a tensor of scales beside it, one for the
whole weight, one for each row, or one for each block of it. The weight is the number times its
scale, rounded to float32 once. The hf engine and the gate's reference read these values; vLLM gets
the tensors as they are stored. GPTQ's and AWQ's words are in `words.py`, bitsandbytes' codes in
`bitsandbytes.py`; other formats that pack several numbers into one are refused by name.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

from batch_scorer.errors import ModelError
from batch_scorer.models import bitsandbytes, words
from batch_scorer.models.adapter import ModelConfig, ModelFiles, Packed, Scale

_EIGHT_BITS = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "int8"}
"""safetensors' names for the dtypes of 8-bit weights."""
_SCALES = ("_scale_inv", "_scale")
"""What stands behind a weight's name in that of its scales: as transformers' FineGrainedFP8 writes
it (a factor too, in spite of its name), and as compressed-tensors and vLLM do."""
_ZERO_POINT = "_zero_point"
_OF_ENGINES = ("_scale_inv", "_scale", "_zero_point")
"""Ends of the names of tensors that quantised layers have and plain ones do not."""
_OF_CACHES = (".k_scale", ".v_scale", ".q_scale", "_proj.output_scale")
"""Scales of the keys' and values' cache, which is never quantised here."""
_METHODS = ("fp8", "compressed-tensors", *words.METHODS, bitsandbytes.METHOD)
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
"""compressed-tensors' formats with one number in every element."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a checkpoint is quantised. `name` is for people; `vllm_devices` are those whose vLLM
    computes with the stored numbers."""

    name: str
    vllm_devices: tuple[str, ...]


def quantisation_of(config: ModelConfig) -> Mapping[str, Any]:
    """The config's entry about quantisation, which older compressed-tensors named otherwise; empty
    where there is none."""
    for part in (config, config.get("text_config")):
        for name in ("quantization_config", "compression_config"):
            if isinstance(part, Mapping) and isinstance(part.get(name), Mapping):
                return dict(part[name])
    return {}


def describe(files: ModelFiles) -> Quantisation | None:
    """How these files are quantised; None: they are not."""
    if not files.scales:
        return None
    stated = quantisation_of(files.config)
    if (method := stated["quant_method"]) in words.METHODS:
        return Quantisation(method, ("cuda",))
    if method == bitsandbytes.METHOD:
        # vLLM 0.32 has no loader for it any more.
        stored_as = sorted({bitsandbytes.kind_of(scale) for scale in files.scales.values()})
        return Quantisation(f"{' and '.join(stored_as)}, {method}", ())
    kinds = {_EIGHT_BITS[files.sources[weight].dtype] for weight in files.scales}
    devices: tuple[str, ...] = ()
    if kinds == {"fp8"}:
        # vLLM 0.32's products of FP8 on CPUs need AMX.
        devices = ("cuda",)
    elif kinds == {"int8"} and all(map(_has_int8_inputs, _groups(stated))) and _is_by_row(files):
        devices = ("cuda", "cpu")
    kind = " and ".join(sorted(kinds))
    return Quantisation(kind if kind == method else f"{kind}, {method}", devices)


def _has_int8_inputs(group: Mapping[str, Any]) -> bool:
    inputs = group.get("input_activations") or {}
    return inputs.get("num_bits") == 8 and inputs.get("type") == "int"


def _is_by_row(files: ModelFiles) -> bool:
    """Whether no weight has several scales in a row, nor zero points: vLLM has no such product."""
    return all(
        isinstance(scale, Scale)
        and scale.zero_point is None
        and (scale.block is None or scale.block == (1, files.shapes[name][-1]))
        for name, scale in files.scales.items()
    )


def _groups(stated: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = stated.get("config_groups") or {}
    return [group for group in groups.values() if isinstance(group, Mapping)]


def read_quantised(files: ModelFiles) -> ModelFiles:
    """The files with every 8-bit weight's scales found; those and other companions of quantised
    layers are no tensors of the model any more.

    Raises ModelError for a format that cannot be read exactly, and where config and tensors
    contradict each other.
    """
    stated = quantisation_of(files.config)
    method = stated.get("quant_method")
    if stated:
        _refuse_unreadable(files, stated)
    if method in words.METHODS:
        return words.read_words(files, stated)
    if method == bitsandbytes.METHOD:
        return bitsandbytes.read_bitsandbytes(files, stated)
    scales = {
        name: scale
        for name, source in files.sources.items()
        if source.dtype in _EIGHT_BITS and (scale := _scale_of(name, files, stated)) is not None
    }
    if method == "fp8" and (packed := [n for n in scales if files.sources[n].dtype == "I8"]):
        # As DeepSeek-V4's experts: two 4-bit floats in a byte.
        raise ModelError(
            f"{files.path}: {packed[0]} is quantised to 4 bits (fp8's packed form), which is not "
            "supported; use the checkpoint that it was made from"
        )
    if not stated:
        if named := [*scales, *bitsandbytes.quantised_weights(files)]:
            raise ModelError(
                f"{files.path}: {named[0]} is quantised, with scales beside it, and "
                "config.json has no quantization_config: take it from the folder that this one was "
                "copied from"
            )
        return files
    bare = [n for n, s in files.sources.items() if s.dtype in _EIGHT_BITS and n not in scales]
    bare = [name for name in bare if not name.endswith(_OF_ENGINES)]
    if bare or not scales:
        what = f"{bare[0]} has no scales beside it" if bare else "no tensor with scales is there"
        raise ModelError(
            f"{files.path}: the weights are quantised ({method}) by config.json, but {what}; use "
            "the checkpoint that they were made from"
        )
    layers = {name.rpartition(".")[0] for name in scales}
    of_caches = {name for name in files.sources if name.endswith(_OF_CACHES)}
    companions = {
        name
        for name in files.sources
        if name.endswith(_OF_ENGINES) and name.rpartition(".")[0] in layers
    }
    changes = [f"{len(scales)} weights are stored in 8 bits ({method}) and stand for float32 ones"]
    if of_caches:
        changes.append(f"{len(of_caches)} scales of a quantised cache are not used")
    dropped = companions | of_caches
    return replace(
        files,
        shapes={name: shape for name, shape in files.shapes.items() if name not in dropped},
        sources={name: source for name, source in files.sources.items() if name not in dropped},
        scales=scales,
        companions={name: files.sources[name] for name in companions - of_caches},
        changes=(*files.changes, *changes),
    )


def as_stored(files: ModelFiles, but: Collection[str] = ()) -> ModelFiles:
    """The same files with quantised weights left as they are, and their companions beside them; all
    `but` these weights, which are read as the numbers that they stand for."""
    scales = {name: scale for name, scale in files.scales.items() if name in but}
    layers = {name.rpartition(".")[0] for name in scales}
    beside = {n: s for n, s in files.companions.items() if n.rpartition(".")[0] not in layers}
    unpacked = {
        name
        for name, scale in files.scales.items()
        if isinstance(scale, Packed) and name not in but
    }
    stored = {name: source for name, source in files.sources.items() if name not in unpacked}
    return replace(files, sources={**stored, **beside}, scales=scales)


def vllm_config(files: ModelFiles) -> dict[str, Any]:
    """The entry about quantisation that vLLM gets: without a quantised cache, and with a head of
    floats, as it is given one."""
    stated = quantisation_of(files.config)
    if stated.get("quant_method") in words.METHODS:
        stated = {**stated, "lm_head": False}
    elif "config_groups" in stated:
        stated = {**stated, "ignore": [*(stated.get("ignore") or ()), "lm_head"]}
    return {**stated, **({"kv_cache_scheme": None} if "kv_cache_scheme" in stated else {})}


def _refuse_unreadable(files: ModelFiles, stated: Mapping[str, Any]) -> None:
    """Raise ModelError for a method or format whose weights are not number times scale."""
    name = method = stated.get("quant_method") or stated.get("quant_algo") or "by an unnamed method"
    why = None if method in _METHODS else "which is not supported"
    formats = {part["format"] for part in (stated, *_groups(stated)) if part.get("format")}
    sparsity = (stated.get("sparsity_config") or {}).get("format") or "dense"
    if method == "compressed-tensors":
        unread = sorted(formats - {*_FORMATS, "mixed-precision"})
        if unread:
            name, why = f"{method}, {unread[0]}", "which is not supported"
        elif sparsity != "dense":
            why = f"and stored sparse ({sparsity}), which is not supported"
        elif stated.get("transform_config"):
            why = "and rotated (transform_config), which is not supported"
        elif any(n.endswith("weight_g_idx") for n in files.sources):
            why = "with reordered columns (weight_g_idx), which is not supported"
    if method in words.METHODS and (form := words.unread_form(stated)):
        name, why = form, "which is not supported"
    if why:
        raise ModelError(
            f"{files.path}: the weights are quantised ({name}), {why}; use the checkpoint that "
            "they were made from (under vLLM, --quantization can quantise it)"
        )


def _scale_of(name: str, files: ModelFiles, stated: Mapping[str, Any]) -> Scale | None:
    beside = next((name + end for end in _SCALES if name + end in files.sources), None)
    if beside is None:
        return None
    zero_point = name + _ZERO_POINT if name + _ZERO_POINT in files.sources else None
    return Scale(
        files.sources[beside],
        _block(name, beside, files, stated),
        None if zero_point is None else files.sources[zero_point],
    )


def _block(
    name: str, beside: str, files: ModelFiles, stated: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Rows and columns of a weight that share one of its scales; None: all of them."""
    shape, grid = files.shapes[name], files.shapes[beside]
    if prod(grid) == 1:
        return None
    if len(shape) >= 2:
        rows, columns = shape[-2:]
        if grid == [*shape[:-1], 1] or (grid == [rows] and len(shape) == 2):
            return 1, columns
        if len(grid) == len(shape) and grid[:-2] == shape[:-2] and 0 not in grid:
            weights = [group.get("weights") or {} for group in _groups(stated)]
            sizes = [part.get("block_structure") for part in weights]
            for size in (stated.get("weight_block_size"), *sizes):
                if size and grid[-2:] == [ceil(rows / size[0]), ceil(columns / size[1])]:
                    return int(size[0]), int(size[1])
            if rows % grid[-2] == 0 and columns % grid[-1] == 0:
                return rows // grid[-2], columns // grid[-1]
    raise ModelError(f"{files.path}: {name} is {shape}, and its scales {beside} are {grid}")
