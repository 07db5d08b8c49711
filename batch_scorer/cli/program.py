"""The program around a command: logs, signals, and what an error becomes."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from batch_scorer import logs
from batch_scorer.arrow import without_pandas
from batch_scorer.backends.device import CPU_ENVIRONMENT
from batch_scorer.cli.commands import app
from batch_scorer.cli.terminal import fail
from batch_scorer.errors import BatchScorerError, ExitCode

_INTERRUPTED = 130
"""What Typer makes of a KeyboardInterrupt, which SIGTERM raises here too."""


def main() -> NoReturn:
    """Entry point: errors of ours become one clear message and an exit code."""
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    without_pandas()
    logs.set_up()
    signal.signal(signal.SIGTERM, _stop)
    try:
        # A command that raises typer.Exit has its code returned here.
        code = app(standalone_mode=False)
    except BatchScorerError as error:
        fail(str(error), error.exit_code, as_json=_wants_json(), kind=type(error).__name__)
    except typer.Abort:
        sys.exit(ExitCode.INCOMPLETE)
    except Exception as error:
        # Typer's own usage errors know how to print themselves.
        show_usage_error = getattr(error, "show", None)
        if show_usage_error is None:
            raise
        if _wants_json():
            message = str(getattr(error, "format_message", error.__str__)())
            fail(message, ExitCode.CONFIG, as_json=True, kind="UsageError")
        show_usage_error()
        sys.exit(ExitCode.CONFIG)
    if code == _INTERRUPTED:
        message = "stopped; run the same command again to resume"
        fail(message, ExitCode.INCOMPLETE, as_json=_wants_json(), kind="Interrupted")
    sys.exit(code or ExitCode.DONE)


def _wants_json() -> bool:
    """Whether this command was called with --json; what follows `--` is another command's."""
    words = sys.argv[1:]
    return "--json" in (words[: words.index("--")] if "--" in words else words)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
