"""Causal attention of a packed batch, on any device: one plan per batch, one call per layer.

A kernel does not know which sequence a token belongs to. Its plan lists the keys of each query:
a token's ancestors in the trie and the token itself (`packing.PackedBatch`).

Legend: T tokens of a batch, K its keys (T and those carried into it), N query tokens, H query
heads, G key/value heads, D head size of queries and keys, E that of values.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from batch_scorer.backends.packing import Int64Array, PackedBatch
from batch_scorer.errors import ModelError

BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """The settings of a decoder layer's attention."""

    scale: float
    window: int | None
    """Most keys that a query sees, its own included."""
    softcap: float | None


@dataclass(frozen=True, slots=True)
class Kernel:
    """`plan(batch, tokens, window, query, key)`: what `attend` needs to know for such queries and
    keys; they are those of all tokens, or of the ascending int64[N] `tokens` only.

    `attend(query [H, N, D], key [G, K, D], value [G, K, E], plan, layer)` gives [N, H, E].
    """

    plan: Callable[[PackedBatch, Int64Array | None, int | None, Tensor, Tensor], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any, LayerSettings], Tensor]


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """`array` on `device`; a copy to CUDA is pinned so that the host need not wait for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


# Blocks: plain matrix products

BLOCK_QUERIES = 64
"""Consecutive tokens whose keys are gathered together. 32 make small matrix products, 128 compute
more scores that the mask hides."""

CHUNK_SCORES = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Most attention scores in memory at a time. On a CPU they should stay in its cache."""

_KEYS_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class BlockChunk:
    """B blocks of Q queries that are computed together, L keys each, padded on the left."""

    queries: Tensor
    """int64[G * B * H/G * Q], rows of the queries as [N * H, D], in the order in which the matrix
    products take them; a short block repeats its last query."""
    keys: Tensor
    """int64[G * B * L], rows of the keys as [K * G, D]; a block with few repeats its first."""
    mask: Tensor
    """[B, 1, Q, L], 0 where the query sees the key, otherwise -inf."""


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """`order` is int64[N * H]: where the chunks' outputs, end to end, hold each query's."""

    chunks: list[BlockChunk]
    order: Tensor


