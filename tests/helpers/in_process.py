"""The command line in this process: for tests that start no Ray, and so need no process."""

import contextlib
import io
import signal
import sys
from unittest.mock import patch

from rich.console import Console

from batch_scorer import logs
from batch_scorer.cli import commands as cli
from tests.helpers.program import Ended


def run_cli(*arguments: object) -> Ended:
    """What `batch-scorer ARGUMENTS` prints and how it ends; what it lets escape is raised."""
    out, err = io.StringIO(), io.StringIO()
    handler, hook = signal.getsignal(signal.SIGTERM), sys.excepthook
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", ["batch-scorer", *map(str, arguments)]),
        # Consoles take the width of the terminal that they were made in.
        patch.multiple(cli, _out=Console(width=200), _err=Console(stderr=True, width=200)),
        patch.multiple(logs.log, handlers=[], propagate=True, level=logs.log.level),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
            sys.excepthook = hook
    return Ended(code, out.getvalue(), err.getvalue())
