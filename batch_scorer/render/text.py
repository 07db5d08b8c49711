"""Conversation → text, as the job has it: what the template is given, and what became of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from batch_scorer.errors import RowNote, RowReason
from batch_scorer.formats.kinds import role_alias
from batch_scorer.models.adapter import Prompt
from batch_scorer.records import Conversation, Message, RowError
from batch_scorer.render import messages
from batch_scorer.render.probe import BESIDE
from batch_scorer.render.special import SpecialText
from batch_scorer.render.template import ChatTemplate


@dataclass(slots=True)
class Talk:
    """A conversation on its way to a text.

    `messages` and `arguments` are what the template is given, and `beside` the message that the
    model reads beside them. `text` is empty until it is written; an error says why it is not.
    `special_tokens` counts where the messages spell one.
    """

    messages: Conversation
    arguments: Mapping[str, Any] = field(default_factory=dict)
    notes: set[RowNote] = field(default_factory=set)
    text: str | RowError = ""
    special_tokens: int = 0
    beside: Message | None = None


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
        self._turn: ChatTemplate | None = None
        if prompt.beside is not None and prompt.beside.turn is not None:
            self._turn = template.instead(prompt.beside.turn)

    def prepare(self, talk: Talk, steps: Sequence[str] | None = None) -> Talk:
        """The same talk with the messages that the template is given: system prompt, reasoning,
        parts and `steps` as the job has them; or with the reason why its row is not scored."""
        prompt, talk.messages = self._prompt, list(talk.messages)
        beside = [] if talk.beside is None else [talk.beside]
        talk.special_tokens = sum(map(self._special.count, [*talk.messages, *beside])) + sum(
            self._special.count({"content": step}) for step in steps or ()
        )
        if talk.special_tokens and prompt.special_text == "mark":
            detail = f"{talk.special_tokens} times the text spells a special token"
            talk.text = RowError(RowReason.SPECIAL_TEXT, detail)
            return talk
        if prompt.special_text == "literal":
            if not all(map(self._special.is_hideable, [*talk.messages, *beside])):
                detail = "the text has characters of private use, which `literal` needs itself"
                talk.text = RowError(RowReason.SPECIAL_TEXT, detail)
                return talk
            talk.messages = list(map(self._special.hide, talk.messages))
            talk.beside = talk.beside and self._special.hide(talk.beside)
            steps = steps and [self._special.hide({"content": s})["content"] for s in steps]
        if prompt.reasoning == "drop":
            talk.messages = list(map(messages.without_reasoning, talk.messages))
            talk.beside = talk.beside and messages.without_reasoning(talk.beside)
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

    def written(self, conversation: Conversation, arguments: Mapping[str, Any]) -> str | RowError:
        """The text of a conversation as it is, with words of no meaning beside it."""
        talk = Talk(conversation, arguments, beside=BESIDE if self._prompt.beside else None)
        self._apply([talk])
        return talk.text

    @property
    def _joins_parts(self) -> bool:
        own_text = self._in_pairs or self._prompt.beside is not None
        return own_text or self._template.content == "text"

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

    def answer_starts(self, talks: Sequence[Talk]) -> list[int | None]:
        """The character at which each talk's judged answer begins in its text: behind what the
        template writes to have a model answer, as in TRL. Where a text does not begin so, behind
        what any answer has in common with that, or, where the template writes the turns before
        otherwise too, at the answer's own text. None where the text begins with neither.
        """
        asked = [_before_answer(talk, asks=True) for talk in talks]
        self._apply(asked)
        starts = [
            _length_of(prompt.text, talk.text) for prompt, talk in zip(asked, talks, strict=True)
        ]
        again = [place for place, start in enumerate(starts) if start is None]
        stood_in = [_answering(talks[place], messages.stand_in) for place in again]
        alone = [_before_answer(talks[place], asks=False) for place in again]
        self._apply(stood_in)
        self._apply(alone)
        for place, seen, prompt in zip(again, stood_in, alone, strict=True):
            if not isinstance(seen.text, str) or seen.text.count(messages.STAND_IN) != 1:
                continue
            before = seen.text.partition(messages.STAND_IN)[0]
            shared = before[: _shared_characters(str(asked[place].text), before)]
            if _length_of(prompt.text, shared) is not None:
                before = shared
            starts[place] = _length_of(before, talks[place].text)
        return starts

    def _apply(self, talks: Sequence[Talk]) -> None:
        given: list[Conversation] = [talk.messages for talk in talks]
        arguments = [self._arguments(talk) for talk in talks]
        turns: Sequence[str | RowError | None] = [None] * len(talks)
        if self._turn is not None:
            turns = self._turn.render(given, arguments)
            given = [self._with_turn(*pair) for pair in zip(given, turns, strict=True)]
        if talks and self._template.content == "parts":
            given = [list(map(messages.with_parts, each)) for each in given]
        texts = self._template.render(given, arguments)
        for talk, turn, text in zip(talks, turns, texts, strict=True):
            talk.text = turn if isinstance(turn, RowError) else text

    def _arguments(self, talk: Talk) -> Mapping[str, Any]:
        """The template's arguments, the text beside the conversation among them."""
        if talk.beside is None or self._prompt.beside is None:
            return talk.arguments
        keeps = self._prompt.reasoning == "keep"
        text = (messages.whole_answer if keeps else messages.joined_text)(talk.beside)
        return {**talk.arguments, self._prompt.beside.field: text}

    def _with_turn(self, conversation: Conversation, turn: str | RowError | None) -> Conversation:
        """The conversation with the turn in which the model is asked, or that turn alone."""
        assert self._prompt.beside is not None
        asked = {"role": "user", "content": turn if isinstance(turn, str) else ""}
        return [asked] if self._prompt.beside.replaces else [*conversation, asked]


def _before_answer(talk: Talk, *, asks: bool) -> Talk:
    """The turns before the judged answer; with `asks`, and what has a model give one."""
    arguments = {**talk.arguments, "add_generation_prompt": asks}
    return replace(talk, messages=talk.messages[:-1], arguments=arguments)


def _shared_characters(one: str, other: str) -> int:
    """How many characters both texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _length_of(beginning: str | RowError, text: str | RowError) -> int | None:
    """How many characters of the text this beginning is; None where the text does not begin so."""
    if isinstance(beginning, str) and isinstance(text, str) and text.startswith(beginning):
        return len(beginning)
    return None


def _answering(talk: Talk, change: Callable[[Message], Message]) -> Talk:
    """The same talk with its last message changed."""
    return replace(talk, messages=[*talk.messages[:-1], change(talk.messages[-1])])


def holds(text: str, answer: Message) -> bool:
    """Whether the judged answer, its reasoning included, stands in a text as the row has it."""
    return all(part in text for part in messages.judged_texts(answer))


def _has_system(conversation: Conversation) -> bool:
    return role_alias(conversation[0]["role"]) == "system"
