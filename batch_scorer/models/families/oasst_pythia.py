"""OpenAssistant's GPT-NeoX reward models: a linear `out_proj`, mean or last pooling by config."""

from batch_scorer.models.adapter import Adapter, Body, LastOrAll, Prompt, is_mean_pooled
from batch_scorer.models.families.heads import linear_head

_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|prompter|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% else %}{{ raise_exception('this model was trained on user and assistant turns only') }}"
    "{% endif %}{{ message['content'] + '<|endoftext|>' }}{% endfor %}"
)
ADAPTERS = (
    Adapter(
        name="oasst_pythia",
        summary="GPT-NeoX with `out_proj` over the mean or the last hidden state",
        architectures=("GPTNeoXRewardModel",),
        head={"out_proj.weight": (1, None), "out_proj.bias": (1,)},
        unused=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
        build_head=linear_head("out_proj"),
        pooling=LastOrAll(),
        averages=is_mean_pooled,
        reads="all tokens, averaged, or the last: the config's `pooling`",
        body=Body(model_type="gpt_neox"),
        prompt=Prompt(template=_TEMPLATE),
        engines=("hf",),  # vLLM 0.32 has no GPT-NeoX of its own, and cannot load it otherwise
        models=("OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5, oasst-rm-2-pythia-6.9b",),
        traps=("the score has an offset that means nothing: compare within a prompt",),
    ),
)
