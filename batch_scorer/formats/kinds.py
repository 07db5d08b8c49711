"""The row kinds and the usual names of their columns: tables read by detection and parsing, and
shown in `docs/formats.md`."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TypeAlias

from batch_scorer.records import Format


class Part(StrEnum):
    """What one value of a column is."""

    TEXT = "text"
    MESSAGE = "one message"
    MESSAGES = "messages"
    TOKEN_IDS = "token ids"
    STEPS = "steps"
    PROBLEM = "a problem"  # PRM800K's question: an object whose `problem` is the text


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


_ANY = frozenset({Part.TEXT, Part.MESSAGE, Part.MESSAGES, Part.TOKEN_IDS})
_MANY = frozenset({Part.TEXT, Part.MESSAGES, Part.TOKEN_IDS})
_TEXT = frozenset({Part.TEXT})
_MESSAGES = frozenset({Part.MESSAGES})
_TOKEN_IDS = frozenset({Part.TOKEN_IDS})
_DIALOGUE = frozenset({Part.TEXT, Part.MESSAGES})
_STEPS = frozenset({Part.STEPS})
_PROBLEM = frozenset({Part.PROBLEM})

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
    Format.STEPS: Kind("answers in steps", ("steps",), _STEPS, Prompt.REQUIRED, rank=0),
    Format.CONVERSATION: Kind("conversations", ("messages",), _DIALOGUE, Prompt.NEVER, rank=1),
    Format.TEXT: Kind("texts", ("text",), _TEXT, Prompt.NEVER, rank=2),
    Format.TOKEN_IDS: Kind("sequences", ("token_ids",), _TOKEN_IDS, Prompt.NEVER, rank=2),
}

PROMPT_PARTS: Mapping[Part, frozenset[Part]] = {
    Part.TEXT: _DIALOGUE,
    Part.MESSAGE: _DIALOGUE,
    Part.MESSAGES: _DIALOGUE,
    Part.TOKEN_IDS: _TOKEN_IDS,
    Part.STEPS: _DIALOGUE | _PROBLEM,
}
"""The prompts that a response of each part can follow."""

Tier: TypeAlias = tuple[frozenset[Part], tuple[str, ...]]

# An `input` of text is no known prompt: Alpaca's is half of one, and verl's has lost its roles.
KNOWN_NAMES: Mapping[str, tuple[Tier, ...]] = {
    "prompt": (
        (_ANY, ("prompt",)),
        (_TEXT, ("instruction", "question")),
        (_PROBLEM, ("question",)),
        (_MESSAGES, ("messages", "conversations", "conversation")),
        (_MESSAGES, ("context", "trajectory", "input")),
        (_TEXT, ("problem",)),
    ),
    "chosen": ((_ANY, ("chosen",)), (_TOKEN_IDS, ("input_ids_chosen", "chosen_input_ids"))),
    "rejected": ((_ANY, ("rejected",)), (_TOKEN_IDS, ("input_ids_rejected", "rejected_input_ids"))),
    "responses": (
        (_ANY, ("responses", "completions", "outputs", "generations")),
        (_MESSAGES, ("conversations",)),
    ),
    "response": ((_ANY, ("response", "completion", "output")),),
    "steps": ((_STEPS, ("steps", "completions", "label")),),
    "messages": (
        (_MESSAGES, ("messages", "conversations", "conversation")),
        (_MESSAGES, ("text",)),
    ),
    "text": ((_TEXT, ("text",)),),
    "token_ids": ((_TOKEN_IDS, ("input_ids", "token_ids")),),
}
"""Field → names in tiers: an earlier tier wins, two names of one tier are ambiguous."""

STEP_LABELS = "labels"
"""A list of this name says that `completions` are the steps of one answer, not several answers."""

CONTEXT_NAMES: Mapping[str, tuple[str, ...]] = {
    "system": ("system_prompt", "system_message"),
    "history": ("history",),
    "input": (),
    "tools": ("tools",),
    "documents": ("documents",),
    "template_arguments": ("chat_template_kwargs",),
}
"""Fields of the conversation around prompt and responses → columns that are read as such, because
their meaning is agreed. `--column` names others."""

BESIDE_NAMES: Mapping[str, tuple[str, ...]] = {
    "reference": ("reference", "reference_answer", "reference_response", "ground_truth"),
    "principle": ("principle", "criterion"),
}
"""Fields that some models judge an answer by → columns that are read as such, for these models
only. `--column` names others."""

WATCHED_NAMES: Mapping[str, str] = {
    "system": "--column system=system (it is the system message)",
    "input": "--column input=input (it continues the instruction)",
    "context": "write it into the prompt",
    "functions": "--column tools=functions (they are tools as chat templates take them)",
    "history": "write it into the prompt",
    "tools": "write them as a list of objects",
    "documents": "write them as a list of objects",
    "chat_template_kwargs": "write them as an object",
    "system_prompt": "write it as text",
    "system_message": "write it as text",
}
"""Columns that may belong to the conversation → what else to do than to ignore them. Where one is
not read as a field and holds something, the file or the row is not scored."""

MEDIA_NAMES = frozenset({"image", "images", "video", "videos", "audio", "audios"})
"""Columns of a row and keys of a message that hold what no text model reads."""

MESSAGE_KEYS = (("role", "content"), ("from", "value"))
"""Names of a message's two fields: the usual ones, and ShareGPT's."""


def mask_field(field: str) -> str:
    """The field that says which token ids of another field are padding."""
    return "attention_mask" if field == "token_ids" else f"attention_mask_{field}"


def mask_names(field: str) -> tuple[str, ...]:
    """The usual names of that field's column."""
    own = mask_field(field)
    return (own,) if field == "token_ids" else (own, f"{field}_attention_mask")


_ROLE_ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_USUAL_ROLES = ("system", "user", "assistant", "tool")
_MEANINGS = _ROLE_ALIASES | {role: role for role in _USUAL_ROLES}


def role_alias(role: str) -> str:
    """The usual role (system, user, assistant, tool) that this one stands for, in any case; the
    role itself where it stands for none."""
    return _MEANINGS.get(role) or _MEANINGS.get(role.strip().lower(), role)


def is_assistant(role: str) -> bool:
    """Whether the turns of this role are the model's."""
    return role == "assistant" or role_alias(role) == "assistant"