def plan_blocks(
    batch: PackedBatch,
    tokens: Int64Array | None,
    window: int | None,
    query: Tensor,
    key: Tensor,
) -> BlockPlan:
    """The queries in blocks of consecutive tokens, those with the most keys first."""
    wanted = np.arange(batch.num_tokens) if tokens is None else tokens
    starts = (np.unique(wanted // BLOCK_QUERIES) * BLOCK_QUERIES).tolist()
    bounds = np.searchsorted(wanted, [*starts, batch.num_tokens]).tolist()
    blocks = [
        _block(batch, start, first, wanted[first:stop], ancestors, window)
        for start, (first, stop), ancestors in zip(
            starts, pairwise(bounds), batch.ancestors(starts), strict=True
        )
    ]
    blocks.sort(key=lambda block: -len(block.keys))
    heads, groups, device = len(query), len(key), query.device
    chunks: list[BlockChunk] = []
    order = np.empty(len(wanted) * heads, np.int64)
    size = 0
    while blocks:
        num_keys = -(-len(blocks[0].keys) // _KEYS_MULTIPLE) * _KEYS_MULTIPLE
        num_queries = min(BLOCK_QUERIES, len(wanted))
        fitting = max(1, CHUNK_SCORES[device.type] // (heads * num_queries * num_keys))
        queries, keys, visible = _filled(blocks[:fitting], num_keys)
        blocks = blocks[fitting:]
        query_rows = _query_rows(queries, heads, groups)
        order[query_rows] = np.arange(size, size + query_rows.size).reshape(query_rows.shape)
        size += query_rows.size
        chunks.append(_chunk(query_rows, keys, visible, groups, query))
    return BlockPlan(chunks, to_device(order, device))


def _query_rows(queries: Int64Array, heads: int, groups: int) -> Int64Array:
    """int64[G, B, H/G, Q], rows of the queries as [N * H, D], of queries [B, Q]."""
    return queries[:, None] * heads + np.arange(heads).reshape(groups, 1, -1, 1)


def _chunk(
    query_rows: Int64Array, keys: Int64Array, visible: BoolArray, groups: int, query: Tensor
) -> BlockChunk:
    """The chunk of `_query_rows`, of keys [B, L] and visibility [B, Q, L]."""
    key_rows = keys * groups + np.arange(groups)[:, None, None]  # [G, B, L]
    mask = np.where(visible, np.float32(0), np.float32("-inf"))
    return BlockChunk(
        to_device(query_rows.ravel(), query.device),
        to_device(key_rows.ravel(), query.device),
        to_device(mask, query.device).to(query.dtype)[:, None],
    )


@dataclass(frozen=True, slots=True)
class _Block:
    queries: Int64Array
    """int64[Q]"""
    keys: Int64Array
    """int64[L]"""
    visible: BoolArray
    """bool[Q, L]"""


def _block(
    batch: PackedBatch,
    start: int,
    first_query: int,
    tokens: Int64Array,
    ancestors: Int64Array,
    window: int | None,
) -> _Block:
    """The block of `tokens`, all of which lie within BLOCK_QUERIES after `start`."""
    stop = int(tokens[-1]) + 1
    positions = batch.position_ids[start:stop]
    keys = np.concatenate([ancestors, batch.num_carried + np.arange(start, stop)])
    key_positions = np.concatenate([np.arange(len(ancestors)), positions])
    # A token sees an earlier one unless a position between them falls back to it or below.
    lowest = np.minimum.accumulate(positions)
    sees_ancestors = np.arange(len(ancestors)) < lowest[:, None]
    visible = np.concatenate([sees_ancestors, _own_visible(positions)], axis=1)
    visible = visible[tokens - start]
    if window is not None:
        query_positions = positions[tokens - start]
        visible &= query_positions[:, None] - key_positions < window
        seen = visible.any(axis=0)
        keys, visible = keys[seen], visible[:, seen]
    return _Block(np.arange(first_query, first_query + len(tokens)), keys, visible)


def _own_visible(positions: npt.NDArray[np.int32]) -> BoolArray:
    """bool[n, n]: which of n consecutive tokens see which."""
    causal = np.tri(len(positions), dtype=np.bool_)
    if bool((np.diff(positions) == 1).all()):
        return causal
    after = np.tri(len(positions), k=-1, dtype=np.bool_)
    between = np.where(after, positions[:, None], np.iinfo(np.int32).max)
    return causal & (np.minimum.accumulate(between, axis=0) > positions)


def _filled(blocks: list[_Block], num_keys: int) -> tuple[Int64Array, Int64Array, BoolArray]:
    """Queries [B, Q], keys [B, L] and visibility [B, Q, L] of blocks of different sizes."""
    num_queries = max(len(block.queries) for block in blocks)
    queries = np.empty((len(blocks), num_queries), np.int64)
    keys = np.empty((len(blocks), num_keys), np.int64)
    visible = np.zeros((len(blocks), num_queries, num_keys), np.bool_)
    for row, block in enumerate(blocks):
        filled = len(block.queries)
        ahead = num_keys - len(block.keys)
        queries[row, :filled], queries[row, filled:] = block.queries, block.queries[-1]
        keys[row, :ahead], keys[row, ahead:] = block.keys[0], block.keys
        visible[row, :filled, ahead:] = block.visible
        visible[row, filled:, ahead:] = block.visible[-1]
    return queries, keys, visible


ALIGNED_POSITIONS = 32
"""Positions of an aligned block; its number of keys is a multiple of as many."""

ALIGNED_BLOCKS = 32
"""Most of a chunk on CUDA, where every chunk of one width has as many: what lacks is repeated."""


def plan_aligned_blocks(
    batch: PackedBatch,
    tokens: Int64Array | None,
    window: int | None,
    query: Tensor,
    key: Tensor,
) -> BlockPlan:
    """The queries in blocks of one sequence each, cut at multiples of ALIGNED_POSITIONS.

    A block has a row for each of its positions, and its keys in order, from the sequence's start or
    the window's. So a token's place in its block, the block's shape, and the order in which a
    product is added up depend on the token's position alone, whatever else the batch holds. Rows
    and keys of positions that are not there repeat one that is, and are not read. `tokens` may
    repeat one.
    """
    wanted = np.arange(batch.num_tokens) if tokens is None else tokens
    slots, rows = np.divmod(batch.position_ids[wanted].astype(np.int64), ALIGNED_POSITIONS)
    runs = np.searchsorted(batch.run_starts, wanted, side="right")
    is_first = (np.diff(runs, prepend=-1) != 0) | (np.diff(slots, prepend=-1) != 0)
    block_of = np.cumsum(is_first) - 1  # int64[N]
    firsts = np.flatnonzero(is_first)
    lasts = np.append(firsts[1:], len(wanted)) - 1
    first_rows = slots[firsts] * ALIGNED_POSITIONS
    first_keys = np.zeros_like(first_rows)
    if window is not None:
        first_keys = np.maximum(0, first_rows - window + 1)
    spans = first_rows + ALIGNED_POSITIONS - first_keys
    num_keys = -(-spans // ALIGNED_POSITIONS) * ALIGNED_POSITIONS
    paths = [
        np.concatenate([ancestors, batch.num_carried + np.arange(start, stop)])[first_key:]
        for ancestors, start, stop, first_key in zip(
            batch.ancestors(wanted[firsts].tolist()),
            wanted[firsts].tolist(),
            (wanted[lasts] + 1).tolist(),
            first_keys.tolist(),
            strict=True,
        )
    ]
    heads, groups, device = len(query), len(key), query.device
    chunks: list[BlockChunk] = []
    order = np.empty((len(wanted), heads), np.int64)
    size = 0
    for width in np.unique(num_keys).tolist():
        alike = np.flatnonzero(num_keys == width)
        fitting = max(1, CHUNK_SCORES[device.type] // (heads * ALIGNED_POSITIONS * width))
        if device.type == "cuda":
            fitting = min(fitting, ALIGNED_BLOCKS)
        for start in range(0, len(alike), fitting):
            blocks = alike[start : start + fitting]
            inside = np.flatnonzero(np.isin(block_of, blocks))
            places = np.searchsorted(blocks, block_of[inside])  # of their blocks in the chunk
            queries = np.repeat(firsts[blocks][:, None], ALIGNED_POSITIONS, axis=1)
            queries[places, rows[inside]] = inside
            keys = np.stack([np.resize(paths[block], width) for block in blocks.tolist()])
            query_positions = first_rows[blocks][:, None] + np.arange(ALIGNED_POSITIONS)
            key_positions = first_keys[blocks][:, None] + np.arange(width)
            distances = query_positions[:, :, None] - key_positions[:, None]
            visible = (distances >= 0) & (distances < (window or np.iinfo(np.int64).max))
            if device.type == "cuda":  # cuBLAS chooses a kernel by the number of products, too
                queries, keys, visible = (
                    np.resize(array, (fitting, *array.shape[1:]))
                    for array in (queries, keys, visible)
                )
            query_rows = _query_rows(queries, heads, groups)
            chunks.append(_chunk(query_rows, keys, visible, groups, query))
            # Of [G, B, H/G, Q], the outputs of all heads of each query.
            outputs = np.arange(size, size + query_rows.size).reshape(query_rows.shape)
            order[inside] = outputs[:, places, :, rows[inside]].reshape(len(inside), heads)
            size += outputs.size
    return BlockPlan(chunks, to_device(order.ravel(), device))


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, layer: LayerSettings
) -> Tensor:
    """Scores, softmax in float32 and mixing, each rounded as transformers' eager attention does."""
    (heads, num_queries, size), groups, value_size = query.shape, len(key), value.shape[2]
    query, key, value = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
    rows = sum(len(chunk.queries) for chunk in plan.chunks)
    output, nothing = query.new_empty(rows, value_size), query.new_empty(1, 1, 1)
    done = 0
    for chunk in plan.chunks:
        blocks, _, num_rows, num_keys = chunk.mask.shape
        # [G * B, H/G * Q, D] against [G * B, L, D]: the heads of a group share their keys.
        queries = query.index_select(0, chunk.queries).view(groups * blocks, -1, size)
        keys = key.index_select(0, chunk.keys).view(groups * blocks, num_keys, size)
        scores = torch.baddbmm(nothing, queries, keys.transpose(1, 2), beta=0, alpha=layer.scale)
        if layer.softcap is not None:
            scores.div_(layer.softcap).tanh_().mul_(layer.softcap)
        scores.view(groups, blocks, -1, num_rows, num_keys).add_(chunk.mask)
        weights = torch.softmax(scores, dim=-1)
        values = value.index_select(0, chunk.keys).view(groups * blocks, num_keys, value_size)
        mixed = output[done : done + len(chunk.queries)]
        torch.bmm(weights, values, out=mixed.view(groups * blocks, -1, value_size))
        done += len(chunk.queries)
    return output.index_select(0, plan.order).view(num_queries, heads, value_size)


# Flash attention: one call for all runs


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Queries in runs of one sequence; each sees its ancestors and what comes before it in the
    run: the keys of a run end to end, causal, aligned at the bottom right."""

    query_offsets: Tensor
    """int32[runs + 1], in the N queries."""
    key_offsets: Tensor
    """int32[runs + 1], in the keys that `key_index` gathers."""
    key_index: Tensor | None
    """int64, keys of run after run; None where these are the batch's keys as they lie."""
    most_queries: int
    most_keys: int


def plan_runs(
    batch: PackedBatch,
    tokens: Int64Array | None,
    window: int | None,
    query: Tensor,
    key: Tensor,
) -> RunPlan:
    """Runs as they are in the batch; with `tokens` each of these is a run of its own."""
    if tokens is None:
        starts = batch.run_starts
        stops = np.append(starts[1:], batch.num_tokens)
    else:
        starts, stops = tokens, tokens + 1
    keys = [
        np.concatenate([ancestors, batch.num_carried + np.arange(start, stop)])
        for start, stop, ancestors in zip(
            starts.tolist(), stops.tolist(), batch.ancestors(starts.tolist()), strict=True
        )
    ]
    index = np.concatenate(keys)
    as_they_lie = len(index) == batch.num_carried + batch.num_tokens and bool(
        (index == np.arange(len(index))).all()
    )
    counts = [stops - starts, np.array([len(run) for run in keys])]
    query_offsets, key_offsets = (
        np.concatenate([[0], np.cumsum(count)]).astype(np.int32) for count in counts
    )
    return RunPlan(
        query_offsets=to_device(query_offsets, query.device),
        key_offsets=to_device(key_offsets, query.device),
        key_index=None if as_they_lie else to_device(index, query.device),
        most_queries=int(counts[0].max()),
        most_keys=int(counts[1].max()),
    )


def _in_runs(
    query: Tensor, key: Tensor, value: Tensor, plan: RunPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, H, D], [keys, G, D] and [keys, G, D]: gathered, the values padded to the head size."""
    if value.shape[2] != query.shape[2]:  # DeepSeek's values are smaller
        value = pad(value, (0, query.shape[2] - value.shape[2]))
    query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    if plan.key_index is not None:
        key, value = key.index_select(0, plan.key_index), value.index_select(0, plan.key_index)
    return query, key, value


def flash_attn_varlen(
    query: Tensor, key: Tensor, value: Tensor, plan: RunPlan, layer: LayerSettings
) -> Tensor:
    """The flash-attn package."""
    function = _import_flash_attn()
    assert function is not None, "choose_kernel names this kernel only where it is installed"
    output: Tensor = function(
        *_in_runs(query, key, value, plan),
        cu_seqlens_q=plan.query_offsets,
        cu_seqlens_k=plan.key_offsets,
        max_seqlen_q=plan.most_queries,
        max_seqlen_k=plan.most_keys,
        softmax_scale=layer.scale,
        causal=True,
        # flash-attn counts the tokens before the query's own
        window_size=(-1, -1) if layer.window is None else (layer.window - 1, 0),
        softcap=0.0 if layer.softcap is None else layer.softcap,
    )
    return output[..., : value.shape[2]]


def torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: RunPlan,
    layer: LayerSettings,
    **arguments: Any,
) -> Tensor:
    """torch's own variable-length flash attention, with further `arguments`. No softcap."""
    if layer.softcap is not None:
        raise ModelError("torch's varlen_attn cannot apply attn_logit_softcapping")
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 has no such parameter: its kernel takes fewer key/value heads unasked.
    if _varlen_takes("enable_gqa"):
        arguments["enable_gqa"] = True
    output = varlen_attn(
        *_in_runs(query, key, value, plan),
        plan.query_offsets,
        plan.key_offsets,
        plan.most_queries,
        plan.most_keys,
        scale=layer.scale,
        window_size=(-1 if layer.window is None else layer.window - 1, 0),
        **arguments,
    )
    assert isinstance(output, Tensor)
    return output[..., : value.shape[2]]


KERNELS: dict[str, Kernel] = {
    "flash_attn": Kernel(plan_runs, flash_attn_varlen),
    "torch_varlen": Kernel(plan_runs, torch_varlen),
    "torch_varlen_unsplit": Kernel(plan_runs, functools.partial(torch_varlen, num_splits=1)),
    "blocks": Kernel(plan_blocks, attend_blocks),
    "aligned_blocks": Kernel(plan_aligned_blocks, attend_blocks),
}


def choose_kernel(
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int,
    softcap: bool,
    invariant: bool = False,
) -> str:
    """The name of the fastest kernel in `KERNELS` that is right for this model here.

    `invariant`: one whose outputs for a token have the same bits in any batch.
    """
    if invariant:
        can_flash = _flash_can_run(device, dtype, head_dim) and _varlen_takes("num_splits")
        return "torch_varlen_unsplit" if can_flash and not softcap else "aligned_blocks"
    if _flash_can_run(device, dtype, head_dim):
        if _import_flash_attn() is not None:
            return "flash_attn"
        if not softcap:
            return "torch_varlen"
    return "blocks"


def _flash_can_run(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Flash kernels want an Ampere GPU or later, half precision and heads of at most 256."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@functools.cache
def _varlen_takes(argument: str) -> bool:
    """Whether this torch's `varlen_attn` has an argument of this name."""
    from torch.nn.attention.varlen import varlen_attn

    return argument in inspect.signature(varlen_attn).parameters


@functools.cache
def _import_flash_attn() -> Callable[..., Tensor] | None:
    """flash-attn's varlen function, or None where the package is missing."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    function: Callable[..., Tensor] = importlib.import_module("flash_attn").flash_attn_varlen_func
    return function
