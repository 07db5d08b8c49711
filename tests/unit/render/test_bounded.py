"""A template cannot work or write without end, and is otherwise what transformers makes of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import TemplateError

from batch_scorer.config import OverLength
from batch_scorer.errors import ModelError, RowReason
from batch_scorer.records import ParsedRows
from batch_scorer.render import Renderer
from batch_scorer.render.bounded import BoundedTemplate, TooMuchWork
from tests.helpers.tiny import TEMPLATE, tiny_tokenizer

TALK = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
DOUBLED = "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}"
ENDLESS = {
    "nested loops": 2 * "{% for i in range(99999) %}" + 2 * "{% endfor %}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "a recursive loop": "{% for a in [[1, 2], [3, 4]] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "deep macros": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(1) }}",
    "a doubled text": DOUBLED + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "an added text": DOUBLED + "{% set n.x = n.x + n.x %}{% endfor %}",
    "a doubled block": DOUBLED + "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"
    "{% endfor %}",
    "lists in lists": DOUBLED + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "objects in objects": DOUBLED + "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}"
    "{{ n.x | tojson }}",
    "namespaces": DOUBLED + "{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "a repeated text": "{{ 'a' * 10**10 }}",
    "a repeated list": "{{ [1] * 10**9 }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "powers of powers": "{% set n = namespace(x=3) %}{% for i in range(60) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "center": "{{ 'a' | center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a format's width": "{{ '%*d' % (10**10, 1) }}",
    "a format filter": "{{ '%1000000000d' | format(1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "str.format's width": "{{ '{:{}}'.format(1, 10**10) }}",
    "replace": "{% set a = 'a' * 10**6 %}{{ a | replace('a', a) }}{{ a.replace('a', a) }}",
    "join": "{% set a = 'a' * 10**6 %}{{ range(10**5) | list | join(a) }}",
    "tabs": "{{ ('\t' * 10**6).expandtabs(10**9) }}",
    "indent": "{{ ('\n' * 10**6) | indent(10**9) }}",
    "much text": "{% for i in range(99999) %}" + 5000 * "a" + "{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=10**9) }}",
    "a long source": "a" * (1 << 21),
}
LANGUAGE = """
{%- macro shout(text) -%}{{ text | upper }}!{%- endmacro -%}
{%- set seen = namespace(n=0, all=[]) -%}
{%- for m in messages if m.content -%}
{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{{ (loop.previtem or {}).role }}
{% set seen.n = seen.n + m.content | length %}{% set seen.all = seen.all + [m.role] -%}
{{ '<%s>' % m.role }}{{ '{}:{}'.format(m.role, seen.n) }}{{ shout(m.content) }}{{ m.x }}
{%- generation %}{{ m.content[::-1] ~ 1 ~ none }}{% endgeneration %}
{%- if loop.index == 9 %}{% break %}{% endif %}
{%- else -%}nothing{%- endfor -%}
{{ seen.all | join(';') }}{{ {'é': [1, (2, 3)]} | tojson }}{{ (1, 2) }}{{ 2 ** 3 % 5 }}
{%- for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor -%}
{%- for a in [[1, [2]], []] recursive %}({{ a if a is not iterable else loop(a) }}){% endfor -%}
{{ messages | map(attribute='role') | list }}
{{- messages | selectattr('role', 'eq', 'user') | list }}
{%- set block %}{% filter title %}set in a block{% endfilter %}{% endset %}{{ block }}
{{ 'a' + 'b' + ('c' + m) + 'd' if m else 1 + 2 + 3 - (4 + 5) }}{{ 'written as it is' }}
{{- {'x': 1, 'items': 2}.x }}{{ {'items': 2}.items is callable }}{{ {'items': 2}['items'] }}
{%- for message in nothing %}{% else %}{{ eos_token }}{% endfor %}{{ tools }}{{ documents }}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return folder


def rows(*talks: Any) -> ParsedRows:
    return ParsedRows(list(talks), np.arange(len(talks) + 1))


def renderer(folder: Path, template: str) -> Renderer:
    (folder / "chat_template.jinja").write_text(template)
    return Renderer(folder, 10_000, OverLength.MARK)


@pytest.mark.parametrize("name", ENDLESS)
def test_it_ends(name: str) -> None:
    with pytest.raises((TooMuchWork, TemplateError, OverflowError, RecursionError)):
        BoundedTemplate(ENDLESS[name]).render({"messages": TALK})


def test_a_template_without_end_is_refused_before_a_row_is_read(folder: Path) -> None:
    with pytest.raises(ModelError, match="without end"):
        renderer(folder, ENDLESS["nested loops"] + TEMPLATE).probe()


def test_only_the_row_that_it_does_not_end_on_is_marked(folder: Path) -> None:
    turns = "{% for i in range((messages[0].content | length) ** 2) %}{% endfor %}"
    long = [{"role": "user", "content": 300 * "a"}, TALK[1]]
    template = 30 * ("{% for i in range(4) %}" + turns + "{% endfor %}") + TEMPLATE
    made = renderer(folder, template).tokenize(rows(TALK, long, TALK))
    assert list(made.sequence_errors) == [1]
    assert made.sequence_errors[1].reason is RowReason.TEMPLATE_ERROR
    assert "without end" in made.sequence_errors[1].detail
    assert made.lengths[0] == made.lengths[2] > 0


def test_a_very_long_conversation_is_rendered(folder: Path) -> None:
    """With a loop over all messages for each of them, as templates that look for a last turn do."""
    template = TEMPLATE.replace(
        "{% for message in messages %}",
        "{% for message in messages %}{% for other in messages %}{% endfor %}",
    )
    (folder / "chat_template.jinja").write_text(template)
    long = [{**TALK[0], "content": 10**6 * "a"}, TALK[1]]
    made = Renderer(folder, 10**7, OverLength.MARK).tokenize(rows(600 * TALK, long))
    assert not made.sequence_errors


def test_it_writes_what_transformers_writes(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = LANGUAGE
    for talk in ([TALK[0]], 20 * TALK, [{"role": "user", "content": ""}]):
        arguments = {**tokenizer.special_tokens_map, "messages": talk, "tools": None}
        text = BoundedTemplate(LANGUAGE).render({**arguments, "documents": None})
        assert text == tokenizer.apply_chat_template(talk, tokenize=False)
    assert json.dumps({"é": [1, [2, 3]]}, ensure_ascii=False) in text


@pytest.mark.parametrize(
    "term", ["1", "none", "nothing", "nothing.at.all", "messages", "messages[0]"]
)
def test_a_sum_that_is_none_raises_what_it_raises_in_transformers(folder: Path, term: str) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ 'a' + 'b' + " + term + " + 'c' }}"
    with pytest.raises((TypeError, TemplateError)) as theirs:
        tokenizer.apply_chat_template(TALK, tokenize=False)
    with pytest.raises(type(theirs.value)) as ours:
        BoundedTemplate(tokenizer.chat_template).render({"messages": TALK})
    assert str(ours.value) == str(theirs.value)
