"""A raw row as the sequences that its model has to see, by the gate's own short code.

It says again, on plain values and one row at a time, what docs/formats.md says of each layout.
Nothing of it is shared with `formats.parse`, which it checks.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batch_scorer.formats.kinds import KINDS, role_alias
from batch_scorer.parity.raw_rows import RawRow
from batch_scorer.records import Conversation, Format, Layout, Message, SequenceInput, TextStyle

_MASKS = "attention_mask"


@dataclass(frozen=True, slots=True)
class RawSequence:
    """One sequence of a row.

    `content` is a conversation to render, rendered text, or token ids; `arguments` are those of the
    row for the chat template. `steps` are a process reward model's, where the row lists them: the
    last message then has no content. `unmasked` are token ids before the mask was applied.
    """

    content: SequenceInput
    arguments: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[str, ...] | None = None
    unmasked: list[int] | None = None


def raw_sequences(row: RawRow, layout: Layout) -> list[RawSequence | None]:
    """The row's sequences in the order of the format's fields; None for one that cannot be read.

    Raises LookupError, TypeError and ValueError where the row is not what the layout says.
    """
    kind = KINDS[layout.format]
    values = {name: row.get(column) for name, column in layout.columns.items()}
    for name, column in layout.columns.items():
        if column in layout.encoded:
            values[name] = _decoded(values[name])
    arguments = _arguments(values)
    context = _context(values)
    found: list[RawSequence | None] = []
    for side in kind.responses:
        answers = values[side] if kind.is_group else [values[side]]
        masks = _masks(values, side, len(answers), kind.is_group)
        for answer, mask in zip(answers, masks, strict=True):
            if column_is_encoded(layout, side) and kind.is_group:
                answer = _decoded(answer)
            found.append(_sequence(layout, values, context, answer, mask, arguments))
    return found


def column_is_encoded(layout: Layout, name: str) -> bool:
    return layout.columns[name] in layout.encoded


def _sequence(
    layout: Layout,
    values: Mapping[str, Any],
    context: Conversation,
    answer: Any,
    mask: Sequence[int] | None,
    arguments: Mapping[str, Any],
) -> RawSequence | None:
    prompt = values.get("prompt")
    if answer is None or answer == [] or ("prompt" in layout.columns and prompt is None):
        return None
    if _is_ids(answer):
        ids = [*(prompt or []), *answer]
        if mask is None:
            return RawSequence(ids)
        return RawSequence([i for i, kept in zip(ids, mask, strict=True) if kept], unmasked=ids)
    if layout.format is Format.STEPS:
        steps = tuple(step if isinstance(step, str) else str(step) for step in answer)
        last: Message = {"role": "assistant", "content": ""}
        return RawSequence([*context, *_turns(prompt, "user", layout), last], arguments, steps)
    if isinstance(answer, str) and layout.text_style is TextStyle.RENDERED:
        return RawSequence(answer if layout.prompt_inside else f"{prompt or ''}{answer}")
    before = [] if prompt is None else _turns(prompt, "user", layout)
    if isinstance(answer, str) and layout.prompt_inside:
        assert isinstance(prompt, str)
        answer = answer.removeprefix(prompt).lstrip()
    after = _turns(answer, "assistant", layout, is_apart=prompt is not None)
    if before and after[: len(before)] == before:
        before = []  # the answer's messages begin with the prompt's
    return RawSequence(_with_context(context, [*before, *after]), arguments)


def _turns(value: Any, role: str, layout: Layout, *, is_apart: bool = True) -> Conversation:
    """Text, a message or messages as messages. HH text: of a prompt (`role` user), of an answer to
    a prompt that is apart, or of a whole dialogue."""
    if isinstance(value, dict):
        return [_message(value)]
    if isinstance(value, list):
        return [_message(item) for item in value]
    if not isinstance(value, str):
        raise TypeError(f"neither text nor messages: {type(value).__name__}")
    if layout.text_style is not TextStyle.HH:
        return [{"role": role, "content": value}]
    if role == "assistant" and is_apart:
        return [{"role": role, "content": value.strip()}]
    pieces = re.split(r"\n\n(Human|Assistant):", value)[1:]
    turns: Conversation = [
        {"role": "user" if mark == "Human" else "assistant", "content": text.strip()}
        for mark, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return turns[:-1] if role == "user" else turns


def _message(value: Mapping[str, Any]) -> Message:
    """The message with all its fields; ShareGPT's names of the first two mean the usual ones."""
    if "role" in value or "from" not in value:
        return dict(value)
    role = value["from"]
    others = {name: item for name, item in value.items() if name not in ("from", "value")}
    return {"role": role_alias(role) or role, "content": value.get("value"), **others}


def _context(values: Mapping[str, Any]) -> Conversation:
    """What stands before the prompt: the row's own system message, then its history."""
    before: Conversation = []
    system = values.get("system")
    if isinstance(system, str) and system.strip():
        before.append({"role": "system", "content": system})
    for item in _decoded(values.get("history")) or []:
        if isinstance(item, dict):
            before.append(_message(item))
        else:
            question, answer = item
            before.append({"role": "user", "content": question})
            before.append({"role": "assistant", "content": answer})
    return before


def _with_context(context: Conversation, conversation: Conversation) -> Conversation:
    """Context and conversation; a system message that both have stands once."""
    if context and conversation and context[0] == conversation[0]:
        context = context[1:]
    first, *rest = conversation
    if context and first["role"] == "system":
        return [first, *context, *rest]
    return [*context, *conversation]


def _arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template's arguments that the row has of its own."""
    found: dict[str, Any] = dict(_decoded(values.get("template_arguments")) or {})
    for name in ("tools", "documents"):
        if value := _decoded(values.get(name)):
            found[name] = value
    return found


def _decoded(value: Any) -> Any:
    """What text says that is JSON, or Python's spelling of the same; other values as they are."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError:
        return ast.literal_eval(value)


def _masks(
    values: Mapping[str, Any], side: str, count: int, is_group: bool
) -> Sequence[Sequence[int] | None]:
    """The attention mask of each answer of a side, if there is any."""
    mask = values.get(_MASKS, values.get(f"{_MASKS}_{side}"))
    if mask is None:
        return [None] * count
    return mask if is_group else [mask]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not isinstance(value[0], dict | str)
