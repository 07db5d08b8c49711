"""vLLM's own OpenAI-compatible server, on this machine's CPU, with a tiny random chat model."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.local.ports import own_ports
from tests.helpers.language_models import random_language_model
from tests.watched import descendants

MAX_TOKENS = 2048
_KEY = "test-key-of-vllm"
_PORTS = range(24_000, 24_200, 2)
_START_TIMEOUT_S = 900


@dataclass(frozen=True)
class VllmServer:
    """A running server. `environment` holds its key."""

    base_url: str
    model_dir: Path
    model: str = "tiny-judge"

    @property
    def environment(self) -> dict[str, str]:
        return {"TINY_JUDGE_KEY": _KEY}

    def complete(self, **body: Any) -> Any:
        """Its answer to this body, as JSON. Raises urllib's HTTPError."""
        request = urllib.request.Request(
            f"{self.base_url}/chat/completions",
            json.dumps({"model": self.model, **body}).encode(),
            {"Authorization": f"Bearer {_KEY}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_START_TIMEOUT_S) as answer:
            return json.load(answer)


@contextmanager
def vllm_server() -> Iterator[VllmServer]:
    """Start a server, wait until it answers, and leave no process and no file behind."""
    with tempfile.TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        model_dir = folder / "model"
        random_language_model(model_dir, max_position_embeddings=MAX_TOKENS)
        with own_ports(_PORTS) as (port,):
            server = VllmServer(f"http://127.0.0.1:{port}/v1", model_dir)
            process = _launch(server, folder, port)
            try:
                _wait_until_up(port, process, folder / "log")
                yield server
            finally:
                _end(process)


def _launch(server: VllmServer, folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(server.model_dir), "--served-model-name", server.model),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(MAX_TOKENS)),
        *("--dtype", "float32", "--enforce-eager", "--enable-prompt-tokens-details"),
    ]
    environment = {
        "VLLM_API_KEY": _KEY,
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env={**os.environ, **environment}
        )


def _wait_until_up(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Raises RuntimeError, with what the server said, if it does not start."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
            return
        time.sleep(0.5)
    raise RuntimeError(f"vLLM does not serve:\n{log.read_text(errors='replace')[-4000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    for pid in [process.pid, *descendants(process.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # its data is temporary
    process.wait()
