"""Values to messages: every field stays as the row has it; what cannot be one is said by name."""

from typing import Any

from batch_scorer.errors import RowReason
from batch_scorer.formats.kinds import MEDIA_NAMES, is_assistant, role_alias
from batch_scorer.formats.values import is_empty
from batch_scorer.records import Conversation, Message, RowError

_SPEAKING = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields that a message may have in place of a content."""


def messages_of(values: list[Any], label: str) -> Conversation | RowError:
    """The messages in a list that is not empty; `label` is the list's name in errors."""
    messages = []
    for value in values:
        if not _is_plain(value):
            value = message_of(value, f"a message of {label}")
            if isinstance(value, RowError):
                return value
        messages.append(value)
    return messages


def _is_plain(value: Any) -> bool:
    """Whether a value is a message of a role and a text and nothing else, as most are."""
    try:
        return len(value) == 2 and type(value["content"]) is str and value["role"].strip() != ""
    except (TypeError, KeyError, AttributeError):
        return False


def message_of(value: Any, label: str) -> Message | RowError:
    """One message, with `role` and whatever else it has.

    ShareGPT's `from` and `value` become `role` and `content`, and its role the usual one.
    """
    if value is None:
        return RowError(RowReason.NULL_VALUE, f"{label} is null")
    if not isinstance(value, dict):
        return bad(f"{label} is no object")
    message: Message = value
    if "from" in message and message.get("role") is None:
        message = _from_sharegpt(message)
    role, content = message.get("role"), message.get("content")
    if role is None:
        return RowError(RowReason.NULL_VALUE, f"{label} has no role")
    if not isinstance(role, str) or not role.strip():
        return RowError(RowReason.UNKNOWN_ROLE, f"{label} has an empty role")
    if len(message) > 2:
        for name in sorted(MEDIA_NAMES & message.keys()):
            if not is_empty(message[name]):
                return _media(label, name)
    if isinstance(content, str):
        return message
    if content is None:
        if any(not is_empty(message.get(name)) for name in _SPEAKING):
            return message
        return RowError(RowReason.NULL_VALUE, f"{label} has no content")
    is_result = role_alias(role) == "tool"  # which may be any JSON value
    if isinstance(content, list):
        return _fault_of_parts(content, label, is_result=is_result) or message
    return message if is_result else bad(f"the content of {label} is neither text nor a list")


def judged(conversation: Conversation, label: str) -> Conversation | RowError:
    """The conversation, if it is a prompt and an assistant's answer to score."""
    last = conversation[-1]
    if not is_assistant(last["role"]):
        return bad(f"{label} does not end with the assistant's message")
    if not _says_something(last):
        return RowError(RowReason.EMPTY, f"the last message of {label} is empty")
    return asked(conversation, label) or conversation


def asked(conversation: Conversation, label: str) -> RowError | None:
    """Why nobody asks anything in this conversation, or None."""
    is_asked = False
    for message in conversation:
        if not is_assistant(message["role"]):
            if _says_something(message):
                return None
            is_asked = True
    if is_asked:
        return RowError(RowReason.EMPTY, f"the prompt of {label} is empty")
    return bad(f"{label} holds no prompt before the assistant's message")


def text_of(message: Message) -> str:
    """The text of a message whose content is text, or a list of texts; "" for another."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = (part.get("text") if isinstance(part, dict) else part for part in content)
    return "\n".join(text for text in texts if isinstance(text, str))


def bad(detail: str) -> RowError:
    return RowError(RowReason.BAD_STRUCTURE, detail)


def _from_sharegpt(value: Message) -> Message:
    role = value["from"]
    others = {
        name: item
        for name, item in value.items()
        if name not in ("from", "value", "role") and (name != "content" or item is not None)
    }
    alias = role_alias(role) if isinstance(role, str) else role
    return {"role": alias, "content": value.get("value"), **others}


def _fault_of_parts(parts: list[Any], label: str, *, is_result: bool) -> RowError | None:
    """Why these parts of a content cannot be read, or None: all of them must be text."""
    for part in parts:
        if not isinstance(part, dict):
            if is_result:
                continue
            return bad(f"a part of the content of {label} is no object")
        kind = part.get("type", "text")
        media = [name for name in sorted(MEDIA_NAMES & part.keys()) if not is_empty(part[name])]
        if media or kind != "text":
            if is_result and "type" not in part:
                continue  # an item of a list that a tool gave
            return _media(label, media[0] if media else str(kind))
        if not isinstance(part.get("text"), str) and not is_result:
            return bad(f"a part of the content of {label} has no text")
    return None


def _media(label: str, kind: str) -> RowError:
    return RowError(RowReason.UNSUPPORTED_MEDIA, f"{label} holds {kind}: only text is scored")


def _says_something(message: Message) -> bool:
    content = message.get("content")
    if isinstance(content, str):
        if content.strip():
            return True
    elif isinstance(content, list) and text_of(message).strip():
        return True
    elif not isinstance(content, list) and content is not None:
        return not is_empty(content)
    return any(not is_empty(message.get(name)) for name in _SPEAKING)
