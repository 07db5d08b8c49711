"""Text in a message that spells a special token: counted, kept as text, or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_scorer.config import OverLength
from batch_scorer.errors import ModelError, RowReason
from batch_scorer.models.adapter import Prompt, Steps
from batch_scorer.records import ParsedRows
from batch_scorer.render import Renderer
from tests.helpers.tiny import TEMPLATE, tiny_tokenizer

CLOSES = "Yes.<|im_end|>\n<|im_start|>user\nThanks!"
"""An answer that closes its own turn."""


def talk(answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": answer}]


def parsed(*sequences: Any) -> ParsedRows:
    return ParsedRows(list(sequences), np.arange(len(sequences) + 1))


def renderer(folder: Path, policy: Any, **prompt: Any) -> Renderer:
    tiny_tokenizer(folder, bos=True)
    return Renderer(folder, 1000, OverLength.MARK, Prompt(special_text=policy, **prompt))


def test_special_tokens_in_messages_are_counted_by_row(tmp_path: Path) -> None:
    made = renderer(tmp_path, "parse").tokenize(
        parsed(talk("Yes."), talk(CLOSES), "<|im_start|>user\nrendered<|im_end|>")
    )
    assert made.special_tokens == {1: 2}
    assert made.sequence_errors == {}


def test_they_are_tokens_where_they_are_parsed(tmp_path: Path) -> None:
    ids = renderer(tmp_path, "parse").tokenize(parsed(talk(CLOSES))).token_ids.tolist()
    assert (ids.count(2), ids.count(3)) == (3, 3)


def test_they_are_text_where_they_are_literal(tmp_path: Path) -> None:
    """The ids of the template's own tokens and of the text between, as ordinary text."""
    from transformers import AutoTokenizer

    tokenizer = renderer(tmp_path, "literal")
    made = tokenizer.tokenize(parsed(talk(CLOSES), talk("Yes."), talk("say <s>")))
    ids, plain, bos = np.split(made.token_ids, made.sequence_offsets[1:-1])
    core: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert plain.tolist() == core(core.apply_chat_template(talk("Yes."), tokenize=False)).input_ids

    def text(part: str) -> list[int]:
        split = core(part, add_special_tokens=False, split_special_tokens=True)
        return list(split["input_ids"])

    assert ids.tolist() == [
        1, 2, *text("user\nHi?"), 3, *text("\n"), 2, *text(f"assistant\n{CLOSES}"), 3, *text("\n"),
    ]  # fmt: skip
    assert tokenizer.visible(ids).endswith(f"assistant\n{CLOSES}<|im_end|>\n")
    assert bos.tolist().count(1) == 1
    assert made.special_tokens == {0: 2, 2: 1}


def test_their_rows_are_marked(tmp_path: Path) -> None:
    made = renderer(tmp_path, "mark").tokenize(parsed(talk("Yes."), talk(CLOSES)))
    assert {i: error.reason for i, error in made.sequence_errors.items()} == {
        1: RowReason.SPECIAL_TEXT
    }
    assert made.special_tokens == {1: 2}


def test_rendered_text_is_read_with_its_special_tokens(tmp_path: Path) -> None:
    text = "<|im_start|>user\nHi \U00100000?<|im_end|>"
    rows = parsed(text)
    literal, usual = (
        renderer(tmp_path, policy).tokenize(rows).token_ids.tolist()
        for policy in ("literal", "parse")
    )
    assert literal == usual


def test_characters_that_stand_for_spellings_are_not_mixed_up(tmp_path: Path) -> None:
    made = renderer(tmp_path, "literal").tokenize(parsed(talk("\U00100001")))
    assert made.sequence_errors[0].reason is RowReason.SPECIAL_TEXT


def test_a_tag_of_a_step_is_no_special_text(tmp_path: Path) -> None:
    steps = Steps("tagged", "<|im_end|>")
    made = renderer(tmp_path, "mark", steps=steps).tokenize(parsed(talk("a<|im_end|>b<|im_end|>")))
    assert made.sequence_errors == {} and made.special_tokens == {}


def test_marks_of_reasoning_are_no_special_text(tmp_path: Path) -> None:
    """Some tokenizers call them special."""
    from transformers import AutoTokenizer

    tiny_tokenizer(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(tmp_path)
    prompt = Prompt(special_text="mark")
    made = Renderer(tmp_path, 1000, OverLength.MARK, prompt).tokenize(
        parsed(talk("<think>\nHm.\n</think>\n\nYes."))
    )
    assert made.sequence_errors == {} and made.special_tokens == {}
    assert {len(tokenizer) - 1, len(tokenizer) - 2} < set(made.token_ids.tolist())


def test_a_tokenizer_that_reads_pieces_otherwise_is_refused(tmp_path: Path) -> None:
    """As Llama-2's does, which puts a blank before the first word of a text only."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        ["user assistant How many sides"],
        trainers.BpeTrainer(vocab_size=64, special_tokens=special, show_progress=False),
    )
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="in pieces otherwise than whole; use mark"):
        Renderer(tmp_path, 1000, OverLength.MARK, Prompt(special_text="literal"))
