"""What a command prints: its result on stdout, all else on stderr, and others' text as it is.

Names and paths are printed as `Text`, in which Rich finds neither markup nor emoji.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.text import Text

from batch_scorer import logs

T = TypeVar("T")


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


def show(
    found: T,
    to_json: Callable[[T], Any],
    print_it: Callable[[Console, T], None],
    *,
    as_json: bool,
) -> None:
    """Print a result, for a machine or for people."""
    if as_json:
        print(json.dumps(to_json(found)))
    else:
        print_it(out(), found)


def fail(message: str, code: int) -> NoReturn:
    """End the program with a message on stderr, which holds no secrets."""
    if logs.is_json():
        logs.log.error(message)
    else:
        text = Text.assemble(("error:", "red"), " ", logs.mask(message))
        err().print(text, soft_wrap=True)
    sys.exit(code)


def program_name() -> str:
    """How this program was called, so that the next command can be copied."""
    called = sys.argv[0]
    return os.path.relpath(called) if os.access(called, os.X_OK) else "batch-scorer"
