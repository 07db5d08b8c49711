"""The version of this package."""

import hashlib
from functools import cache
from pathlib import Path

__version__ = "0.1.0"


@cache
def package_digest() -> str:
    """Digest of this package's code: what was found out with other code is not used again."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"\n{file.relative_to(folder)} ".encode() + file.read_bytes())
    return digest.hexdigest()
