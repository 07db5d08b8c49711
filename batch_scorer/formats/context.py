"""What a row says beside its prompt and its responses, and what of it would not be read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from batch_scorer.errors import RowReason
from batch_scorer.formats.encoded import decoded
from batch_scorer.formats.kinds import BESIDE_NAMES, MEDIA_NAMES, role_alias
from batch_scorer.formats.messages import bad, messages_of, text_of
from batch_scorer.formats.values import Columns, is_empty
from batch_scorer.records import Conversation, Layout, Message, ReadBounds, RowError

Reader: TypeAlias = Callable[[Any, str, ReadBounds], Any]
"""Of a value, the name of its column and the bounds: what is read, or a RowError."""


@dataclass(slots=True)
class Context:
    """What stands around the messages of one row: a system message, the turns before, and the chat
    template's arguments that are the row's own."""

    system: str | None = None
    history: Conversation = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)

    def around(self, conversation: Conversation) -> Conversation | RowError:
        """The conversation with its system message and the turns before it, each once."""
        system = _system_turn(conversation)
        turns = conversation[len(system) :]
        if turns[: len(self.history)] != self.history:
            turns = self.history + turns
        if not system:
            system = _system_turn(turns)  # of the history
            turns = turns[len(system) :]
        if self.system is None:
            return system + turns
        if system and text_of(system[0]).strip() != self.system.strip():
            return bad("the row has two different system messages")
        return (system or [{"role": "system", "content": self.system}]) + turns


def contexts(columns: Columns, layout: Layout) -> tuple[dict[int, Context], dict[int, RowError]]:
    """The contexts of the rows that have one, and the errors of those whose context cannot be read
    or is not read at all."""
    found: dict[int, Context] = {}
    errors: dict[int, RowError] = {}
    for name in layout.watched:
        for row, value in enumerate(columns[name]):
            if not is_empty(value):
                errors.setdefault(row, _not_read(name))
    for kind, read in READERS.items():
        label = layout.columns.get(kind)
        for row, value in enumerate(columns[label] if label else ()):
            if label is None or is_empty(value):
                continue
            given = read(value, label, layout.bounds)
            if isinstance(given, RowError):
                errors.setdefault(row, given)
                continue
            context = found.setdefault(row, Context())
            if kind in ("system", "history"):
                setattr(context, kind, given)
            elif twice := given.keys() & context.arguments.keys():
                errors.setdefault(row, bad(f"the row gives {', '.join(sorted(twice))} twice"))
            else:
                context.arguments |= given
    return found, errors


def texts_beside(
    columns: Columns, layout: Layout
) -> tuple[dict[int, Message], dict[int, RowError]]:
    """What the model judges the answers of each row by, as a message, and the errors of the rows
    that lack it; nothing where it is not read."""
    found: dict[int, Message] = {}
    errors: dict[int, RowError] = {}
    for kind in BESIDE_NAMES.keys() & layout.columns.keys():
        label = layout.columns[kind]
        for row, value in enumerate(columns[label]):
            if label in layout.encoded:
                value = decoded(value, label, layout.bounds)
            text = read_beside(value, label, layout.bounds)
            if isinstance(text, RowError):
                errors[row] = text
            else:
                found[row] = {"role": "assistant", "content": text}
    return found, errors


def read_beside(value: Any, label: str, _: ReadBounds) -> str | RowError:
    """A text, or the texts of a message or of messages, joined by line feeds."""
    if value is None:
        return RowError(RowReason.NULL_VALUE, f"{label} is null")
    if isinstance(value, RowError):
        return value
    text = value
    if not isinstance(value, str):
        messages = messages_of(value if isinstance(value, list) else [value], label)
        if isinstance(messages, RowError):
            return messages
        text = "\n".join(map(text_of, messages))
    return text if text.strip() else RowError(RowReason.EMPTY, f"{label} is empty")


def _system_turn(conversation: Conversation) -> Conversation:
    """The system message that it begins with, or nothing."""
    return conversation[:1] if role_alias(conversation[0]["role"]) == "system" else []


def _not_read(name: str) -> RowError:
    if name in MEDIA_NAMES:
        return RowError(RowReason.UNSUPPORTED_MEDIA, f"{name} holds something: only text is scored")
    return RowError(RowReason.CONTEXT_NOT_READ, f"{name} holds something that is not read")


def _system(value: Any, label: str, _: ReadBounds) -> str | RowError:
    return value if isinstance(value, str) else bad(f"{label} is no text")


def _history(value: Any, label: str, _: ReadBounds) -> Conversation | RowError:
    """The turns of a list of messages, or of pairs of a question and its answer."""
    if isinstance(value, list) and all(map(_is_pair, value)):
        return [
            {"role": role, "content": text}
            for pair in value
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return messages_of(value, label) if isinstance(value, list) else bad(f"{label} is no list")


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _objects(argument: str) -> Reader:
    def read(value: Any, label: str, bounds: ReadBounds) -> Mapping[str, Any] | RowError:
        value = decoded(decoded(value, label, bounds), label, bounds)
        if isinstance(value, RowError):
            return value
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            return {argument: value}
        return bad(f"{label} is no list of objects")

    return read


def _arguments(value: Any, label: str, bounds: ReadBounds) -> Mapping[str, Any] | RowError:
    value = decoded(value, label, bounds)
    return value if isinstance(value, dict | RowError) else bad(f"{label} is no object")


READERS: Mapping[str, Reader] = {
    "system": _system,
    "history": _history,
    "tools": _objects("tools"),
    "documents": _objects("documents"),
    "template_arguments": _arguments,
}
"""Field → what reads a value that is not empty, as a value of `Context` or as arguments."""
