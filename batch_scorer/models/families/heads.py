"""Parts of heads. All compute in float32.

Legend: S sequences, k pooled tokens per sequence, H hidden, A named attributes.
"""

from collections.abc import Callable, Mapping
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

from batch_scorer.errors import ModelError
from batch_scorer.models.adapter import ModelConfig


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with these float32 tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def mlp(tensors: Mapping[str, Tensor], prefix: str, activation: type[nn.Module]) -> nn.Sequential:
    """The linear layers `<prefix><index>.weight` (and `.bias`) in the order of their indices, with
    an activation between any two.

    The indices are those of the checkpoint's `nn.Sequential`; other modules between its layers than
    the activation have no tensors and do nothing in evaluation (dropout).
    """
    indices = sorted(
        int(name.removeprefix(prefix).removesuffix(".weight"))
        for name in tensors
        if name.startswith(prefix) and name.endswith(".weight")
    )
    layers = [
        linear(tensors[f"{prefix}{i}.weight"], tensors.get(f"{prefix}{i}.bias")) for i in indices
    ]
    for before, after in pairwise(layers):
        if before.out_features != after.in_features:
            raise ModelError(f"the layers {prefix}* do not fit each other")
    alternating = chain.from_iterable((activation(), layer) for layer in layers)
    return nn.Sequential(*list(alternating)[1:])


class LastTokenHead(nn.Module):
    """`score` applied to the last pooled token: [S, k, H] → [S, its outputs], mostly one."""

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score = score

    def forward(self, hidden: Tensor) -> Tensor:
        score: Tensor = self.score(hidden[:, -1])
        return score


def linear_head(name: str) -> Callable[[Mapping[str, Tensor], ModelConfig], nn.Module]:
    """Builds heads with one linear layer, `<name>.weight` (and `.bias`), on the last token."""

    def build(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
        return LastTokenHead(linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")))

    return build


class Logits(nn.Module):
    """A language model's logits: [K, H] → [K, its vocabulary].

    `softcap` and `scale` are what the model does to them; 0 and 1 do nothing.
    """

    def __init__(self, layer: nn.Linear, softcap: float, scale: float) -> None:
        super().__init__()
        self.layer = layer
        self.softcap = softcap
        self.scale = scale

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.layer(hidden) * self.scale
        return (logits / self.softcap).tanh() * self.softcap if self.softcap else logits


def vocabulary_head(tensors: Mapping[str, Tensor], config: ModelConfig) -> Logits:
    """The whole `lm_head`."""
    layer = linear(tensors["lm_head.weight"], tensors.get("lm_head.bias"))
    # Cohere multiplies its logits by an entry, Granite divides them by another one.
    scale = float(config.get("logit_scale") or 1) / float(config.get("logits_scaling") or 1)
    return Logits(layer, float(config.get("final_logit_softcapping") or 0), scale)


class Activated(nn.Module):
    """A logit after an activation, a module of torch.nn by name, and the logit itself: [S, 1] →
    [S, 2]."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.activation: nn.Module = getattr(nn, name)()

    def forward(self, logit: Tensor) -> Tensor:
        return torch.cat([self.activation(logit), logit], dim=-1)


def difference_head(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    """The first of two read rows of `lm_head` minus the second, on the last token: the logit of one
    token minus that of another, [S, k, H] → [S, 1]."""
    rows = tensors["lm_head.weight"]
    return LastTokenHead(linear(rows[:1] - rows[1:]))


class ClassProbability(nn.Module):
    """One class's share among all, for every pooled token: [K, H] → [K, 1]."""

    def __init__(self, logits: nn.Module, wanted: int) -> None:
        super().__init__()
        self.logits = logits
        self.wanted = wanted

    def forward(self, hidden: Tensor) -> Tensor:
        shares: Tensor = self.logits(hidden).softmax(dim=-1)
        return shares[:, self.wanted : self.wanted + 1]
