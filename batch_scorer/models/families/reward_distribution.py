"""Distributions of rewards, folded into a score: QRM, URM, LDL.

Ported from their published forwards (allenai/reward-bench `models/qrm.py` and `ldlreward.py`,
sgl-project/sglang `models/llama_reward.py`).

Legend: S sequences, H hidden, A attributes, Q quantiles, B bins.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batch_scorer.models.adapter import Adapter, Body, ModelConfig
from batch_scorer.models.families.armorm import ATTRIBUTES, PROMPT_END, PROMPT_END_TOKENS
from batch_scorer.models.families.attribute_regression import HELPSTEER
from batch_scorer.models.families.heads import linear, mlp

_GATE_LINEAR, _GATE_NORM, _GATE_OUT = (0, 3, 6), (2, 5, 8), 9
_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
_LDL_BINS = 10


class QuantileRewards(nn.Module):
    """[S, 2, H] (end of prompt, last token) → [S, 1 + A]: the score, the transformed rewards."""

    def __init__(self, tensors: Mapping[str, Tensor], temperature: float) -> None:
        super().__init__()
        self.transform: Tensor
        self.logit_scale: Tensor
        self.regression = linear(tensors["regression_layer.weight"])  # [A * Q, H]
        self.register_buffer("transform", tensors["reward_transform_matrix"])  # [A, A]
        self.register_buffer("logit_scale", tensors["gating.logit_scale"])
        layers: list[nn.Module] = []
        for at, norm in zip(_GATE_LINEAR, _GATE_NORM, strict=True):
            layers += [linear(tensors[f"gating.layers.{at}.weight"]), nn.ReLU()]
            layers.append(_batch_norm(tensors, f"gating.layers.{norm}."))
        out = f"gating.layers.{_GATE_OUT}."
        layers.append(linear(tensors[f"{out}weight"], tensors[f"{out}bias"]))
        self.gate = nn.Sequential(*layers)
        self.temperature = temperature

    def forward(self, hidden: Tensor) -> Tensor:
        prompt_end, last = hidden.unbind(1)
        weights = F.softmax(self.gate(prompt_end) / self.temperature, dim=-1) * self.logit_scale
        means = self.regression(last).unflatten(-1, (len(self.transform), -1)).mean(-1)  # [S, A]
        rewards = means @ self.transform
        return torch.cat([(weights * rewards).sum(-1, keepdim=True), rewards], dim=-1)


def _batch_norm(tensors: Mapping[str, Tensor], prefix: str) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(len(tensors[f"{prefix}weight"]))
    layer.load_state_dict({part: tensors[prefix + part] for part in _NORM_PARTS}, strict=False)
    return layer  # `load_head` puts it in evaluation: a score must not depend on its batch


class MeansAndSpreads(nn.Module):
    """[S, 1, H] → [S, 1 + A]: weighted sum of the means, the means. The spreads are not used."""

    def __init__(self, score: nn.Module, weights: nn.Module) -> None:
        super().__init__()
        self.score = score
        self.weights = weights

    def forward(self, hidden: Tensor) -> Tensor:
        last = hidden[:, -1]
        means = self.score(last)[:, 0::2]
        return torch.cat([(means * self.weights(last)).sum(-1, keepdim=True), means], dim=-1)


class LabelDistribution(nn.Module):
    """[S, 1, H] → [S, 1]: mean of the gated sum of the attributes' distributions over bins."""

    def __init__(self, bins: nn.Module, gate: nn.Module, temperature: float | None) -> None:
        super().__init__()
        self.bins = bins
        self.gate = gate
        self.temperature = temperature  # None: the gate's outputs are the weights as they are

    def forward(self, hidden: Tensor) -> Tensor:
        last = hidden[:, -1]
        shares = self.bins(last).unflatten(-1, (-1, _LDL_BINS)).softmax(-1)  # [S, A, B]
        weights = self.gate(last)  # [S, A]
        if self.temperature is not None:
            weights = F.softmax(weights / self.temperature, dim=-1)
        distribution = (weights[:, :, None] * shares).sum(1)  # [S, B]
        values = torch.linspace(0, 1, _LDL_BINS, device=hidden.device)
        score: Tensor = (distribution * values).sum(-1, keepdim=True)
        return score


