"""The command line: `batch-scorer`, or `python -m batch_scorer.cli`."""

from batch_scorer.cli.program import main

__all__ = ["main"]
