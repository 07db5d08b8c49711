"""A real S3 server on this machine: SeaweedFS from PyPI, on its own ports and folder."""

import hmac
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from cluster.local.ports import own_ports

ACCESS_KEY = "test-access"
SECRET_KEY = "test-secret"
BUCKET = "bkt"
_START_TIMEOUT_S = 60
_PORTS_PER_SERVER = 6
_PORTS = range(20_000, 22_700, _PORTS_PER_SERVER + 1)
_SHIFTS = (0, 10_000)
"""Each part of a server has another port for gRPC. All are above those of the local cluster and
below the ones that Linux gives to outgoing connections."""
_METRICS_SHIFT = 5
_REQUESTS = r'^SeaweedFS_s3_request_total{{bucket="{}",.*type="(\w+)"}} (\S+)$'
_VERSIONED = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>"


@dataclass(frozen=True)
class S3Server:
    """A running server and one of its buckets. `options` go to the store, `environment` to
    processes that use it."""

    endpoint: str
    pid: int
    bucket: str = BUCKET

    @property
    def options(self) -> dict[str, str]:
        return {"endpoint": self.endpoint, "region": "us-east-1", "allow_http": "true"}

    @property
    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}

    def url(self, path: str) -> str:
        return f"s3://{self.bucket}/{path}"

    def requests(self) -> Counter[str]:
        """How many it has answered so far in its bucket, by kind: GET (and HEAD), PUT, LIST, …"""
        port = (urlsplit(self.endpoint).port or 0) + _METRICS_SHIFT
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        counts: Counter[str] = Counter()
        for kind, count in re.findall(_REQUESTS.format(self.bucket), text, re.MULTILINE):
            counts[kind] += int(float(count))
        return counts

    def versioned(self, bucket: str) -> "S3Server":
        """The same server with a new bucket that keeps old versions."""
        _ask_signed(self.endpoint, f"/{bucket}", "")
        _ask_signed(self.endpoint, f"/{bucket}", "versioning=", _VERSIONED)
        return replace(self, bucket=bucket)


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server, wait until it answers, and leave nothing behind."""
    with tempfile.TemporaryDirectory(prefix="weed-", ignore_cleanup_errors=True) as folder:
        process, server = _start(Path(folder))
        try:
            yield server
        finally:
            _end(process, server)


def start_s3(folder: Path) -> S3Server:
    """Start a server that outlives this process; all but its sockets is in `folder`."""
    folder.mkdir()
    return _start(folder)[1]


def remove_sockets(endpoint: str) -> None:
    """Remove what a server that has ended leaves outside of its folder; it knows no other place."""
    port = urlsplit(endpoint).port or 0
    for own in range(port, port + _PORTS_PER_SERVER):
        for shift in _SHIFTS:
            for left in Path("/tmp").glob(f"seaweedfs-*-{own + shift}.sock"):
                left.unlink(missing_ok=True)


def _start(folder: Path) -> tuple[subprocess.Popen[bytes], S3Server]:
    """A server that answers. Raises RuntimeError, with its own message, if it does not."""
    with own_ports(_PORTS, _SHIFTS) as ports:
        process, server = _launch(folder, ports[0])
        try:
            _wait_until_up(server, process, folder)
        except BaseException:
            _end(process, server)
            raise
    return process, server


def _end(process: subprocess.Popen[bytes], server: S3Server) -> None:
    process.kill()  # its data is temporary, and a polite stop takes ten seconds
    process.wait()
    remove_sockets(server.endpoint)


def _launch(folder: Path, port: int) -> tuple[subprocess.Popen[bytes], S3Server]:
    config = folder / "s3.json"
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    config.write_text(json.dumps({"identities": [identity]}))
    data = folder / "data"
    data.mkdir()
    command = [
        str(Path(sys.executable).parent / "weed"), f"-logdir={folder}", "mini", f"-dir={data}",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-admin.ui=false",
        "-webdav=false", f"-s3.config={config}", "-s3.iam=false", f"-s3.port={port}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", f"-master.port={port + 1}",
        f"-filer.port={port + 2}", f"-volume.port={port + 3}", f"-admin.port={port + 4}",
        f"-metricsPort={port + _METRICS_SHIFT}", f"-bucket={BUCKET}",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    return process, S3Server(endpoint=f"http://127.0.0.1:{port}", pid=process.pid)


def _ask_signed(endpoint: str, path: str, query: str, body: str = "") -> None:
    """A PUT of what obstore has no call for, signed as S3 wants it (AWS Signature Version 4)."""
    now = datetime.now(UTC)
    day, moment = f"{now:%Y%m%d}", f"{now:%Y%m%dT%H%M%SZ}"
    signed = {
        "host": urlsplit(endpoint).netloc,
        "x-amz-content-sha256": sha256(body.encode()).hexdigest(),
        "x-amz-date": moment,
    }
    scope = (day, "us-east-1", "s3", "aws4_request")
    lines = [f"{name}:{value}" for name, value in signed.items()]
    names = ";".join(signed)
    request = "\n".join(["PUT", path, query, *lines, "", names, signed["x-amz-content-sha256"]])
    text = "\n".join(
        ["AWS4-HMAC-SHA256", moment, "/".join(scope), sha256(request.encode()).hexdigest()]
    )
    key = f"AWS4{SECRET_KEY}".encode()
    for part in (*scope, text):
        key = hmac.digest(key, part.encode(), sha256)
    credential = f"Credential={ACCESS_KEY}/{'/'.join(scope)}, SignedHeaders={names}"
    headers = {**signed, "Authorization": f"AWS4-HMAC-SHA256 {credential}, Signature={key.hex()}"}
    url = f"{endpoint}{path}?{query}"
    urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers, method="PUT"))


def _wait_until_up(server: S3Server, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{server.endpoint}/{BUCKET}", timeout=1)
            return
        except urllib.error.HTTPError as answer:
            # Without a signature the bucket is refused, which only a live server can do.
            if answer.code == 403:
                return
        except OSError:
            pass
        time.sleep(0.1)
    log = (folder / "log").read_text()[-2000:]
    raise RuntimeError(f"no S3 server at {server.endpoint}: {log}")
