"""An HTTPS server that answers for RayJobs as the Kubernetes API server would."""

import ipaddress
import json
import re
import ssl
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.manifests.schemas import violations

NAMESPACE = "scoring"
_HOST = "127.0.0.1"
_COLLECTION = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"


class ApiServer:
    """Started on entering the context. Strict about the token, the right, the manifest, the name.

    `allowed` are the verbs that the account may use; the next `busy` requests get 503. Each read of
    a RayJob takes the first of `statuses`, or does what it says: "busy", "gone", "new token".
    """

    def __init__(self, account: Path) -> None:
        self.account = account
        self.created: dict[str, dict[str, Any]] = {}
        self.allowed = {"create", "get"}
        self.busy = 0
        self.statuses: list[Any] = []
        account.mkdir()
        (account / "namespace").write_text(NAMESPACE)
        self.new_token()
        key = account.parent / "tls.pem"
        key.write_bytes(certificate(account / "ca.crt"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(account / "ca.crt", key)
        self._server = ThreadingHTTPServer((_HOST, 0), self._handler())
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"https://{_HOST}:{self._server.server_port}"

    def new_token(self) -> None:
        """Another one, and the old one no longer counts."""
        old = getattr(self, "token", "token-0")
        self.token = f"token-{int(old.rpartition('-')[2]) + 1}"
        (self.account / "token").write_text(self.token + "\n")

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _handler(api: Self) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(*api._post(self.path, self.headers, body))

            def do_GET(self) -> None:
                self._answer(*api._get(self.path, self.headers))

            def log_message(self, *_: object) -> None: ...

            def _answer(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        return Handler

    def _refused(self, headers: Any, verb: str) -> tuple[int, dict[str, Any]] | None:
        if self.busy:
            self.busy -= 1
            return _status(503, "ServiceUnavailable", "the server is starting")
        if headers["Authorization"] != f"Bearer {self.token}":
            return _status(401, "Unauthorized", "Unauthorized")
        if verb not in self.allowed:
            return _status(403, "Forbidden", f'the account cannot {verb} resource "rayjobs"')
        return None

    def _post(self, path: str, headers: Any, body: bytes) -> tuple[int, dict[str, Any]]:
        refused = self._refused(headers, "create")
        if refused is not None:
            return refused
        url = urlsplit(path)
        if url.path != _COLLECTION or headers["Content-Type"] != "application/yaml":
            return _status(404, "NotFound", f"the server has no {url.path}")
        # Without it the real server drops unknown keys, and this one would not look for them.
        assert parse_qs(url.query) == {"fieldValidation": ["Strict"]}
        document = yaml.safe_load(body)
        wrong = violations(document)
        if wrong:
            return _status(400, "BadRequest", "strict decoding error: " + "; ".join(wrong))
        name = document["metadata"]["name"]
        if name in self.created:
            return _status(409, "AlreadyExists", f'rayjobs.ray.io "{name}" already exists')
        self.created[name] = document
        return 201, document

    def _get(self, path: str, headers: Any) -> tuple[int, dict[str, Any]]:
        refused = self._refused(headers, "get")
        if refused is not None:
            return refused
        name = re.fullmatch(f"{_COLLECTION}/([a-z0-9-]+)", path)
        status = self.statuses.pop(0) if self.statuses else {}
        if status == "busy":
            return _status(503, "ServiceUnavailable", "the server is starting")
        if name is None or name[1] not in self.created or status == "gone":
            return _status(404, "NotFound", f"rayjobs.ray.io {path} not found")
        if status == "new token":
            self.new_token()
            status = {}
        return 200, {**self.created[name[1]], "status": status}


def _status(code: int, reason: str, message: str) -> tuple[int, dict[str, Any]]:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
    return code, {**body, "reason": reason, "message": message}


def certificate(file: Path) -> bytes:
    """Write a certificate that answers for itself, and return its key."""
    key = generate_private_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")])
    now, day = datetime.now(UTC), timedelta(days=1)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(_HOST))])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    made = made.add_extension(address, critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    file.write_bytes(made.sign(key, SHA256()).public_bytes(Encoding.PEM))
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
