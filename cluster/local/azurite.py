"""A real server of Azure's blobs on this machine: Azurite from npm, in memory, on its own port."""

import base64
import hashlib
import hmac
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import IO

from cluster.local.ports import own_ports

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's only account, and the key that its documentation gives it."""
CONTAINER = "box"
_PROGRAM = "azurite/node_modules/azurite/dist/src/blob/main.js"
_PORTS = range(23_000, 24_000, 2)
"""Above those of SeaweedFS, and below the ones that Linux gives to outgoing connections."""
_START_TIMEOUT_S = 120
_API_VERSION = "2023-11-03"
_ENDS_WITH_US = 'process.stdin.on("end", () => process.exit()).resume()'
"""Its standard input is a pipe that only we hold: it ends when we do, however we do."""


@dataclass(frozen=True)
class AzureServer:
    """A running server. `options` go to the store, `environment` to processes that use it."""

    endpoint: str
    pid: int

    @property
    def options(self) -> dict[str, str]:
        account = {"account_name": ACCOUNT, "endpoint": f"{self.endpoint}/{ACCOUNT}"}
        return {**account, "allow_http": "true"}

    @property
    def environment(self) -> dict[str, str]:
        return {"AZURE_STORAGE_ACCOUNT_KEY": KEY}

    def url(self, path: str) -> str:
        return f"az://{CONTAINER}/{path}"


@contextmanager
def azure_server() -> Iterator[AzureServer]:
    """Start a server, wait until it answers, make its container, and leave nothing behind.

    Raises RuntimeError where it is not installed or does not start.
    """
    node, program = shutil.which("node"), Path(sys.prefix) / _PROGRAM
    if node is None:
        raise RuntimeError("Azurite, a server of Azure's blobs for tests, needs Node.js: no `node`")
    if not program.exists():
        raise RuntimeError(f"Azurite is not installed: no {program}; `make test` installs it")
    # Nothing of it is on disk under a name, so that nothing stays if this process is killed.
    with tempfile.TemporaryFile() as log:
        with own_ports(_PORTS) as ports:
            process = subprocess.Popen(
                [
                    node, f"--import=data:text/javascript,{_ENDS_WITH_US}", str(program),
                    "--blobPort", str(ports[0]), "--inMemoryPersistence", "--disableTelemetry",
                    "--silent",
                ],
                stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=tempfile.gettempdir(),
            )  # fmt: skip
            server = AzureServer(f"http://127.0.0.1:{ports[0]}", process.pid)
            try:
                _wait_until_up(server, process, log)
                _make_container(server)
            except BaseException:
                process.kill()
                process.wait()
                raise
        try:
            yield server
        finally:
            process.kill()
            process.wait()


def _wait_until_up(server: AzureServer, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(server.endpoint, timeout=5)
        except urllib.error.HTTPError:
            return  # it refuses, so it lives
        except OSError:
            time.sleep(0.1)
    log.seek(0)
    raise RuntimeError(f"no Azurite at {server.endpoint}: {log.read().decode()[-2000:]}")


def _make_container(server: AzureServer) -> None:
    """obstore makes none: a request of our own, signed with the account's key."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": _API_VERSION}
    text = "\n".join(
        [
            "PUT",
            *[""] * 11,  # no standard header has a value
            *(f"{name}:{value}" for name, value in headers.items()),
            f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}",
            "restype:container",
        ]
    )
    digest = hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    url = f"{server.endpoint}/{ACCOUNT}/{CONTAINER}?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers))
