"""Every kernel against a reference written out query by query, in float64."""

import importlib.util
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batch_scorer.backends.attention import (
    KERNELS,
    AttentionBounds,
    attention_bounds,
    choose_kernel,
    packed_attention,
)
from batch_scorer.errors import ModelError
from batch_scorer.packing import PackedBatch

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 16
SCALE = 0.3  # not 1/sqrt(16): what the model asks for must be what is used
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_gpu = [pytest.mark.gpu, needs_cuda]
needs_flash_attn = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="needs the flash-attn package"
)
WITHOUT_SOFTCAP = [
    pytest.param("sdpa_loop", "cpu", None),
    pytest.param("sdpa_loop", "cuda", None, marks=on_gpu),
    pytest.param("torch_varlen", "cuda", None, marks=on_gpu),
]
KERNELS_HERE = WITHOUT_SOFTCAP + [
    pytest.param(kernel, device, softcap, marks=marks)
    for kernel, device, marks in [
        ("eager_blocks", "cpu", []),
        ("eager_blocks", "cuda", on_gpu),
        ("flash_attn", "cuda", [*on_gpu, needs_flash_attn]),
    ]
    for softcap in (None, 2.0)
]


def make_bounds(
    kernel: str, device: str, query_lengths: list[int], key_index: list[list[int]] | None = None
) -> AttentionBounds:
    """Nodes of these lengths end to end; `key_index` names each node's keys, its own if None."""
    offsets = np.cumsum([0, *query_lengths]).astype(np.int32)
    key_offsets = offsets
    if key_index is not None:
        key_offsets = np.cumsum([0, *map(len, key_index)]).astype(np.int32)
    nothing = np.zeros(0, dtype=np.int32)
    batch = PackedBatch(
        sequences=np.zeros(0, dtype=np.int64),
        token_ids=nothing,
        position_ids=nothing,
        query_offsets=offsets,
        key_offsets=key_offsets,
        key_index=None if key_index is None else np.concatenate(key_index).astype(np.int64),
        pooled_index=np.zeros(0, dtype=np.int64),
    )
    return attention_bounds(batch, KERNELS[kernel], torch.device(device))


