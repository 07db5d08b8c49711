"""The logit of one token as reward: Nemotron-Reward, a plain causal language model."""

from batch_scorer.models.adapter import Adapter, Reference
from batch_scorer.models.families.heads import linear_head

_REWARD_ID = 0

ADAPTERS = (
    Adapter(
        name="token_logit",
        summary="causal LM whose logit of token id 0, right after the conversation, is the reward",
        architectures=("*ForCausalLM",),
        head={"lm_head.weight": (None, None)},
        head_rows=(_REWARD_ID,),
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        build_head=linear_head("lm_head"),
        model_ids=("*nemotron*reward*",),
        models=(
            "nvidia/Llama-3.1-Nemotron-70B-Reward-HF",
            "nvidia/Llama-3.3-Nemotron-70B-Reward, -Multilingual",
            "nvidia/Qwen-3-Nemotron-32B-Reward",
        ),
        references=(
            Reference(
                "nvidia/Llama-3.1-Nemotron-70B-Reward-HF",
                "What is 1+1?, good answer",
                -3.28125,
                "model card",
            ),
        ),
        traps=(
            "the raw logit, before any softcap; a log probability is another number",
            "the conversation ends without a generation prompt",
            "scores are comparable within one prompt only",
            "nothing in a language model's files shows this use: the family comes from the model's "
            "name, or from `--adapter token_logit`",
        ),
    ),
)
