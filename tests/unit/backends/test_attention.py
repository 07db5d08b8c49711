"""Every kernel against a reference written out query by query, in float64."""

import importlib.util
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from batch_scorer.backends.attention import Pass, packed_attention, pool_in_last_layer
from batch_scorer.backends.kernels import KERNELS, choose_kernel
from batch_scorer.backends.packing import PackedBatch, TokenTrie, build_trie
from batch_scorer.errors import ModelError
from batch_scorer.records import PooledTokens, TokenizedRows

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 16
SCALE = 0.3  # not 1/sqrt(16): what the model asks for must be what is used
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_gpu = [pytest.mark.gpu, needs_cuda]
needs_flash_attn = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="needs the flash-attn package"
)
KERNELS_HERE = [
    pytest.param("torch_varlen", "cuda", None, marks=on_gpu),
    pytest.param("torch_varlen_unsplit", "cuda", None, marks=on_gpu),
    *(
        pytest.param(kernel, device, softcap, marks=marks)
        for kernel, device, marks in [
            ("blocks", "cpu", []),
            ("blocks", "cuda", on_gpu),
            ("aligned_blocks", "cpu", []),
            ("aligned_blocks", "cuda", on_gpu),
            ("flash_attn", "cuda", [*on_gpu, needs_flash_attn]),
        ]
        for softcap in (None, 2.0)
    ),
]
UNRELATED = [300, 129, 128, 17, 16, 2, 1, 1]
"""Lengths of sequences that share nothing."""


def make_trie(sequences: list[list[int]]) -> TokenTrie:
    lengths = np.array([len(ids) for ids in sequences])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([np.array(ids, dtype=np.int32) for ids in sequences])
    rows = TokenizedRows(ids, offsets, offsets, np.zeros(0, dtype=np.int32), {}, {})
    last = PooledTokens(lengths - 1, np.arange(len(sequences) + 1))
    return build_trie(rows, np.arange(len(sequences)), last)


def unrelated(lengths: list[int]) -> TokenTrie:
    return make_trie([[first] * length for first, length in enumerate(lengths)])


