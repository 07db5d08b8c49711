"""Linear layers of 8 bits, against integers multiplied one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from batch_scorer.backends import eight_bits
from batch_scorer.backends.device import cpu_has_int8
from batch_scorer.backends.eight_bits import (
    FP8_LARGEST,
    CudaFp8Linear,
    CudaInt8Linear,
    Int8Linear,
    round_linears,
    round_to_bytes,
    round_weight,
)
from batch_scorer.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

needs_int8 = pytest.mark.skipif(not cpu_has_int8(), reason="needs a CPU with VNNI or AMX")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 8, 8), (5, 64, 32), (37, 200, 77), (300, 576, 192)]
"""T, K and N."""


def linear_of(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


def states_of(tokens: int, size: int, dtype: torch.dtype) -> Tensor:
    """Tokens whose sizes differ by a factor of a million."""
    torch.manual_seed(1)
    return (torch.randn(tokens, size) * torch.logspace(-3, 3, tokens)[:, None]).to(dtype)


def products(numbers: Tensor, weight: Tensor) -> Tensor:
    """[T, N] of int8-sized [T, K] and [N, K], exact: float64 holds every sum."""
    return numbers.double() @ weight.double().t()


@needs_int8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SIZES)
@torch.inference_mode()
def test_the_output_is_the_integers_product_times_both_scales(
    tokens: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype
) -> None:
    linear, states = linear_of(inputs, outputs, dtype, bias=bias), states_of(tokens, inputs, dtype)
    weight, weight_scales = round_weight(linear.weight)
    numbers, scales = round_to_bytes(states)
    exact = products(numbers.int() - 128, weight)
    expected = (exact.float() * weight_scales).to(dtype) * scales
    if linear.bias is not None:
        expected = expected + linear.bias
    assert torch.equal(Int8Linear(linear)(states), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_rounded_to_the_nearest_of_255_steps(dtype: torch.dtype) -> None:
    states = states_of(200, 64, dtype)
    numbers, scales = round_to_bytes(states)
    assert scales.dtype == dtype
    exact = states.double() / scales.double() + 128
    assert (numbers.double() - exact).abs().max() < 0.5 + 1e-3
    largest = (numbers.int() - 128).abs().amax(1)
    assert torch.equal(largest, torch.full_like(largest, 127))


def test_weights_are_rounded_to_the_nearest_of_255_steps_of_their_row() -> None:
    torch.manual_seed(2)
    weight = torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    numbers, scales = round_weight(weight)
    assert ((numbers * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()
    assert torch.equal(numbers.int().abs().amax(1), torch.full((40,), 127, dtype=torch.int32))


@needs_int8
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_token_is_rounded_by_itself(dtype: torch.dtype) -> None:
    """Whatever its neighbours are: zeros, an infinity, NaN."""
    layer, states = Int8Linear(linear_of(64, 32, dtype)), states_of(6, 64, dtype)
    alone = torch.cat([layer(token[None]) for token in states])
    states[1], states[3, 5], states[4, 5] = 0.0, float("inf"), float("nan")
    together = layer(states)
    sound = torch.tensor([0, 2, 5])
    assert torch.equal(together[sound], alone[sound])
    assert torch.equal(together[1], layer.bias)
    assert not together[3].isfinite().any() and together[4].isnan().all()


@needs_int8
@torch.inference_mode()
def test_the_shape_before_the_last_stays() -> None:
    layer, states = Int8Linear(linear_of(16, 8, torch.bfloat16)), torch.randn(2, 3, 16).bfloat16()
    assert layer(states).shape == (2, 3, 8)
    assert torch.equal(layer(states)[1], layer(states[1]))


# Models


def tiny(model_type: str, **shape: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(
        model_type,
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, **shape},
    )
    model: PreTrainedModel = AutoModel.from_config(config).eval().bfloat16()
    return model


@needs_int8
@torch.inference_mode()
def test_linear_layers_are_replaced_and_nothing_else() -> None:
    model = tiny("llama")
    before = {name: type(module) for name, module in model.named_modules()}
    assert round_linears(model, "int8") == 2 * 7
    after = {name: type(module) for name, module in model.named_modules()}
    changed = {name for name in before if before[name] is not after[name]}
    assert {before[name] for name in changed} == {nn.Linear}
    assert {after[name] for name in changed} == {Int8Linear}
    assert all(name.endswith("_proj") for name in changed)


@needs_int8
@torch.inference_mode()
def test_what_several_layers_read_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    round_linears(model, "int8")
    rounded: list[Tensor] = []

    def counted(tokens: Tensor) -> eight_bits.Rounded:
        rounded.append(tokens)
        return round_to_bytes(tokens)

    monkeypatch.setattr(eight_bits, "round_to_bytes", counted)
    model(input_ids=torch.arange(8)[None], use_cache=False)
    assert len(rounded) == 2 * 4, "attention's input and output, the MLP's input and its middle"


@needs_int8
@torch.inference_mode()
def test_a_router_of_experts_stays() -> None:
    model = tiny("jetmoe", num_local_experts=4, kv_channels=16)
    round_linears(model, "int8")
    left = {m.out_features for m in model.modules() if type(m) is nn.Linear}
    assert left == {4}


@needs_int8
def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision: GPT2Model has no linear layer that int8"):
        round_linears(tiny("gpt2", n_embd=32, n_head=2, n_layer=1), "int8")


def test_what_this_cpu_cannot_multiply_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="precision: no CPU multiplies fp8; set int8"):
        round_linears(tiny("llama"), "fp8")
    monkeypatch.setattr(eight_bits, "cpu_has_int8", lambda: False)
    with pytest.raises(ConfigError, match="precision: int8 needs a CPU with VNNI or AMX"):
        round_linears(tiny("llama"), "int8")
    monkeypatch.setattr(eight_bits, "cpu_has_int8", lambda: True)
    with pytest.raises(ConfigError, match="give no float16"):
        round_linears(tiny("llama").half(), "int8")


# CUDA


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 16, 17, 300])
@torch.inference_mode()
def test_int8_on_cuda_is_the_integers_product_times_both_scales(
    tokens: int, dtype: torch.dtype
) -> None:
    linear = linear_of(64, 32, dtype, bias=False).cuda()
    states = states_of(tokens, 64, dtype).cuda()
    weight, weight_scales = round_weight(linear.weight)
    numbers, scales = eight_bits._round_to_int8(states)
    expected = products(numbers.int(), weight).float() * weight_scales * scales.float()
    assert torch.equal(CudaInt8Linear(linear)(states), expected.to(dtype))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("tokens", [1, 16, 17, 300])
@torch.inference_mode()
def test_fp8_on_cuda_is_the_product_of_the_rounded_numbers(tokens: int) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with fp8")
    linear = linear_of(64, 32, torch.bfloat16, bias=False).cuda()
    states = states_of(tokens, 64, torch.bfloat16).cuda()
    layer = CudaFp8Linear(linear)
    numbers, scales = eight_bits._round_to_fp8(states)
    assert numbers.double().abs().max() <= FP8_LARGEST
    expected = products(numbers, layer.weight) * layer.scales.double() * scales.double()
    # The sum is rounded in float32, the result to bfloat16.
    torch.testing.assert_close(layer(states).double(), expected, rtol=2**-8, atol=1e-3)
