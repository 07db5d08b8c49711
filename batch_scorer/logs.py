"""The logger `batch_scorer`: how a line looks, what it knows of the work, what it never shows.

Text for people, or one JSON object a line where RAY_LOGGING_CONFIG_ENCODING is JSON, the variable
that Ray's own logs follow. Lines carry the fields of the work that they were written in (`fields`):
run, night, shard, attempt. What the environment holds under a secret's name is masked (`mask`).
"""

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from urllib.parse import quote

Field = str | int | float

log = logging.getLogger("batch_scorer")

_ENCODING = "RAY_LOGGING_CONFIG_ENCODING"
_LINE = "%(levelname)s %(name)s: %(message)s"
_WORKER_LINE = f"%(asctime)s {_LINE}"
_MASK = "***"
_SECRET_NAME = re.compile(r"(^|_)(SECRET|TOKEN|PASSWORD|PASSWD|KEY|SAS|CONNECTION_STRING)(_|$)")
_PLACE_OF_A_SECRET = re.compile(r"_(PATH|FILE|DIR|URI|URL)$")
_SHORTEST_SECRET = 8
"""Shorter values may be words of any message."""

_fields: ContextVar[Mapping[str, Field]] = ContextVar("fields", default=MappingProxyType({}))


@contextmanager
def fields(**added: Field) -> Iterator[None]:
    """Put these on every line that this thread logs inside."""
    token = _fields.set({**_fields.get(), **added})
    try:
        yield
    finally:
        _fields.reset(token)


def is_json() -> bool:
    """Whether lines are for machines."""
    return os.environ.get(_ENCODING, "").upper() == "JSON"


def mask(text: str) -> str:
    """The text without any value that the environment holds under a secret's name."""
    secrets = {
        form
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET and _names_a_secret(name.upper())
        for form in (value, quote(value, safe=""))
    }
    for secret in sorted(secrets, key=len, reverse=True):  # one may hold another
        text = text.replace(secret, _MASK)
    return text


def _names_a_secret(name: str) -> bool:
    return bool(_SECRET_NAME.search(name)) and not _PLACE_OF_A_SECRET.search(name)


def set_up() -> None:
    """Log to stderr, warnings and worse; as JSON everything, and uncaught exceptions too."""
    if not is_json():  # Ray brings a handler for other libraries' lines as JSON
        logging.basicConfig(level=logging.WARNING, format=_LINE)
    _log_with(_JsonLine() if is_json() else _TextLine(_LINE))
    sys.excepthook = _log_uncaught


@dataclass(frozen=True, slots=True)
class Carried:
    """How the driver logs, for its workers; see `carry` and `resume`."""

    encoding: str
    fields: Mapping[str, Field]
    attempt: int


def carry(attempt: int = 1) -> Carried:
    """What a worker has to know to log as this process does, in this attempt at its work."""
    return Carried(os.environ.get(_ENCODING, ""), dict(_fields.get()), attempt)


def resume(carried: Carried, retries: int = 0) -> None:
    """In a worker: log as the driver does, with its fields; stderr is Ray's file of this worker.

    `retries` of the attempt took place on workers that died. The fields stay until the next call.
    """
    if not log.handlers:
        os.environ[_ENCODING] = carried.encoding
        _log_with(_JsonLine() if is_json() else _TextLine(_WORKER_LINE, with_fields=True))
    _fields.set({**carried.fields, "attempt": carried.attempt + retries})


def _log_with(formatter: logging.Formatter) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    log.handlers = [handler]
    log.propagate = False  # other handlers know neither the fields nor what to mask
    log.setLevel(logging.INFO if is_json() else logging.WARNING)


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if is_json():
        log.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))
    else:
        sys.stderr.write(mask("".join(traceback.format_exception(kind, error, trace))))


class _TextLine(logging.Formatter):
    def __init__(self, line: str, *, with_fields: bool = False) -> None:
        super().__init__(line)
        self._with_fields = with_fields

    def formatMessage(self, record: logging.LogRecord) -> str:
        known = _fields.get() if self._with_fields else {}
        return super().formatMessage(record) + "".join(f" {k}={v}" for k, v in known.items())

    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


class _JsonLine(logging.Formatter):
    """The names that Ray's JSON lines have, and ours beside them."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Field] = {
            "asctime": self.formatTime(record),
            "levelname": record.levelname,
            "message": record.getMessage(),
            "name": record.name,
            "filename": record.filename,
            "lineno": record.lineno,
            "process": record.process or 0,
            "timestamp_ns": int(record.created * 1e9),
            **_fields.get(),
        }
        if record.exc_info:
            line["exc_text"] = self.formatException(record.exc_info)
        return json.dumps({k: mask(v) if isinstance(v, str) else v for k, v in line.items()})
