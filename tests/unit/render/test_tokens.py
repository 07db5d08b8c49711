"""Where BOS and EOS stand, and what is cut of a long sequence."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_scorer.config import OverLength
from batch_scorer.errors import ModelError, RowReason
from batch_scorer.models.adapter import Prompt, Steps
from batch_scorer.records import ParsedRows
from batch_scorer.render import Renderer
from batch_scorer.render.tokens import cut
from tests.helpers.tiny import TEMPLATE, tiny_tokenizer

BOS, OPEN, EOS = 1, 2, 3
TALK = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]


def ids_of(folder: Path, *sequences: Any, template: str = TEMPLATE, **prompt: Any) -> list[Any]:
    tiny_tokenizer(folder, bos=True)
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Renderer(folder, 1000, OverLength.MARK, Prompt(**prompt))
    made = tokenizer.tokenize(ParsedRows(list(sequences), np.arange(len(sequences) + 1)))
    return [made.token_ids[start:stop].tolist() for start, stop in pairwise(made.sequence_offsets)]


@pytest.mark.parametrize(
    ("rule", "in_template", "leading"),
    [
        ("auto", False, 1),
        ("auto", True, 1),
        ("always", False, 1),
        ("always", True, 1),
        ("never", False, 0),
        ("never", True, 0),
        ("template", False, 0),
        ("template", True, 1),
    ],
)
def test_bos_stands_where_the_rule_has_it(
    tmp_path: Path, rule: str, in_template: bool, leading: int
) -> None:
    template = ("{{ bos_token }}" if in_template else "") + TEMPLATE
    (ids,) = ids_of(tmp_path, TALK, template=template, bos=rule)
    assert ids.count(BOS) == leading and ids[leading] == OPEN


def test_always_needs_a_tokenizer_that_has_bos(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path, bos=False)
    with pytest.raises(ModelError, match="has no BOS"):
        Renderer(tmp_path, 9, OverLength.MARK, Prompt(bos="always"))


def test_eos_is_appended_once_or_taken_off(tmp_path: Path) -> None:
    ended = TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")
    kept, text = ids_of(tmp_path, TALK, "plain text")
    assert kept[-1] != EOS
    assert ids_of(tmp_path, TALK, "plain text", eos="append") == [[*kept, EOS], [*text, EOS]]
    assert ids_of(tmp_path, "a<|im_end|>", eos="append") == ids_of(tmp_path, "a<|im_end|>")
    assert ids_of(tmp_path, "a<|im_end|><|im_end|>", eos="never") == ids_of(tmp_path, "a")
    assert ids_of(tmp_path, [5, 6], eos="append") == [[5, 6]]
    (ends,) = ids_of(tmp_path, TALK, template=ended)
    assert ids_of(tmp_path, TALK, template=ended, eos="append") == [ends]


def test_openrlhf_ends_a_text_as_it_was_trained(tmp_path: Path) -> None:
    """Line feeds are stripped; EOS is there already, or comes behind a blank; no BOS is added."""
    rule = {"eos": "openrlhf", "bos": "template"}
    chat, plain = ids_of(tmp_path, TALK, "an answer\n\n", **rule)
    assert chat[-1] == EOS and chat.count(EOS) == 2 and chat[0] == OPEN
    assert plain == ids_of(tmp_path, "an answer <|im_end|>", bos="template")[0]


LONG = np.arange(1, 11, dtype=np.int32)
"""BOS and nine tokens more."""


@pytest.mark.parametrize(
    ("how", "last_id", "kept"),
    [
        (OverLength.TRUNCATE_LEFT, None, [1, 7, 8, 9, 10]),
        (OverLength.TRUNCATE_RIGHT, None, [1, 2, 3, 4, 5]),
        (OverLength.TRUNCATE_RIGHT, 10, [1, 2, 3, 4, 10]),
        (OverLength.TRUNCATE_MIDDLE, None, [1, 2, 3, 9, 10]),
        (OverLength.TRUNCATE_MIDDLE, 10, [1, 2, 3, 9, 10]),
    ],
)
def test_each_cut_keeps_its_ends(how: OverLength, last_id: int | None, kept: list[int]) -> None:
    assert LONG[cut(LONG, 5, how, BOS, last_id)].tolist() == kept


@pytest.mark.parametrize("how", [how for how in OverLength if how.cuts])
@pytest.mark.parametrize("most", [1, 2, 9])
def test_a_cut_is_as_long_as_asked(how: OverLength, most: int) -> None:
    for last_id in (None, 10):
        assert len(cut(LONG, most, how, BOS, last_id)) == most


def test_a_long_sequence_is_counted_and_its_end_token_kept(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    prompt = Prompt(eos="append")
    talk = [TALK[0], {"role": "assistant", "content": "word " * 40}]
    rows = ParsedRows([talk, TALK], np.array([0, 2]))
    whole = Renderer(tmp_path, 1000, OverLength.MARK, prompt).tokenize(rows)
    right = Renderer(tmp_path, 50, OverLength.TRUNCATE_RIGHT, prompt).tokenize(rows)
    assert right.token_ids[:50].tolist() == [*whole.token_ids[:49].tolist(), EOS]
    assert right.truncated_tokens.tolist() == [whole.lengths[0] - 50, 0]
    marked = Renderer(tmp_path, 50, OverLength.MARK, prompt).tokenize(rows)
    assert marked.too_long == {0: whole.lengths[0]}


# Steps that the row gives as a list


def with_steps(folder: Path, prompt: Prompt, *steps: str) -> tuple[Any, str]:
    tiny_tokenizer(folder)
    tokenizer = Renderer(folder, 1000, OverLength.MARK, prompt)
    talk = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": ""}]
    made = tokenizer.tokenize(ParsedRows([talk], np.array([0, 1]), steps={0: steps}))
    return made, tokenizer.visible(made.token_ids)


def test_given_steps_are_joined_for_a_model_that_reads_the_answer_whole(tmp_path: Path) -> None:
    made, text = with_steps(tmp_path, Prompt(), "one", "two")
    assert text.endswith("assistant\none\n\ntwo<|im_end|>\n")
    assert made.given_steps == {}
    other = with_steps(tmp_path, Prompt(step_separator=" | "), "one", "two")[1]
    assert other.endswith("assistant\none | two<|im_end|>\n")


def test_given_steps_are_tagged_and_never_split_again(tmp_path: Path) -> None:
    tagged = Prompt(steps=Steps("tagged", "<+>"))
    made, text = with_steps(tmp_path, tagged, "one\n\nstill one", "", "two")
    assert text.endswith("assistant\none\n\nstill one<+><+>two<+><|im_end|>\n")
    assert made.given_steps == {0: 3}
    turns = with_steps(tmp_path, Prompt(steps=Steps("turns", "+")), "one\n\nstill", "two")[1]
    assert turns.count("assistant\n+<|im_end|>") == 2
    assert with_steps(tmp_path, tagged)[0].sequence_errors[0].reason is RowReason.NO_STEPS