def shared() -> TokenTrie:
    """A prompt of 20 tokens, three answers, two continuations of the second, and a stranger."""
    prompt, second = [1] * 20, [3] * 40
    return make_trie(
        [
            [*prompt, *[2] * 150],
            [*prompt, *second],
            [*prompt, *second, 4],
            [*prompt, *second, *[5] * 70],
            [*prompt, 6],
            [7] * 9,
        ]
    )


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
    trie: TokenTrie,
    heads: tuple[Tensor, Tensor, Tensor],
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[U, H, D]: each token attends to its ancestors and itself, one token at a time."""
    groups = HEADS // KEY_HEADS
    query = heads[0][0].double().cpu()  # [H, U, D]
    key, value = (h[0].double().cpu().repeat_interleave(groups, 0) for h in heads[1:])
    path: list[int] = []
    output = []
    for token, position in enumerate(trie.position_ids.tolist()):
        path = [*path[:position], token]
        seen = path if window is None else path[-window:]
        scores = torch.einsum("hkd,hd->hk", key[:, seen], query[:, token]) * SCALE
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = torch.softmax(scores, dim=-1)
        output.append(torch.einsum("hk,hkd->hd", weights, value[:, seen]))
    return torch.stack(output)


def attend(
    trie: TokenTrie,
    heads: tuple[Tensor, Tensor, Tensor],
    kernel: str = "blocks",
    budget: int = 10_000,
    **arguments: Any,
) -> Tensor:
    """[U, H, D], one layer over batches of `budget` tokens, as a model calls it."""
    output, carried = [], []
    for start in range(0, trie.num_tokens, budget):
        stop = min(start + budget, trie.num_tokens)
        batch = trie.batch(start, stop)
        part = [tensor[:, :, start:stop] for tensor in heads]
        with running(batch, kernel, part[0].device, carried) as current:
            given = {"scaling": SCALE} | arguments
            attended, weights = packed_attention(nn.Identity(), *part, None, **given)
        assert weights is None
        output.append(attended[0])
        carried = current.kept
    return torch.cat(output).double().cpu()


def running(
    batch: PackedBatch,
    kernel: str = "blocks",
    device: str | torch.device = "cpu",
    carried: Any = (),
    *,
    pools: bool = False,
) -> Pass:
    return Pass(batch, KERNELS[kernel], torch.device(device), list(carried), pools=pools)


@pytest.mark.parametrize(("kernel", "device", "softcap"), KERNELS_HERE)
@pytest.mark.parametrize("window", [None, 1, 16, 128, 1000])
def test_sequences_of_many_lengths(
    kernel: str, device: str, softcap: float | None, window: int | None
) -> None:
    trie = unrelated(UNRELATED)
    heads = make_heads(trie.num_tokens, device)
    got = attend(trie, heads, kernel, sliding_window=window, softcap=softcap)
    want = reference(trie, heads, window, softcap)
    torch.testing.assert_close(got, want, rtol=0, atol=3e-2 if device == "cuda" else 2e-5)


@pytest.mark.parametrize(("kernel", "device", "softcap"), KERNELS_HERE)
@pytest.mark.parametrize("window", [None, 1, 24])
@pytest.mark.parametrize("budget", [1000, 128, 33])
def test_tokens_attend_to_their_ancestors_also_those_of_earlier_batches(
    kernel: str, device: str, softcap: float | None, window: int | None, budget: int
) -> None:
    trie = shared()
    assert trie.num_tokens == 20 + 150 + 40 + 1 + 70 + 1 + 9
    heads = make_heads(trie.num_tokens, device)
    got = attend(trie, heads, kernel, budget, sliding_window=window, softcap=softcap)
    want = reference(trie, heads, window, softcap)
    torch.testing.assert_close(got, want, rtol=0, atol=3e-2 if device == "cuda" else 2e-5)


@pytest.mark.parametrize(("kernel", "device", "softcap"), KERNELS_HERE)
@pytest.mark.parametrize("window", [None, 24])
def test_the_last_layer_attends_for_the_pooled_tokens_only(
    kernel: str, device: str, softcap: float | None, window: int | None
) -> None:
    class Layer(nn.Module):
        def forward(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
            widths.append(hidden_states.shape[1])
            parts = hidden_states.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)
            heads = parts.split([HEADS, KEY_HEADS, KEY_HEADS], dim=1)
            settings: dict[str, Any] = {"sliding_window": window, "softcap": softcap}
            mixed, _ = packed_attention(self, *heads, None, scaling=SCALE, **settings)
            return mixed + position_ids[..., None, None]

    widths: list[int] = []
    layer = Layer()
    pool_in_last_layer(layer)
    trie = shared()
    heads = make_heads(trie.num_tokens, device)
    hidden = torch.cat(heads, dim=1).transpose(1, 2).flatten(2)
    batch = trie.batch(0, trie.num_tokens)
    positions = torch.from_numpy(trie.position_ids).to(device)[None]
    with running(batch, kernel, hidden.device, pools=True):
        got = layer(hidden, position_ids=positions)[0].double().cpu()
    assert widths == [trie.num_tokens, len(batch.pooled_index)]
    want = reference(trie, heads, window, softcap)[batch.pooled_index]
    want += torch.from_numpy(trie.position_ids[batch.pooled_index])[:, None, None]
    torch.testing.assert_close(got, want, rtol=0, atol=0.5 if device == "cuda" else 2e-5)


def test_smaller_value_heads_come_back_at_their_size() -> None:
    trie = unrelated([6, 3])
    query, key, value = make_heads(9, "cpu")
    got = attend(trie, (query, key, value[..., :10]))
    assert got.shape == (9, HEADS, 10)
    torch.testing.assert_close(got, attend(trie, (query, key, value))[..., :10])


def test_scaling_defaults_to_the_head_size() -> None:
    trie, heads = unrelated([5]), make_heads(5, "cpu")
    default = attend(trie, heads, scaling=None)
    assert torch.equal(default, attend(trie, heads, scaling=1 / math.sqrt(HEAD_DIM)))


def test_softcap_is_never_dropped() -> None:
    with pytest.raises(ModelError, match="softcapping"):
        attend(unrelated([4]), make_heads(4, "cpu"), "torch_varlen", softcap=2.0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"s_aux": torch.zeros(HEADS)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "later tokens"),
    ],
)
def test_what_a_layer_asks_for_is_done_or_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        attend(unrelated([4]), make_heads(4, "cpu"), **arguments)


def test_a_mask_is_refused() -> None:
    trie = unrelated([4])
    with running(trie.batch(0, 4)), pytest.raises(ModelError, match="attention mask"):
        packed_attention(nn.Identity(), *make_heads(4, "cpu"), torch.ones(4, 4))


def test_outside_of_a_packed_batch_it_is_refused() -> None:
    with pytest.raises(ModelError, match="packed batch"):
        packed_attention(nn.Identity(), *make_heads(4, "cpu"), None)


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
    heads = make_heads(4, "cpu")
    with running(unrelated([4]).batch(0, 4)):
        if refused:
            with pytest.raises(ModelError, match="sliding window"):
                packed_attention(layer, *heads, None)
        else:
            packed_attention(layer, *heads, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [False, True])
def test_kernel_on_the_cpu(dtype: torch.dtype, softcap: bool) -> None:
    assert choose_kernel(torch.device("cpu"), dtype, head_dim=64, softcap=softcap) == "blocks"


@pytest.mark.parametrize("window", [None, 16])
def test_the_shape_of_an_aligned_block_is_that_of_its_positions(window: int | None) -> None:
    """Whatever the batch: each query's place in its block, the block's keys, and which it sees."""
    trie = shared()
    query, key, _ = make_heads(trie.num_tokens, "cpu")
    seen: dict[int, set[tuple[int, bytes]]] = {}
    for start, stop in [(0, trie.num_tokens), (0, 33), (33, 170), (170, trie.num_tokens)]:
        batch = trie.batch(start, stop)
        plan = KERNELS["aligned_blocks"].plan(batch, None, window, query[0], key[0])
        queries = torch.cat([chunk.queries for chunk in plan.chunks])
        masks = {}
        size = 0
        for chunk in plan.chunks:
            blocks, _, rows, _ = chunk.mask.shape
            for output in range(size, size + len(chunk.queries)):
                inside = (output - size) // rows % (blocks * HEADS // KEY_HEADS)
                block = inside // (HEADS // KEY_HEADS)
                masks[output] = (output % rows, chunk.mask[block, 0, output % rows])
            size += len(chunk.queries)
        for token, output in enumerate(plan.order.view(-1, HEADS)[:, 0].tolist()):
            assert int(queries[output]) == token * HEADS
            row, mask = masks[output]
            position = int(batch.position_ids[token])
            seen.setdefault(position, set()).add((row, mask.numpy().tobytes()))
            assert int((mask == 0).sum()) == min(position + 1, window or position + 1)
    assert {len(shapes) for shapes in seen.values()} == {1}
