"""What this model's template does to a conversation, found with marker words.

Templates drop what they do not know without a word: a system message, the reasoning of the judged
answer, tools. So the words below are rendered once before a job, and looked for.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from batch_scorer.records import Conversation, RowError
from batch_scorer.render.messages import REASONING_KEYS
from batch_scorer.render.template import ChatTemplate, Content

PROBES: tuple[Conversation, ...] = (
    [
        {"role": "user", "content": "How many sides does a square have?"},
        {"role": "assistant", "content": "Four."},
    ],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Green."},
        {"role": "user", "content": "Another one, please."},
        {"role": "assistant", "content": "Blue."},
    ],
)
"""Conversations whose rendering stands for the template in the fingerprint. Public templates may
put today's date into the prompt, which no file digest shows."""

BESIDE = {"role": "assistant", "content": "It is what everybody says."}
"""Stands beside these where a model reads something there."""

_SYSTEM, _USER, _AGAIN = "markersystem", "markeruser", "markeragain"
_REASONING, _TOOL = "markerreasoning", "markertool"
_ANSWER = "markeranswer\n\n  - of two lines"
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": _TOOL,
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
]
_LONGEST_SHOWN = 80

Fate = Literal["kept", "lost", "refused"]


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What the template does with the parts of a conversation.

    `system`, `answer` (with its blanks and line feeds), `tools` and `reasoning_text`
    (`<think>…</think>` in the judged answer) are kept as they are, or lost, or the template refuses
    them. `reasoning_fields` are the fields for reasoning that it writes out. `added` is what it
    puts before the first turn unasked, such as a system message of its own; `content` what it takes
    as content.
    `has_text`: the words of the user stand in the text at all.
    """

    system: Fate
    answer: Fate
    reasoning_text: Fate
    reasoning_fields: tuple[str, ...]
    tools: Fate
    added: str
    content: Content
    has_text: bool
    asks_for_date: bool

    def changes(self, held: Collection[str], reasoning: str) -> tuple[str, ...]:
        """What it leaves out of these rows without a word, so that no score depends on it, and what
        it adds to all of them.

        `held` is what the rows have (`parity.cover.traits_of`). `reasoning` is the setting: with
        another than `template`, not the template says what happens to it.
        """
        lost = {
            "leaves out system messages": self.system == "lost" and "role system" in held,
            "leaves out tools": self.tools == "lost" and "tools" in held,
        }
        if reasoning == "template":
            lost["leaves out <think> in the answer"] = (
                self.reasoning_text == "lost" and "reasoning in text" in held
            )
            for key in REASONING_KEYS:
                lost[f"leaves out {key}"] = key in held and key not in self.reasoning_fields
        added = (f"adds {self.added!r}",) if self.added else ()
        return (*(name for name, is_lost in lost.items() if is_lost), *added)


@dataclass(frozen=True, slots=True)
class Probe:
    """How this tokenizer and template treat `PROBES`, and what the template does to marker words
    (None without a template); recorded with the run."""

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    template: TemplateFacts | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr((self.texts, self.token_ids)).encode()).hexdigest()


def look_at(
    template: ChatTemplate,
    write: Callable[[Conversation, Mapping[str, Any]], str | RowError],
    special: re.Pattern[str],
) -> TemplateFacts:
    """Write conversations of marker words, with the template's arguments; `special` finds the
    tokenizer's special tokens in a text."""
    user = {"role": "user", "content": _USER}
    answer = {"role": "assistant", "content": _ANSWER}
    thought = f"<think>\n{_REASONING}\n</think>\n\n{_ANSWER}"

    def rendered(conversation: Conversation, **arguments: Any) -> str | RowError:
        return write(conversation, arguments)

    def fate(text: str | RowError, *words: str) -> Fate:
        if isinstance(text, RowError):
            return "refused"
        return "kept" if all(word in text for word in words) else "lost"

    plain = rendered([user, answer])
    return TemplateFacts(
        system=fate(rendered([{"role": "system", "content": _SYSTEM}, user, answer]), _SYSTEM),
        answer=fate(plain, _ANSWER),
        reasoning_text=fate(rendered([user, {**answer, "content": thought}]), thought),
        reasoning_fields=tuple(
            key
            for key in REASONING_KEYS
            if fate(rendered([user, {**answer, key: _REASONING}]), _REASONING) == "kept"
        ),
        tools=fate(rendered([user, answer], tools=_TOOLS), _TOOL),
        added=_added(rendered, special),
        content=template.content,
        has_text=fate(plain, _USER) == "kept",
        asks_for_date=template.asks_for_date,
    )


def _added(rendered: Any, special: re.Pattern[str]) -> str:
    """What stands before the first turn and not before the second one, special tokens aside."""
    turns = [
        {"role": role, "content": text}
        for role, text in (
            ("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN), ("assistant", _ANSWER),
        )
    ]  # fmt: skip
    text = rendered(turns)
    if isinstance(text, RowError) or not all(word in text for word in (_USER, _ANSWER, _AGAIN)):
        return ""
    first, rest = text.split(_USER, 1)
    second = rest.split(_AGAIN, 1)[0].rsplit(_ANSWER, 1)[-1]
    first, second = special.sub(" ", first), special.sub(" ", second)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first[::-1], second[::-1], strict=False))
    heading = sum(1 for _ in same)  # characters of the user's turn before its text
    added = first[: len(first) - heading].strip()
    return added if len(added) <= _LONGEST_SHOWN else f"{added[:_LONGEST_SHOWN]} […]"
