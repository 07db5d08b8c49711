"""A chat server whose replies follow from the messages and the seed, and a proxy that breaks what
passes through it as it was planned. They stand for the ways in which a served judge fails, not for
the judge.
"""

import hashlib
import http.client
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Body = dict[str, Any]
_PATH = "/v1/chat/completions"
_QUESTION = re.compile(rb"question (\d+)")


def question_text(number: int) -> str:
    """By which the proxy knows a question."""
    return f"question {number}"


def reply_text(messages: Sequence[Mapping[str, str]], seed: int) -> str:
    """The only right reply."""
    asked = json.dumps([[*map(dict, messages)], seed], sort_keys=True)
    return f"reply {hashlib.sha256(asked.encode()).hexdigest()}"


def completion(body: Body) -> Body:
    """The answer to a request, with its counts."""
    text = reply_text(body["messages"], body["seed"])
    return {
        "object": "chat.completion",
        "model": f"{body['model']}-2026-11-29",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


Answer = Callable[[Body], tuple[int, Body]]
"""A status and a JSON body for the body of a request."""


def always_right(body: Body) -> tuple[int, Body]:
    """Every question is answered."""
    return 200, completion(body)


@dataclass
class ChatServer:
    """A running server: what it was asked, what was shown to it as a key, and how many requests
    it had at once."""

    port: int = 0
    bodies: list[Body] = field(default_factory=list)
    authorizations: Counter[str | None] = field(default_factory=Counter)
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def read(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))


@contextmanager
def chat_server(
    answer: Answer = always_right, *, again_after_s: float | None = None, **headers: str
) -> Iterator[ChatServer]:
    """A server on a free port; `headers` are those of every answer, with _ for -. With
    `again_after_s` each answer is sent once more, so much later."""
    state = ChatServer()

    class Handler(_Handler):
        def do_POST(self) -> None:
            body = json.loads(self.read())
            # Counted until just before the answer is sent: the next request may follow at once.
            with state._counted():
                state.authorizations[self.headers["Authorization"]] += 1
                state.bodies.append(body)
                status, found = answer(body) if self.path == _PATH else (404, {})
            self.answer(status, json.dumps(found).encode(), **headers)
            if again_after_s is not None:
                time.sleep(again_after_s)
                self.answer(status, json.dumps(found).encode(), **headers)

    with _serving(Handler) as state.port:
        yield state


class Fault(StrEnum):
    """What becomes of a request, or of its answer."""

    TOO_MANY = "429"
    TOO_MANY_FOR_NOW = "429 with Retry-After"
    INTERNAL = "500"
    UNAVAILABLE = "503"
    RESET_BEFORE = "connection reset, the request unseen"
    RESET_AFTER = "connection reset in place of the answer"
    CUT = "answer cut within its length"
    CUT_WITHOUT_LENGTH = "answer without a length, cut"
    STALLED = "answer not sent"
    NOT_JSON = "page in place of the answer"
    OTHER_JSON = "JSON that is no completion"
    NO_CHOICES = "no choices"


_STATUS = {
    Fault.TOO_MANY: 429,
    Fault.TOO_MANY_FOR_NOW: 429,
    Fault.INTERNAL: 500,
    Fault.UNAVAILABLE: 503,
}
_IN_PLACE = {
    Fault.NOT_JSON: b"<html><body>One moment, please</body></html>",
    Fault.OTHER_JSON: b'{"choices": [{"message": "none"}]}',
    Fault.NO_CHOICES: b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}',
}

Plan = dict[int, list[Fault]]
"""What happens to a question's requests, one after the other; those after the last are answered."""


def dealt(faults: int, questions: int, most: int, seed: int) -> Plan:
    """So many faults, each kind as often as the others, dealt among questions of which none gets
    more than `most`."""
    kinds = list(Fault)
    cards = [kinds[place % len(kinds)] for place in range(faults)]
    places = [question for question in range(questions) for _ in range(most)]
    chance = random.Random(seed)
    chance.shuffle(cards)
    plan: Plan = {}
    for question, fault in zip(chance.sample(places, faults), cards, strict=True):
        plan.setdefault(question, []).append(fault)
    return plan


@dataclass
class FaultProxy(ChatServer):
    """A running proxy: which faults it has made."""

    injected: Counter[Fault] = field(default_factory=Counter)


@contextmanager
def faulty(base_url: str, plan: Plan, *, message: str = "injected") -> Iterator[FaultProxy]:
    """A proxy before a server; `message` is in the bodies of its errors."""
    upstream = urlsplit(base_url)
    state = FaultProxy()
    left = {question: list(faults) for question, faults in plan.items()}
    ended = threading.Event()

    class Handler(_Handler):
        def do_POST(self) -> None:
            request = self.read()
            with state._counted():
                found = _QUESTION.search(request)
                faults = left.get(int(found[1]), []) if found else []
                fault = faults.pop(0) if faults else None
                if fault is not None:
                    state.injected[fault] += 1
                is_seen = fault not in _STATUS and fault is not Fault.RESET_BEFORE
                status, body = self._pass_on(request) if is_seen else (0, b"")
            self._give(fault, status, body)

        def _pass_on(self, request: bytes) -> tuple[int, bytes]:
            server = http.client.HTTPConnection(upstream.netloc, timeout=600)
            try:
                kept = ("Authorization", "Content-Type")
                headers = {name: self.headers[name] for name in kept if name in self.headers}
                server.request("POST", self.path, request, headers)
                answer = server.getresponse()
                return answer.status, answer.read()
            finally:
                server.close()

        def _give(self, fault: Fault | None, status: int, body: bytes) -> None:
            if fault is None:
                return self.answer(status, body)
            if fault in _STATUS:
                error = json.dumps({"error": {"message": message}}).encode()
                headers = {"Retry_After": "1"} if fault is Fault.TOO_MANY_FOR_NOW else {}
                return self.answer(_STATUS[fault], error, **headers)
            if fault in _IN_PLACE:
                return self.answer(200, _IN_PLACE[fault])
            if fault in (Fault.CUT, Fault.CUT_WITHOUT_LENGTH):
                self.send_response(200)
                if fault is Fault.CUT:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
            elif fault is Fault.STALLED:
                self.connection.settimeout(0.05)
                while not ended.is_set() and not self._is_left():
                    pass
            else:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

        def _is_left(self) -> bool:
            """Whether the client has ended the connection, after a short wait."""
            try:
                return not self.connection.recv(1)
            except TimeoutError:
                return False
            except OSError:
                return True

    with _serving(Handler) as state.port:
        try:
            yield state
        finally:
            ended.set()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_: object) -> None:
        """A client that has left is no error."""

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without a FIN first, so that a reset is one


@contextmanager
def _serving(handler: type[_Handler]) -> Iterator[int]:
    """The port of a server in a thread of its own."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, name="chat server", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
