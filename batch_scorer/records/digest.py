"""A digest of JSON-like values."""

import hashlib
import json
from typing import Any


def digest_of(value: Any) -> str:
    """sha256 of a JSON value, the same in every process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
