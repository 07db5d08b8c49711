"""The command line: `batch-scorer`, or `python -m batch_scorer.cli`."""

import sys
from typing import NoReturn

from batch_scorer import quarantine

_READING = ("score", "plan", "check", "nightly")
"""Commands that begin with reading inputs."""


def main() -> NoReturn:
    """Entry point: see `program.main`."""
    if sys.argv[1:2] and sys.argv[1] in _READING and "--help" not in sys.argv:
        quarantine.prepare()  # it imports while we do, half a second each
    from batch_scorer.cli.program import main as run

    run()
