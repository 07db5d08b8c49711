"""A digest of JSON-like values."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

json_text = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode
"""A JSON value as the text that is digested, the same in every process."""


def digest_of(value: Any) -> str:
    """sha256 of a JSON value, the same in every process."""
    return hashlib.sha256(json_text(value).encode()).hexdigest()


def digest_of_list(values: Iterable[str]) -> str:
    """`digest_of` a list of these texts, of which there may be a million."""
    digest = hashlib.sha256(b"[")
    for place, value in enumerate(values):
        digest.update((("," if place else "") + json_text(value)).encode())
    digest.update(b"]")
    return digest.hexdigest()
