"""Language models for judges that write: a tiny random one, one whose every next token is given,
and SmolLM2 as its package has it; and how plain Hugging Face goes on with a text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from batch_scorer.models import embedded
from tests.helpers.tiny import tiny_tokenizer

VOCABULARY = 384  # the tokenizer's
END = 3
"""`<|im_end|>`, which ends a turn."""
BROKEN = 0
"""The padding token: a random model's hidden states are no numbers from here on."""


def random_language_model(directory: Path, name: str = "llama", **shape: Any) -> PreTrainedModel:
    """A tiny random model whose attention is peaked, so that every token before counts."""
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(directory)
    torch.manual_seed(0)
    config: Any = transformers.AutoConfig.for_model(
        name,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "pad_token_id": BROKEN,
            "eos_token_id": END,
            "tie_word_embeddings": False,
            **shape,
        },
    )
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "q_proj" in parameter_name or "k_proj" in parameter_name:
                parameter.mul_(8)
        model.lm_head.weight.mul_(20)
        if not config.tie_word_embeddings:
            model.model.embed_tokens.weight[BROKEN] = float("inf")
            model.lm_head.weight[BROKEN] = 0
    model.save_pretrained(directory)
    return model.eval()


def scripted_language_model(directory: Path, follows: Mapping[int, int], otherwise: int) -> None:
    """A Llama that writes what it is told: behind a token always the one that `follows` names. Its
    embedding has a dimension for each token, its layers add nothing."""
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    size = 512
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=END,
    )
    model: Any = transformers.LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for token in range(size):
            model.lm_head.weight[follows.get(token, otherwise), token] = 1
    model.save_pretrained(directory)


def embedded_language_model(directory: Path) -> Path:
    """SmolLM2-135M-Instruct, all layers and the tied head, in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    config = embedded.language_model_config()
    config.architectures = ["LlamaForCausalLM"]
    config.tie_word_embeddings = True
    config.dtype = "bfloat16"
    config.save_pretrained(directory)
    embedded.load_tokenizer().save_pretrained(directory)
    tensors = {f"model.{n}": t.to(torch.bfloat16) for n, t in embedded.load_body().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@torch.inference_mode()
def plain_reply(
    model: Any, prompt: Sequence[int], max_tokens: int, end_ids: Sequence[int], *, noise: float
) -> tuple[list[int], bool]:
    """What `generate` of transformers writes behind the prompt, greedily, its end not included, and
    whether that is all: it is cut where the two best logits are closer than `noise`."""
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=list(end_ids),
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(made.logits).topk(2).values
    close = torch.nonzero(best[:, 0] - best[:, 1] < noise)
    ids = made.sequences[0, len(prompt) :].tolist()
    if len(close):
        return ids[: int(close[0])], False
    return ids[:-1] if ids[-1] in end_ids else ids, True
