"""What the template is given, and which template it is."""

import json
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_scorer.config import OverLength
from batch_scorer.errors import ModelError, RowNote, RowReason
from batch_scorer.models.adapter import Prompt
from batch_scorer.records import ParsedRows
from batch_scorer.render import OWN_TEMPLATE, Renderer
from tests.helpers.tiny import TEMPLATE, tiny_tokenizer

TALK = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
WHOLE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if thinks is defined %}thinks: {{ thinks }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
"""A template that reads tools, calls and an argument."""
CUTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
)
"""A template that cuts reasoning, as DeepSeek's do."""
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
"""A template that takes lists of parts only, as SmolVLM's does."""
BOTH = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
)
DATED = "Today: {{ strftime_now('%d %b %Y %H:%M') }}\n" + TEMPLATE


def renderer(folder: Path, template: str | dict[str, str] = TEMPLATE, **prompt: Any) -> Renderer:
    tiny_tokenizer(folder, bos=True)
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    if isinstance(template, dict):
        named = [{"name": name, "template": text} for name, text in template.items()]
        config["chat_template"] = named
    else:
        config["chat_template"] = template
    file.write_text(json.dumps(config))
    return Renderer(folder, 10_000, OverLength.MARK, Prompt(**prompt) if prompt else OWN_TEMPLATE)


def parsed(*sequences: Any, **facts: Any) -> ParsedRows:
    return ParsedRows(list(sequences), np.arange(len(sequences) + 1), **facts)


def seen(tokenizer: Renderer, rows: ParsedRows) -> list[str]:
    """What the model sees of each sequence."""
    made = tokenizer.tokenize(rows)
    assert made.sequence_errors == {}
    return [
        tokenizer.visible(made.token_ids[start:stop]).removeprefix("<s>")
        for start, stop in pairwise(made.sequence_offsets)
    ]


