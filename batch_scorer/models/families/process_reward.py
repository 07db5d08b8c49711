"""Process reward models: one score for every step of an answer, all from one forward pass."""

from collections.abc import Mapping

from torch import Tensor, nn

from batch_scorer.models.adapter import Adapter, ModelConfig, Prompt, Steps, StepTokens
from batch_scorer.models.families.heads import ClassProbability, linear, mlp
from batch_scorer.models.families.mlp_head import MATH_SYSTEM

_EXTRA_0 = 151651
# RLHFlow: ids of "+" and "-" in Llama-3's vocabulary, and of the assistant's header.
_LLAMA_PLUS, _LLAMA_MINUS = 10, 12
_LLAMA_HEADER = {
    "<|start_header_id|>": 128006,
    "assistant": 78191,
    "<|end_header_id|>": 128007,
    "ĊĊ": 271,  # two newlines
}
# Math-Shepherd: as its card prints them.
_MISTRAL_PLUS, _MISTRAL_MINUS, _MISTRAL_TAG = 648, 387, 12902
_RAW_TEXT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('this model was trained without system messages') }}{% endif %}"
    "{{ message['content'] }}{% if not loop.last %}{{ ' ' }}{% endif %}{% endfor %}"
)


def _classes(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    return ClassProbability(mlp(tensors, "score.", nn.ReLU), wanted=1)


def _plus_or_minus(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    return ClassProbability(linear(tensors["lm_head.weight"]), wanted=0)


ADAPTERS = (
    Adapter(
        name="qwen2_math_prm",
        summary="two classes at a tag after every step; the step's score is the share of class 1",
        architectures=("Qwen2ForProcessRewardModel",),
        head={
            "score.0.weight": (None, None),
            "score.0.bias": (None,),
            "score.2.weight": (2, None),
            "score.2.bias": (2,),
        },
        unused=("lm_head.*",),
        build_head=_classes,
        pooling=StepTokens(_EXTRA_0),
        reads="every `<extra_0>`",
        tokens={"qwen2": {"<extra_0>": _EXTRA_0}},
        prompt=Prompt(system=MATH_SYSTEM, steps=Steps(layout="tagged", tag="<extra_0>")),
        step_aggregation="min",
        models=("Qwen/Qwen2.5-Math-PRM-7B, -72B",),
        traps=(
            "class 1 is the good one",
            "an answer without a step has no score: `no_steps`, never an empty list",
        ),
    ),
    Adapter(
        name="rlhflow_prm",
        summary="every step is a user turn answered by + or -; the step's score is the share of +",
        architectures=("LlamaForCausalLM",),
        head={"lm_head.weight": (None, None)},
        head_rows=(_LLAMA_PLUS, _LLAMA_MINUS),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        build_head=_plus_or_minus,
        pooling=StepTokens(_LLAMA_PLUS, offset=-1, after=tuple(_LLAMA_HEADER.values())),
        reads="the token before every `+` that opens an assistant's turn",
        tokens={"llama": {**_LLAMA_HEADER, "+": _LLAMA_PLUS, "-": _LLAMA_MINUS}},
        prompt=Prompt(steps=Steps(layout="turns", tag="+")),
        step_aggregation="mean",
        model_ids=("*rlhflow*prm*", "*llama3.1-8b-prm*"),
        models=("RLHFlow/Llama3.1-8B-PRM-Mistral-Data, -Deepseek-Data",),
        traps=(
            "the sign is predicted one token before its own place",
            "one forward gives what the original takes one forward a step for, since every "
            "earlier reply is `+` there too",
            "the Mistral-Data model was trained on answers cut at `ки`, not at blank lines",
        ),
    ),
    Adapter(
        name="math_shepherd",
        summary="+ or - at a tag after every step; the step's score is the share of +",
        architectures=("MistralForCausalLM",),
        head={"lm_head.weight": (None, None)},
        head_rows=(_MISTRAL_PLUS, _MISTRAL_MINUS),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        build_head=_plus_or_minus,
        pooling=StepTokens(_MISTRAL_TAG),
        reads="every `ки`",
        tokens={"mistral": {"▁+": _MISTRAL_PLUS, "▁-": _MISTRAL_MINUS}},
        prompt=Prompt(
            template=_RAW_TEXT,
            steps=Steps(layout="tagged", tag=" ки", separator="\n", joint="\n"),
        ),
        step_aggregation="min",
        model_ids=("*math-shepherd*prm*",),
        models=("peiyi9979/math-shepherd-mistral-7b-prm",),
        traps=("+ and - are the ids of the signs after a blank, 648 and 387",),
    ),
)
