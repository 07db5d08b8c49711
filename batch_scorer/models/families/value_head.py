"""Causal language models with a value head beside the lm_head: TRL, LLaMA-Factory, OpenRLHF."""

from collections.abc import Mapping

from torch import Tensor, nn

from batch_scorer.models.adapter import Adapter, ModelConfig
from batch_scorer.models.families.sequence_classifier import LastTokenHead, linear


def _summary(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    return LastTokenHead(
        linear(tensors["v_head.summary.weight"], tensors.get("v_head.summary.bias"))
    )


ADAPTERS = (
    Adapter(
        name="value_head",
        summary="causal LM with TRL's linear value head, read at the last token",
        architectures=("*ForCausalLM", "*ForCausalLMWithValueHead"),
        head={"v_head.summary.weight": (1, None)},
        head_extra=("v_head.summary.bias", "lm_head.*"),
        build_head=_summary,
        models=("TRL and LLaMA-Factory reward models", "GRM-*-sftreg (linear)"),
    ),
)
