"""`score.0` and `score.2`, ReLU between: Qwen2.5-Math-RM, WorldPM, INF-ORM."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from batch_scorer.models.adapter import Adapter, LastToken, ModelConfig, Prompt, Reference
from batch_scorer.models.families.heads import LastTokenHead, mlp

HEAD: Mapping[str, tuple[int | None, ...]] = {
    "score.0.weight": (None, None),
    "score.0.bias": (None,),
    "score.2.weight": (1, None),
    "score.2.bias": (1,),
}
MATH_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


def _head(tensors: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    return LastTokenHead(mlp(tensors, "score.", nn.ReLU))


_INF_ORM = Adapter(
    name="inf_orm",
    summary="two-layer head on Llama",
    architectures=("INFORMForSequenceClassification", "LlamaForSequenceClassification"),
    head=HEAD,
    unused=("lm_head.*",),
    build_head=_head,
    models=("infly/INF-ORM-Llama3.1-70B",),
    traps=(
        "the original reads the token before the first pad id, which may be mid-text; the last "
        "token is read here",
    ),
)

# Qwen2's have the same head and differ in the text that they were trained on.
ADAPTERS = (
    replace(
        _INF_ORM,
        name="worldpm",
        summary="two-layer head, read at an end token that is added after the conversation",
        architectures=("Qwen2ForRewardModel",),
        pooling=LastToken(must_be="pad_token_id"),
        reads="`<|endoftext|>`, the config's pad id, added after the conversation",
        prompt=Prompt(system="", suffix_id_of="pad_token_id"),
        model_ids=("*worldpm*",),
        models=("Qwen/WorldPM-72B and its fine-tunes",),
        references=(
            Reference("Qwen/WorldPM-72B", "demo, first answer", 0.62983, "model card"),
            Reference("Qwen/WorldPM-72B", "demo, second answer", -1.64253, "model card"),
        ),
        traps=(
            "a system turn is there, but empty",
            "the card reads `<|endoftext|>`; the class it ships reads the token before the first "
            "pad id. Compare the demo's scores before a job",
        ),
    ),
    replace(
        _INF_ORM,
        name="qwen2_math_rm",
        summary="two-layer head on Qwen2",
        architectures=("Qwen2ForRewardModel",),
        prompt=Prompt(system=MATH_SYSTEM),
        models=("Qwen/Qwen2.5-Math-RM-72B",),
        references=(
            Reference("Qwen/Qwen2.5-Math-RM-72B", "the card's example", 3.75, "model card"),
        ),
        traps=("without its system prompt the model sees text it was not trained on",),
    ),
    _INF_ORM,
)
