"""A raw row as the questions that a judge has to see, by the gate's own short code.

It says again what docs/judges.md says of a page, with jinja2 itself. Nothing of it is shared with
`render.questions`, which it checks.
"""

import json
import re
from collections.abc import Sequence
from itertools import permutations
from typing import Any, cast

import jinja2

from batch_scorer.backends.plain_tokenizer import joined, whole, without_reasoning
from batch_scorer.formats.kinds import role_alias
from batch_scorer.judges.page import Page
from batch_scorer.parity.raw_rows import RawRow
from batch_scorer.parity.raw_sequences import RawSequence, raw_sequences
from batch_scorer.records import Conversation, Layout, Message


def raw_questions(
    row: RawRow, layout: Layout, page: Page, reasoning: str
) -> list[RawSequence | None]:
    """All questions about the row, in order; its answers can all be read. Raises as
    `raw_sequences`."""
    talks = [
        cast(Conversation, sequence.content)
        for sequence in raw_sequences(row, layout)
        if sequence is not None
    ]
    answers = [_answer(talk[-1], reasoning) for talk in talks]
    prompts = [_prompt(talk[:-1]) for talk in talks]
    columns = {name: _text(row[name]) for name in page.columns}
    criteria = _criteria(row[page.rubric]) if page.mode == "rubric" else []
    texts = [*answers, *prompts, *columns.values(), *criteria]
    longest = max(len(run) for text in texts for run in re.findall("`*", text))
    shared: dict[str, Any] = {**columns, "fence": "`" * max(3, longest + 1)}
    found: list[RawSequence | None] = []
    for places, more in _shown(len(talks), criteria, page):
        given = {**shared, "prompt": prompts[places[0]], "turns": talks[places[0]][:-1], **more}
        if page.mode == "pairwise":
            given |= {"response_a": answers[places[0]], "response_b": answers[places[1]]}
        elif page.mode == "listwise":
            given |= {"responses": [answers[place] for place in places]}
        else:
            given |= {"response": answers[places[0]]}
        messages = [
            {"role": message.role, "content": jinja2.Template(message.content).render(given)}
            for message in page.messages
        ]
        found += [RawSequence(messages)] * page.votes
    return found


def _shown(
    count: int, criteria: list[str], page: Page
) -> Sequence[tuple[tuple[int, ...], dict[str, Any]]]:
    """The answers that each question shows, and what else it has."""
    if page.mode == "listwise":
        return [(tuple(range(count)), {})]
    if page.mode == "pairwise":
        pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
        orders = 2 if page.orders == "both" else 1
        return [(order, {}) for pair in pairs for order in list(permutations(pair))[:orders]]
    if page.mode == "pointwise":
        return [((place,), {}) for place in range(count)]
    if page.criteria == "together":
        return [((place,), {"criteria": criteria}) for place in range(count)]
    return [((place,), {"criterion": each}) for place in range(count) for each in criteria]


def _answer(message: Message, reasoning: str) -> str:
    if reasoning == "drop":
        message = without_reasoning(message)
    text = whole(message) if reasoning == "keep" else joined(message)
    if message.get("tool_calls"):
        calls = json.dumps(message["tool_calls"], ensure_ascii=False)
        text = f"{text}\n{calls}" if text else calls
    return text


def _prompt(turns: Conversation) -> str:
    if [role_alias(turn["role"]) for turn in turns] == ["user"]:
        return joined(turns[0])
    lines = [f"{role_alias(turn['role']).capitalize()}: {joined(turn)}" for turn in turns]
    return "\n\n".join(lines)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _criteria(value: Any) -> list[str]:
    items = json.loads(value) if isinstance(value, str) else value
    names = ("criterion", "description", "text", "title")
    return [
        item if isinstance(item, str) else next(item[n] for n in names if item.get(n))
        for item in items
    ]
