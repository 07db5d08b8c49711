"""A small server of the Hugging Face hub's HTTP API: a data set or a model with commits, to be
read."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = Mapping[str, bytes]


class Hub(ThreadingHTTPServer):
    """`commits` are the files by commit hash, `branches` commit hashes by name, `token` what opens
    the repository `ORG/NAME`, of the kind `datasets` or `models`. With `gated` all may look at it,
    and only the token opens its files. Of the files in `broken` half is sent, and then an error.
    `asked` lists what was requested."""

    daemon_threads = True

    def __init__(self, name: str, token: str | None = None, kind: str = "datasets") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.token, self.kind = name, token, kind
        self.gated = False
        self.broken: set[str] = set()
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, files: Files, branch: str = "main") -> str:
        """Put these files on the branch; returns the commit's hash."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest], self.branches[branch] = files, digest
        return digest


@contextmanager
def hub(name: str, token: str | None = None, kind: str = "datasets") -> Iterator[Hub]:
    with Hub(name, token, kind) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        form = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        api = f"/api/{hub.kind}/{hub.name}"
        files = (
            f"/datasets/{hub.name}/resolve/" if hub.kind == "datasets" else f"/{hub.name}/resolve/"
        )
        is_open = not hub.token or self.headers.get("Authorization") == f"Bearer {hub.token}"
        if not is_open and not hub.gated:
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        if path.startswith(files):
            if not is_open:
                status = 403 if "Authorization" in self.headers else 401
                return self._send(status, b"", {"X-Error-Code": "GatedRepo"})
            revision, _, name = path.removeprefix(files).partition("/")
            return self._send_file(revision, name, with_body=with_body)
        if path != api and not path.startswith(f"{api}/"):
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        what, _, rest = path.removeprefix(api).strip("/").partition("/")
        revision, _, name = (rest if what else "main").partition("/")
        if what == "revision":
            revision, name = rest, ""
        commit = hub.branches.get(revision, revision)
        if commit not in hub.commits:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        entries = [_entry(path, data) for path, data in hub.commits[commit].items()]
        if what == "tree":
            below = f"{name}/" if name else ""
            found: Any = [entry for entry in entries if entry["path"].startswith(below)]
            if not found:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif what == "paths-info":
            wanted = parse_qs(form.decode())["paths"]
            found = [entry for entry in entries if entry["path"] in wanted]
        else:
            found = {"id": hub.name, "sha": commit, "lastModified": "2026-11-01T10:00:00.000Z"}
            found |= {"siblings": [], "tags": [], "private": False, "downloads": 0, "likes": 0}
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
        return None

    def _send_file(self, revision: str, name: str, *, with_body: bool) -> None:
        data = self.server.commits.get(revision, {}).get(name)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{_entry(name, data)["oid"]}"', "X-Repo-Commit": revision}
        if with_body and name in self.server.broken:
            if sum(line.endswith(f"GET {self.path}") for line in self.server.asked) > 1:
                return self._send(500, b"", {})
            headers["Content-Length"] = str(len(data))
            self.close_connection = True
            return self._send(200, data[: len(data) // 2], headers)
        self._send(200, data, headers, with_body=with_body)
        return None

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], *, with_body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": blob}
