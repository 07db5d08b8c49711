"""What a template does to a conversation is found with marker words."""

from pathlib import Path
from typing import Any

import pytest

from batch_scorer.config import OverLength
from batch_scorer.errors import ModelError
from batch_scorer.models.adapter import Prompt
from batch_scorer.render import Renderer, TemplateFacts
from tests.helpers.tiny import TEMPLATE, tiny_tokenizer

ADDS = "<|im_start|>system\nBe good.<|im_end|>\n" + TEMPLATE
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n{% endif %}{% endfor %}"
)
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
TOOLS = "{{ tools | tojson if tools else '' }}" + TEMPLATE
THINKS = TEMPLATE.replace(
    "message['content']", "(message.reasoning_content or '') + message['content']"
)


def facts(folder: Path, template: str, **prompt: Any) -> TemplateFacts:
    tiny_tokenizer(folder, bos=True)
    (folder / "chat_template.jinja").write_text(template)
    found = Renderer(folder, 1000, OverLength.MARK, Prompt(**prompt)).probe().template
    assert found is not None
    return found


def test_a_plain_template(tmp_path: Path) -> None:
    found = facts(tmp_path, TEMPLATE)
    assert found == TemplateFacts(
        system="kept",
        answer="kept",
        reasoning_text="kept",
        reasoning_fields=(),
        tools="lost",
        added="",
        content="text",
        has_text=True,
        asks_for_date=False,
    )
    assert found.changes({"role user", "tools"}, "template") == ("leaves out tools",)
    thinks = {"role user", "reasoning_content"}
    assert found.changes(thinks, "template") == ("leaves out reasoning_content",)
    assert found.changes(thinks, "keep") == ()
    assert found.changes({"role user", "role system", "reasoning in text"}, "template") == ()


@pytest.mark.parametrize(
    ("template", "fact", "value"),
    [
        (NO_SYSTEM, "system", "lost"),
        (NO_SYSTEM, "reasoning_text", "lost"),
        (REFUSES, "system", "refused"),
        (TOOLS, "tools", "kept"),
        (THINKS, "reasoning_fields", ("reasoning_content",)),
        (ADDS, "added", "system\nBe good."),
        ("{{ bos_token }}" + TEMPLATE, "added", ""),
        ("Today {{ strftime_now('%Y') }} " + TEMPLATE, "asks_for_date", True),
    ],
)
def test_what_a_template_does(tmp_path: Path, template: str, fact: str, value: Any) -> None:
    assert getattr(facts(tmp_path, template), fact) == value


def test_a_template_that_writes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="writes nothing"):
        facts(tmp_path, "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}")


@pytest.mark.parametrize("template", [NO_SYSTEM, REFUSES])
def test_a_system_prompt_that_would_be_lost_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(ModelError, match="no place for a system message"):
        facts(tmp_path, template, system="Be exact.")


def test_what_a_template_adds_is_shown_shortened(tmp_path: Path) -> None:
    added = facts(tmp_path, "Be careful. " * 20 + TEMPLATE).added
    assert added.startswith("Be careful. Be careful.")
    assert added.endswith(" […]") and len(added) < 100


def test_the_probe_does_not_depend_on_the_length_policy(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    short = Renderer(tmp_path, 1, OverLength.ERROR).probe()
    assert short == Renderer(tmp_path, 1000, OverLength.MARK).probe()
