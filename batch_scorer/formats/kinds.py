"""The row kinds and their usual column names: one table, read by detection and parsing."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TypeAlias

import pyarrow as pa

from batch_scorer.records import Format


class Part(StrEnum):
    """What one value of a column is, by its Arrow type."""

    TEXT = "text"
    MESSAGE = "one message"
    MESSAGES = "messages"
    TOKEN_IDS = "token ids"


class Prompt(Enum):
    """Whether a row kind has its prompt in a separate column."""

    NEVER = 0
    OPTIONAL = 1
    REQUIRED = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """How one row kind is laid out.

    `responses` are the fields whose values are scored, in the order of the sequences.
    `is_group`: each value is a list. Of several kinds that fit a file the lowest `rank` wins; kinds
    of equal rank are ambiguous.
    """

    noun: str
    responses: tuple[str, ...]
    parts: frozenset[Part]
    prompt: Prompt
    rank: int
    is_group: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        return self.responses if self.prompt is Prompt.NEVER else ("prompt", *self.responses)


_ANY = frozenset(Part)
_MANY = frozenset({Part.TEXT, Part.MESSAGES, Part.TOKEN_IDS})
_TEXT = frozenset({Part.TEXT})
_MESSAGES = frozenset({Part.MESSAGES})
_TOKEN_IDS = frozenset({Part.TOKEN_IDS})
_DIALOGUE = frozenset({Part.TEXT, Part.MESSAGES})

KINDS: Mapping[Format, Kind] = {
    Format.PREFERENCE_PAIR: Kind(
        "preference pairs", ("chosen", "rejected"), _ANY, Prompt.OPTIONAL, rank=0
    ),
    Format.BEST_OF_N: Kind(
        "best-of-n rows", ("chosen", "rejected"), _MANY, Prompt.OPTIONAL, rank=0, is_group=True
    ),
    Format.ROLLOUT_GROUP: Kind(
        "rollout groups", ("responses",), _MANY, Prompt.OPTIONAL, rank=0, is_group=True
    ),
    Format.ROLLOUT: Kind("rollouts", ("response",), _ANY, Prompt.REQUIRED, rank=0),
    Format.CONVERSATION: Kind("conversations", ("messages",), _DIALOGUE, Prompt.NEVER, rank=1),
    Format.TEXT: Kind("texts", ("text",), _TEXT, Prompt.NEVER, rank=2),
    Format.TOKEN_IDS: Kind("sequences", ("token_ids",), _TOKEN_IDS, Prompt.NEVER, rank=2),
}

PROMPT_PARTS: Mapping[Part, frozenset[Part]] = {
    Part.TEXT: _DIALOGUE,
    Part.MESSAGE: _DIALOGUE,
    Part.MESSAGES: _DIALOGUE,
    Part.TOKEN_IDS: _TOKEN_IDS,
}
"""The prompts that a response of each part can follow."""

Tier: TypeAlias = tuple[frozenset[Part], tuple[str, ...]]

# An `input` of text is no known prompt: Alpaca's is half of one, and verl's has lost its roles.
KNOWN_NAMES: Mapping[str, tuple[Tier, ...]] = {
    "prompt": (
        (_ANY, ("prompt",)),
        (_TEXT, ("instruction", "question")),
        (_MESSAGES, ("messages", "conversations", "conversation")),
        (_MESSAGES, ("context", "trajectory", "input")),
    ),
    "chosen": ((_ANY, ("chosen",)),),
    "rejected": ((_ANY, ("rejected",)),),
    "responses": (
        (_ANY, ("responses", "completions", "outputs", "generations")),
        (_MESSAGES, ("conversations",)),
    ),
    "response": ((_ANY, ("response", "completion", "output")),),
    "messages": ((_MESSAGES, ("messages", "conversations", "conversation")),),
    "text": ((_TEXT, ("text",)),),
    "token_ids": ((_TOKEN_IDS, ("input_ids", "token_ids")),),
}
"""Field → names in tiers: an earlier tier wins, two names of one tier are ambiguous."""

CONTEXT_NAMES = ("system", "system_prompt", "history", "tools", "input")
"""Columns that belong to the conversation in some layouts; no row kind here reads them."""

MESSAGE_KEYS = (("role", "content"), ("from", "value"))
"""Names of a message's two fields: the usual ones, and ShareGPT's."""

ROLES = frozenset({"system", "user", "assistant", "tool"})
_ROLE_ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
}


def role_of(raw: str | None) -> str:
    """One of ROLES, in any case and by any alias; "" for other names."""
    name = (raw or "").strip().lower()
    name = _ROLE_ALIASES.get(name, name)
    return name if name in ROLES else ""


def role_alias(role: str) -> str:
    """The usual name of a role that goes by another; any other role as it is."""
    return role if role in ROLES else role_of(role) or role


def message_keys(dtype: pa.DataType) -> tuple[str, str] | None:
    """The names of role and content in a struct, or None where it is not a message."""
    if not pa.types.is_struct(dtype):
        return None
    for keys in MESSAGE_KEYS:
        # get_field_index is -1 for a name that is missing or there twice.
        at = [dtype.get_field_index(key) for key in keys]
        if min(at) >= 0 and all(is_text(dtype.field(i).type) for i in at):
            return keys
    return None


def is_text(dtype: pa.DataType) -> bool:
    if pa.types.is_dictionary(dtype):
        return is_text(dtype.value_type)
    return bool(
        pa.types.is_string(dtype)
        or pa.types.is_large_string(dtype)
        or pa.types.is_string_view(dtype)
    )


def item_type(dtype: pa.DataType) -> pa.DataType | None:
    """The type of a list's items, or None where it is not a list."""
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return dtype.value_type if any(check(dtype) for check in is_list) else None


def part_of(dtype: pa.DataType) -> Part | None:
    """What a value of this type is, or None where it cannot be part of a sequence."""
    if is_text(dtype):
        return Part.TEXT
    if message_keys(dtype):
        return Part.MESSAGE
    item = item_type(dtype)
    if item is None:
        return None
    if message_keys(item):
        return Part.MESSAGES
    return Part.TOKEN_IDS if pa.types.is_integer(item) else None


def response_part(kind: Kind, dtype: pa.DataType) -> Part | None:
    """`part_of` for a response column of `kind`; for a group, of the list's items."""
    if not kind.is_group:
        return part_of(dtype)
    item = item_type(dtype)
    return None if item is None else part_of(item)
