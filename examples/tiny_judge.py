"""A tiny language model that judges one thing, and judges it right: trained in a minute on a CPU.

    python examples/tiny_judge.py FOLDER

A prompt asks for a number, and the better of two answers is the one that gives it. The right
verdict on every row is known, so a judge that is asked with another prompt, in another order or
read in another way shows in its accuracy. It is asked what `tiny_judge.yaml` asks, in both orders,
and writes `A` or `B` and ends its turn, so its verdict can be read by probability or as text.

FOLDER gets the model (three layers, 0.7 MB) and `rows.parquet`: `prompt`, `chosen` and `rejected`
of rows that it was not trained on.

Legend: Q questions, L longest of a batch, H hidden, V vocabulary.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import permutations, product
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from batch_scorer.judges.page import Page, load_page

PAGE = Path(__file__).with_suffix(".yaml")
ROWS_NAME = "rows.parquet"
VERDICTS = ("A", "B")
"""For the answer that stands first, and for the other one."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ('system', 'user', 'assistant') -%}
{{- raise_exception('unknown role: ' ~ message['role']) -}}
{%- endif -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_PROMPTS = ("Say the number {}.", "Which number is {}?", "Write {}.", "Please give me a {}.")
_ANSWERS = ("{}", "It is {}.", "The number is {}.", "Here you are: {}", "Sure, {}!")
_FENCES = ("```", "````", "`````")
_NUM_TRAINED, _NUM_HELD_OUT = 3000, 200
_MAX_TOKENS = 2048

# Chosen by trial: at 3e-3, or with weights of 0.15, it learns in several times as many steps.
_LEARNING_RATE = 1.5e-3
_INITIAL_STD = 0.1
_STEPS = 400
_ROWS_A_STEP = 32
_MOST_LOSS = 0.03
"""Of the verdict, at the end; an even guess has 0.69."""


@dataclass(frozen=True)
class Row:
    """`chosen` gives the number that `prompt` asks for, `rejected` another one."""

    prompt: str
    chosen: str
    rejected: str


def make_rows() -> tuple[list[Row], list[Row]]:
    """Rows to train on, and others to judge."""
    rows = [
        Row(prompt.format(asked), chosen.format(asked), rejected.format(other))
        for asked, other in permutations(range(10), 2)
        for prompt, chosen, rejected in product(_PROMPTS, _ANSWERS, _ANSWERS)
    ]
    random.Random(0).shuffle(rows)
    return rows[:_NUM_TRAINED], rows[_NUM_TRAINED : _NUM_TRAINED + _NUM_HELD_OUT]


def question(
    page: Page, prompt: str, first: str, second: str, fence: str = _FENCES[0]
) -> list[dict[str, str]]:
    """The page's messages about two answers, in the order in which they are shown."""
    fields = {"prompt": prompt, "response_a": first, "response_b": second, "fence": fence}
    return [
        {"role": message.role, "content": _template(message.content).render(fields)}
        for message in page.messages
    ]


_template = cache(jinja2.Template)


def make_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE, which takes any text; each digit is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        model_max_length=_MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(vocabulary_size: int) -> Any:
    """Three layers with random weights: enough to know the number that was asked for from one that
    is answered, to find it again, and to tell which answer it was in. Queries begin equal to keys,
    so that a token attends to its like; without that it takes several times as long."""
    model: Any = LlamaForCausalLM(  # type: ignore[no-untyped-call]
        LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=_MAX_TOKENS,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            initializer_range=_INITIAL_STD,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=3,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            keys = attention.k_proj.weight.unflatten(0, (2, 1, 32))  # [key heads, 1, head, H]
            queries = keys.expand(-1, 2, -1, -1).flatten(0, 2)  # two query heads to each
            attention.q_proj.weight.copy_(queries)
    return model


@dataclass(frozen=True)
class Batch:
    """Q questions with their verdicts: `token_ids` is int64[Q, L + 1], padded on the right,
    `lengths` int64[Q] those of the questions alone, `verdict_ids` int64[Q]."""

    token_ids: Tensor
    lengths: Tensor
    verdict_ids: Tensor


def batches(page: Page, tokenizer: Any, rows: Sequence[Row]) -> Iterator[Batch]:
    """Some rows at a time, each in both orders, without end."""
    draw = random.Random(0)
    verdict_ids = torch.tensor(tokenizer.convert_tokens_to_ids(VERDICTS))  # int64[2]
    while True:
        asked = []
        for row in draw.sample(rows, _ROWS_A_STEP):
            fence = draw.choice(_FENCES)
            asked.append(question(page, row.prompt, row.chosen, row.rejected, fence))
            asked.append(question(page, row.prompt, row.rejected, row.chosen, fence))
        ids = [torch.tensor(ids) for ids in token_ids(tokenizer, asked)]
        expected = verdict_ids.repeat(_ROWS_A_STEP)
        written = [torch.cat([a, b[None]]) for a, b in zip(ids, expected, strict=True)]
        yield Batch(
            torch.nn.utils.rnn.pad_sequence(written, batch_first=True),
            torch.tensor([len(one) for one in ids]),
            expected,
        )


def token_ids(tokenizer: Any, asked: Sequence[list[dict[str, str]]]) -> list[list[int]]:
    """What the model is given: the messages in its template, and the head of its own turn."""
    done: list[list[int]] = tokenizer.apply_chat_template(
        list(asked), add_generation_prompt=True, return_dict=False
    )
    return done


def train(page: Page, tokenizer: Any, rows: Sequence[Row]) -> Any:
    """The model after training on the verdicts and on the end of the turn behind them. Raises
    RuntimeError where it does not learn."""
    torch.manual_seed(0)
    model = make_model(len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=_STEPS, pct_start=0.1
    )
    losses = []
    for _, batch in zip(range(_STEPS), batches(page, tokenizer, rows), strict=False):
        # Causal attention hides the padding, which is on the right.
        hidden = model.model(batch.token_ids).last_hidden_state  # [Q, L + 1, H]
        each = torch.arange(len(hidden))
        verdict = model.lm_head(hidden[each, batch.lengths - 1])  # [Q, V]
        ending = model.lm_head(hidden[each, batch.lengths])  # [Q, V]
        loss = cross_entropy(verdict, batch.verdict_ids)
        ends = torch.full_like(batch.verdict_ids, tokenizer.eos_token_id)
        total: Any = loss + 0.1 * cross_entropy(ending, ends)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            print(f"step {len(losses)}: loss {losses[-1]:.4f}", flush=True)
    if (last := sum(losses[-20:]) / 20) > _MOST_LOSS:
        raise RuntimeError(f"the tiny judge has not learned its task: its loss is {last:.3f}")
    return model.eval()


def write_tiny_judge(folder: Path) -> None:
    """Train the judge; write it and its rows."""
    page = load_page(str(PAGE))
    trained, held_out = make_rows()
    some = [question(page, row.prompt, row.chosen, row.rejected) for row in trained]
    texts = [message["content"] for messages in some for message in messages]
    tokenizer = make_tokenizer([*texts, "system\nuser\nassistant\n"])
    model = train(page, tokenizer, trained)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in held_out]), folder / ROWS_NAME)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    torch.set_num_threads(1)  # several would wait for each other: the matrices are small
    write_tiny_judge(parser.parse_args().folder)
