"""Responses that do not hold the prompt that stands beside them, as others of their file do."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from batch_scorer.errors import RowReason
from batch_scorer.formats.kinds import is_assistant
from batch_scorer.formats.messages import bad, message_of, text_of
from batch_scorer.records import RowError, SequenceInput

Needed: TypeAlias = tuple[str, ...] | str | list[int]
"""What a response must hold: the texts of its prompt's messages, rendered text, or token ids."""

_TEXT_SHOWN = 60


def needed_of(prompts: Sequence[Any]) -> dict[int, Needed]:
    """What the responses of each row must hold; of rows whose prompt says nothing, nothing."""
    needed: dict[int, Needed] = {}
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            prompt = prompt.strip()
        elif isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            prompt = texts_asked(prompt)
        if prompt:
            needed[row] = prompt
    return needed


def lacking(needed: Needed, response: SequenceInput, label: str) -> RowError | None:
    """The error of a response that does not hold what it must."""
    if isinstance(needed, tuple):
        missing = missing_text(needed, response)
        if missing is None:
            return None
        detail = f"{label} lacks a message of the prompt beside it: {missing[:_TEXT_SHOWN]!r}"
        return RowError(RowReason.CONTEXT_NOT_READ, detail)
    if isinstance(needed, str):
        is_held = isinstance(response, str) and needed in response
    else:
        is_held = response[: len(needed)] == needed
    return None if is_held else bad(f"{label} does not hold its prompt, as others of its file do")


def missing_text(needed: Sequence[str], response: SequenceInput) -> str | None:
    """The first of these texts that no message of a dialogue has."""
    held = texts_asked(response)
    return next((text for text in needed if text not in held), None)


def texts_asked(messages: Sequence[Any]) -> tuple[str, ...]:
    """The texts of the messages that are not the assistant's, without the blanks at their ends."""
    read = (message_of(value, "") for value in messages)
    texts = (
        text_of(message).strip()
        for message in read
        if not isinstance(message, RowError) and not is_assistant(message["role"])
    )
    return tuple(text for text in texts if text)
