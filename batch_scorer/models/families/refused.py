"""Models that give no score to one answer on its own, refused by name with the reason."""

from batch_scorer.models.adapter import Adapter

ADAPTERS = (
    Adapter(
        name="pairwise_only",
        summary="compares two answers in one input; there is no score of one answer",
        architectures=("*",),
        model_ids=("*pairrm*", "*pair-rm*", "*steamshp*", "*pair-preference-model*"),
        refused=(
            "a pairwise model: it reads both answers in one input and has no score for one alone; "
            "choose a model that scores one answer (docs/models.md)"
        ),
        models=("llm-blender/PairRM", "SteamSHP", "RLHFlow/pair-preference-model-LLaMA3-8B"),
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
