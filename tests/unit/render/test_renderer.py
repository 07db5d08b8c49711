import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_scorer.config import OverLength
from batch_scorer.errors import ModelError, RowNote, RowReason, ShardError
from batch_scorer.models.adapter import Beside, Prompt, Steps
from batch_scorer.records import Conversation, ParsedRows, RowError
from batch_scorer.render import OWN_TEMPLATE, Renderer
from tests.helpers.tiny import TEMPLATE, tiny_tokenizer

LONG = 10_000
REWARD = 97


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
    prompt: Prompt = OWN_TEMPLATE,
) -> Renderer:
    tiny_tokenizer(folder, bos=bos)
    file = folder / "chat_template.jinja"
    if template is None:
        file.unlink()
    else:
        file.write_text(template)
    (folder / "config.json").write_text(json.dumps({"reward_token_id": REWARD}))
    return Renderer(folder, max_tokens, over_length, prompt)


def texts(tokenizer: Renderer, *sequences: object) -> list[str]:
    """What the model sees of each sequence."""
    made = tokenizer.tokenize(rows(*sequences))
    assert made.sequence_errors == {}
    bounds = made.sequence_offsets
    return [tokenizer.visible(made.token_ids[start:stop]) for start, stop in pairwise(bounds)]


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


def test_an_id_beyond_the_embedding_marks_its_row_and_a_pad_token_there_does_no_harm(
    tmp_path: Path,
) -> None:
    from transformers import AutoTokenizer

    tiny_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    made = Renderer(tmp_path, LONG, OverLength.MARK, vocab_size=size)
    assert made.vocab_size <= size
    found = made.tokenize(rows([1, size - 1], [1, size], conversation("Hi", "Ho [PAD]")))
    assert found.lengths.tolist()[0] == 2
    assert {i: error.reason for i, error in found.sequence_errors.items()} == {
        1: RowReason.BAD_TOKEN_ID,
        2: RowReason.BAD_TOKEN_ID,
    }


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


# What a family was trained on, where that is not its tokenizer's own template


def test_a_system_prompt_is_put_where_there_is_none(tmp_path: Path) -> None:
    tokenizer = renderer(tmp_path, prompt=Prompt(system="Be exact."))
    own = [{"role": "system", "content": "Be kind."}, *conversation("Q", "A")]
    without, with_own = texts(tokenizer, conversation("Q", "A"), own)
    assert without.startswith("<|im_start|>system\nBe exact.<|im_end|>")
    assert "Be exact." not in with_own and "Be kind." in with_own


def test_the_suffix_token_ends_every_sequence_once(tmp_path: Path) -> None:
    """T-INTERN: absent, already there, and twice in the content; kept by truncation."""
    prompt = Prompt(suffix_id_of="reward_token_id")
    tokenizer = renderer(
        tmp_path, prompt=prompt, max_tokens=12, over_length=OverLength.TRUNCATE_LEFT
    )
    made = tokenizer.tokenize(
        rows([5, 6], [5, 6, REWARD], [REWARD, 5, REWARD, 6], conversation("Long " * 20, "A"))
    )
    ids = np.split(made.token_ids, made.sequence_offsets[1:-1])
    assert [part.tolist() for part in ids[:3]] == [
        [5, 6, REWARD],
        [5, 6, REWARD],
        [REWARD, 5, REWARD, 6, REWARD],
    ]
    assert len(ids[3]) == 12 and ids[3][-1] == REWARD and ids[3][-2] != REWARD
    with pytest.raises(ModelError, match="no other_id"):
        renderer(tmp_path, prompt=Prompt(suffix_id_of="other_id"))


def test_a_pair_is_given_to_the_tokenizer_as_one(tmp_path: Path) -> None:
    """T-ENC: turns before the answer are joined by blank lines; a template goes before."""
    tokenizer = renderer(tmp_path, template=None, prompt=Prompt(pair=True))
    (text,) = texts(tokenizer, conversation("Q1", "A1", "Q2", "A2"))
    assert text == "Q1\n\nA1\n\nQ2A2"
    with_template = renderer(tmp_path, prompt=Prompt(pair=True))
    assert texts(with_template, conversation("Q", "A"))[0].startswith("<|im_start|>user")


