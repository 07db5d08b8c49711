"""What is done to a conversation before the chat template sees it. Pure functions.

A message's content is a text, a list of parts of which some are texts, or nothing at all; a tool's
is any value.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from batch_scorer.errors import RowReason
from batch_scorer.formats.kinds import role_alias
from batch_scorer.models.adapter import Steps
from batch_scorer.records import Conversation, Message, RowError

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Fields in which a message may hold its reasoning."""
_REASONING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_NO_REASONING = re.compile(r"<think>\s*</think>\s*$")

STAND_IN = "\U0010fffdthe judged answer\U0010fffd"
"""Stands for an answer while the template is applied; U+10FFFD has no meaning in Unicode."""


# Content


def texts_of(message: Message) -> list[str]:
    """The texts of a message's content, without the blanks at their ends."""
    content = message.get("content")
    if isinstance(content, str):
        return [content.strip()]
    return [text.strip() for text in _part_texts(content)]


def joined_text(message: Message) -> str:
    """The content as one text, parts joined by line feeds."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(_part_texts(content))


def has_parts(message: Message) -> bool:
    """Whether the content is a list of texts, and no list that a tool gave."""
    content = message.get("content")
    return isinstance(content, list) and content != [] and all(map(_is_text, content))


def with_joined_parts(message: Message) -> Message:
    return {**message, "content": joined_text(message)} if has_parts(message) else message


def with_parts(message: Message) -> Message:
    """The same with its text as a list of one part."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with every text in it changed, at any depth; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_text(item, change) for item in value]
    if isinstance(value, dict):
        return {key: map_text(item, change) for key, item in value.items()}
    return value


def all_texts(value: Any) -> Iterator[str]:
    """Every text in a value, at any depth; keys are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from all_texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from all_texts(item)


def _part_texts(content: Any) -> list[str]:
    """The texts of a list of parts; none of another value, such as a tool gives."""
    return [part["text"] for part in content if _is_text(part)] if isinstance(content, list) else []


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


# Roles


def with_usual_roles(conversation: Conversation) -> Conversation | None:
    """The same with aliases of roles (`human`, `gpt`, …) replaced; None where there are none."""
    if not any(_is_renamed(message) for message in conversation):
        return None
    return [{**message, "role": role_alias(message["role"])} for message in conversation]


def lacks_renamed(conversation: Conversation, rendered: str) -> bool:
    """Whether a message whose role is an alias is missing from the rendered text."""
    return any(
        text not in rendered
        for message in conversation
        if _is_renamed(message)
        for text in texts_of(message)
    )


def _is_renamed(message: Message) -> bool:
    role = message.get("role")
    return isinstance(role, str) and role_alias(role) != role


# Reasoning


def reasoning_of(message: Message) -> str:
    """A message's reasoning: of its own field, or of `<think>…</think>` before the text."""
    for key in REASONING_KEYS:
        if isinstance(reasoning := message.get(key), str) and reasoning.strip():
            return reasoning
    found = _REASONING.match(joined_text(message))
    return found[1] if found else ""


def without_reasoning(message: Message) -> Message:
    kept = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    content = kept.get("content")
    if isinstance(content, str):
        kept["content"] = _REASONING.sub("", content, count=1) if _starts(content) else content
    elif isinstance(content, list) and content and _is_text(content[0]):
        first = content[0]
        if _starts(first["text"]):
            text = _REASONING.sub("", first["text"], count=1)
            kept["content"] = [{**first, "text": text}, *content[1:]]
    return kept


def _starts(text: str) -> bool:
    return _REASONING.match(text) is not None


def judged_texts(answer: Message) -> list[str]:
    """What of the answer has to stand in the rendered text: its reasoning and its texts."""
    reasoning = next((answer[k] for k in REASONING_KEYS if isinstance(answer.get(k), str)), "")
    return [reasoning.strip(), *texts_of(answer)]


def whole_answer(answer: Message) -> str:
    """The answer's text behind its reasoning."""
    text = joined_text(answer)
    if _starts(text):
        return text
    reasoning = reasoning_of(answer).strip("\n")
    return f"<think>\n{reasoning}\n</think>\n\n{text}" if reasoning else text


def stand_in(answer: Message) -> Message:
    """The same message with `STAND_IN` in place of its text and reasoning."""
    return {**without_reasoning(answer), "content": STAND_IN}


def with_marked_reasoning(answer: Message) -> Message:
    """The same message with `STAND_IN` in place of its reasoning, wherever it has it."""
    fields = {
        key: STAND_IN
        for key in REASONING_KEYS
        if isinstance(answer.get(key), str) and answer[key].strip()
    }
    content = answer.get("content")
    if isinstance(content, str):
        content = _marked(content)
    elif has_parts(answer) and content:
        content = [{**content[0], "text": _marked(content[0]["text"])}, *content[1:]]
    return {**answer, **fields, **({"content": content} if "content" in answer else {})}


def _marked(text: str) -> str:
    found = _REASONING.match(text)
    return text[: found.start(1)] + STAND_IN + text[found.end(1) :] if found else text


def put_back(rendered: str, answer: Message) -> str | None:
    """The whole answer in place of its stand-in, and of the empty reasoning that a template may
    put before it; None where the stand-in is not there once."""
    before, found, after = rendered.partition(STAND_IN)
    if not found or STAND_IN in after:
        return None
    return _NO_REASONING.sub("", before) + whole_answer(answer) + after


# Steps


def with_steps(
    conversation: Conversation, steps: Steps, given: Sequence[str] | None = None
) -> Conversation | RowError:
    """The answer's steps, each followed or answered by the tag (`models.adapter.Steps`): those that
    are `given`, or the answer's text cut."""
    *before, answer = conversation
    if given is not None:
        parts = [step.strip() for step in given]
    else:
        text = joined_text(answer)
        is_tagged = steps.layout == "tagged" and steps.tag in text
        mark = steps.tag if is_tagged else steps.separator
        parts = [part for part in (part.strip() for part in text.split(mark)) if part]
    if not parts:
        return RowError(RowReason.NO_STEPS, "the answer has no step that could be judged")
    if steps.layout == "tagged":
        text = steps.joint.join(part + steps.tag for part in parts)
        return [*before, {**answer, "content": text}]
    if before and before[-1]["role"] == "user":
        parts[0] = f"{joined_text(before[-1])} {parts[0]}"
        before = before[:-1]
    turns = [
        message
        for part in parts
        for message in (
            {"role": "user", "content": part},
            {"role": "assistant", "content": steps.tag},
        )
    ]
    return [*before, *turns]
