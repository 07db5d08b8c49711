"""Implicit rewards: how much likelier a policy finds an answer than the model it was trained from.

beta * (log pi(answer | prompt) - log pi_ref(answer | prompt)), the reward that DPO fits a policy by
(Rafailov et al. 2023, arXiv 2305.18290, section 4). Two models that were not trained from one
another give a density ratio the same way (Xu et al. 2024, arXiv 2411.02481: a stronger model as the
policy, a weaker one as the reference, beta 1).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from batch_scorer.models.adapter import Adapter, ModelConfig, Prompt
from batch_scorer.models.families.heads import vocabulary_head

_LOGITS_AT_ONCE = 1 << 25
"""128 MiB in float32: those of all tokens of a batch would be tens of gigabytes."""


class NextToken(nn.Module):
    """Log probabilities of given next tokens: [K, H] and int64[K] → float32[K]."""

    def __init__(self, logits: nn.Module, vocabulary_size: int) -> None:
        super().__init__()
        self.logits = logits
        self.vocabulary_size = vocabulary_size

    def forward(self, hidden: Tensor, next_ids: Tensor) -> Tensor:
        rows = max(1, _LOGITS_AT_ONCE // self.vocabulary_size)
        parts = zip(torch.split(hidden, rows), torch.split(next_ids, rows), strict=True)
        return torch.cat([self._log_probs(*part) for part in parts])

    def _log_probs(self, hidden: Tensor, next_ids: Tensor) -> Tensor:
        logits: Tensor = self.logits(hidden.float())
        return logits.gather(1, next_ids[:, None])[:, 0] - logits.logsumexp(dim=1)


def _next_token(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    return NextToken(vocabulary_head(tensors, config), len(tensors["lm_head.weight"]))


ADAPTERS = (
    Adapter(
        name="implicit_reward",
        summary="a DPO policy against its reference model (`--reference-model`), or any two models "
        "that share a tokenizer: beta times the difference of the answer's log probabilities",
        architectures=("*ForCausalLM",),
        head={"lm_head.weight": (None, None)},
        head_extra=("lm_head.bias",),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        build_head=_next_token,
        log_probs=True,
        reads="every token before one of the answer's",
        prompt=Prompt(answer=True),
        attributes=lambda config: ("policy_logp", "reference_logp"),
        asked_only=True,
        engines=("hf",),
        models=("any policy that was trained with DPO or a loss like it",),
        traps=(
            "both models need one vocabulary, token by token; others are refused",
            "`policy_logp` and `reference_logp` are sums over the answer's tokens, also with "
            "`--length-normalize`, which divides the score alone by their number",
            "the answer is all that follows the generation prompt: its end-of-turn token and what "
            "the template writes behind it count, as in TRL 1.16, which takes the token ids that "
            "prompt and whole do not share; a token on the border is the answer's",
            "TRL lets both answers of a pair begin at the earlier of their borders, here each has "
            "its own",
            "RewardBench leaves beta out, appends EOS to every answer and cuts the prompt of what "
            "is too long to 128 tokens; without a reference it takes minus the Euclidean norm of "
            "the log probabilities unless told `sum` or `avg`",
            "without a reference (`--reference-model none`) a sum falls with every token, so that "
            "short answers win: add `--length-normalize`",
            "where the tokens before the answer are not known, a row is `answer_not_found`, and a "
            "format without a prompt of its own is refused",
        ),
    ),
)
