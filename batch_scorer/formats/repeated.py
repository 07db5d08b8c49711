"""Responses that do not hold the prompt that stands beside them, as others of their file do."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from batch_scorer.errors import RowReason
from batch_scorer.formats.kinds import role_alias
from batch_scorer.formats.messages import bad, message_of, text_of
from batch_scorer.records import Message, RowError, SequenceInput

Needed: TypeAlias = Message | str | list[int]
"""What a response must hold: the system message of its prompt, rendered text, or token ids."""


def needed_of(prompts: Sequence[Any]) -> dict[int, Needed]:
    """What the responses of each row must hold; of rows whose prompt says nothing, nothing."""
    needed: dict[int, Needed] = {}
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            prompt = prompt.strip()
        elif isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            prompt = _system_message(prompt[0])
        if prompt:
            needed[row] = prompt
    return needed


def lacking(needed: Needed, response: SequenceInput, label: str) -> RowError | None:
    """The error of a response that does not hold what it must."""
    if isinstance(needed, dict):
        first = response[0]
        system = _system_message(first) if isinstance(first, dict) else None
        if system is not None and text_of(system).strip() == text_of(needed).strip():
            return None
        detail = f"{label} lacks the system message of the prompt beside it"
        return RowError(RowReason.CONTEXT_NOT_READ, detail)
    if isinstance(needed, str):
        is_held = isinstance(response, str) and needed in response
    else:
        is_held = response[: len(needed)] == needed
    return None if is_held else bad(f"{label} does not hold its prompt, as others of its file do")


def _system_message(value: Any) -> Message | None:
    message = message_of(value, "")
    if isinstance(message, RowError) or role_alias(message["role"]) != "system":
        return None
    return message if text_of(message).strip() else None