def make_heads(num_tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Query [1, H, T, D], key and value [1, G, T, D], large enough that softcap and mask bite."""
    generator = torch.Generator().manual_seed(num_tokens)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, value = (
        torch.randn(1, heads, num_tokens, HEAD_DIM, generator=generator).mul(2)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    return query.to(device, dtype), key.to(device, dtype), value.to(device, dtype)


def reference(
    heads: tuple[Tensor, Tensor, Tensor],
    query_lengths: list[int],
    key_index: list[list[int]],
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[T, H, D]: each query attends to its node's keys up to its own, one at a time."""
    groups = HEADS // KEY_HEADS
    query = heads[0][0].double().cpu()  # [H, T, D]
    key, value = (h[0].double().cpu().repeat_interleave(groups, 0) for h in heads[1:])
    output = []
    for length, keys in zip(query_lengths, key_index, strict=True):
        for place in range(len(keys) - length, len(keys)):
            first = 0 if window is None else max(0, place - window + 1)
            seen = keys[first : place + 1]
            scores = torch.einsum("hkd,hd->hk", key[:, seen], query[:, len(output)]) * SCALE
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = torch.softmax(scores, dim=-1)
            output.append(torch.einsum("hk,hkd->hd", weights, value[:, seen]))
    return torch.stack(output)


def attend(
    heads: tuple[Tensor, Tensor, Tensor], bounds: AttentionBounds, **arguments: Any
) -> Tensor:
    output, weights = packed_attention(
        nn.Identity(), *heads, None, scaling=SCALE, bounds=bounds, **arguments
    )
    assert weights is None
    return output[0].double().cpu()


def own_tokens(lengths: list[int]) -> list[list[int]]:
    ends = np.cumsum(lengths).tolist()
    return [list(range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]


@pytest.mark.parametrize(("kernel", "device", "softcap"), KERNELS_HERE)
@pytest.mark.parametrize("window", [None, 1, 16, 128, 1000])
def test_sequences_of_many_lengths(
    kernel: str, device: str, softcap: float | None, window: int | None
) -> None:
    lengths = [300, 129, 128, 17, 16, 2, 1, 1]
    heads = make_heads(sum(lengths), device)
    got = attend(
        heads, make_bounds(kernel, device, lengths), sliding_window=window, softcap=softcap
    )
    want = reference(heads, lengths, own_tokens(lengths), window, softcap)
    torch.testing.assert_close(got, want, rtol=0, atol=3e-2 if device == "cuda" else 2e-5)


@pytest.mark.parametrize(("kernel", "device", "softcap"), KERNELS_HERE)
@pytest.mark.parametrize("window", [None, 1, 24])
def test_nodes_attend_to_gathered_ancestors_aligned_at_the_bottom_right(
    kernel: str, device: str, softcap: float | None, window: int | None
) -> None:
    """A prompt of 20 tokens, two responses that continue it, and a leaf under the second."""
    lengths = [20, 150, 1, 5]
    prompt, first, second, leaf = own_tokens(lengths)
    keys = [prompt, prompt + first, prompt + second, prompt + second + leaf]
    heads = make_heads(sum(lengths), device)
    bounds = make_bounds(kernel, device, lengths, keys)
    got = attend(heads, bounds, sliding_window=window, softcap=softcap)
    want = reference(heads, lengths, keys, window, softcap)
    torch.testing.assert_close(got, want, rtol=0, atol=3e-2 if device == "cuda" else 2e-5)


def test_smaller_value_heads_come_back_at_their_size() -> None:
    query, key, value = make_heads(9, "cpu")
    got = attend((query, key, value[..., :10]), make_bounds("sdpa_loop", "cpu", [6, 3]))
    whole = attend((query, key, value), make_bounds("sdpa_loop", "cpu", [6, 3]))
    assert got.shape == (9, HEADS, 10)
    torch.testing.assert_close(got, whole[..., :10])


def test_scaling_defaults_to_the_head_size() -> None:
    heads, bounds = make_heads(5, "cpu"), make_bounds("sdpa_loop", "cpu", [5])
    default, _ = packed_attention(nn.Identity(), *heads, None, bounds=bounds)
    scale = 1 / math.sqrt(HEAD_DIM)
    explicit, _ = packed_attention(nn.Identity(), *heads, None, scaling=scale, bounds=bounds)
    assert torch.equal(default, explicit)


@pytest.mark.parametrize("kernel", ["sdpa_loop", "torch_varlen"])
def test_softcap_is_never_dropped(kernel: str) -> None:
    with pytest.raises(ModelError, match="softcapping"):
        attend(make_heads(4, "cpu"), make_bounds(kernel, "cpu", [4]), softcap=2.0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"s_aux": torch.zeros(HEADS)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "later tokens"),
        ({"bounds": None}, "keyword arguments"),
    ],
)
def test_what_a_layer_asks_for_is_done_or_refused(arguments: dict[str, Any], named: str) -> None:
    given = {"bounds": make_bounds("sdpa_loop", "cpu", [4])} | arguments
    with pytest.raises(ModelError, match=named):
        packed_attention(nn.Identity(), *make_heads(4, "cpu"), None, **given)


def test_a_mask_is_refused() -> None:
    bounds = make_bounds("sdpa_loop", "cpu", [4])
    with pytest.raises(ModelError, match="attention mask"):
        packed_attention(nn.Identity(), *make_heads(4, "cpu"), torch.ones(4, 4), bounds=bounds)


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"layer_types": ["full_attention"], "sliding_window": 2}, False),
        ({"layer_types": ["sliding_attention"], "sliding_window": 2}, True),
        ({"sliding_window": 2}, True),
        ({"sliding_window": 2, "use_sliding_window": False}, False),
        ({"sliding_window": None}, False),
    ],
)
def test_a_window_that_the_layer_leaves_to_a_mask_is_refused(
    config: dict[str, Any], refused: bool
) -> None:
    """PhiMoE and Qwen2-MoE slide by mask alone; packed attention never sees that mask."""
    layer = nn.Identity()
    layer.config, layer.layer_idx = SimpleNamespace(**config), 0
    heads, bounds = make_heads(4, "cpu"), make_bounds("sdpa_loop", "cpu", [4])
    if refused:
        with pytest.raises(ModelError, match="sliding window"):
            packed_attention(layer, *heads, None, bounds=bounds)
    else:
        packed_attention(layer, *heads, None, bounds=bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "kernel"), [(False, "sdpa_loop"), (True, "eager_blocks")])
def test_kernel_on_the_cpu(dtype: torch.dtype, softcap: bool, kernel: str) -> None:
    assert choose_kernel(torch.device("cpu"), dtype, head_dim=64, softcap=softcap) == kernel
