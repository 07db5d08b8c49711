"""Attention of a packed batch inside any decoder of transformers, and what the next batch needs.

`packed_attention` is registered with transformers under `PACKED_ATTENTION`, so that every decoder
whose attention goes through transformers' `AttentionInterface` runs over a token trie unchanged.
A `Pass` has what belongs to the batch and not to the layer, and is current while the body runs:
the keys and values that earlier batches computed, and those that the next batch needs.

Only the pooled tokens are read from the last layer, so it computes keys and values of all tokens,
and everything else for the pooled ones only (`pool_in_last_layer`).

Legend: T tokens of the batch, R rows of the forward pass, K keys, P pooled tokens, H query heads,
G key/value heads, D head size.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface

from batch_scorer.backends.kernels import Kernel, LayerSettings, to_device
from batch_scorer.backends.packing import PackedBatch
from batch_scorer.errors import ModelError

PACKED_ATTENTION = "batch_scorer_packed"
"""The name under which transformers knows `packed_attention`."""

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
"""Arguments that decoders pass to attention and that have no effect here: inference has no
dropout, there is no cache, and queries and keys already contain the positions."""

POOLED_ROWS = 64
"""Pooled tokens that go through the last layer together where shapes are fixed."""

KeysValues: TypeAlias = tuple[Tensor, Tensor]
"""One layer's keys and values: [G, K, D] each."""


class _KeysTaken(Exception):
    """Ends a layer's forward once its keys and values are known."""


class Pass:
    """The attention of one forward pass over `batch`, current inside a `with`.

    `carried` has the ancestors' keys and values, layer after layer; after the forward pass `kept`
    has those for the next batch. With `pools`, the last layer returns the pooled tokens' outputs
    only.

    With `num_rows` the forward pass has so many rows, of which the batch's tokens are the first,
    and the last layer is given POOLED_ROWS pooled tokens at a time, the last one as often as it
    takes: then products of matrices have the same shapes in every batch.
    """

    _of_thread = threading.local()

    def __init__(
        self,
        batch: PackedBatch,
        kernel: Kernel,
        device: torch.device,
        carried: list[KeysValues],
        *,
        pools: bool,
        num_rows: int | None = None,
    ) -> None:
        self.batch = batch
        self.kept: list[KeysValues] = []
        # At least one token: layers do not accept none.
        pooled = batch.pooled_index if len(batch.pooled_index) else np.zeros(1, np.int64)
        if num_rows is not None:
            pooled = np.pad(pooled, (0, -len(pooled) % POOLED_ROWS), mode="edge")
            self._parts = np.split(pooled, len(pooled) // POOLED_ROWS)
        else:
            self._parts = [pooled]
        self.pools = pools
        self.num_rows = num_rows or batch.num_tokens
        self._device = device
        self._kernel = kernel
        self._carried = carried
        self._kept_keys = to_device(batch.kept_keys, device)
        self._plans: dict[tuple[int | None, int | None], Any] = {}
        self._part: int | None = None
        self._takes_keys = False
        self._taken: KeysValues | None = None

    def __enter__(self) -> Self:
        self._of_thread.current = self
        return self

    def __exit__(self, *_: object) -> None:
        self._of_thread.current = None

    @classmethod
    def current(cls) -> "Pass":
        """The current pass of this thread. Raises ModelError where there is none."""
        current: Pass | None = getattr(cls._of_thread, "current", None)
        if current is None:
            raise ModelError("a packed model runs over a packed batch only")
        return current

    @contextmanager
    def taking_keys(self) -> Iterator[None]:
        """A layer's forward that ends once its keys and values are known."""
        self._takes_keys = True
        try:
            yield
        except _KeysTaken:
            pass
        finally:
            self._takes_keys = False

    def pooled_parts(self) -> Iterator[Tensor]:
        """The pooled tokens, part after part; attention is for the one that was given last."""
        for part, tokens in enumerate(self._parts):
            self._part = part
            yield to_device(tokens, self._device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: LayerSettings) -> Tensor:
        """[R, H, D] of query [H, R, D], key and value [G, R, D], R rows; after `taking_keys` of a
        part of the pooled tokens."""
        num_rows, num_tokens = query.shape[1], self.batch.num_tokens
        if self._taken is None:
            query, key, value = (tensor[:, :num_tokens] for tensor in (query, key, value))
            if self.batch.num_carried:
                before = self._carried[len(self.kept)]
                key, value = torch.cat([before[0], key], 1), torch.cat([before[1], value], 1)
            kept = (key.index_select(1, self._kept_keys), value.index_select(1, self._kept_keys))
            self.kept.append(kept)
            if self._takes_keys:
                self._taken = key, value
                raise _KeysTaken
        else:
            key, value = self._taken
        plan = self._plan(layer.window, query, key)
        output = self._kernel.attend(query, key, value, plan, layer)
        missing = num_rows - len(output)
        return pad(output, (0, 0, 0, 0, 0, missing)) if missing else output

    def _plan(self, window: int | None, query: Tensor, key: Tensor) -> Any:
        if (window, self._part) not in self._plans:
            tokens = None if self._part is None else self._parts[self._part]
            plan = self._kernel.plan(self.batch, tokens, window, query, key)
            self._plans[window, self._part] = plan
        return self._plans[window, self._part]


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer as transformers calls it: [1, heads, T, D] in, [1, T, H, D] out.

    Raises ModelError where the layer needs something that this attention does not do.
    """
    if not torch.compiler.is_compiling():  # compiled layers have run uncompiled once
        _refuse_unsupported(module, attention_mask, sliding_window, is_causal, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return _attend(query, key, value, scale, sliding_window, softcap), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


# An operator of torch, so that compiled layers call it and do not trace into it.
@torch.library.custom_op("batch_scorer::attend", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    layer = LayerSettings(scale, window, softcap)
    return Pass.current().attend(query[0], key[0], value[0], layer)[None]


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_settings: float | None) -> Tensor:
    _, heads, num_tokens, _ = query.shape
    return query.new_empty(1, num_tokens, heads, value.shape[3])


def pool_in_last_layer(layer: nn.Module) -> None:
    """Make `layer`, a body's last, return the pooled tokens' outputs only.

    No later layer attends to its outputs, so of the other tokens only keys and values are needed.
    """
    forward: Callable[..., Any] = layer.forward

    def pooled_forward(*args: Any, **kwargs: Any) -> Any:
        current = Pass.current()
        if not current.pools:
            return forward(*args, **kwargs)
        with current.taking_keys():
            forward(*args, **kwargs)
        outputs = [
            forward(
                *(_narrowed(value, tokens, current.num_rows) for value in args),
                **{
                    name: _narrowed(value, tokens, current.num_rows)
                    for name, value in kwargs.items()
                },
            )
            for tokens in current.pooled_parts()
        ]
        return _joined(outputs)

    layer.forward = pooled_forward


def _narrowed(value: Any, tokens: Tensor, num_rows: int) -> Any:
    """The chosen tokens' part of `value`, where that is [1, R, …] or a tuple of such."""
    if isinstance(value, tuple):
        return tuple(_narrowed(part, tokens, num_rows) for part in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == num_rows:
        return value.index_select(1, tokens)
    return value


def _joined(outputs: list[Any]) -> Any:
    """What a layer returns for parts of the tokens, [1, P, …] or a tuple that begins with it, as
    one."""
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], tuple):
        return (torch.cat([output[0] for output in outputs], 1), *outputs[0][1:])
    return torch.cat(outputs, 1)


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
        raise ModelError(f"{name} passes {', '.join(unknown)} to its attention, so {cure}")
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