TAGGED = Steps("tagged", "<+>")
TURNS = Steps("turns", "+")


def test_an_answer_is_cut_into_steps(tmp_path: Path) -> None:
    """T-PRM-1: at blank lines; at its own tags where it has some; no empty steps."""
    tokenizer = renderer(tmp_path, prompt=Prompt(steps=TAGGED))
    plain, tagged, loose = texts(
        tokenizer,
        conversation("Q", "one\n\ntwo"),
        conversation("Q", "one <+> two <+>"),
        conversation("Q", "\n\none\n\n\n\ntwo\n"),
    )
    assert plain.endswith("assistant\none<+>two<+><|im_end|>\n")
    assert plain == tagged == loose
    (turns,) = texts(
        renderer(tmp_path, prompt=Prompt(steps=TURNS)), conversation("1+1?", "1+1\n\n= 2")
    )
    assert turns == (
        "<|im_start|>user\n1+1? 1+1<|im_end|>\n<|im_start|>assistant\n+<|im_end|>\n"
        "<|im_start|>user\n= 2<|im_end|>\n<|im_start|>assistant\n+<|im_end|>\n"
    )


def test_an_answer_without_steps_is_marked(tmp_path: Path) -> None:
    """T-PRM-1"""
    tokenizer = renderer(tmp_path, prompt=Prompt(steps=TAGGED))
    made = tokenizer.tokenize(rows(conversation("Q", "one"), conversation("Q", " <+> ")))
    assert {i: error.reason for i, error in made.sequence_errors.items()} == {1: RowReason.NO_STEPS}


def test_steps_are_never_cut_off(tmp_path: Path) -> None:
    """T-PRM-2: a step that the model does not see would be missing without a word."""
    tokenizer = renderer(
        tmp_path,
        prompt=Prompt(steps=TAGGED),
        max_tokens=30,
        over_length=OverLength.TRUNCATE_LEFT,
    )
    made = tokenizer.tokenize(rows(conversation("Q", "a long step\n\n" * 20)))
    (error,) = made.sequence_errors.values()
    assert error.reason is RowReason.TOO_LONG and "would lose steps" in error.detail


@pytest.mark.parametrize(
    "settings", [{"bos": "never"}, {"eos": "append"}, {"special_text": "literal"}]
)
def test_a_pair_takes_no_settings_that_it_would_ignore(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match="pair"):
        renderer(tmp_path, template=None, prompt=Prompt(pair=True, **settings))


def test_the_reasoning_of_a_pairs_answer_is_kept_or_noted(tmp_path: Path) -> None:
    talk = conversation("Q", "A")
    talk[-1]["reasoning_content"] = "Hm."
    made = renderer(tmp_path, template=None, prompt=Prompt(pair=True)).tokenize(rows(talk))
    assert made.notes == {0: (RowNote.ANSWER_REWRITTEN,)}
    keeping = renderer(tmp_path, template=None, prompt=Prompt(pair=True, reasoning="keep"))
    assert texts(keeping, talk) == ["Q<think>\nHm.\n</think>\n\nA"]
    assert keeping.tokenize(rows(talk)).notes == {}


def test_a_principle_that_nobody_gives_is_not_left_out(tmp_path: Path) -> None:
    asking = Prompt(beside=Beside("principle", turn="Is it {{ principle }}?"))
    talk = conversation("q", "a")
    made = renderer(tmp_path, prompt=asking).tokenize(rows(talk))
    assert made.sequence_errors[0].reason == RowReason.NULL_VALUE
    given = ParsedRows([talk], np.array([0, 1]), beside={0: {"content": "brief"}})
    asked = renderer(tmp_path, prompt=asking)
    shown = asked.visible(asked.tokenize(given).token_ids)
    assert shown.endswith("a<|im_end|>\n<|im_start|>user\nIs it brief?<|im_end|>\n")
