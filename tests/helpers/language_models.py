"""Language models for judges and implicit rewards: tiny random ones, one whose every next token is
given, and SmolLM2 as its package has it; and how plain Hugging Face goes on with a text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from batch_scorer.models import embedded
from tests.helpers.tiny import TEMPLATE, tiny_tokenizer
from tests.parity.tiny_models import QUERY_KEY_GAIN

VOCABULARY = 384  # the tokenizer's
END = 3
"""`<|im_end|>`, which ends a turn."""
BROKEN = 0
"""The padding token, which no text has."""
ASKING = TEMPLATE + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": BROKEN,
    "eos_token_id": END,
}
TRAPS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}
"""What each kind does to its logits, or where it keeps the last layer."""


def random_language_model(
    directory: Path, kind: str = "llama", *, seed: int = 0, breaks: bool = False, **shape: Any
) -> Path:
    """A tiny random model, with a tokenizer and a template. Its attention is peaked, so that every
    token before counts, and so are its probabilities. With `breaks` its hidden states are no
    numbers from the token `BROKEN` on, which it never writes; for a head that is not tied."""
    directory.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(ASKING)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **(SHAPE | TRAPS[kind] | shape))
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(QUERY_KEY_GAIN.get(kind, 8.0))
        head = model.get_output_embeddings().weight
        head.mul_(20)  # a tied one, too
        if breaks:
            model.get_input_embeddings().weight[BROKEN] = float("inf")
            head[BROKEN] = 0
    model.save_pretrained(directory)
    return directory


def scripted_language_model(directory: Path, follows: Mapping[int, int], otherwise: int) -> None:
    """A Llama that writes what it is told: behind a token always the one that `follows` names. Its
    embedding has a dimension for each token, its layers add nothing."""
    directory.mkdir(parents=True, exist_ok=True)
    size = 512
    config = LlamaConfig(
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
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
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
def next_token_probabilities(model_dir: Path, sequences: list[list[int]]) -> np.ndarray:
    """float64[S, V]: the probabilities of all next tokens, by transformers' own language model."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    return np.stack(
        [
            torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), -1).numpy()
            for ids in sequences
        ]
    )


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
