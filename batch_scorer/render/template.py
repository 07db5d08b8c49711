"""The chat template of one model: conversation → text, as transformers applies it."""

import json
from collections.abc import Mapping, Sequence
from copy import copy
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from batch_scorer.errors import ModelError, RowReason
from batch_scorer.models.adapter import Prompt
from batch_scorer.records import Conversation, RowError
from batch_scorer.render.bounded import BoundedTemplate, compiled
from batch_scorer.render.messages import with_parts

Content = Literal["text", "parts", "both"]

_TODAY = "strftime_now"
"""The function by which a template asks for the date (transformers 5.19 knows no other)."""
_OF_THE_CALL = frozenset(
    {
        "conversation",
        "chat_template",
        "continue_final_message",
        "messages",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
"""Arguments of transformers' `apply_chat_template` that its template does not get."""


class ChatTemplate:
    """A tokenizer's template, or the one that takes its place, with the job's arguments and date.

    Raises ModelError for the name of a template that the tokenizer does not have.
    """

    def __init__(self, tokenizer: Any, prompt: Prompt, model_dir: Path) -> None:
        self._tokenizer = tokenizer
        self._model_dir = model_dir
        own = tokenizer.chat_template
        self._named: Mapping[str, str] = own if isinstance(own, dict) else {}
        name = prompt.template_name
        if prompt.template is None and name is not None and name not in self._named:
            has = f"it has {_names(self._named)}" if self._named else "it has none by name"
            raise ModelError(
                f"{model_dir}: chat_template: {name!r} is neither a file nor a template of this "
                f"tokenizer; {has}"
            )
        self._chosen = prompt.template or name
        date = prompt.date or datetime.now()
        self._arguments = {**json.loads(prompt.arguments), _TODAY: date.strftime}

    def instead(self, template: str) -> "ChatTemplate":
        """Another template of this tokenizer, with the same arguments and date."""
        other = copy(self)
        other._chosen = template
        for found in ("content", "_given_to_most"):  # of this template
            vars(other).pop(found, None)
        return other

    @property
    def problem(self) -> str | None:
        """Why conversations cannot be rendered; None: they can."""
        if self._chosen is not None or "default" in self._named:
            return None
        if self._named:
            return (
                f"{self._model_dir}: the tokenizer has several chat templates and no default: "
                f"choose one with chat_template: {_names(self._named)}"
            )
        if self._tokenizer.chat_template:
            return None
        return (
            f"{self._model_dir}: the tokenizer has no chat template, so conversations cannot be "
            "rendered; add chat_template.jinja, name a file with --chat-template, or score "
            "pre-rendered text (--format text)"
        )

    @property
    def asks_for_date(self) -> bool:
        """Whether a template that may be used prints today's date."""
        if self._chosen is not None:
            templates = [self._named.get(self._chosen, self._chosen)]
        else:
            templates = [*self._named.values()] or [self._tokenizer.chat_template or ""]
        return any(_TODAY in template for template in templates)

    def render(
        self, conversations: Sequence[Conversation], arguments: Sequence[Mapping[str, Any]]
    ) -> list[str | RowError]:
        """The text of each conversation, given the arguments of its row; a template's error in
        place of the text that it refuses."""
        return [
            self._render_one(conversation, own)
            for conversation, own in zip(conversations, arguments, strict=True)
        ]

    def _render_one(
        self, conversation: Conversation, arguments: Mapping[str, Any]
    ) -> str | RowError:
        try:
            return self._apply(conversation, arguments)
        except Exception as error:  # a template is foreign code: raise_exception, type errors, …
            return RowError(RowReason.TEMPLATE_ERROR, f"{type(error).__name__}: {error}"[:200])

    def _apply(self, conversation: Conversation, arguments: Mapping[str, Any]) -> str:
        """What transformers' `apply_chat_template` gives, with a bound on the template's work."""
        template, given = self._given(arguments) if arguments else self._given_to_most
        return template.render({**given, "messages": conversation})

    def _given(self, arguments: Mapping[str, Any]) -> tuple[BoundedTemplate, dict[str, Any]]:
        """The template for a row with these arguments, and all that it gets but the messages."""
        given = {**self._arguments, **arguments}
        if meant_otherwise := sorted(_OF_THE_CALL & given.keys()):
            raise ValueError(f"{', '.join(meant_otherwise)} is no argument of a template")
        tools, documents = given.get("tools"), given.get("documents")
        if not all(isinstance(each, dict) for each in [*(tools or ()), *(documents or ())]):
            raise TypeError("tools and documents are lists of objects")
        source: str = self._tokenizer.get_chat_template(self._chosen, tools)
        return compiled(source), {
            "documents": documents,
            "add_generation_prompt": False,
            **self._tokenizer.special_tokens_map,
            **given,
            "tools": tools,
        }

    @cached_property
    def _given_to_most(self) -> tuple[BoundedTemplate, dict[str, Any]]:
        """The same for a row without arguments of its own."""
        return self._given({})

    @cached_property
    def content(self) -> Content:
        """Which content the template takes: texts, lists of parts, or both alike."""
        words = ("markerquestion", "markeranswer")
        talk: Conversation = [
            {"role": "user", "content": words[0]},
            {"role": "assistant", "content": words[1]},
        ]
        as_text, as_parts = self.render([talk, [with_parts(m) for m in talk]], [{"_": 0}, {"_": 0}])
        has_text, has_parts = (
            isinstance(text, str) and all(word in text for word in words)
            for text in (as_text, as_parts)
        )
        if has_parts and not has_text:
            return "parts"
        return "both" if has_parts and as_text == as_parts else "text"


def _names(templates: Mapping[str, str]) -> str:
    return ", ".join(sorted(templates))
