"""Attention of a packed batch inside any decoder of transformers, and what the next batch needs.

`packed_attention` is registered with transformers under `PACKED_ATTENTION`, so that every decoder
whose attention goes through transformers' `AttentionInterface` runs over a token trie unchanged.
A `Pass` has what belongs to the batch and not to the layer, and is current while the body runs:
the keys and values that earlier batches computed, and those that the next batch needs.

Only the pooled tokens are read from the last layer, so it computes keys and values of all tokens,
and everything else for the pooled ones only (`pool_in_last_layer`).

Legend: T tokens of the batch, K keys, P pooled tokens, H query heads, G key/value heads, D head
size.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
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

KeysValues: TypeAlias = tuple[Tensor, Tensor]
"""One layer's keys and values: [G, K, D] each."""


class _KeysTaken(Exception):
    """Ends a layer's forward once its keys and values are known."""


class Pass:
    """The attention of one forward pass over `batch`, current inside a `with`.

    `carried` has the ancestors' keys and values, layer after layer; after the forward pass `kept`
    has those for the next batch. With `pools`, the last layer returns the pooled tokens' outputs
    only.
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
    ) -> None:
        self.batch = batch
        self.kept: list[KeysValues] = []
        # At least one token: layers do not accept none.
        self._pooled = batch.pooled_index if len(batch.pooled_index) else np.zeros(1, np.int64)
        self.pooled = to_device(self._pooled, device) if pools else None
        self._kernel = kernel
        self._carried = carried
        self._kept_keys = to_device(batch.kept_keys, device)
        self._plans: dict[tuple[int | None, bool], Any] = {}
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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: LayerSettings) -> Tensor:
        """[T, H, D] of query [H, T, D], key and value [G, T, D]; after `taking_keys` of the
        pooled tokens, P in place of T."""
        if self._taken is None:
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
        return self._kernel.attend(query, key, value, plan, layer)

    def _plan(self, window: int | None, query: Tensor, key: Tensor) -> Any:
        pools = self._taken is not None
        if (window, pools) not in self._plans:
            tokens = self._pooled if pools else None
            plan = self._kernel.plan(self.batch, tokens, window, query, key)
            self._plans[window, pools] = plan
        return self._plans[window, pools]


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
        tokens = current.pooled
        if tokens is None:
            return forward(*args, **kwargs)
        with current.taking_keys():
            forward(*args, **kwargs)
        num_tokens = current.batch.num_tokens
        return forward(
            *(_narrowed(value, tokens, num_tokens) for value in args),
            **{name: _narrowed(value, tokens, num_tokens) for name, value in kwargs.items()},
        )

    layer.forward = pooled_forward


def _narrowed(value: Any, tokens: Tensor, num_tokens: int) -> Any:
    """The chosen tokens' part of `value`, where that is [1, T, …] or a tuple of such."""
    if isinstance(value, tuple):
        return tuple(_narrowed(part, tokens, num_tokens) for part in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == num_tokens:
        return value.index_select(1, tokens)
    return value


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
