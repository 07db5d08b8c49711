"""Linear layers whose weights are stored in the layout of the CPU's matrix kernels.

oneDNN reorders a plain weight at every call. torch does the reordering ahead of time only where
a whole model is compiled with its weights frozen in; these are the operators it uses for that.
"""

import itertools
import weakref
from typing import cast

import torch
from torch import Tensor, nn

_numbers = itertools.count()
_layers: "weakref.WeakValueDictionary[int, ReorderedLinear]" = weakref.WeakValueDictionary()


class ReorderedLinear(nn.Module):
    """A linear layer whose weight is reordered once; the products are the same bit for bit."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.weight: Tensor = reorder(linear.weight.detach(), None)
        self.bias = linear.bias
        self.out_features = linear.out_features
        # A compiled graph cannot contain such a weight, so it gets the layer's number. That is a
        # tensor, because a Python number would be a constant, and every layer a separate graph.
        self.number = torch.tensor(next(_numbers))
        _layers[int(self.number)] = self

    def forward(self, states: Tensor) -> Tensor:
        """[..., out] of [..., in]."""
        if torch.compiler.is_compiling():
            return cast(Tensor, _reordered_linear(states, self.number, self.out_features))
        return self.product(states)

    def product(self, states: Tensor) -> Tensor:
        """[..., out] of [..., in], outside of any graph."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            states, self.weight, self.bias, "none", [], ""
        )
        return product


@torch.library.custom_op("batch_scorer::reordered_linear", mutates_args=())
def _reordered_linear(states: Tensor, number: Tensor, out_features: int) -> Tensor:
    return _layers[int(number)].product(states)


@_reordered_linear.register_fake
def _(states: Tensor, number: Tensor, out_features: int) -> Tensor:
    return states.new_empty(*states.shape[:-1], out_features)


def reorder_linears(model: nn.Module) -> int:
    """Replace every plain linear layer by a `ReorderedLinear`; returns their number.

    Only where the CPU multiplies bfloat16 in hardware: another library computes float32, and it
    reads plain weights.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16
    ]
    if not (found and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return 0
    for parent, name, child in found:
        setattr(parent, name, ReorderedLinear(child))
    return len(found)
