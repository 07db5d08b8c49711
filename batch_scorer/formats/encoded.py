"""Text that is JSON, or Python's spelling, of messages, as CSV files and dumps hold them."""

import ast
import json
import re
from typing import Any

from batch_scorer.errors import RowReason
from batch_scorer.records import RowError

_LIKE_MESSAGES = re.compile(
    r"""[\s\[(]*(?:array\([\s\[]*)?\{\s*['"](?:role|content|from|value)['"]\s*:"""
)


def looks_encoded(text: str) -> bool:
    """Whether a text begins as a message does, or a list of messages, in JSON or Python."""
    return _LIKE_MESSAGES.match(text) is not None


def decode(text: str, label: str) -> Any:
    """The value that a text spells, or an error; blank text as it is."""
    if not text.strip():
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass  # then it is Python's spelling, or none at all
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return RowError(
            RowReason.MALFORMED_JSON, f"{label} is text that is neither JSON nor Python's spelling"
        )


def decoded(value: Any, label: str) -> Any:
    """The same where the value is text, or of the texts of a list; another value as it is."""
    if isinstance(value, str):
        return decode(value, label)
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        return [decode(item, label) if isinstance(item, str) else item for item in value]
    return value
