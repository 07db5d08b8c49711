"""Causal attention over sequences of different lengths that lie end to end in one row.

`packed_attention` is registered with transformers under `PACKED_ATTENTION`, so that every
decoder whose attention goes through transformers' `AttentionInterface` runs packed without a
change. The bounds of the nodes travel as a keyword argument of the base model's call, which
the decoder layers hand down; transformers builds no mask for a name it has no mask for.

Legend: N nodes, T tokens of the batch, K keys, H query heads, G key/value heads, D head size.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from batch_scorer.errors import ModelError
from batch_scorer.packing import PackedBatch

PACKED_ATTENTION = "batch_scorer_packed"
"""The name under which transformers knows `packed_attention`."""

BLOCK_QUERIES = 128
"""Queries that masked attention takes at a time, so that its memory grows with the length,
not its square. Measured on 2 cores in bfloat16, softcap, 2048-token sequences: 619 ms for
whole sequences, 145 ms for blocks of 256, 85 ms for 128 (SDPA without softcap: 80 ms)."""

SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
"""What `packed_attention` can do among the values of transformers' `config.layer_types`."""

HARMLESS_ARGUMENTS = frozenset(
    {
        "cache_position",
        "dropout",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Arguments that decoders hand to attention and that change nothing here: inference has no
dropout, there is no cache, positions are already in the queries and keys."""


@dataclass(frozen=True, slots=True)
class AttentionBounds:
    """Where each node's queries and keys lie, and the kernel that attends.

    Queries of node n are `[query_offsets[n]:query_offsets[n + 1]]` of the T tokens; its keys
    the same slice of `key_offsets` in the K keys that `key_index` gathers from the T tokens,
    or in the T tokens themselves when it is None.
    """

    kernel: "Kernel"
    query_offsets: Tensor
    """int32[N+1] on the device."""
    key_offsets: Tensor
    """int32[N+1] on the device."""
    key_index: Tensor | None
    """int64[K] on the device."""
    query_bounds: list[int]
    """`query_offsets` on the host, for kernels that loop over nodes."""
    key_bounds: list[int]
    """`key_offsets` on the host."""
    max_queries: int
    max_keys: int


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """What a decoder layer asks of its attention."""

    scale: float
    window: int | None
    """Keys that a query sees at most, its own included."""
    softcap: float | None


Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, AttentionBounds, LayerSettings], Tensor]
"""(query [T, H, D], key [K, G, D], value [K, G, D], bounds, layer) -> [T, H, D]. A query sees
the keys up to its own; the last query of a node is its last key."""


def attention_bounds(batch: PackedBatch, kernel: Kernel, device: torch.device) -> AttentionBounds:
    """The bounds of `batch` for `kernel`, on `device`."""
    query_offsets, key_offsets = batch.query_offsets, batch.key_offsets
    return AttentionBounds(
        kernel=kernel,
        query_offsets=to_device(torch.from_numpy(query_offsets), device),
        key_offsets=to_device(torch.from_numpy(key_offsets), device),
        key_index=(
            None
            if batch.key_index is None
            else to_device(torch.from_numpy(batch.key_index), device)
        ),
        query_bounds=query_offsets.tolist(),
        key_bounds=key_offsets.tolist(),
        max_queries=int((query_offsets[1:] - query_offsets[:-1]).max()),
        max_keys=int((key_offsets[1:] - key_offsets[:-1]).max()),
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; a copy to CUDA is pinned so that the host need not wait for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    bounds: AttentionBounds | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer as transformers calls it: [1, heads, T, D] in, [1, T, H, D] out.

    Raises ModelError where the layer asks for something this attention does not do, rather
    than leave it out.
    """
    _refuse_unsupported(module, attention_mask, sliding_window, is_causal, kwargs)
    if bounds is None:
        raise ModelError(
            f"{type(module).__name__} does not hand keyword arguments down to its attention, "
            "so its sequences cannot be packed; set attention to sdpa or eager"
        )
    queries, keys, values = (heads[0].transpose(0, 1) for heads in (query, key, value))
    size, value_size = queries.shape[-1], values.shape[-1]
    if value_size != size:  # the kernels want one head size (DeepSeek's values are smaller)
        values = pad(values, (0, size - value_size))
    if bounds.key_index is not None:
        keys, values = keys[bounds.key_index], values[bounds.key_index]
    scale = size**-0.5 if scaling is None else float(scaling)
    layer = LayerSettings(scale, sliding_window, softcap)
    output = bounds.kernel(queries, keys, values, bounds, layer)
    return output[None, ..., :value_size], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _refuse_unsupported(
    module: nn.Module,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    is_causal: bool | None,
    arguments: dict[str, Any],
) -> None:
    """Raise ModelError for a layer whose attention is not plain causal attention."""
    name = type(module).__name__
    cure = "its sequences cannot be packed; set attention to sdpa or eager"
    if attention_mask is not None:
        raise ModelError(f"{name} makes its own attention mask, so {cure}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ModelError(f"{name} attends to later tokens, so {cure}")
    asked = [key for key, given in arguments.items() if given is not None]
    if unknown := sorted(set(asked) - HARMLESS_ARGUMENTS):
        raise ModelError(f"{name} asks its attention for {', '.join(unknown)}, so {cure}")
    if sliding_window is None and _layer_slides(module):
        raise ModelError(f"{name} applies its sliding window through a mask only, so {cure}")


def _layer_slides(module: nn.Module) -> bool:
    """Whether the config gives this layer a sliding window."""
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return bool(layer_types[module.layer_idx] == "sliding_attention")
    return (
        getattr(config, "sliding_window", None) is not None
        and getattr(config, "use_sliding_window", None) is not False
    )


# Kernels


def sdpa_loop(
    query: Tensor, key: Tensor, value: Tensor, bounds: AttentionBounds, layer: LayerSettings
) -> Tensor:
    """torch's own attention, node by node: flash on the CPU, any device and dtype. No softcap."""
    if layer.softcap is not None:
        raise ModelError("scaled_dot_product_attention cannot apply attn_logit_softcapping")
    output = torch.empty_like(query)
    for own, keys in _node_slices(bounds):
        num_queries, num_keys = own.stop - own.start, keys.stop - keys.start
        if num_queries == num_keys and (layer.window is None or num_keys <= layer.window):
            output[own] = _sdpa(query[own], key[keys], value[keys], None, layer.scale)
            continue
        for block, seen, mask in _blocks(own, keys, layer.window, query.device):
            output[block] = _sdpa(query[block], key[seen], value[seen], mask, layer.scale)
    return output


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one node or block; without a mask it is causal, queries and keys alike."""
    output = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)


def eager_blocks(
    query: Tensor, key: Tensor, value: Tensor, bounds: AttentionBounds, layer: LayerSettings
) -> Tensor:
    """Plain matrix products with softcap, node by node: each step as transformers' eager."""
    output = torch.empty_like(query)
    group_shape = (key.shape[1], query.shape[1] // key.shape[1])  # (G, H/G)
    for own, keys in _node_slices(bounds):
        for block, seen, mask in _blocks(own, keys, layer.window, query.device):
            # [G, H/G, queries, D] and [G, 1, D, keys]: GQA by broadcasting, nothing repeated
            heads = query[block].view(-1, *group_shape, query.shape[2]).permute(1, 2, 0, 3)
            scores = torch.matmul(heads, key[seen].permute(1, 2, 0)[:, None]).mul_(layer.scale)
            if layer.softcap is not None:
                scores.div_(layer.softcap).tanh_().mul_(layer.softcap)
            scores.masked_fill_(~mask, float("-inf"))
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
            mixed = torch.matmul(weights, value[seen].transpose(0, 1)[:, None])
            output[block] = mixed.flatten(0, 1).transpose(0, 1)
    return output


def flash_attn_varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: AttentionBounds, layer: LayerSettings
) -> Tensor:
    """The flash-attn package: one call for all nodes."""
    function = _import_flash_attn()
    assert function is not None, "choose_kernel names this kernel only where it is installed"
    output: Tensor = function(
        query,
        key,
        value,
        cu_seqlens_q=bounds.query_offsets,
        cu_seqlens_k=bounds.key_offsets,
        max_seqlen_q=bounds.max_queries,
        max_seqlen_k=bounds.max_keys,
        softmax_scale=layer.scale,
        causal=True,
        # flash-attn counts the tokens before the query's own
        window_size=(-1, -1) if layer.window is None else (layer.window - 1, 0),
        softcap=0.0 if layer.softcap is None else layer.softcap,
    )
    return output


def torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: AttentionBounds, layer: LayerSettings
) -> Tensor:
    """torch's own variable-length flash attention: one call for all nodes. No softcap."""
    if layer.softcap is not None:
        raise ModelError("torch's varlen_attn cannot apply attn_logit_softcapping")
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 has no such parameter: its kernel takes fewer key/value heads unasked.
    has_gqa_flag = "enable_gqa" in inspect.signature(varlen_attn).parameters
    gqa: dict[str, Any] = {"enable_gqa": True} if has_gqa_flag else {}
    output = varlen_attn(
        query,
        key,
        value,
        bounds.query_offsets,
        bounds.key_offsets,
        bounds.max_queries,
        bounds.max_keys,
        scale=layer.scale,
        window_size=(-1 if layer.window is None else layer.window - 1, 0),
        **gqa,
    )
    assert isinstance(output, Tensor)
    return output


KERNELS: dict[str, Kernel] = {
    "flash_attn": flash_attn_varlen,
    "torch_varlen": torch_varlen,
    "sdpa_loop": sdpa_loop,
    "eager_blocks": eager_blocks,
}


def choose_kernel(device: torch.device, dtype: torch.dtype, *, head_dim: int, softcap: bool) -> str:
    """The name of the fastest kernel in `KERNELS` that is right for this model here."""
    if _flash_can_run(device, dtype, head_dim):
        if _import_flash_attn() is not None:
            return "flash_attn"
        if not softcap:
            return "torch_varlen"
    return "eager_blocks" if softcap else "sdpa_loop"


def _flash_can_run(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Flash kernels want an Ampere GPU or later, half precision and heads of at most 256."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@functools.cache
def _import_flash_attn() -> Callable[..., Tensor] | None:
    """flash-attn's varlen function, or None where the package is missing."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    function: Callable[..., Tensor] = importlib.import_module("flash_attn").flash_attn_varlen_func
    return function


def _node_slices(bounds: AttentionBounds) -> Iterator[tuple[slice, slice]]:
    """Each node's queries in T and keys in K."""
    queries, keys = bounds.query_bounds, bounds.key_bounds
    for node in range(len(queries) - 1):
        yield slice(queries[node], queries[node + 1]), slice(keys[node], keys[node + 1])


def _blocks(
    own: slice, keys: slice, window: int | None, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """A node's queries in blocks, each with the keys it can see and bool[queries, keys]."""
    ahead = keys.stop - own.stop  # a query at token t is the key at t + ahead
    for start in range(own.start, own.stop, BLOCK_QUERIES):
        block = slice(start, min(start + BLOCK_QUERIES, own.stop))
        first = keys.start if window is None else max(keys.start, start + ahead - window + 1)
        seen = slice(first, block.stop + ahead)
        places = torch.arange(start + ahead, seen.stop, device=device)[:, None]
        key_places = torch.arange(first, seen.stop, device=device)
        mask = key_places <= places
        if window is not None:
            mask &= key_places > places - window
        yield block, seen, mask
