"""A language model as a judge, by the probability of the tokens that it may answer with.

Kadavath et al. 2022 (arXiv 2207.05221) read a model's own belief off the probability of one
answer's token; Liu et al. 2023 (G-Eval, arXiv 2303.16634) weight grades by theirs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from batch_scorer.models.adapter import VERDICTS, Adapter, ModelConfig
from batch_scorer.models.families.heads import vocabulary_head


class _Choices(nn.Module):
    """How probable some next tokens are among the whole vocabulary: [S, 1, H] → [S, choices]."""

    def __init__(self, logits: nn.Module, token_ids: list[int]) -> None:
        super().__init__()
        self.logits = logits
        self.register_buffer("token_ids", torch.tensor(token_ids))

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.logits(hidden[:, -1])
        chosen = logits.index_select(1, self.get_buffer("token_ids"))
        return (chosen - logits.logsumexp(dim=1, keepdim=True)).exp()


def _choices(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    return _Choices(vocabulary_head(tensors, config), [*config[VERDICTS].values()])


ADAPTERS = (
    Adapter(
        name="judge",
        summary="any language model, asked by a judge's page: `--task judge` (docs/judges.md)",
        architectures=("*ForCausalLM",),
        head={"lm_head.weight": (None, None)},
        head_extra=("lm_head.bias",),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        build_head=_choices,
        verdicts=True,
        attributes=lambda config: tuple(config.get(VERDICTS, ())),
        has_score=lambda config: False,
        reads="the last token, after which the judge would answer",
        asked_only=True,
        models=("any instruction-tuned language model", "Skywork-Critic, Selene, Prometheus 2, …"),
        traps=(
            "a choice is one token in the place where the reply begins; one that is several is "
            "refused",
            "a model that thinks before it answers gives the choices little probability at that "
            "place: no verdict (`least_mass`)",
        ),
    ),
)
