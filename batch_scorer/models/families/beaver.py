"""Beaver reward and cost models of safe-rlhf: a linear `score_head` and a normaliser."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batch_scorer.models.adapter import Adapter, Body, ModelConfig, Prompt, Reference
from batch_scorer.models.families.heads import linear

_TEMPLATE = (
    "{{ 'BEGINNING OF CONVERSATION: ' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('this model was trained on user and assistant turns only') }}"
    "{% endif %}{% endfor %}"
)
_EPSILON = 1e-8  # as safe-rlhf adds to the standard deviation


class ScoreHead(nn.Module):
    """[S, 1, H] → [S, 1], the reward, or [S, 2], minus the cost and the cost."""

    def __init__(self, score: nn.Module, mean: Tensor, std: Tensor, *, is_cost: bool) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.score = score
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.is_cost = is_cost

    def forward(self, hidden: Tensor) -> Tensor:
        score: Tensor = (self.score(hidden[:, -1]) - self.mean) / self.std
        return torch.cat([-score, score], dim=-1) if self.is_cost else score


def _head(*, is_cost: bool) -> Callable[[Mapping[str, Tensor], ModelConfig], nn.Module]:
    def build(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
        score = linear(tensors["score_head.weight"], tensors.get("score_head.bias"))
        mean, std = torch.zeros(1), torch.ones(1)
        if config.get("do_normalize"):
            # Stored as buffers, and in the config since the training's last step.
            if not is_cost:  # a cost keeps its zero, which parts safe from unsafe
                mean = _figure(tensors, config, "mean", mean)
            std = _figure(tensors, config, "var", std).sqrt() + _EPSILON
        return ScoreHead(score, mean, std, is_cost=is_cost)

    return build


def _figure(
    tensors: Mapping[str, Tensor], config: ModelConfig, name: str, default: Tensor
) -> Tensor:
    if f"normalizer.{name}" in tensors:
        return tensors[f"normalizer.{name}"].reshape(1)
    return torch.tensor(config[name]).float().reshape(1) if config.get(name) else default


def _body_config(config: ModelConfig) -> dict[str, Any]:
    """Without `bias`, which is the head's: vLLM takes it for the attention's."""
    return {name: value for name, value in config.items() if name != "bias"}


ADAPTERS = tuple(
    Adapter(
        name=f"beaver_{kind}",
        summary=summary,
        architectures=("LlamaForScore", "LlamaModelForScore"),
        fits_config=fits,
        head={"score_head.weight": (1, None)},
        head_extra=("score_head.bias", "normalizer.*"),
        unused=("lm_head.*",),
        build_head=_head(is_cost=kind == "cost"),
        body=Body(model_type="llama", config=_body_config),
        prompt=Prompt(template=_TEMPLATE),
        attributes=attributes,
        models=models,
        references=references,
        traps=traps,
    )
    for kind, summary, fits, attributes, models, references, traps in (
        (
            "reward",
            "linear `score_head`, normalised if the config sets it",
            lambda config: config.get("score_type", "reward") == "reward",
            lambda config: (),
            ("PKU-Alignment/beaver-7b-v1.0-reward, -v2.0-, -v3.0-, -unified-reward",),
            (
                Reference(
                    "PKU-Alignment/beaver-7b-v1.0-reward",
                    "hello → Hello! How can I help you today? (as text, no end token)",
                    -11.4375,
                    "model card",
                ),
            ),
            ("trained with the end token after the answer; the card's example leaves it out",),
        ),
        (
            "cost",
            "cost model; the score is minus the cost, so that higher is better everywhere",
            lambda config: config.get("score_type") == "cost",
            lambda config: ("cost",),
            ("PKU-Alignment/beaver-7b-v1.0-cost, -v2.0-, -v3.0-, -unified-cost",),
            (),
            (
                "the model's own sign is kept in the attribute `cost`: above 0 is unsafe",
                "normalising scales a cost and does not shift it: its zero has a meaning",
                "trained with the end token after the answer; the card's example leaves it out",
            ),
        ),
    )
)
