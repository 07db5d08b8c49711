"""An HTTP proxy before a store's server that breaks requests: which ones, a seed decides.

It understands as much of HTTP/1.1 as it takes to tell requests apart and to break them in the
middle. The Host header passes through as it came, because signatures cover it.
"""

import asyncio
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from urllib.parse import urlsplit

_ORIGIN = re.compile("^https?://[^/]+")
_POLL_S = 0.05
_BODILESS = {"204", "304"}
_FRAMING = {"content-length", "transfer-encoding", "connection"}
_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>injected</Message></Error>"


class Kind(StrEnum):
    """What happens to a request."""

    INTERNAL_ERROR = "500"
    SLOW_DOWN = "503"
    DENIED = "403"
    RESET = "reset"
    """In the middle of a body: a PUT's own, otherwise that of the answer."""
    TRUNCATED = "truncated"
    """The connection ends in the middle of the answer's body."""
    SHORT = "short"
    """Half of the body, and a Content-Length that agrees with it."""
    STALL = "stall"
    """The answer is held back for `stall_s`."""
    UNSEEN = "unseen"
    """404 for an object that was written through this proxy."""
    LOST = "lost"
    """The PUT is applied, and the connection reset in place of its answer."""
    TWICE = "twice"
    """The PUT is delivered twice, and the second answer given."""


_STATUS = {
    Kind.INTERNAL_ERROR: ("500 Internal Server Error", "InternalError"),
    Kind.SLOW_DOWN: ("503 Slow Down", "SlowDown"),
    Kind.DENIED: ("403 Forbidden", "ExpiredToken"),
    Kind.UNSEEN: ("404 Not Found", "NoSuchKey"),
}
_METHODS = {
    Kind.TRUNCATED: {"GET"},
    Kind.SHORT: {"GET"},
    Kind.UNSEEN: {"GET", "HEAD"},
    Kind.LOST: {"PUT"},
    Kind.TWICE: {"PUT"},
}


@dataclass(frozen=True)
class Faults:
    """Which requests to break, of those that a kind can break: each with probability `rate`, or
    `burst` in a row, beginning at one of the first `burst_within`."""

    kinds: tuple[Kind, ...]
    seed: int
    rate: float = 0.0
    burst: int = 0
    burst_within: int = 12
    stall_s: float = 0.5
    only: str = ""
    """A part of the path, where only some objects are meant."""


@dataclass(frozen=True)
class Injected:
    """A request that was broken; `client_port` tells which process sent it."""

    kind: Kind
    method: str
    path: str
    client_port: int


@dataclass(frozen=True)
class Answered:
    """What the store answered to a request, whatever the client got."""

    method: str
    key: str
    """The path, without its query."""
    status: int
    kind: Kind | None
    """How it was broken."""

    @property
    def is_done(self) -> bool:
        return 200 <= self.status < 300

    @property
    def is_refused(self) -> bool:
        """Its condition did not hold."""
        return self.status in (304, 409, 412)


