"""The command line in this process: for tests that start no Ray, and so need no process."""

import contextlib
import io
import os
import signal
import sys
from unittest.mock import patch

from batch_scorer import cli, logs
from tests.helpers.program import Ended


def run_cli(*arguments: object, columns: int = 200) -> Ended:
    """What `batch-scorer ARGUMENTS` prints on a terminal of so many columns, and how it ends; what
    it lets escape is raised."""
    out, err = io.StringIO(), io.StringIO()
    handler, hook = signal.getsignal(signal.SIGTERM), sys.excepthook
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", ["batch-scorer", *map(str, arguments)]),
        patch.dict(os.environ, COLUMNS=str(columns)),
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
