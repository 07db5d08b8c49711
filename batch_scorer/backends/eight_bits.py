"""Linear layers that multiply numbers of 8 bits: the setting `precision`.

Every output channel of a weight has a scale, and so has every token of what comes in: the largest
number of either becomes the largest that 8 bits hold. Weights are rounded once, tokens as they
come. Everything else of the model stays as it is: norms, embeddings, attention, the head.

Legend: T tokens, K numbers in, N numbers out.
"""

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from batch_scorer.backends.device import cpu_has_int8
from batch_scorer.errors import ConfigError

INT8_LARGEST = 127
FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0

Rounded: TypeAlias = tuple[Tensor, Tensor]
"""[T, K] in 8 bits, and the scales [T, 1] that they are to be multiplied by."""

_LEAST_SCALE = 1e-30
"""Of a token that is all zeros: what is divided by it stays 0."""

_CUDA_MULTIPLE = 16
"""Of K and N, in CUDA's products; and T of `_int_mm` has to be above it."""

_numbers = itertools.count()
_layers: "weakref.WeakValueDictionary[int, Int8Linear]" = weakref.WeakValueDictionary()


class _LastRounded(threading.local):
    """What this thread rounded last. Queries, keys and values come from the same states, and so do
    the two halves of a gated MLP, so these are rounded once."""

    states: Tensor | None = None
    rounded: Rounded | None = None

    def of(self, states: Tensor, round_tokens: Callable[[Tensor], Rounded]) -> Rounded:
        if self.rounded is None or self.states is not states:
            self.rounded = round_tokens(states.reshape(-1, states.shape[-1]))
            self.states = states  # kept, so that no other tensor takes its place in memory
        return self.rounded


_last = _LastRounded()


