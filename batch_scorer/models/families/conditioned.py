"""Models that judge an answer by something that the row gives: a reference answer, a principle."""

import json
from dataclasses import replace

from batch_scorer.models.adapter import Adapter, Beside, Prompt, Reference
from batch_scorer.models.families import internlm2
from batch_scorer.models.families.heads import difference_head

# "Yes" and "No" in Llama-3's vocabulary, as NVIDIA's card has them.
_YES, _NO = 9642, 2822

_POLAR = (
    "{% set before = messages[:-1] | map(attribute='content') | join('\\n') %}"
    "{{ before + '\\n' + reference + '<|reward|>' + before + '\\n' + messages[-1].content }}"
)
_PRINCIPLE = (
    "Evaluate the response to the previous prompt in terms of whether it satisfies this "
    "principle: {{ principle }}. Only answer Yes or No."
)

(_INTERNLM2,) = internlm2.ADAPTERS

ADAPTERS = (
    replace(
        _INTERNLM2,
        name="polar",
        summary="InternLM2 that compares the answer with a reference answer",
        reads="the reward token (the config's reward_token_id), added at the end",
        prompt=Prompt(template=_POLAR, suffix_id_of="reward_token_id", beside=Beside("reference")),
        model_ids=("*polar*",),
        models=("internlm/POLAR-1_8B, -7B, and models trained from their bases",),
        references=(
            Reference("internlm/POLAR-7B", "China's capital, Beijing", -0.5703, "README"),
            Reference("internlm/POLAR-7B", "China's capital, Shanghai", -11.0304, "README"),
        ),
        traps=(
            "nothing but its name tells it from internlm2_reward: `--adapter polar` for a model "
            "that is called otherwise",
            "the text is prompt, reference, `<|reward|>`, prompt, answer, joined by line feeds, "
            "without roles; a reference in several turns is joined alike",
            "the original cuts reference and answer to their last 4096 tokens each, and takes "
            "special tokens out of all texts; here the settings say what is cut and taken out",
        ),
    ),
    Adapter(
        name="nemotron_principle",
        summary="causal LM asked whether the answer satisfies a principle: logit of Yes minus No",
        architectures=("LlamaForCausalLM",),
        head={"lm_head.weight": (None, None)},
        head_rows=(_YES, _NO),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        build_head=difference_head,
        reads="the last token, after which the model would answer Yes or No",
        tokens={"llama": {"Yes": _YES, "No": _NO}},
        prompt=Prompt(
            arguments=json.dumps({"add_generation_prompt": True}),
            beside=Beside("principle", turn=_PRINCIPLE),
        ),
        model_ids=("*nemotron*reward-principle*",),
        models=("nvidia/Llama-3.3-Nemotron-70B-Reward-Principle",),
        references=(
            Reference(
                "nvidia/Llama-3.3-Nemotron-70B-Reward-Principle",
                "What is 1+1?, good answer, correctness",
                4.875,
                "model card",
            ),
            Reference(
                "nvidia/Llama-3.3-Nemotron-70B-Reward-Principle",
                "What is 1+1?, bad answer, correctness",
                -4.875,
                "model card",
            ),
        ),
        traps=(
            "the principle is asked for in a user's turn after the answer, and the assistant's "
            "header follows",
            "one principle for all rows: `--template-argument principle=correctness`",
        ),
    ),
)
