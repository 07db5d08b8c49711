"""Pairwise models: both answers of a row in one input.

Each answer is scored in the input in which it stands first: what the model gives for it minus what
it gives for the other. So the difference of a row's two scores is the comparison in both orders,
which is what the models' authors take.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batch_scorer.models.adapter import Adapter, Beside, Body, ModelConfig, OneOfEach, Prompt
from batch_scorer.models.families.heads import difference_head, mlp

# "A" and "B" in Llama-3's vocabulary.
_A, _B = 32, 33

_PAIRRM_TOKENS = 2048
"""1224 of the question, and 412 of each answer."""

_BOTH_SIDES = (
    "the score is of the order in which the answer stands first; the margin of a row is the "
    "comparison in both orders, as the original takes it"
)

_TURNS_ALTERNATE = (
    "{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) or message.role not in "
    "['user', 'assistant'] %}{{ raise_exception('this model was trained on turns of user and "
    "assistant, one after the other') }}{% endif %}{% endfor %}"
)
_PAIRRM = _TURNS_ALTERNATE + (
    "{% set own = messages[-1].content %}"
    "{% set asked = namespace(text=messages[0].content) %}"
    "{% set said = namespace(before='') %}"
    "{% if messages | length > 2 %}"
    "{% set asked.text = 'Finish the following coversation in each i-th turn by filling in "
    "<Response i> with your response.' %}"
    "{% for message in messages %}"
    "{% set turn = '<Response ' ~ (loop.index0 // 2 + 1) ~ '>' %}"
    "{% if message.role == 'user' %}"
    "{% set asked.text = asked.text + ('' if loop.first else '\\n') + 'USER: ' + message.content "
    "+ '\\nAssistant: ' + turn %}"
    "{% else %}"
    "{% set said.before = said.before + turn + ': ' + ('' if loop.last else message.content "
    "+ '\\n') %}"
    "{% endif %}{% endfor %}{% endif %}"
    "{{ cls_token + '<|source|>' + asked.text + sep_token }}"
    "{{ cls_token + '<|candidate1|>' + said.before + own + sep_token }}"
    "{{ cls_token + '<|candidate2|>' + said.before + other + sep_token }}"
)
_RLHFLOW = _TURNS_ALTERNATE + (
    "{{ '[CONTEXT] \\n' }}"
    "{% for message in messages[:-1] %}"
    "{{ '\\n<turn> ' + message.role + '\\n ' + message.content }}"
    "{% endfor %}"
    "{{ '\\n [RESPONSE A] ' + messages[-1].content + ' [RESPONSE B] ' + other + ' \\n' }}"
)


class _Comparison(nn.Module):
    """PairRM's head: of the question's and both answers' marks, float32[S, 3, H] → [S, 1]."""

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score = score

    def forward(self, hidden: Tensor) -> Tensor:
        question, first, second = hidden.unbind(dim=1)
        own = self.score(torch.cat([question, first], dim=-1))
        other = self.score(torch.cat([question, second], dim=-1))
        score: Tensor = (own - other).mean(dim=-1, keepdim=True)
        return score


def _comparison(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    return _Comparison(mlp(tensors, "head_layer.", nn.Tanh))


def _config(config: ModelConfig) -> dict[str, Any]:
    """DeBERTa counts distances, not positions, so its limit of 512 is none; what it takes for the
    longest distance stays."""
    longest = config.get("max_relative_positions", -1)
    if longest < 1:
        longest = config["max_position_embeddings"]
    entries = {name: value for name, value in config.items() if name != "architectures"}
    return entries | {
        "max_relative_positions": longest,
        "max_position_embeddings": max(_PAIRRM_TOKENS, config["max_position_embeddings"]),
    }


def _tensors(name: str, tensor: Tensor, config: ModelConfig) -> Iterable[tuple[str, Tensor]]:
    yield name.removeprefix("pretrained_model."), tensor


ADAPTERS = (
    Adapter(
        name="pairrm",
        summary="DeBERTa that compares the two answers of a row",
        architectures=("DebertaV2PairRM",),
        head={
            "head_layer.1.weight": (None, None),
            "head_layer.1.bias": (None,),
            "head_layer.4.weight": (None, None),
            "head_layer.4.bias": (None,),
        },
        unused=("*.position_ids",),
        build_head=_comparison,
        pooling=OneOfEach(("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")),
        max_tokens=_PAIRRM_TOKENS,
        reads="`<|source|>`, `<|candidate1|>` and `<|candidate2|>`",
        body=Body(model_type="deberta-v2", config=_config, tensors=_tensors),
        prompt=Prompt(template=_PAIRRM, bos="template", beside=Beside("other")),
        engines=("hf",),
        models=("llm-blender/PairRM-hf",),
        traps=(
            _BOTH_SIDES,
            "the config's 512 positions are no limit: it was trained on 2048 tokens, the limit "
            "here; the original cuts the question to 1224 and each answer to half of the rest",
            "several turns are written as the card's `compare_conversations` does, one question "
            "and its answers as `rank` does; a system message has no place",
        ),
    ),
    Adapter(
        name="pair_preference",
        summary="causal LM asked which of two answers is better: logit of A minus B",
        architectures=("LlamaForCausalLM",),
        head={"lm_head.weight": (None, None)},
        head_rows=(_A, _B),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        build_head=difference_head,
        reads="the last token, after which the model would answer A or B",
        tokens={"llama": {"A": _A, "B": _B}},
        prompt=Prompt(bos="never", beside=Beside("other", turn=_RLHFLOW, replaces=True)),
        model_ids=("*pair-preference-model*",),
        models=("RLHFlow/pair-preference-model-LLaMA3-8B",),
        traps=(
            _BOTH_SIDES,
            "the sigmoid of the score is the original's probability in that order; its mean over "
            "both orders exceeds one half exactly where the margin is positive",
            "no BOS, as in the original",
            "the tokenizer's template is applied as the card does it, without an argument that "
            "asks for the assistant's header: the model's own template ends with it anyway",
        ),
    ),
)
