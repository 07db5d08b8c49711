"""Dialogue text as in Anthropic HH-RLHF: turns after `Human:` and `Assistant:`."""

import re
from itertools import pairwise

from batch_scorer.errors import RowReason
from batch_scorer.records import Conversation, RowError

# Two newlines belong to the mark: the bare words stand inside the messages of real pairs.
_MARK = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(text: str) -> bool:
    """Whether text begins, as all HH dialogues do, with the mark of a human turn."""
    return text.startswith("\n\nHuman:")


def cut(text: str, name: str) -> Conversation | RowError:
    """A whole dialogue as messages; blanks at both ends of a turn are removed.

    Marks inside a message look the same as turns, so turns that are empty or do not alternate make
    the row an error. `name` is the text's name in the error.
    """
    turns = _turns(text, name)
    if not isinstance(turns, RowError) and any(not turn["content"] for turn in turns):
        return RowError(RowReason.EMPTY, f"{name} has an empty turn")
    return turns


def cut_prompt(text: str, name: str) -> Conversation | RowError:
    """The messages of a prompt, which ends in an `Assistant:` that nothing follows."""
    turns = _turns(text, name)
    if isinstance(turns, RowError):
        return turns
    if turns[-1] != {"role": "assistant", "content": ""}:
        return RowError(RowReason.BAD_STRUCTURE, f"{name} does not end with Assistant:")
    if any(not turn["content"] for turn in turns[:-1]):
        return RowError(RowReason.EMPTY, f"{name} has an empty turn")
    return turns[:-1]


def _turns(text: str, name: str) -> Conversation | RowError:
    before, *pieces = _MARK.split(text)
    if before.strip() or not pieces or pieces[0] != "Human":
        return RowError(RowReason.BAD_STRUCTURE, f"{name} does not begin with Human:")
    turns = [
        {"role": _ROLES[mark], "content": turn.strip()}
        for mark, turn in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if any(a["role"] == b["role"] for a, b in pairwise(turns)):
        return RowError(RowReason.BAD_STRUCTURE, f"the turns of {name} do not alternate")
    return turns
