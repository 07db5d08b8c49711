"""Conversation → text, as the job has it: what the template is given, and what became of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from batch_scorer.errors import RowNote, RowReason
from batch_scorer.formats.kinds import role_alias
from batch_scorer.models.adapter import Prompt
from batch_scorer.records import Conversation, Message, RowError
from batch_scorer.render import messages
from batch_scorer.render.special import SpecialText
from batch_scorer.render.template import ChatTemplate


@dataclass(slots=True)
class Talk:
    """A conversation on its way to a text.

    `messages` and `arguments` are what the template is given. `text` is empty until it is written;
    an error says why it is not. `special_tokens` counts where the messages spell one.
    """

    messages: Conversation
    arguments: Mapping[str, Any] = field(default_factory=dict)
    notes: set[RowNote] = field(default_factory=set)
    text: str | RowError = ""
    special_tokens: int = 0


class TextWriter:
    """The template of one model, and the settings of one job.

    `in_pairs`: question and answer go to the tokenizer as they are; nothing is written.
    """

    def __init__(
        self, template: ChatTemplate, special: SpecialText, prompt: Prompt, *, in_pairs: bool
    ) -> None:
        self._template = template
        self._special = special
        self._prompt = prompt
        self._in_pairs = in_pairs

    def prepare(self, talk: Talk, steps: Sequence[str] | None = None) -> Talk:
        """The same talk with the messages that the template is given: system prompt, reasoning,
        parts and `steps` as the job has them; or with the reason why its row is not scored."""
        prompt, talk.messages = self._prompt, list(talk.messages)
        talk.special_tokens = sum(map(self._special.count, talk.messages)) + sum(
            self._special.count({"content": step}) for step in steps or ()
        )
        if talk.special_tokens and prompt.special_text == "mark":
            detail = f"{talk.special_tokens} times the text spells a special token"
            talk.text = RowError(RowReason.SPECIAL_TEXT, detail)
            return talk
        if prompt.special_text == "literal":
            if not all(map(self._special.is_hideable, talk.messages)):
                detail = "the text has characters of private use, which `literal` needs itself"
                talk.text = RowError(RowReason.SPECIAL_TEXT, detail)
                return talk
            talk.messages = list(map(self._special.hide, talk.messages))
            steps = steps and [self._special.hide({"content": s})["content"] for s in steps]
        if prompt.reasoning == "drop":
            talk.messages = list(map(messages.without_reasoning, talk.messages))
        if any(map(messages.has_parts, talk.messages)) and self._joins_parts:
            talk.notes.add(RowNote.PARTS_JOINED)
            talk.messages = list(map(messages.with_joined_parts, talk.messages))
        if prompt.steps is not None:
            cut_up = messages.with_steps(talk.messages, prompt.steps, steps)
            if isinstance(cut_up, RowError):
                talk.text = cut_up
                return talk
            talk.messages = cut_up
        elif steps is not None:
            talk.messages[-1] = {**talk.messages[-1], "content": prompt.step_separator.join(steps)}
        if prompt.system is not None and not _has_system(talk.messages):
            talk.messages.insert(0, {"role": "system", "content": prompt.system})
        return talk

    @property
    def _joins_parts(self) -> bool:
        return self._in_pairs or self._template.content == "text"

    def write(self, talks: Sequence[Talk]) -> None:
        """The text of every conversation, or the template's error."""
        self._apply(talks)
        self._try_usual_roles(talks)
        if self._prompt.reasoning == "keep":
            self._keep_reasoning(talks)
        for talk in talks:
            if isinstance(talk.text, str) and not holds(talk.text, talk.messages[-1]):
                talk.notes.add(RowNote.ANSWER_REWRITTEN)

    def _try_usual_roles(self, talks: Sequence[Talk]) -> None:
        """Write those again whose roles the template refuses or leaves out, by their usual names;
        what it refuses then too keeps its first error."""
        again: list[tuple[Talk, Talk]] = []
        for talk in talks:
            usual = messages.with_usual_roles(talk.messages)
            if usual is not None and (
                isinstance(talk.text, RowError) or messages.lacks_renamed(talk.messages, talk.text)
            ):
                again.append((talk, replace(talk, messages=usual)))
        self._apply([renamed for _, renamed in again])
        for talk, renamed in again:
            if isinstance(renamed.text, str):
                talk.messages, talk.text = renamed.messages, renamed.text
                talk.notes.add(RowNote.ROLE_RENAMED)

    def _keep_reasoning(self, talks: Sequence[Talk]) -> None:
        """Put the judged answer with its reasoning where the template would write it, if the
        template does not write the reasoning itself."""
        thoughtful = [
            talk
            for talk in talks
            if isinstance(talk.text, str) and messages.reasoning_of(talk.messages[-1]).strip()
        ]
        # Its words may stand in the prompt or in the answer, too, so others are looked for.
        marked = [_answering(talk, messages.with_marked_reasoning) for talk in thoughtful]
        self._apply(marked)
        again = [
            (talk, _answering(talk, messages.stand_in))
            for talk, seen in zip(thoughtful, marked, strict=True)
            if isinstance(seen.text, str) and messages.STAND_IN not in seen.text
        ]
        self._apply([stood_in for _, stood_in in again])
        for talk, stood_in in again:
            if isinstance(stood_in.text, str):
                whole = messages.put_back(stood_in.text, talk.messages[-1])
                talk.text = whole or talk.text

    def _apply(self, talks: Sequence[Talk]) -> None:
        given: list[Conversation] = [talk.messages for talk in talks]
        if talks and self._template.content == "parts":
            given = [list(map(messages.with_parts, each)) for each in given]
        texts = self._template.render(given, [talk.arguments for talk in talks])
        for talk, text in zip(talks, texts, strict=True):
            talk.text = text


def _answering(talk: Talk, change: Callable[[Message], Message]) -> Talk:
    """The same talk with its last message changed."""
    return replace(talk, messages=[*talk.messages[:-1], change(talk.messages[-1])])


def holds(text: str, answer: Message) -> bool:
    """Whether the judged answer, its reasoning included, stands in a text as the row has it."""
    return all(part in text for part in messages.judged_texts(answer))


def _has_system(conversation: Conversation) -> bool:
    return role_alias(conversation[0]["role"]) == "system"
