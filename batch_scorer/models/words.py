"""GPTQ's and AWQ's layers: small integers packed into 32-bit words, with scales for groups of
inputs.

A layer's weight is in `.qweight`, with `.qzeros` and `.scales` beside it and GPTQ's `.g_idx`, which
gives every input's group. Both store the weight transposed. GPTQ's words run along the inputs,
AWQ's along the outputs and in an order of their own. GPTQ's older files hold zero points less 1.
The layouts are those that AutoGPTQ and AutoAWQ write.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from batch_scorer.errors import ModelError
from batch_scorer.models.adapter import ModelFiles, Packed, Scale, Source

METHODS = ("gptq", "awq")
_WORDS = ".qweight"
_ENDS = (_WORDS, ".qzeros", ".scales", ".g_idx")
_WORD_BITS = 32
_ORDER_OF_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def unread_form(stated: Mapping[str, Any]) -> str | None:
    """The form of a `quantization_config` that is not read here; None: it is read."""
    method, bits = stated["quant_method"], _bits(stated)
    form = str(stated.get("checkpoint_format") or stated.get("version") or "").lower()
    known = {"gptq": (4, 8, "", "gptq", "gptq_v2"), "awq": (4, "", "gemm")}[method]
    return None if bits in known and form in known else f"{method}, {bits} bits {form}".rstrip()


def read_words(files: ModelFiles, stated: Mapping[str, Any]) -> ModelFiles:
    """The files with every packed weight under its own name and shape.

    Raises ModelError where a part is missing, or the parts do not fit each other.
    """
    shapes, sources = dict(files.shapes), dict(files.sources)
    scales: dict[str, Scale | Packed] = {}
    companions: dict[str, Source] = {}
    for layer in [n.removesuffix(_WORDS) for n in files.sources if n.endswith(_WORDS)]:
        name = f"{layer}.weight"
        if name in files.shapes:
            raise ModelError(f"{files.path}: {name} is there, and {layer}{_WORDS} too")
        scales[name], shape = _packed(layer, files, stated)
        for part in (layer + end for end in _ENDS if layer + end in files.sources):
            companions[part] = sources.pop(part)
            del shapes[part]
        shapes[name], sources[name] = shape, files.sources[layer + _WORDS]
    method = stated["quant_method"]
    if not scales:
        raise ModelError(
            f"{files.path}: the weights are quantised ({method}) by config.json, but no tensor "
            f"*{_WORDS} is there; use the checkpoint that they were made from"
        )
    line = f"{len(scales)} weights are stored packed ({method}) and stand for float32 ones"
    return replace(
        files,
        shapes=shapes,
        sources=sources,
        scales=scales,
        companions=companions,
        changes=(*files.changes, line),
    )


def _packed(layer: str, files: ModelFiles, stated: Mapping[str, Any]) -> tuple[Packed, list[int]]:
    """How a layer's weight is packed, and its shape [out, in]."""
    if lacking := [end for end in (".qzeros", ".scales") if layer + end not in files.sources]:
        raise ModelError(f"{files.path}: {layer}{_WORDS} has no {layer}{lacking[0]} beside it")
    is_awq, bits = stated["quant_method"] == "awq", _bits(stated)
    per_word = _WORD_BITS // bits
    words, zeros, grid = (files.shapes[layer + end] for end in (_WORDS, ".qzeros", ".scales"))
    groups = files.sources.get(f"{layer}.g_idx")
    fits = len(words) == len(grid) == 2
    if fits:
        factors = (1, per_word) if is_awq else (per_word, 1)
        inputs, outputs = (size * by for size, by in zip(words, factors, strict=True))
        fits = grid[1] == outputs and zeros == [grid[0], outputs // per_word]
        fits &= inputs % grid[0] == 0 or groups is not None
        fits &= groups is None or files.shapes[f"{layer}.g_idx"] == [inputs]
    if not fits:
        raise ModelError(
            f"{files.path}: {layer}{_WORDS} is {words} in {bits} bits, its scales {grid} and its "
            f"zero points {zeros}: they do not fit each other"
        )
    is_older = not is_awq and stated.get("checkpoint_format") in (None, "gptq")
    packed = Packed(
        bits=bits,
        along_outputs=is_awq,
        order=_ORDER_OF_AWQ if is_awq else tuple(range(per_word)),
        scales=files.sources[f"{layer}.scales"],
        zeros=files.sources[f"{layer}.qzeros"],
        zero_offset=int(is_older),
        groups=groups,
    )
    return packed, [outputs, inputs]


def _bits(stated: Mapping[str, Any]) -> Any:
    return stated.get("bits") or stated.get("w_bit") or 4
