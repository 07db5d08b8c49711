"""The server of Azure's blobs that tests start: it ends with them, and says what it lacks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.local.azurite import azure_server
from tests.helpers.program import REPOSITORY, wait_until

_START = """
import time
from cluster.local.azurite import azure_server
with azure_server() as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""


def test_it_ends_with_the_process_that_started_it_however_that_ends() -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", _START], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert starter.stdout is not None
    with starter:
        server = Path(f"/proc/{int(starter.stdout.readline())}")
        assert server.exists()
        starter.send_signal(signal.SIGKILL)
    wait_until(lambda: not server.exists(), "Azurite is gone")


def test_a_machine_without_node_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(RuntimeError, match=r"needs Node\.js"), azure_server():
        pass


def test_a_set_up_without_azurite_is_told_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(RuntimeError, match="`make test` installs it"), azure_server():
        pass
