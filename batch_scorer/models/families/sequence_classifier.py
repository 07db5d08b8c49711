"""Stock decoders with one linear `score` head: Skywork-Reward and most public reward models."""

from batch_scorer.models.adapter import Adapter, LastToken, Reference
from batch_scorer.models.families.heads import linear_head

_JANE = "Jane's 12 apples, {} response"
_PUBLISHED = {
    ("Skywork/Skywork-Reward-Llama-3.1-8B", "model card"): (12.625, -15.25),
    ("Skywork/Skywork-Reward-Gemma-2-27B", "SkyworkAI/Skywork-Reward README"): (9.1875, -17.875),
    ("Skywork/Skywork-Reward-Llama-3.1-8B-v0.2", "model card"): (13.6875, -9.1875),
    ("Skywork/Skywork-Reward-Gemma-2-27B-v0.2", "model card"): (4.59375, -18.125),
    ("Skywork/Skywork-Reward-V2-Llama-3.1-8B", "SkyworkAI/Skywork-Reward-V2 README"): (
        23.0,
        3.59375,
    ),
}

ADAPTERS = (
    Adapter(
        name="sequence_classifier",
        summary="decoder with one linear score head, read at the last token",
        # Merged adapters and LLaMA-Factory keep the causal model's config beside the score head.
        architectures=("*ForSequenceClassification", "*ForCausalLM"),
        head={"score.weight": (1, None)},
        head_extra=("score.bias",),
        build_head=linear_head("score"),
        pooling=LastToken(skips_pad=True),
        reads="the last token that is not the config's pad id",
        models=(
            "Skywork-Reward-Llama-3.1-8B, -Gemma-2-27B (v0.1, v0.2)",
            "Skywork-Reward-V2 (Qwen3 0.6B-8B, Llama-3.1, Llama-3.2)",
            "FsfairX-LLaMA3-RM, OffsetBias-RM-8B, GRM-*-rewardmodel-ft, Tulu-3-8B-RM, AceMath-RM",
        ),
        references=tuple(
            Reference(model, _JANE.format(which), score, source)
            for (model, source), scores in _PUBLISHED.items()
            for which, score in zip(("right", "wrong"), scores, strict=True)
        ),
        traps=(
            "BOS: v0.1 templates hold none, v0.2 and V2 do; the rendered text decides",
            "Gemma-2: sdpa drops the softcap and float16 overflows; both are refused",
            "pad id equal to the last token's: transformers pools one token earlier, so do we",
        ),
    ),
    Adapter(
        name="token_classifier",
        summary="decoder with a linear score for every token, of which the last one counts",
        architectures=("*ForTokenClassification",),
        head={"score.weight": (1, None)},
        head_extra=("score.bias",),
        build_head=linear_head("score"),
        models=("reward models and critics of verl",),
        traps=(
            "the head has a bias, unlike that of transformers' sequence classifiers",
            "the last token is read whatever it is, also where it is the config's pad id",
        ),
    ),
)
