"""A stand-in for Google Cloud Storage: as much of its XML API as a client of ours uses.

Made from Google's documentation of the XML API, since no emulator in the package registries takes
its conditional requests: generations, `x-goog-if-generation-match`, `If-Match`, ranges, listings in
pages, copies, and its error codes. Objects are in memory; the server is a thread of this process.
It can also break a promise (`Lie`), as a store does that only resembles one.
"""

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from enum import StrEnum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bkt"
TOKEN = "test-token-of-gcs"
_NAMESPACE = "http://doc.s3.amazonaws.com/2006-03-01"
_MOST_KEYS = 1000


class Lie(StrEnum):
    """A promise that a store breaks."""

    NO_CONDITIONS = "conditional writes are not refused"
    NO_PINS = "conditional reads are not refused"
    OTHER_TAGS = "listings show other entity tags"
    STALE_LISTING = "listings show no new object"
    NO_DELETION = "deletions do nothing"
    OLD_CLOCK = "times run backwards"


@dataclass(frozen=True)
class GcsServer:
    """A running server. `options` go to the store, `environment` to processes that use it."""

    endpoint: str

    @property
    def options(self) -> dict[str, str]:
        return {"base_url": self.endpoint, "allow_http": "true"}

    @property
    def environment(self) -> dict[str, str]:
        return {"GOOGLE_BEARER_TOKEN": TOKEN}

    def url(self, path: str) -> str:
        return f"gs://{BUCKET}/{path}"


@contextmanager
def gcs_server(lie: Lie | None = None) -> Iterator[GcsServer]:
    """Start the stand-in, on a free port."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.lie = lie
    thread = threading.Thread(target=server.serve_forever, name="GCS stand-in", daemon=True)
    thread.start()
    try:
        yield GcsServer(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(frozen=True)
class _Object:
    data: bytes
    generation: int
    changed: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data).hexdigest()}"'


class _Refused(Exception):
    """An answer with an error code in it."""

    def __init__(self, status: HTTPStatus, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.lock = threading.Lock()
        self.objects: dict[str, _Object] = {}
        self.lie: Lie | None = None
        self._newest = 0

    def next_generation(self) -> int:
        """As Google's: microseconds, and never one twice."""
        self._newest = max(self._newest + 1, time.time_ns() // 1000)
        return self._newest


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer is one packet, not two of which the second waits

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            bucket, key, query = self._target()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise _Refused(HTTPStatus.UNAUTHORIZED, "AuthenticationRequired")
            if bucket != BUCKET:
                raise _Refused(HTTPStatus.NOT_FOUND, "NoSuchBucket")
            with self.server.lock:
                if self.command == "PUT":
                    self._put(key, body)
                elif self.command == "DELETE":
                    self._delete(key)
                elif key:
                    self._get(key)
                else:
                    self._list(query)
        except _Refused as refused:
            text = f"<Error><Code>{refused.code}</Code><Message>{refused.code}</Message></Error>"
            self._answer(refused.status, text.encode(), {"Content-Type": "application/xml"})

    do_GET = do_HEAD = do_PUT = do_DELETE = _serve

    def _target(self) -> tuple[str, str, dict[str, str]]:
        parts = urlsplit(self.path)
        bucket, _, key = parts.path.removeprefix("/").partition("/")
        return bucket, unquote(key), dict(parse_qsl(parts.query, keep_blank_values=True))

    def _answer(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _stored(self, key: str) -> _Object:
        if (stored := self.server.objects.get(key)) is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "NoSuchKey")
        return stored

    def _check_generation(self, key: str) -> None:
        """0 stands for nothing."""
        if self.server.lie is Lie.NO_CONDITIONS:
            return
        expected = self.headers.get("x-goog-if-generation-match")
        stored = self.server.objects.get(key)
        if expected is not None and int(expected) != (stored.generation if stored else 0):
            raise _Refused(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed")

    def _put(self, key: str, body: bytes) -> None:
        self._check_generation(key)
        source = self.headers.get("x-goog-copy-source")
        if source is not None:
            bucket, _, from_key = unquote(source).removeprefix("/").partition("/")
            if bucket != BUCKET:
                raise _Refused(HTTPStatus.NOT_FOUND, "NoSuchBucket")
            body = self._stored(from_key).data
        stored = _Object(body, self.server.next_generation())
        if self.server.lie is Lie.OLD_CLOCK:
            stored = replace(
                stored, changed=stored.changed - timedelta(days=len(self.server.objects))
            )
        self.server.objects[key] = stored
        headers = {"ETag": stored.etag, "x-goog-generation": str(stored.generation)}
        copied = f"<CopyObjectResult><LastModified>{_iso(stored.changed)}</LastModified>"
        copied += f"<ETag>{stored.etag}</ETag></CopyObjectResult>"
        self._answer(HTTPStatus.OK, copied.encode() if source is not None else b"", headers)

    def _delete(self, key: str) -> None:
        self._check_generation(key)
        self._stored(key)
        if self.server.lie is not Lie.NO_DELETION:
            del self.server.objects[key]
        self._answer(HTTPStatus.NO_CONTENT, b"", {})

    def _get(self, key: str) -> None:
        stored = self._stored(key)
        expected = self.headers.get("If-Match")
        if expected not in (None, "*", stored.etag) and self.server.lie is not Lie.NO_PINS:
            raise _Refused(HTTPStatus.PRECONDITION_FAILED, "PreconditionFailed")
        headers = {
            "ETag": stored.etag,
            "x-goog-generation": str(stored.generation),
            "Last-Modified": format_datetime(stored.changed, usegmt=True),
            "Content-Type": "application/octet-stream",
        }
        data, size = stored.data, len(stored.data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._answer(HTTPStatus.OK, data, headers)
        start, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
        if start >= size:
            raise _Refused(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{last}/{size}"
        self._answer(HTTPStatus.PARTIAL_CONTENT, data[start : last + 1], headers)

    def _list(self, query: dict[str, str]) -> None:
        prefix = query.get("prefix", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        most = min(int(query.get("max-keys", _MOST_KEYS)), _MOST_KEYS)
        keys = [key for key in sorted(self.server.objects) if key.startswith(prefix)]
        keys = [key for key in keys if key > after]
        if self.server.lie is Lie.STALE_LISTING:
            keys = []
        page = keys[:most]
        entries = [_entry(key, self.server.objects[key]) for key in page]
        if self.server.lie is Lie.OTHER_TAGS:
            entries = [entry.replace('<ETag>"', '<ETag>"other-') for entry in entries]
        is_truncated = len(keys) > most
        if is_truncated:
            token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>"
            entries.append(token)
        text = (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="{_NAMESPACE}">'
            f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{str(is_truncated).lower()}</IsTruncated>{''.join(entries)}"
            "</ListBucketResult>"
        )
        self._answer(HTTPStatus.OK, text.encode(), {"Content-Type": "application/xml"})


def _entry(key: str, stored: _Object) -> str:
    return (
        f"<Contents><Key>{escape(key)}</Key><Generation>{stored.generation}</Generation>"
        f"<MetaGeneration>1</MetaGeneration><LastModified>{_iso(stored.changed)}</LastModified>"
        f"<ETag>{escape(stored.etag)}</ETag><Size>{len(stored.data)}</Size></Contents>"
    )


def _iso(moment: datetime) -> str:
    return f"{moment.isoformat(timespec='milliseconds').removesuffix('+00:00')}Z"
