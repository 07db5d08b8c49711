"""A tiny reward model with a real tokenizer and template, for tests of all but the engine."""

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
_TEXT = [
    "The quick brown fox jumps over the lazy dog, and then it rests for a while.",
    "user assistant system What is the answer to this question? I think that the answer is 42.",
    "How do you make a good cup of tea? Boil the water, warm the pot, and wait for four minutes.",
]


def tiny_tokenizer(directory: Path, *, bos: bool = False) -> None:
    """A byte-level BPE tokenizer of 512 ids; with `bos`, one that puts `<s>` first by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_TEXT, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>" if bos else None,
        eos_token="<|im_end|>",
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)


def tiny_reward_model(directory: Path, *, bos: bool = False, max_tokens: int = 4096) -> Path:
    """A random Llama of two layers with a head whose scores spread over a few units."""
    import torch
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(directory, bos=bos)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=max_tokens,
        pad_token_id=0,
    )
    config.num_labels = 1
    model: Any = transformers.AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.score.weight.mul_(20)
    model.save_pretrained(directory)
    return directory