def token_scales(tokens: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    """[T, 1] in `dtype` of float32[T, K]: what makes each token's largest number `largest`.

    Rounding to bfloat16 moves a scale by 1/512 at most, so the largest number is below 127.25 and
    still rounds to 127.
    """
    most = torch.maximum(tokens.amax(1, keepdim=True), -tokens.amin(1, keepdim=True))
    return (most / largest).clamp_(min=_LEAST_SCALE).to(dtype)


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8[N, K] of [N, K], and float32[N], the scale of each row."""
    weight = weight.detach().float()
    scales = (weight.abs().amax(1) / INT8_LARGEST).clamp_(min=_LEAST_SCALE)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


# CPU


_ZERO = 128
"""What stands for 0 in the tokens' bytes: VNNI multiplies bytes without a sign by such with one.
Given signed ones, one product of 4,096 tokens took minutes here."""


def round_to_bytes(tokens: Tensor) -> Rounded:
    """uint8[T, K], `_ZERO` more than the rounded numbers."""
    numbers = tokens.to(torch.float32, copy=True)
    scales = token_scales(numbers, INT8_LARGEST, tokens.dtype)
    rounded = numbers.mul_(scales.float().reciprocal()).round_().to(torch.int8)
    # Adds _ZERO. Conversion to uint8 takes five times as long as to int8.
    return rounded.view(torch.uint8).bitwise_xor_(_ZERO), scales


class Int8Linear(nn.Module):
    """A linear layer through oneDNN's products of bytes, on a CPU with VNNI or AMX."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, self.scales = round_weight(linear.weight)
        self.weight: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        self.bias = linear.bias
        # Why a number: see `linear.ReorderedLinear`.
        self.number = torch.tensor(next(_numbers))
        _layers[int(self.number)] = self

    def forward(self, states: Tensor) -> Tensor:
        """[..., N] of [..., K], in the same dtype."""
        if torch.compiler.is_compiling():
            numbers, scales = round_to_bytes(states.reshape(-1, states.shape[-1]))
            product = _bytes_product(numbers, self.number, len(self.scales), states.dtype)
            output: Tensor = product * scales
        else:
            numbers, scales = _last.of(states, round_to_bytes)
            output = self.product(numbers, states.dtype).mul_(scales)
        if self.bias is not None:
            output = output + self.bias
        return output.view(*states.shape[:-1], -1)

    def product(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, N] of uint8[T, K], without the tokens' scales."""
        output: Tensor = torch.ops.onednn.qlinear_pointwise(
            *(numbers, 1.0, _ZERO, self.weight, self.scales, self.zeros),
            *(None, 1.0, 0, dtype, "none", [], ""),
        )
        return output


@torch.library.custom_op("batch_scorer::bytes_product", mutates_args=())
def _bytes_product(numbers: Tensor, layer: Tensor, out_features: int, dtype: torch.dtype) -> Tensor:
    return _layers[int(layer)].product(numbers, dtype)


@_bytes_product.register_fake
def _(numbers: Tensor, layer: Tensor, out_features: int, dtype: torch.dtype) -> Tensor:
    return numbers.new_empty(len(numbers), out_features, dtype=dtype)


# CUDA


class CudaInt8Linear(nn.Module):
    """A linear layer through cuBLAS's products of int8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.scales = round_weight(linear.weight)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """[..., N] of [..., K], in the same dtype."""
        numbers, scales = _last.of(states, _round_to_int8)
        missing = max(0, _CUDA_MULTIPLE + 1 - len(numbers))
        filled = nn.functional.pad(numbers, (0, 0, 0, missing)) if missing else numbers
        product = torch._int_mm(filled, self.weight.t())[: len(numbers)]
        output = (product.float() * self.scales * scales.float()).to(states.dtype)
        if self.bias is not None:
            output = output + self.bias
        return output.view(*states.shape[:-1], -1)


def _round_to_int8(tokens: Tensor) -> Rounded:
    numbers = tokens.float()
    scales = token_scales(numbers, INT8_LARGEST, tokens.dtype)
    return (numbers / scales.float()).round_().to(torch.int8), scales


class CudaFp8Linear(nn.Module):
    """A linear layer through torch's scaled products of fp8 (e4m3), which give bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.scales = (weight.abs().amax(1) / FP8_LARGEST).clamp_(min=_LEAST_SCALE)[None]
        self.weight = (weight / self.scales.t()).to(FP8)
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """[..., N] of [..., K], both bfloat16."""
        numbers, scales = _last.of(states, _round_to_fp8)
        output = torch._scaled_mm(
            numbers,
            self.weight.t(),
            scale_a=scales.float(),
            scale_b=self.scales,
            bias=self.bias,
            out_dtype=torch.bfloat16,
        )
        return output.view(*states.shape[:-1], -1)


def _round_to_fp8(tokens: Tensor) -> Rounded:
    numbers = tokens.float()
    scales = token_scales(numbers, FP8_LARGEST, tokens.dtype)
    # A rounded scale may leave the largest number above what fp8 holds, which would make it NaN.
    return (numbers / scales.float()).clamp_(-FP8_LARGEST, FP8_LARGEST).to(FP8), scales


# The model

_EXPERTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")
"""What configs call the number of a layer's experts."""


def round_linears(model: PreTrainedModel, precision: str) -> int:
    """Replace the linear layers of `model` by such of 8 bits; returns their number.

    A router of experts stays, where rounding would send tokens to other experts, and on CUDA a
    layer of a size that its products do not take. Raises ConfigError where the device cannot
    multiply so, the dtype is not one that the products give, or no layer would be replaced.
    """
    weight = next(iter(model.parameters()))
    make = _layer_of(precision, weight.device, weight.dtype)
    config = model.config.get_text_config()
    experts = {getattr(config, name, None) for name in _EXPERTS}
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.out_features not in experts and _takes(child)
    ]
    if not found:
        raise ConfigError(
            f"precision: {type(model).__name__} has no linear layer that {precision} could "
            "multiply; leave it out"
        )
    for parent, name, child in found:
        setattr(parent, name, make(child))
    return len(found)


def _layer_of(
    precision: str, device: torch.device, dtype: torch.dtype
) -> Callable[[nn.Linear], nn.Module]:
    if device.type == "cpu":
        if precision != "int8":
            raise ConfigError(f"precision: no CPU multiplies {precision}; set int8")
        if not cpu_has_int8():
            raise ConfigError(
                "precision: int8 needs a CPU with VNNI or AMX, which this one has not; leave it out"
            )
        if dtype == torch.float16:
            raise ConfigError("precision: int8 products on a CPU give no float16; set bfloat16")
        return Int8Linear
    if precision == "int8":
        return CudaInt8Linear
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError("precision: fp8 needs a GPU of compute capability 8.9 or more; set int8")
    if dtype != torch.bfloat16:
        raise ConfigError("precision: fp8 products give bfloat16; set dtype to it")
    return CudaFp8Linear


def _takes(linear: nn.Linear) -> bool:
    if linear.weight.device.type == "cpu":
        return True
    return not (linear.in_features % _CUDA_MULTIPLE or linear.out_features % _CUDA_MULTIPLE)
