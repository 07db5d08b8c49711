"""Runs of the program in processes that are forked off one which has everything imported.

So a run costs a fifth of a second, and one that is killed or paused at a failpoint not much more.

    with forked_runs(folder) as runs:
        run = runs.start(config, "commit.after_put:kill")
        assert run.wait() == -signal.SIGKILL

The server never touches a store before it forks: the threads of a store's client would be missing
in its children.
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from batch_scorer import Config, quarantine
from batch_scorer.errors import BatchScorerError
from batch_scorer.failpoints import TESTING, arm
from batch_scorer.models.registry import adapter_named
from batch_scorer.records import Receipt
from batch_scorer.render import renderer_of
from batch_scorer.runs.derive import derive, look_at_model
from batch_scorer.runs.remaining import Work
from batch_scorer.runs.run import score
from batch_scorer.storage import Store
from tests.helpers.program import REPOSITORY

STOPPED, HUNG = 1000, 1001
"""In place of an exit code: the process is paused, and may go on; it did not end, and was killed
after a trace of its threads went to the log."""

_HANG_S = 90.0
_POLL_S = 0.005


@dataclass(frozen=True)
class Scene:
    """What happens around a run: an object that another writer puts there after the run has
    planned, by its key, and how long the run dwells on its first shard, unless it loses its lease;
    where it does, the failpoint is not armed before."""

    appears: Mapping[str, str] | None = None
    dwell_s: float = 0.0


class _Stage:
    """A listener that plays the scene."""

    def __init__(self, config: Config, scene: Scene, failpoint: str) -> None:
        self._config = config
        self._scene = scene
        self._failpoint = failpoint
        if not scene.dwell_s:
            arm(failpoint)

    def planned(self, work: Work) -> None:
        for key, file in (self._scene.appears or {}).items():
            store = Store(self._config.output, self._config.store_options)
            store.create(key, Path(file).read_bytes())

    def finished(self, receipt: Receipt) -> None:
        if self._scene.dwell_s:
            arm(self._failpoint)
            deadline = time.monotonic() + self._scene.dwell_s
            while time.monotonic() < deadline and _is_renewed():
                time.sleep(_POLL_S)
            self._scene = Scene()


def _is_renewed() -> bool:
    """Whether this process renews a lease; it stops where it has lost it."""
    return any(thread.name == "lease" for thread in threading.enumerate())


class ForkedRun:
    """A run that was started; its words go to the server's log."""

    def __init__(self, runs: "ForkedRuns", pid: int) -> None:
        self._runs = runs
        self.pid = pid

    def wait(self) -> int:
        """Its exit code, minus the signal that ended it, `STOPPED` or `HUNG`."""
        return int(self._runs.ask({"wait": self.pid}))

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


class ForkedRuns:
    """The client of the server; one request at a time."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self.log = log

    def start(self, config: Config, failpoint: str = "", scene: Scene | None = None) -> ForkedRun:
        scene = scene or Scene()
        return ForkedRun(
            self,
            self.ask(
                {
                    "config": config.model_dump(mode="json"),
                    "failpoint": failpoint,
                    "appears": dict(scene.appears or {}),
                    "dwell_s": scene.dwell_s,
                }
            ),
        )

    def run(self, config: Config) -> int:
        """The exit code of a run without faults."""
        return self.start(config).wait()

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the server of forked runs has ended: {self.said()}"
        return json.loads(answer)

    def said(self) -> str:
        return self.log.read_text()[-4000:]


@contextmanager
def forked_runs(folder: Path, model: Path) -> Iterator[ForkedRuns]:
    """A server, warm with this model's tokenizer; what it forked ends with it."""
    log = folder / "forked.log"
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        TESTING: "1",
    }
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.forked", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            cwd=REPOSITORY,
        )
    try:
        yield ForkedRuns(process, log)
    finally:
        assert process.stdin is not None
        process.stdin.close()  # it then ends what is left of its children, and itself
        process.wait()


def _serve(model: Path) -> None:
    # As in a reading process, which costs seconds of each run: nothing foreign is read here.
    quarantine._is_child = True
    _warm_up(model)
    children: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"])
            if answer != STOPPED:
                children.discard(request["wait"])
        else:
            answer = os.fork()
            if answer == 0:
                # Also as there: what is printed goes to a file, and not among the answers.
                with tempfile.TemporaryFile() as printed:
                    os.dup2(printed.fileno(), sys.stdout.fileno())
                _run(request)
            children.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _wait(pid: int) -> int:
    deadline = time.monotonic() + _HANG_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
        if ended:
            return STOPPED if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        time.sleep(_POLL_S)
    os.kill(pid, signal.SIGUSR1)
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return HUNG


def _warm_up(model: Path) -> None:
    """Import what a run imports on its way, and load the tokenizer, which stays loaded."""
    config = Config(
        model=str(model), inputs=("in",), output="out", backend="fake", device="cpu",
        dtype="float32", use_ray=False,
    )  # fmt: skip
    job = derive(config, look_at_model(config))  # of a known model this loads nothing
    adapter_named(job.adapter)
    renderer_of(job.config, job.model)
    pa.table({"a column": ["of Python's"]})  # imports pandas where it is installed


def _run(request: dict[str, Any]) -> None:
    """The child: never returns."""
    code = 1
    faulthandler.register(signal.SIGUSR1)
    try:
        config = Config.model_validate(request["config"])
        scene = Scene(request["appears"], request["dwell_s"])
        stage = _Stage(config, scene, request["failpoint"])
        code = 0 if score(config, stage).is_complete else 3
    except BatchScorerError as error:
        print(error, file=sys.stderr, flush=True)
        code = int(error.exit_code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
