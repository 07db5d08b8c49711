"""Value heads on a causal language model: TRL and LLaMA-Factory, GRM, OpenRLHF."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batch_scorer.models.adapter import Adapter, ModelConfig, Prompt
from batch_scorer.models.families.heads import LastTokenHead, linear, linear_head, mlp

_ARCHITECTURES = ("*ForCausalLM", "*ForCausalLMWithValueHead", "GRewardModel")


class NormalizedHead(nn.Module):
    """[S, 1, H] → [S, 2]: the score, normalised by the training data's figures, and the raw one."""

    def __init__(self, score: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.score = score
        self.mean = mean
        self.std = std

    def forward(self, hidden: Tensor) -> Tensor:
        raw: Tensor = self.score(hidden[:, -1])
        return torch.cat([(raw - self.mean) / self.std, raw], dim=-1)


def _summary_mlp(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    return LastTokenHead(mlp(tensors, "v_head.summary.", nn.ReLU))


def _openrlhf(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    (weight,) = (t for name, t in tensors.items() if name.endswith(".weight"))
    if not _is_normalized(config):
        return LastTokenHead(linear(weight))
    return NormalizedHead(linear(weight), _number(config["mean"]), _number(config["std"]))


def _is_normalized(config: ModelConfig) -> bool:
    return config.get("mean") is not None and config.get("std") is not None


def _number(entry: Any) -> float:
    return float(entry[0] if isinstance(entry, list) else entry)


ADAPTERS = (
    Adapter(
        name="value_head",
        summary="causal LM with TRL's linear value head",
        architectures=_ARCHITECTURES,
        head={"v_head.summary.weight": (1, None)},
        head_extra=("v_head.summary.bias",),
        head_files={"value_head.bin": ""},
        unused=("lm_head.*",),
        build_head=linear_head("v_head.summary"),
        models=("TRL and LLaMA-Factory reward models", "GRM-*-sftreg with vhead_layer_type linear"),
        traps=("the head's dropout is for training; scores are taken without it",),
    ),
    Adapter(
        name="value_head_mlp",
        summary="causal LM with a value head of several layers, ReLU between",
        architectures=_ARCHITECTURES,
        head={
            "v_head.summary.0.weight": (None, None),
            "v_head.summary.0.bias": (None,),
            "v_head.summary.2.weight": (None, None),
            "v_head.summary.2.bias": (None,),
        },
        head_extra=("v_head.summary.*",),
        unused=("lm_head.*",),
        build_head=_summary_mlp,
        models=("GRM-llama3-8B-sftreg, GRM-Gemma-2B-sftreg",),
        traps=(
            "the original decides the padding side once per batch; the last token is read here",
            "the head's dropout is for training; scores are taken without it",
        ),
    ),
    *(
        Adapter(
            name=name,
            summary=f"OpenRLHF's reward model, value_head_prefix `{prefix}`",
            architectures=("RewardModel", "LLMForSequenceRegression"),
            head={f"{prefix}.weight": (1, None)},
            unused=("lm_head.*",),
            build_head=_openrlhf,
            prompt=Prompt(bos="template", eos="openrlhf"),
            attributes=lambda config: ("raw_score",) if _is_normalized(config) else (),
            models=("OpenRLHF reward models",),
            traps=(
                "trained on text without line feeds at its end, followed by a blank and EOS where "
                "it did not end in EOS; the head reads that EOS",
                "with mean and std in the config the score is (raw - mean) / std; the raw score "
                "is kept beside it",
            ),
        )
        for name, prefix in (("openrlhf", "score"), ("openrlhf_value_head", "value_head"))
    ),
)
