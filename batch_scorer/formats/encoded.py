"""Text that is JSON, or Python's spelling, of messages, as CSV files and dumps hold them."""

import ast
import json
import re
from dataclasses import replace
from typing import Any

from batch_scorer.errors import RowReason
from batch_scorer.formats.bounded import NEITHER, fault_of, fault_of_literal
from batch_scorer.records import ReadBounds, RowError

_LIKE_MESSAGES = re.compile(
    r"""[\s\[(]*(?:array\([\s\[]*)?\{\s*['"](?:role|content|from|value)['"]\s*:"""
)


def looks_encoded(text: str) -> bool:
    """Whether a text begins as a message does, or a list of messages, in JSON or Python."""
    return _LIKE_MESSAGES.match(text) is not None


def decode(text: str, label: str, bounds: ReadBounds) -> Any:
    """The value that a text spells, or an error; blank text as it is."""
    if not text.strip():
        return text
    fault = fault_of(text.encode(errors="surrogatepass"), bounds)
    if fault is None:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass  # then it is Python's spelling, or none at all
    elif fault.reason is RowReason.ROW_TOO_LARGE:
        return replace(fault, detail=f"{label}: {fault.detail}")
    # Quotes are others in Python: what seems nested by those of JSON may be a text.
    if (other := fault_of_literal(text, bounds)) is not None:
        fault = other if fault is None or other.reason is not RowReason.MALFORMED_JSON else fault
        return replace(fault, detail=f"{label}: {fault.detail}")
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return RowError(RowReason.MALFORMED_JSON, f"{label}: {NEITHER}")


def decoded(value: Any, label: str, bounds: ReadBounds) -> Any:
    """The same where the value is text, or of the texts of a list; another value as it is."""
    if isinstance(value, str):
        return decode(value, label, bounds)
    if isinstance(value, list) and any(isinstance(item, str) for item in value):
        return [decode(v, label, bounds) if isinstance(v, str) else v for v in value]
    return value
