"""The text that a family was trained on, where that is not its tokenizer's own template."""

from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from batch_scorer.models.registry import adapter_named

TURN = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
SYSTEM = {"role": "system", "content": "Be kind."}
NEMOTRON_4 = (
    "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nHi?\n<extra_id_1>Assistant\nYes.\n<extra_id_2>"
)
PROMPTS = {
    "eurus": ("[INST] Hi? [/INST] Yes.", "[INST] Hi? [/INST] Yes.</s>[INST] Hi? [/INST] Yes."),
    "ultrarm": (
        "Human: Hi?\n\nAssistant: Yes.",
        "Human: Hi?\n\nAssistant: Yes.\n\nHuman: Hi?\n\nAssistant: Yes.",
    ),
    "starling": (
        "<s>[INST] Hi? </s> [/INST] Yes.</s>",
        "<s>[INST] Hi? </s> [/INST] Yes.</s><s>[INST] Hi? </s> [/INST] Yes.</s>",
    ),
    "starling_34b": (
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>",
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>",
    ),
    "beaver_reward": (
        "BEGINNING OF CONVERSATION: USER: Hi? ASSISTANT:Yes.</s>",
        "BEGINNING OF CONVERSATION: USER: Hi? ASSISTANT:Yes.</s>USER: Hi? ASSISTANT:Yes.</s>",
    ),
    "oasst_pythia": (
        "<|prompter|>Hi?<|endoftext|><|assistant|>Yes.<|endoftext|>",
        "<|prompter|>Hi?<|endoftext|><|assistant|>Yes.<|endoftext|>"
        "<|prompter|>Hi?<|endoftext|><|assistant|>Yes.<|endoftext|>",
    ),
    "math_shepherd": ("Hi? Yes.", "Hi? Yes. Hi? Yes."),
}


def render(name: str, messages: list[dict[str, str]]) -> str:
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    template = adapter_named(name).prompt.template
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", PROMPTS)
def test_one_turn_and_two(name: str) -> None:
    one, two = PROMPTS[name]
    assert render(name, TURN) == one
    assert render(name, [*TURN, *TURN]) == two


@pytest.mark.parametrize("name", [name for name in PROMPTS if name != "starling_34b"])
def test_a_role_that_the_model_never_saw_is_an_error_of_the_row(name: str) -> None:
    with pytest.raises(TemplateError, match="this model was trained"):
        render(name, [SYSTEM, *TURN])


def test_nemotron_4_has_a_system_prompt_of_its_own() -> None:
    assert render("nemotron4_attributes", [SYSTEM, *TURN]) == NEMOTRON_4
    system = adapter_named("nemotron4_attributes").prompt.system
    assert system is not None and system.startswith("A chat between a curious user and")


def test_reward_and_cost_read_the_same_text() -> None:
    assert adapter_named("beaver_cost").prompt == adapter_named("beaver_reward").prompt
