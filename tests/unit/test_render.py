from pathlib import Path

import numpy as np
import pytest
from tiny import TEMPLATE, tiny_tokenizer

from batch_scorer.config import OverLength
from batch_scorer.errors import ModelError, RowReason, ShardError
from batch_scorer.records import Conversation, ParsedRows, RowError
from batch_scorer.render import Renderer

LONG = 10_000


def conversation(*contents: str, first: str = "user") -> Conversation:
    roles = [first, *["assistant" if i % 2 == 0 else "user" for i in range(len(contents) - 1)]]
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]


def rows(*sequences: object) -> ParsedRows:
    return ParsedRows(list(sequences), np.arange(len(sequences) + 1))  # type: ignore[arg-type]


def renderer(
    folder: Path,
    *,
    bos: bool = False,
    template: str | None = TEMPLATE,
    max_tokens: int = LONG,
    over_length: OverLength = OverLength.MARK,
) -> Renderer:
    tiny_tokenizer(folder, bos=bos)
    file = folder / "chat_template.jinja"
    if template is None:
        file.unlink()
    else:
        file.write_text(template)
    return Renderer(folder, max_tokens, over_length)


@pytest.mark.parametrize(
    ("bos", "template", "expected"),
    [
        (True, TEMPLATE, 1),
        (True, "{{ bos_token }}" + TEMPLATE, 1),
        (False, TEMPLATE, 0),
    ],
    ids=["tokenizer adds BOS", "template holds BOS", "no BOS at all"],
)
def test_exactly_one_bos(tmp_path: Path, bos: bool, template: str, expected: int) -> None:
    tokenizer = renderer(tmp_path, bos=bos, template=template)
    made = tokenizer.tokenize(rows(conversation("Hi", "Hello"), conversation("A", "B", "C", "D")))
    for start, stop in zip(made.sequence_offsets[:-1], made.sequence_offsets[1:], strict=True):
        ids = made.token_ids[start:stop].tolist()
        assert ids.count(1) == expected
        assert not expected or ids[0] == 1


def test_rendered_text_that_starts_with_bos_gets_no_second_one(tmp_path: Path) -> None:
    tokenizer = renderer(tmp_path, bos=True)
    made = tokenizer.tokenize(rows("<s>Hi", "Hi"))
    with_bos, without = np.split(made.token_ids, made.sequence_offsets[1:-1])
    assert with_bos.tolist() == without.tolist()


def test_bos_inside_a_message_stays(tmp_path: Path) -> None:
    made = renderer(tmp_path, bos=True).tokenize(rows(conversation("say <s>", "<s>")))
    assert made.token_ids.tolist().count(1) == 3


def test_bulk_ids_are_those_of_the_model_card(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    talks = [conversation(f"Why {i}?", "Because\n\n é 中文 " * i + "!") for i in range(20)]
    made = renderer(tmp_path, bos=True).tokenize(rows(*talks))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for talk, ids in zip(talks, np.split(made.token_ids, made.sequence_offsets[1:-1]), strict=True):
        text = reference.apply_chat_template(talk, tokenize=False)
        assert ids.tolist() == reference(text)["input_ids"]


def test_a_template_that_raises_marks_its_row_alone(tmp_path: Path) -> None:
    bad = conversation("do it", "done", first="tool")
    made = renderer(tmp_path).tokenize(rows(conversation("a", "b"), bad, conversation("c", "d")))
    assert list(made.sequence_errors) == [1]
    assert made.sequence_errors[1].reason is RowReason.TEMPLATE_ERROR
    assert "unknown role tool" in made.sequence_errors[1].detail
    assert made.lengths[1] == 0
    assert (made.lengths[[0, 2]] > 0).all()


def test_an_over_long_sequence_is_marked_with_its_length(tmp_path: Path) -> None:
    tokenizer = renderer(tmp_path, max_tokens=20)
    made = tokenizer.tokenize(rows(conversation("x" * 200, "y"), conversation("a", "b")))
    assert made.sequence_errors[0].reason is RowReason.TOO_LONG
    assert "at most 20" in made.sequence_errors[0].detail
    assert made.truncated_tokens.tolist() == [0, 0]


def test_the_error_policy_fails_the_shard(tmp_path: Path) -> None:
    tokenizer = renderer(tmp_path, max_tokens=20, over_length=OverLength.ERROR)
    with pytest.raises(ShardError, match=r"row 1: .* tokens, at most 20"):
        tokenizer.tokenize(rows(conversation("a", "b"), conversation("x" * 200, "y")))


def test_truncation_keeps_bos_and_the_end_and_counts_what_is_cut(tmp_path: Path) -> None:
    talk = conversation("question " * 30, "the answer")
    whole = renderer(tmp_path, bos=True).tokenize(rows(talk)).token_ids
    cut = Renderer(tmp_path, 20, OverLength.TRUNCATE_LEFT).tokenize(rows(talk))
    assert cut.token_ids.tolist() == [1, *whole[-19:].tolist()]
    assert cut.truncated_tokens.tolist() == [len(whole) - 20]


def test_ids_pass_as_they_are_and_errors_keep_their_place(tmp_path: Path) -> None:
    error = RowError(RowReason.EMPTY, "")
    made = renderer(tmp_path, bos=True).tokenize(rows([5, 6, 7], error, "text"))
    assert made.token_ids[:3].tolist() == [5, 6, 7]
    assert made.sequence_errors == {1: error}


def test_the_probe_shows_the_template(tmp_path: Path) -> None:
    plain = renderer(tmp_path).probe()
    assert plain.texts[0].startswith("<|im_start|>user\nHow many")
    other = renderer(tmp_path, template="Dated 2026-11-22. " + TEMPLATE).probe()
    assert other.digest != plain.digest


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "no chat template"), ("{{ raise_exception('no') }}", "the chat template fails: .*no")],
)
def test_a_missing_or_broken_template_is_refused(
    tmp_path: Path, template: str | None, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        renderer(tmp_path, template=template).probe()


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no usable tokenizer"):
        Renderer(tmp_path, LONG, OverLength.MARK)
