"""ArmoRM: 19 attribute rewards, gated by the prompt (RLHFlow/ArmoRM-Llama3-8B-v0.1).

Ported from the description of its forward (RLHFlow/RLHF-Reward-Modeling, model card): the
remote code does not import with transformers 5.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batch_scorer.models.adapter import Adapter, MarkAndLast, ModelConfig, Reference
from batch_scorer.models.families.heads import linear

ATTRIBUTES = (
    "helpsteer-helpfulness",
    "helpsteer-correctness",
    "helpsteer-coherence",
    "helpsteer-complexity",
    "helpsteer-verbosity",
    "ultrafeedback-overall_score",
    "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness",
    "ultrafeedback-honesty",
    "ultrafeedback-helpfulness",
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    "code-complexity",
    "code-style",
    "code-explanation",
    "code-instruction-following",
    "code-readability",
)
PROMPT_END = MarkAndLast(
    {
        # End of the user turn and the assistant's header; the last occurrence counts.
        "llama": (128009, 128006, 78191, 128007, 271),
        "gemma2": (107, 108, 106, 2516, 108),
    }
)
PROMPT_END_TOKENS = {
    "llama": {
        "<|eot_id|>": 128009,
        "<|start_header_id|>": 128006,
        "assistant": 78191,
        "<|end_header_id|>": 128007,
        "ĊĊ": 271,  # two newlines
    },
    "gemma2": {"<end_of_turn>": 107, "<start_of_turn>": 106, "model": 2516, "\n": 108},
}
_NUM_GATE_LAYERS = 4

_PUBLISHED = (2.78125, 2.859375, 3.484375, 1.3847656, 1.296875)


class GatedRewards(nn.Module):
    """[S, 2, H] (end of prompt, last token) → [S, 1 + 19]: the score, the untransformed rewards."""

    def __init__(self, tensors: Mapping[str, Tensor], temperature: float) -> None:
        super().__init__()
        self.transform: Tensor
        self.logit_scale: Tensor
        self.regression = linear(tensors["regression_layer.weight"])
        self.register_buffer("transform", tensors["reward_transform_matrix"])  # [19, 19]
        self.register_buffer("logit_scale", tensors["gating.logit_scale"])
        self.gate = nn.ModuleList(
            linear(tensors[f"gating.layers.{i}.weight"], tensors[f"gating.layers.{i}.bias"])
            for i in range(_NUM_GATE_LAYERS)
        )
        self.temperature = temperature

    def forward(self, hidden: Tensor) -> Tensor:
        gate, last = hidden.unbind(1)
        for layer in self.gate[:-1]:
            gate = F.relu(layer(gate))
        weights = F.softmax(self.gate[-1](gate) / self.temperature, dim=-1) * self.logit_scale
        rewards: Tensor = self.regression(last)
        score = (weights * (rewards @ self.transform)).sum(-1, keepdim=True)
        return torch.cat([score, rewards], dim=-1)


def _head(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    return GatedRewards(tensors, float(config.get("gating_temperature", 10)))


ADAPTERS = (
    Adapter(
        name="armorm",
        summary="19 attribute rewards mixed by a gate that reads the end of the prompt",
        architectures=("LlamaForRewardModelWithGating", "Gemma2ForRewardModelWithGating"),
        head={
            "regression_layer.weight": (19, None),
            "reward_transform_matrix": (19, 19),
            "gating.logit_scale": (1,),
            **{
                f"gating.layers.{i}.{part}": shape
                for i in range(_NUM_GATE_LAYERS)
                for part, shape in (("weight", (None, None)), ("bias", (None,)))
            },
        },
        build_head=_head,
        pooling=PROMPT_END,
        reads="the end of the prompt (gate) and the last token (rewards)",
        attributes=lambda config: ATTRIBUTES,
        tokens=PROMPT_END_TOKENS,
        models=("RLHFlow/ArmoRM-Llama3-8B-v0.1",),
        references=tuple(
            Reference(
                "RLHFlow/ArmoRM-Llama3-8B-v0.1",
                f'synonyms for "beautiful", 5 · {attribute} - 0.5',
                score,
                "model card",
            )
            for attribute, score in zip(ATTRIBUTES, _PUBLISHED, strict=False)
        ),
        traps=(
            "the rewards column is the untransformed vector, as in the original's `rewards`",
            "the original pools before the first pad id, which may be mid-text; the last token "
            "is pooled here",
        ),
    ),
)