def test_a_row_with_arguments_is_rendered_as_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    call = {"function": {"name": "f", "arguments": {"b": 1, "a": None}}}
    used = [
        {"role": "user", "content": "Sum?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "tool_calls": [call]},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}]
    arguments: dict[int, dict[str, Any]] = {1: {"tools": tools}, 2: {"thinks": True}}
    tokenizer = renderer(tmp_path, WHOLE)
    made = tokenizer.tokenize(parsed(TALK, used, TALK, arguments=arguments))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for row, talk in enumerate([TALK, used, TALK]):
        text = reference.apply_chat_template(talk, tokenize=False, **arguments.get(row, {}))
        start, stop = made.sequence_offsets[row : row + 2]
        assert made.token_ids[start:stop].tolist() == reference(text)["input_ids"]


def test_a_row_whose_arguments_the_template_refuses_is_marked_alone(tmp_path: Path) -> None:
    template = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + TEMPLATE
    rows = parsed(TALK, TALK, arguments={0: {"tools": [{"type": "function"}]}})
    made = renderer(tmp_path, template).tokenize(rows)
    assert list(made.sequence_errors) == [0]
    assert made.sequence_errors[0].reason is RowReason.TEMPLATE_ERROR
    assert "no tools" in made.sequence_errors[0].detail


def test_an_argument_that_is_none_of_a_templates_is_named(tmp_path: Path) -> None:
    made = renderer(tmp_path).tokenize(parsed(TALK, arguments={0: {"tokenize": True, "x": 1}}))
    assert "tokenize is no argument of a template" in made.sequence_errors[0].detail
    with pytest.raises(ModelError, match="conversation is no argument of a template"):
        renderer(tmp_path, arguments='{"conversation": []}').probe()


def test_a_rows_own_arguments_go_before_the_jobs(tmp_path: Path) -> None:
    tokenizer = renderer(tmp_path, WHOLE, arguments='{"thinks": "always"}')
    job, own = seen(tokenizer, parsed(TALK, TALK, arguments={1: {"thinks": "never"}}))
    assert job.startswith("thinks: always") and own.startswith("thinks: never")


# Which template


def test_another_template_takes_the_place_of_the_tokenizers(tmp_path: Path) -> None:
    (text,) = seen(renderer(tmp_path, template="X {{ messages[-1].content }}"), parsed(TALK))
    assert text == "X Yes."


def test_named_templates_are_chosen_as_transformers_does(tmp_path: Path) -> None:
    """`default`, `tool_use` for rows with tools, or the one that is asked for."""
    named = {"default": "D " + TEMPLATE, "tool_use": "T " + TEMPLATE, "rag": "R " + TEMPLATE}
    rows = parsed(TALK, TALK, arguments={1: {"tools": [{"type": "function"}]}})
    assert [text[0] for text in seen(renderer(tmp_path, named), rows)] == ["D", "T"]
    chosen = renderer(tmp_path, named, template_name="rag")
    assert [text[0] for text in seen(chosen, rows)] == ["R", "R"]


@pytest.mark.parametrize("name", [None, "default"])
def test_without_a_default_the_names_are_listed(tmp_path: Path, name: str | None) -> None:
    named = {"tool_use": TEMPLATE, "rag": TEMPLATE}
    with pytest.raises(ModelError, match="rag, tool_use"):
        renderer(tmp_path, named, template_name=name).probe()


# Content in parts


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


IN_PARTS = [
    {"role": "user", "content": [text_part("One"), text_part("two")]},
    {"role": "assistant", "content": "Yes."},
]


def test_parts_are_joined_for_a_template_that_takes_text(tmp_path: Path) -> None:
    tokenizer = renderer(tmp_path)
    assert "user\nOne\ntwo<|im_end|>" in seen(tokenizer, parsed(IN_PARTS))[0]
    made = tokenizer.tokenize(parsed(TALK, IN_PARTS))
    assert made.notes == {1: (RowNote.PARTS_JOINED,)}


@pytest.mark.parametrize("template", [PARTS, BOTH])
def test_parts_stay_for_a_template_that_takes_them(tmp_path: Path, template: str) -> None:
    tokenizer = renderer(tmp_path, template)
    in_parts, plain = seen(tokenizer, parsed(IN_PARTS, TALK))
    assert "user\nOnetwo<|im_end|>" in in_parts
    assert "user\nHi?<|im_end|>" in plain and "assistant\nYes.<|im_end|>" in plain
    assert tokenizer.tokenize(parsed(IN_PARTS)).notes == {}


def test_a_template_that_prints_a_list_does_not_take_one(tmp_path: Path) -> None:
    """Llama-3's writes Python's spelling of it."""
    printing = "{% for m in messages %}{{ m.role }}: {{ m.content | string }}\n{% endfor %}"
    assert seen(renderer(tmp_path, printing), parsed(IN_PARTS))[0].startswith("user: One\ntwo\n")


# Roles


def test_an_alias_is_used_where_the_template_refuses_the_role(tmp_path: Path) -> None:
    human = [{"role": "human", "content": "Hi?"}, {"role": "gpt", "content": "Yes."}]
    tokenizer = renderer(tmp_path)
    made = tokenizer.tokenize(parsed(TALK, human))
    usual, renamed = np.split(made.token_ids, made.sequence_offsets[1:-1])
    assert usual.tolist() == renamed.tolist()
    assert made.notes == {1: (RowNote.ROLE_RENAMED,)}


def test_a_role_that_the_template_knows_is_kept(tmp_path: Path) -> None:
    human = [{"role": "human", "content": "Hi?"}, {"role": "gpt", "content": "Yes."}]
    tokenizer = renderer(tmp_path, WHOLE)
    assert seen(tokenizer, parsed(human))[0].startswith("<|im_start|>human\n")
    assert tokenizer.tokenize(parsed(human)).notes == {}


def test_an_alias_is_used_where_the_template_ignores_the_role(tmp_path: Path) -> None:
    ignores = (
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}"
        "{{ m.role }} {{ m.content }}\n{% endif %}{% endfor %}"
    )
    human = [{"role": "human", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    assert seen(renderer(tmp_path, ignores), parsed(human)) == ["user Hi?\nassistant Yes.\n"]


# Reasoning

THOUGHT = [TALK[0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}]
OWN_FIELD = [TALK[0], {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}]


@pytest.mark.parametrize("talk", [THOUGHT, OWN_FIELD], ids=["in the text", "a field"])
def test_an_answer_that_the_template_cuts_is_noted(tmp_path: Path, talk: Any) -> None:
    tokenizer = renderer(tmp_path, CUTS)
    assert "Hm." not in seen(tokenizer, parsed(talk))[0]
    made = tokenizer.tokenize(parsed(TALK, talk))
    assert made.notes == {1: (RowNote.ANSWER_REWRITTEN,)}


@pytest.mark.parametrize("talk", [THOUGHT, OWN_FIELD], ids=["in the text", "a field"])
def test_reasoning_is_kept_where_the_template_cuts_it(tmp_path: Path, talk: Any) -> None:
    tokenizer = renderer(tmp_path, CUTS, reasoning="keep")
    kept, plain = seen(tokenizer, parsed(talk, TALK))
    assert kept.endswith("assistant\n<think>\nHm.\n</think>\n\nYes.<|im_end|>\n")
    assert plain.endswith("assistant\nYes.<|im_end|>\n")
    assert tokenizer.tokenize(parsed(talk)).notes == {}


def test_kept_reasoning_takes_the_place_of_an_empty_one(tmp_path: Path) -> None:
    """As Qwen3 writes it before an answer without reasoning."""
    empty = CUTS.replace("{{ m.role }}\n", "{{ m.role }}\n<think>\n\n</think>\n\n")
    (kept,) = seen(renderer(tmp_path, empty, reasoning="keep"), parsed(THOUGHT))
    assert kept.endswith("assistant\n<think>\nHm.\n</think>\n\nYes.<|im_end|>\n")


def test_reasoning_is_kept_though_its_words_stand_elsewhere(tmp_path: Path) -> None:
    talk = [TALK[0], {"role": "assistant", "content": "<think>Yes</think>\n\nYes."}]
    (kept,) = seen(renderer(tmp_path, CUTS, reasoning="keep"), parsed(talk))
    assert "<think>Yes</think>\n\nYes." in kept


@pytest.mark.parametrize("talk", [THOUGHT, OWN_FIELD], ids=["in the text", "a field"])
def test_reasoning_is_dropped_where_the_template_writes_it(tmp_path: Path, talk: Any) -> None:
    writes = TEMPLATE.replace(
        "message['content']", "message.reasoning_content|string + message['content']"
    )
    (dropped,) = seen(renderer(tmp_path, writes, reasoning="drop"), parsed(talk))
    assert "Hm." not in dropped and dropped.endswith("Yes.<|im_end|>\n")


# Dates


def test_a_template_reads_the_prompts_date(tmp_path: Path) -> None:
    tokenizer = renderer(tmp_path, DATED, date=datetime(2026, 3, 4, 5, 6))
    assert tokenizer.asks_for_date
    (text,) = seen(tokenizer, parsed(TALK))
    assert text.startswith("Today: 04 Mar 2026 05:06\n")
    assert not renderer(tmp_path).asks_for_date


def test_all_rows_have_one_date_though_the_clock_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template's date was that of the moment at which its row was rendered."""
    import transformers.utils.chat_template_utils as utils

    class Clock:
        ticks = 0

        @classmethod
        def now(cls) -> datetime:
            cls.ticks += 1
            return datetime(2026, 11, 28, 23, 59, cls.ticks % 60)

    monkeypatch.setattr(utils, "datetime", Clock)
    tokenizer = renderer(tmp_path, "{{ strftime_now('%c') }}" + TEMPLATE)
    rows = parsed(*[TALK] * 1200, arguments={7: {"thinks": 1}})
    assert len(set(seen(tokenizer, rows))) == 1
    assert Clock.ticks == 0


# Pairs


def test_sides_that_differ_in_text_and_not_in_tokens_are_noted(tmp_path: Path) -> None:
    other = [TALK[0], {"role": "assistant", "content": "<think>\nNo.\n</think>\n\nYes."}]
    rows = ParsedRows([THOUGHT, other, TALK, TALK, TALK, THOUGHT], np.array([0, 2, 4, 6]))
    made = renderer(tmp_path, CUTS).tokenize(rows)
    assert made.notes == {
        0: (RowNote.ANSWER_REWRITTEN, RowNote.SAME_TOKENS),
        2: (RowNote.ANSWER_REWRITTEN, RowNote.SAME_TOKENS),
    }