def _qrm(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    return QuantileRewards(tensors, float(config.get("gating_temperature", 10)))


def _urm(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    score = linear(tensors["score.weight"], tensors.get("score.bias"))
    return MeansAndSpreads(score, mlp(tensors, "weights.fc.", nn.SELU))


def _ldl(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    temperature = float(config.get("temperature") or 1.0) if config.get("softmax") else None
    bins = mlp(tensors, "regression_layer.network.", nn.LeakyReLU)
    return LabelDistribution(bins, mlp(tensors, "gating_layer.network.", nn.LeakyReLU), temperature)


def _ldl_body(name: str, tensor: Tensor, config: ModelConfig) -> Iterable[tuple[str, Tensor]]:
    yield (name if name.startswith("model.") else f"model.{name}"), tensor


def _layers(prefix: str, indices: tuple[int, ...]) -> dict[str, tuple[int | None, ...]]:
    weights: dict[str, tuple[int | None, ...]] = {
        f"{prefix}{i}.weight": (None, None) for i in indices
    }
    return weights | {f"{prefix}{i}.bias": (None,) for i in indices}


ADAPTERS = (
    Adapter(
        name="qrm",
        summary="quantiles of 19 attribute rewards, their means mixed by a gate on the prompt",
        architectures=("LlamaForRewardModelWithGating*",),
        head={
            "regression_layer.weight": (None, None),
            "reward_transform_matrix": (19, 19),
            "gating.logit_scale": (1,),
            **{f"gating.layers.{i}.weight": (None, None) for i in _GATE_LINEAR},
            **{f"gating.layers.{i}.{part}": (None,) for i in _GATE_NORM for part in _NORM_PARTS},
            f"gating.layers.{_GATE_OUT}.weight": (19, None),
            f"gating.layers.{_GATE_OUT}.bias": (19,),
        },
        head_extra=("gating.layers.*.num_batches_tracked",),
        build_head=_qrm,
        pooling=PROMPT_END,
        reads="the end of the prompt (gate) and the last token (rewards)",
        tokens=PROMPT_END_TOKENS,
        attributes=lambda config: ATTRIBUTES,
        models=("nicolinho/QRM-Llama3-8B, QRM-Llama3.1-8B",),
        traps=(
            "the rewards column is the transformed vector, as in the original's `rewards`; "
            "ArmoRM's is not",
            "the gate has batch norm: its running figures count, never those of the batch",
        ),
    ),
    Adapter(
        name="urm",
        summary="mean and spread of 5 attributes; the means are mixed by weights from the text",
        architectures=("*ForSequenceClassification*",),
        head={"score.weight": (10, None), **_layers("weights.fc.", (0, 2, 4))},
        head_extra=("score.bias",),
        build_head=_urm,
        attributes=lambda config: HELPSTEER,
        models=("LxzGordon/URM-LLaMa-3.1-8B, URM-LLaMa-3-8B",),
        traps=(
            "means are the even outputs; the attributes' names are HelpSteer2's, in its order",
            "the original takes the weights in float16, here they are float32",
        ),
    ),
    Adapter(
        name="ldl",
        summary="distributions of 22 attributes over 10 bins, mixed by a gate",
        architectures=("LDLReward*", "Gemma2Model", "Gemma2For*"),
        head={
            **_layers("regression_layer.network.", (0, 2, 4)),
            **_layers("gating_layer.network.", (0, 3, 6)),
        },
        head_files={
            "regression_layer.pt": "regression_layer.",
            "gating_layer.pt": "gating_layer.",
        },
        build_head=_ldl,
        body=Body(tensors=_ldl_body),
        models=("ShikaiChen/LDL-Reward-Gemma-2-27B-v0.1",),
        traps=(
            "the heads are in .pt files beside the weights, read as tensors only",
            "the gate reads the last token, not the prompt; softmax only if the config sets it",
            "Gemma-2: attention softcapping must not be dropped",
        ),
    ),
)