@dataclass
class _Message:
    """A request or an answer; header names as they came."""

    start: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    def encoded(self) -> bytes:
        lines = [self.start, *(f"{name}: {value}" for name, value in self.headers)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + self.body


class _Decisions:
    """Says of each request whether and how it is broken."""

    def __init__(self, faults: Faults | None) -> None:
        self._faults = faults
        self._random = random.Random(faults.seed if faults else 0)
        self._first = 0
        if faults and faults.burst:
            self._first = self._random.randrange(faults.burst_within)
        self._seen = 0
        self._written: set[str] = set()

    def next(self, method: str, path: str) -> Kind | None:
        faults = self._faults
        key = urlsplit(path).path
        possible = []
        if faults and faults.only in path:
            possible = [kind for kind in faults.kinds if self._suits(kind, method, key)]
        if method == "PUT":
            self._written.add(key)
        if not faults or not possible:
            return None
        self._seen += 1
        if faults.burst:
            hit = self._first < self._seen <= self._first + faults.burst
        else:
            hit = self._random.random() < faults.rate
        return self._random.choice(possible) if hit else None

    def _suits(self, kind: Kind, method: str, key: str) -> bool:
        is_possible = method in _METHODS.get(kind, {method})
        return is_possible and (kind is not Kind.UNSEEN or key in self._written)


@dataclass
class FaultProxy:
    """A running proxy: what it has passed on (`counts`, by method; `answered`, one by one) and what
    it has broken."""

    port: int
    counts: Counter[str] = field(default_factory=Counter)
    injected: list[Injected] = field(default_factory=list)
    answered: list[Answered] = field(default_factory=list)
    _held: str = ""
    _upstream: tuple[str, int] = ("", 0)
    _faults: Faults | None = None
    _decisions: _Decisions = field(default_factory=lambda: _Decisions(None))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def breaking(self, faults: Faults) -> Iterator[None]:
        """Break requests in here; begins with empty counts."""
        self.counts.clear()
        self.injected.clear()
        self.answered.clear()
        self._faults, self._decisions = faults, _Decisions(faults)
        try:
            yield
        finally:
            self._faults, self._decisions = None, _Decisions(None)

    @contextmanager
    def holding(self, part: str) -> Iterator[None]:
        """Hold back every PUT whose path has this part: before the store sees it, and until the end
        of the context."""
        self._held = part
        try:
            yield
        finally:
            self._held = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client."""
        try:
            while (request := await _read_head(reader)) is not None:
                await self._answer(request, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, request: _Message, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        method, path, _ = request.start.split(" ", 2)
        kind = self._decisions.next(method, path)
        is_listing = "list-type=" in path or "comp=list" in path
        self.counts["LIST" if is_listing else method] += 1
        if kind is not None:
            port = writer.get_extra_info("peername")[1]
            self.injected.append(Injected(kind, method, path, port))
        length = int(request.header("content-length") or 0)
        if kind is Kind.RESET and length:
            await reader.readexactly(length // 2)
            _reset(writer)
        request.body = await reader.readexactly(length)
        while method == "PUT" and self._held and self._held in path:
            await asyncio.sleep(_POLL_S)
        if kind in _STATUS:
            answer = _refusal(kind)  # type: ignore[arg-type]
        else:
            answer = await self._pass_on(request)
            self._note(request, answer, kind)
            if kind is Kind.TWICE:
                answer = await self._pass_on(request)
                self._note(request, answer, kind)
        if kind is Kind.STALL and self._faults:
            await asyncio.sleep(self._faults.stall_s)
        if kind is Kind.LOST:
            _reset(writer)
        half = len(answer.body) // 2
        if kind is Kind.SHORT:
            answer = _framed(answer, answer.body[:half])
        data = answer.encoded()
        if method == "HEAD":
            data = replace(answer, body=b"").encoded()
        if kind in (Kind.RESET, Kind.TRUNCATED):
            writer.write(data[: len(data) - half])
            await writer.drain()
            if kind is Kind.RESET:
                await asyncio.sleep(0.01)  # so that the first half arrives
                _reset(writer)
            raise ConnectionAbortedError
        writer.write(data)
        await writer.drain()

    def _note(self, request: _Message, answer: _Message, kind: Kind | None) -> None:
        method, path, _ = request.start.split(" ", 2)
        status = int(answer.start.split()[1])
        self.answered.append(Answered(method, urlsplit(path).path, status, kind))

    async def _pass_on(self, request: _Message) -> _Message:
        """The store's answer, its body whole."""
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            writer.write(request.encoded())
            await writer.drain()
            answer = await _read_head(reader)
            if answer is None:
                raise ConnectionAbortedError
            is_bodiless = request.start.startswith("HEAD") or answer.start.split()[1] in _BODILESS
            if is_bodiless:
                return answer
            return _framed(answer, await _read_body(answer, reader))
        finally:
            writer.close()


def redirected(options: Mapping[str, str], endpoint: str) -> dict[str, str]:
    """Store options whose requests go to `endpoint`, a proxy before the server that they name."""
    return {name: _ORIGIN.sub(endpoint, value) for name, value in options.items()}


@contextmanager
def fault_proxy(endpoint: str) -> Iterator[FaultProxy]:
    """A proxy before the server at `endpoint`, in a thread of its own."""
    url = urlsplit(endpoint)
    assert url.hostname is not None and url.port is not None
    loop = asyncio.new_event_loop()
    proxy = FaultProxy(port=0, _upstream=(url.hostname, url.port))

    async def start() -> asyncio.Server:
        return await asyncio.start_server(proxy.serve, "127.0.0.1", 0)

    server = loop.run_until_complete(start())
    proxy.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, name="fault proxy", daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    for task in others:
        with suppress(asyncio.CancelledError):
            await task


async def _read_head(reader: asyncio.StreamReader) -> _Message | None:
    """The next message without its body; None at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    start, *lines = head[:-4].decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return _Message(start, [(name, value.strip()) for name, _, value in pairs])


async def _read_body(answer: _Message, reader: asyncio.StreamReader) -> bytes:
    if answer.header("transfer-encoding") != "chunked":
        return await reader.readexactly(int(answer.header("content-length") or 0))
    chunks = []
    while size := int((await reader.readline()).split(b";")[0], 16):
        chunks.append(await reader.readexactly(size))
        await reader.readline()
    await reader.readline()
    return b"".join(chunks)


def _framed(answer: _Message, body: bytes) -> _Message:
    """The answer with this body, and headers that agree with it."""
    kept = [(name, value) for name, value in answer.headers if name.lower() not in _FRAMING]
    return _Message(answer.start, [*kept, ("Content-Length", str(len(body)))], body)


def _refusal(kind: Kind) -> _Message:
    status, code = _STATUS[kind]
    headers = [("Content-Type", "application/xml")]
    return _framed(_Message(f"HTTP/1.1 {status}", headers), _ERROR.format(code).encode())


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection by RST, and the handling of it by an exception."""
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    raise ConnectionResetError
