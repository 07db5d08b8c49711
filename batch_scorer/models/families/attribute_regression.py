"""Regression of HelpSteer's attributes, folded into a score by published weights.

The weights go by the attributes' names, as the config's id2label has them, never by position.
Attributes are neither clamped nor rounded (NVIDIA's annotation script does both).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from batch_scorer.errors import ModelError
from batch_scorer.models.adapter import (
    OUTPUT_WEIGHTS,
    Adapter,
    LastToken,
    ModelConfig,
    Prompt,
    Reference,
)
from batch_scorer.models.families.heads import LastTokenHead, linear
from batch_scorer.models.registry import NAMED, are_names

HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
NEMOTRON_4 = ("quality", "toxicity", "humor", "creativity", *HELPSTEER)
NEMOTRON_4_WEIGHTS = dict(zip(HELPSTEER, (0.3, 0.74, 0.46, 0.47, -0.33), strict=True))
STEERLM_WEIGHTS = dict(zip(HELPSTEER, (0.65, 0.8, 0.45, 0.55, -0.4), strict=True))

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<extra_id_0>System\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '<extra_id_1>User\\n' + message['content'] + '\\n' }}"
    "{% else %}{{ '<extra_id_1>Assistant\\n' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{{ '<extra_id_2>' }}"
)


class WeightedAttributes(nn.Module):
    """[S, 1, H] → [S, 1 + A]: the weighted sum, the attributes as they come."""

    def __init__(self, score: nn.Module, weights: Tensor) -> None:
        super().__init__()
        self.weights: Tensor
        self.score = score
        self.register_buffer("weights", weights)  # [A]

    def forward(self, hidden: Tensor) -> Tensor:
        attributes = self.score(hidden[:, -1])
        return torch.cat([(attributes @ self.weights)[:, None], attributes], dim=-1)


def labels(config: ModelConfig) -> tuple[str, ...]:
    """Names of the outputs in their order; () where the config has none."""
    names = config.get("id2label") or {}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _names(*wanted: str) -> Callable[[ModelConfig], bool]:
    return lambda config: set(wanted) <= set(labels(config))


def _head(weights: Mapping[str, float]) -> Callable[[Mapping[str, Tensor], ModelConfig], nn.Module]:
    def build(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
        names = labels(config)
        score = linear(tensors["score.weight"], tensors.get("score.bias"))
        if absent := [name for name in weights if name not in names]:
            raise ModelError(f"the config's id2label names no {', '.join(absent)}")
        if len(names) != score.out_features:
            raise ModelError(f"id2label has {len(names)} names, the head {score.out_features}")
        return WeightedAttributes(score, torch.tensor([weights.get(name, 0.0) for name in names]))

    return build


def _named_outputs(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    if config.get(OUTPUT_WEIGHTS):
        return _head(config[OUTPUT_WEIGHTS])(tensors, config)
    return LastTokenHead(linear(tensors["score.weight"], tensors.get("score.bias")))


ADAPTERS = (
    Adapter(
        name="nemotron4_attributes",
        summary="9 attributes, weighted by name as Nemotron-4-340B-Reward's are",
        architectures=("*ForSequenceClassification",),
        fits_config=_names(*NEMOTRON_4),
        head={"score.weight": (None, None)},
        head_extra=("score.bias",),
        build_head=_head(NEMOTRON_4_WEIGHTS),
        pooling=LastToken(skips_pad=True),
        reads="the last token that is not the config's pad id",
        prompt=Prompt(template=_TEMPLATE, system=_SYSTEM),
        attributes=labels,
        models=("ports of nvidia/Nemotron-4-340B-Reward whose id2label names its attributes",),
        references=tuple(
            Reference(
                "nvidia/Nemotron-4-340B-Reward", f"the card's example, {name}", score, "model card"
            )
            for name, score in zip(HELPSTEER, (1.6172, 1.6484, 3.3125, 0.5469, 0.5156), strict=True)
        ),
        traps=(
            "quality, toxicity, humor and creativity are untrained: weight 0",
            "attributes are kept raw; NVIDIA's script clamps them to 0-4 and rounds",
        ),
    ),
    Adapter(
        name="steerlm_attributes",
        summary="HelpSteer's attributes, weighted by name as Llama3-70B-SteerLM-RM's are",
        architectures=("*ForSequenceClassification",),
        fits_config=_names(*HELPSTEER),
        asked_only=True,
        model_ids=("*steerlm*",),
        head={"score.weight": (None, None)},
        head_extra=("score.bias",),
        build_head=_head(STEERLM_WEIGHTS),
        pooling=LastToken(skips_pad=True),
        reads="the last token that is not the config's pad id",
        attributes=labels,
        models=("ports of nvidia/Llama3-70B-SteerLM-RM whose id2label names its attributes",),
        traps=("weights belong to one model: another model's attributes need `--adapter`",),
    ),
)

NAMED_OUTPUTS = (
    Adapter(
        name=NAMED,
        summary="linear head with several outputs of the user's own, named by id2label or "
        "`--output-names`",
        architectures=("*ForSequenceClassification", "*ForCausalLM"),
        fits_config=lambda config: are_names(labels(config)),
        head={"score.weight": (None, None)},
        head_extra=("score.bias",),
        build_head=_named_outputs,
        pooling=LastToken(skips_pad=True),
        reads="the last token that is not the config's pad id",
        attributes=labels,
        has_score=lambda config: bool(config.get(OUTPUT_WEIGHTS)),
        models=("any model trained with several labels and a linear head",),
        traps=(
            "there is a `score` only with `--output-weights`, the weighted sum of the raw outputs; "
            "without them the outputs stand in `rewards` alone",
        ),
    ),
)
