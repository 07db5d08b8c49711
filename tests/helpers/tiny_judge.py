"""The judge of `examples/tiny_judge.py`, whose right verdict is known."""

import hashlib
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from batch_scorer.models.digests import user_cache
from examples import tiny_judge
from tests.helpers.program import REPOSITORY

PAGE = tiny_judge.PAGE
ROWS_NAME = tiny_judge.ROWS_NAME


def tiny_judge_directory() -> Path:
    """The folder of model and rows, kept in the user's cache. The script makes it where there is
    none of this script and page, which takes a minute of one core."""
    script = Path(tiny_judge.__file__)
    digest = hashlib.sha256(script.read_bytes() + PAGE.read_bytes()).hexdigest()
    home = user_cache() / f"tiny-judge-{digest[:12]}"
    if home.exists():
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{home.name}.", dir=home.parent) as temporary:
        made = Path(temporary) / "judge"
        subprocess.run(
            [sys.executable, "-m", "examples.tiny_judge", made], cwd=REPOSITORY, check=True
        )
        with suppress(OSError):  # another process was first
            made.rename(home)
    return home
