"""Models that cannot be scored here, refused by name with the reason."""

from batch_scorer.models.adapter import Adapter

ADAPTERS = (
    Adapter(
        name="pairrm_original",
        summary="PairRM as its own library stores it",
        architectures=("*",),
        fits_config=lambda config: config.get("architectures") != ["DebertaV2PairRM"],
        model_ids=("*pairrm*", "*pair-rm*"),
        refused=(
            "a pairwise model in the form of its own library, whose config.json does not describe "
            "it; use llm-blender/PairRM-hf, the same weights"
        ),
        models=("llm-blender/PairRM",),
    ),
    Adapter(
        name="pairwise_only",
        summary="writes which of two answers is better",
        architectures=("*",),
        fits_config=lambda config: config.get("architectures") != ["LlamaForCausalLM"],
        model_ids=("*steamshp*", "*pair-preference-model*"),
        refused=(
            "a pairwise model that is not known here: it reads both answers in one input, and "
            "nothing in its files says how; known are PairRM-hf and "
            "pair-preference-model-LLaMA3-8B (docs/models.md)"
        ),
        models=("SteamSHP", "pair preference models that are no Llama"),
    ),
    Adapter(
        name="generative_judge",
        summary="writes a verdict in words",
        architectures=("*",),
        model_ids=("*genrm*", "*sfr*judge*"),
        refused=(
            "a generative judge: it writes a verdict and has no reward head; choose a model that "
            "scores one answer (docs/models.md)"
        ),
        models=("Nemotron GenRM variants", "SFR-Judge (weights not public)"),
    ),
    Adapter(
        name="vision",
        summary="reads images",
        architectures=("*VL*ForConditionalGeneration", "*VL*RewardModel"),
        refused="a reward model for images and text; only text is scored here (docs/models.md)",
        models=("Skywork/Skywork-VL-Reward-7B",),
    ),
)
