"""One linear head under another name: Eurus, UltraRM, Starling.

Templates are the models' own, from their cards; none is in their tokenizers.
"""

from collections.abc import Iterable

from torch import Tensor

from batch_scorer.models.adapter import Adapter, Body, ModelConfig, Prompt, Reference
from batch_scorer.models.families.heads import linear_head

_NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('this model was trained without system messages') }}{% endif %}"
)
_EURUS = (
    _NO_SYSTEM + "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] }}{% if not loop.last %}{{ eos_token }}{% endif %}"
    "{% endif %}{% endfor %}"
)
_ULTRARM = (
    _NO_SYSTEM + "{% for message in messages %}"
    "{{ 'Human: ' if message['role'] == 'user' else 'Assistant: ' }}{{ message['content'] }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)
# The blank and the end token before [/INST] are as on the card.
_STARLING_7B = (
    _NO_SYSTEM + "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' ' + eos_token + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_STARLING_34B = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def _starling_body(name: str, tensor: Tensor, config: ModelConfig) -> Iterable[tuple[str, Tensor]]:
    if name.startswith("transformer."):
        yield name.replace("transformer.", "model.", 1), tensor


ADAPTERS = (
    Adapter(
        name="eurus",
        summary="Mistral body with `regression_head`",
        architectures=("EurusRewardModel",),
        head={"regression_head.weight": (1, None)},
        unused=("lm_head.*",),
        build_head=linear_head("regression_head"),
        prompt=Prompt(template=_EURUS),
        models=("openbmb/Eurus-RM-7b",),
        references=(
            Reference(
                "openbmb/Eurus-RM-7b",
                "sural region, chosen minus rejected (text as on the card)",
                47.4404296875,
                "model card",
            ),
        ),
        traps=("the card's example closes the prompt with `[\\INST]`, a misspelt `[/INST]`",),
    ),
    Adapter(
        name="ultrarm",
        summary="Llama body with `regression_head`",
        architectures=("LlamaRewardModel", "LlamaForCausalLM"),
        head={"regression_head.weight": (1, None)},
        unused=("lm_head.*",),
        build_head=linear_head("regression_head"),
        prompt=Prompt(template=_ULTRARM),
        models=("openbmb/UltraRM-13b",),
        traps=("RewardBench renders `User:` where the model was trained on `Human:`",),
    ),
    *(
        Adapter(
            name=name,
            summary="Llama body under `transformer.`, with `v_head`",
            architectures=("LlamaForSequenceClassification", "GPTRewardModel", "LlamaForCausalLM"),
            head={"v_head.weight": (1, None)},
            build_head=linear_head("v_head"),
            body=Body(tensors=_starling_body),
            prompt=Prompt(template=template),
            model_ids=ids,
            models=(model,),
            traps=(
                "the 34B's LlamaForSequenceClassification is another class than transformers' "
                "of that name",
                "weights published as a pickle must be converted to safetensors first",
                "the original reads the token before the first id 0, which may be mid-text; the "
                "last token is read here",
            ),
        )
        for name, model, template, ids in (
            ("starling_34b", "Nexusflow/Starling-RM-34B", _STARLING_34B, ("*starling*34b*",)),
            ("starling", "berkeley-nest/Starling-RM-7B-alpha", _STARLING_7B, ()),
        )
    ),
)
