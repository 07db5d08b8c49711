"""Which tokens of a sequence are the judged answer's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from batch_scorer.config import OverLength
from batch_scorer.errors import ModelError, RowNote, RowReason
from batch_scorer.models.adapter import Prompt
from batch_scorer.outputs.reuse import find_known
from batch_scorer.records import ParsedRows, RowError, Scores, TokenizedRows
from batch_scorer.render import Renderer
from tests.helpers.templates import template_texts
from tests.helpers.tiny import TEMPLATE, tiny_tokenizer

ASKING = TEMPLATE + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TALK = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes, tea."}]


def renderer(
    folder: Path,
    template: str = ASKING,
    has_bos: bool = False,
    *,
    most: int = 1000,
    over_length: OverLength = OverLength.MARK,
    **prompt: Any,
) -> Renderer:
    tiny_tokenizer(folder, bos=has_bos)
    (folder / "chat_template.jinja").write_text(template)
    return Renderer(folder, most, over_length, Prompt(answer=True, **prompt))


def rows(*sequences: Any, prompt_lengths: dict[int, int] | None = None) -> ParsedRows:
    parsed = ParsedRows(list(sequences), np.arange(len(sequences) + 1))
    parsed.prompt_lengths = prompt_lengths or {}
    return parsed


def cut(tokenizer: Renderer, made: TokenizedRows, sequence: int = 0) -> tuple[str, str]:
    """What stands before the answer, and the answer."""
    start, stop = made.sequence_offsets[sequence : sequence + 2]
    assert made.answer_starts is not None and sequence not in made.sequence_errors
    border = start + made.answer_starts[sequence]
    ids = made.token_ids
    return tokenizer.visible(ids[start:border]), tokenizer.visible(ids[border:stop])


@pytest.mark.parametrize("bos", ["auto", "always", "never", "template"])
@pytest.mark.parametrize("in_template", [False, True])
def test_the_answer_begins_behind_the_generation_prompt(
    tmp_path: Path, bos: str, in_template: bool
) -> None:
    template = ("{{ bos_token }}" if in_template else "") + ASKING
    prompt: dict[str, Any] = {"bos": bos, "eos": "append"}
    tokenizer = renderer(tmp_path, template, True, **prompt)
    before, answer = cut(tokenizer, tokenizer.tokenize(rows(TALK)))
    assert before.removeprefix("<s>") == (
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answer == "Yes, tea.<|im_end|>\n<|im_end|>"


def test_a_template_that_asks_for_no_answer_leaves_the_header_to_it(tmp_path: Path) -> None:
    """As TRL does it, whose border is where prompt and whole part."""
    tokenizer = renderer(tmp_path, TEMPLATE)
    _, answer = cut(tokenizer, tokenizer.tokenize(rows(TALK)))
    assert answer == "<|im_start|>assistant\nYes, tea.<|im_end|>\n"


@pytest.mark.parametrize("text", ["\n\nYes", "é 中文 🙂", " two  blanks", "<|im_end|> in it"])
def test_the_border_is_found_whatever_the_answer_begins_with(tmp_path: Path, text: str) -> None:
    tokenizer = renderer(tmp_path)
    talk = [TALK[0], {"role": "assistant", "content": text}]
    before, answer = cut(tokenizer, tokenizer.tokenize(rows(talk)))
    # A token on the border is the answer's.
    assert answer.removeprefix("\n") == (text + "<|im_end|>\n").removeprefix("\n")
    assert before.startswith("<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant")


def test_a_template_that_rewrites_the_prompt_is_cut_at_the_answers_own_text(
    tmp_path: Path,
) -> None:
    thinking = TEMPLATE + (
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = renderer(tmp_path, thinking)
    made = tokenizer.tokenize(rows(TALK, [TALK[0], {**TALK[1], "content": "<think>\nA</think>B"}]))
    assert cut(tokenizer, made, 0)[1] == "Yes, tea.<|im_end|>\n"
    assert cut(tokenizer, made, 1)[1] == "A</think>B<|im_end|>\n"  # as TRL


def test_an_answer_that_cannot_be_found_is_marked(tmp_path: Path) -> None:
    tokenizer = renderer(tmp_path, "{{ messages | length }}" + ASKING)
    made = tokenizer.tokenize(rows(TALK, [5, 6, 7], "some text", RowError(RowReason.EMPTY, "")))
    assert cut(tokenizer, made, 0)[1] == "Yes, tea.<|im_end|>\n"
    reasons = {place: error.reason for place, error in made.sequence_errors.items()}
    assert reasons == {
        1: RowReason.ANSWER_NOT_FOUND,
        2: RowReason.ANSWER_NOT_FOUND,
        3: RowReason.EMPTY,
    }
    tokenizer = renderer(tmp_path, "{{ messages[-1]['content'] | length }}" + TEMPLATE)
    (error,) = tokenizer.tokenize(rows(TALK)).sequence_errors.values()
    assert error.reason is RowReason.ANSWER_NOT_FOUND


def test_texts_and_ids_begin_where_their_prompt_ends(tmp_path: Path) -> None:
    tokenizer = renderer(tmp_path, has_bos=True)
    made = tokenizer.tokenize(
        rows([5, 6, 7, 8], "A question? An answer", prompt_lengths={0: 3, 1: len("A question?")})
    )
    assert made.answer_starts is not None and made.answer_starts[0] == 3
    before, answer = cut(tokenizer, made, 1)
    assert before + answer == "<s>A question? An answer" and answer == " An answer"


@pytest.mark.parametrize(
    ("how", "most", "answer"),
    [
        (OverLength.TRUNCATE_LEFT, 40, "Yes, tea.<|im_end|>\n"),
        (OverLength.TRUNCATE_LEFT, 4, None),
        (OverLength.TRUNCATE_MIDDLE, 40, "Yes, tea.<|im_end|>\n"),
        (OverLength.TRUNCATE_MIDDLE, 6, None),
        (OverLength.TRUNCATE_RIGHT, 40, None),
    ],
)
def test_a_cut_takes_the_border_along_or_marks_the_row(
    tmp_path: Path, how: OverLength, most: int, answer: str | None
) -> None:
    tokenizer = renderer(tmp_path, most=most, over_length=how)
    made = tokenizer.tokenize(rows([{"role": "user", "content": "Hi? " * 90}, TALK[1]]))
    if answer is not None:
        assert made.lengths.tolist() == [most]
        assert cut(tokenizer, made)[1] == answer
    else:
        (error,) = made.sequence_errors.values()
        assert error.reason is RowReason.TOO_LONG and "answer" in error.detail


def test_a_long_answer_may_lose_its_end(tmp_path: Path) -> None:
    tokenizer = renderer(tmp_path, most=30, over_length=OverLength.TRUNCATE_RIGHT)
    long = [TALK[0], {"role": "assistant", "content": "tea " * 90}]
    made = tokenizer.tokenize(rows(long))
    assert made.truncated_tokens[0] > 0 and cut(tokenizer, made)[1].startswith("tea tea")


def test_equal_ids_with_another_answer_are_not_the_same(tmp_path: Path) -> None:
    tokenizer = renderer(tmp_path)
    parsed = ParsedRows([[5, 6, 7], [5, 6, 7], [5, 6, 7]], np.array([0, 1, 2, 3]))
    parsed.prompt_lengths = {0: 1, 1: 2, 2: 1}
    here = tokenizer.tokenize(parsed)
    known = find_known(here, [(here.take(np.array([0])), Scores(np.ones((1, 1), np.float32)))])
    assert known is not None
    np.testing.assert_array_equal(known.values[:, 0], [1, np.nan, 1])
    assert here.part(1, 3).answer_starts is not None
    assert here.part(1, 3).answer_starts.tolist() == [2, 1]  # type: ignore[union-attr]


def test_sides_of_the_same_ids_are_noted_only_where_their_answers_are_the_same() -> None:
    from batch_scorer.render.renderer import _rows_of_same_tokens

    parsed = ParsedRows([["a"], ["b"]], np.array([0, 2]))  # type: ignore[list-item]
    ids = [np.array([5, 6], np.int32)] * 2
    assert list(_rows_of_same_tokens(parsed, ids, np.array([1, 1], np.int32))) == [0]
    assert list(_rows_of_same_tokens(parsed, ids, None)) == [0]
    assert list(_rows_of_same_tokens(parsed, ids, np.array([1, 0], np.int32))) == []


def test_what_cannot_tell_the_answers_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="special_text: literal reads a text in pieces"):
        renderer(tmp_path, special_text="literal")


@pytest.mark.parametrize(
    "name", ["llama-3.1", "qwen2.5", "qwen3", "gemma-2", "phi-3", "deepseek-v3", "glm-4.5",
             "mistral-v3", "nemotron-3"]
)  # fmt: skip
def test_real_templates_are_cut_where_trl_cuts_them(name: str, tmp_path: Path) -> None:
    """TRL 1.16: the completion begins where the ids of the prompt, with a generation prompt, and
    of the whole part."""
    tokenizer = renderer(tmp_path, template_texts(name)["default"], True)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    talks = [
        [*before, {"role": "assistant", "content": answer}]
        for before in (TALK[:1], [*TALK, {"role": "user", "content": "And now?"}])
        for answer in ("Tea.", "1. Tea\n2. More", "`code`")
    ]
    made = tokenizer.tokenize(rows(*talks))
    assert made.sequence_errors == {} and made.answer_starts is not None
    assert RowNote.ANSWER_REWRITTEN not in {n for notes in made.notes.values() for n in notes}
    for place, talk in enumerate(talks):
        ids = [
            plain.apply_chat_template(messages, add_generation_prompt=asks, return_dict=True)[
                "input_ids"
            ]
            for messages, asks in ((talk[:-1], True), (talk, False))
        ]
        shorter = min(map(len, ids))
        border = next((i for i in range(shorter) if ids[0][i] != ids[1][i]), shorter)
        answer = made.lengths[place] - made.answer_starts[place]  # BOS may stand in front
        assert answer == len(ids[1]) - border, (name, cut(tokenizer, made, place))
