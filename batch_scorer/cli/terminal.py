"""What a command prints: its result on stdout, all else on stderr, and others' text as it is.

Names and paths are printed as `Text`, in which Rich finds neither markup nor emoji.
"""

import json
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.text import Text

from batch_scorer import logs

if TYPE_CHECKING:
    from batch_scorer.reports.views import Result


def out() -> Console:
    return Console()


def err() -> Console:
    return Console(stderr=True)


def for_progress(*, as_json: bool) -> Console:
    """The console for what is printed on the way; under `as_json` stdout is the result's alone."""
    return err() if as_json else out()


def say(console: Console, line: str) -> None:
    """Print a line as it is, without breaking it."""
    console.print(Text(line), soft_wrap=True)


def show(report: "Result", *, as_json: bool) -> None:
    """Print a command's result: for machines one JSON value, for people lines and tables."""
    if as_json:
        print(json.dumps(report.to_json()))
        return
    from batch_scorer.reports.console import show as show_on

    show_on(out(), report)


def fail(message: str, code: int, *, as_json: bool = False, kind: str = "") -> NoReturn:
    """End the program with a message on stderr, which holds no secrets.

    Under `as_json` its last line is one JSON object with the error's class, `kind`.
    """
    if as_json:
        failure = {"error": kind, "message": logs.mask(message), "exit_code": int(code)}
        print(json.dumps(failure), file=sys.stderr)
    elif logs.is_json():
        logs.log.error(message)
    else:
        text = Text.assemble(("error:", "red"), " ", logs.mask(message))
        err().print(text, soft_wrap=True)
    sys.exit(code)


def program_name() -> str:
    """How this program was called, so that the next command can be copied."""
    called = sys.argv[0]
    return os.path.relpath(called) if os.access(called, os.X_OK) else "batch-scorer"
