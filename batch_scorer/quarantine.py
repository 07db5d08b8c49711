"""Foreign bytes are parsed in another process, whose death costs only what it was parsing.

A damaged file can end the process that parses it, keep it busy without end or fill its memory, and
none of these is an exception. So whatever parses foreign bytes is called through `apart`. It
calls the function in a child process with bounds on time and memory; a child that dies is replaced
and asked once more, and then `Died` says what it died of.

Children are forked from one template, a process of ours that has imported the readers and has a
single thread, so that a new child takes milliseconds. Not `multiprocessing`: its children import
the user's main module, which a script without a guard runs again. Each child has a connection of
its own, so that the death of one leaves no half message to another, and a file for its answers,
which the parent maps: 160 MB of rows took a second through the connection.
"""

import ctypes
import logging
import mmap
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn, ParamSpec, Self, TypeAlias, TypeVar

from batch_scorer.errors import BatchScorerError

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("batch_scorer")

_SLOWEST_BYTES_PER_S = 1e6
_READERS = "batch_scorer.shard"
"""What the template imports: whatever reads inputs, and the store."""
_COUNTED_AS_USED = {"MIMALLOC_ARENA_EAGER_COMMIT": "0"}
"""Arrow's allocator takes a GiB at once by default, which would be free then whatever the bound."""
_MOST_IDLE = 8
"""Children that are kept for the next call: as many as a plan has at once. With fewer, most of its
files wait for a fork. Those of the kind that has most make room."""
_PR_SET_PDEATHSIG = 1
_LAST_WORDS_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one call may take: `memory_bytes` are those that its process has beyond what it was
    forked with, whatever it did before."""

    seconds: float
    memory_bytes: int
    kind: str = ""
    """A child answers calls of one kind: what it has imported for them may not do for others."""
    tries: int = 2
    """How many children may be lost with the call, the last one for good."""
    is_kept: bool = True
    """Whether the child answers another call after this one."""

    @classmethod
    def of_file(
        cls, size_bytes: int, memory_bytes: int, seconds: float = 600.0, kind: str = ""
    ) -> Self:
        """For reading a file of so many bytes, however slow its store."""
        return cls(seconds + size_bytes / _SLOWEST_BYTES_PER_S, memory_bytes, kind)


class Died(Exception):
    """The process that made the call died, or was ended at a bound, and so was every next one;
    `how` says what became of the last of them."""

    subject: ClassVar[str] = "the process that reads it"

    def __init__(self, how: str) -> None:
        self.how = how
        super().__init__(how)

    def __str__(self) -> str:
        return f"{self.subject} {self.how}"


class TimedOut(Died):
    """It was ended because its time was up."""

    subject = "reading it"


def apart(bounds: Bounds, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The function's result, from a child process; its log lines are logged here.

    The function is importable by its name, and what goes in and out can be pickled. In such a child
    it is called there. Raises what the function raises, MemoryError at the bound on memory, and
    Died.
    """
    if _is_child:
        return function(*args, **kwargs)
    request = pickle.dumps((bounds.memory_bytes, function, args, kwargs), protocol=5)
    for tries_left in reversed(range(bounds.tries)):
        try:
            result, error, records = _asked(request, bounds)
        except Died as died:
            if not tries_left:
                raise
            log.info("a reading process was lost (%s); it is tried once more", died)
        else:
            break
    for record in records:
        if (logger := logging.getLogger(record.name)).isEnabledFor(record.levelno):
            logger.handle(record)
    if error is not None:
        raise error
    found: T = result
    return found


def is_child() -> bool:
    """Whether this process is one that may die of what it parses."""
    return _is_child


def prepare() -> None:
    """Start the template, if it is not there, without waiting for it: it imports for a second."""
    if not _is_child:
        with _lock:
            _the_template()


# Here


_Answer: TypeAlias = tuple[Any, BaseException | None, list[logging.LogRecord]]
"""Result, error and what was logged."""


class _Child:
    """A process that answers one request after the other."""

    def __init__(self, template: "_Template", kind: str) -> None:
        self.kind = kind
        self.number = next(_numbers)
        self._template = template
        # What native code prints as it dies.
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        self._answers = _file_in_memory()
        ours, theirs = socket.socketpair()
        with theirs:
            handles = (theirs.fileno(), self._said.fileno(), self._answers.fileno())
            self._pid = template.fork(handles)
        self._connection = Connection(ours.detach())
        self._surroundings: tuple[str, dict[str, str]] | None = None

    def ask(self, request: bytes, bounds: Bounds) -> _Answer:
        """Raises Died, with the child ended."""
        try:
            surroundings = os.getcwd(), dict(os.environ)
            is_known = surroundings == self._surroundings
            self._connection.send(None if is_known else surroundings)
            self._connection.send_bytes(request)
            self._surroundings = surroundings
            if self._connection.poll(bounds.seconds):
                self._connection.recv_bytes()
                return self._answer()
        except (EOFError, OSError):
            raise Died(self.end()) from None
        self.end()
        raise TimedOut(f"takes longer than {bounds.seconds:g} s")

    def _answer(self) -> _Answer:
        with mmap.mmap(self._answers.fileno(), 0, access=mmap.ACCESS_READ) as written:
            answer: _Answer = pickle.loads(written)
        self._answers.truncate(0)
        return answer

    def end(self) -> str:
        """Kill the process if it still runs; how it ended, and what it printed last."""
        self._connection.close()
        self._answers.close()
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        status = self._template.status(self._pid)
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
        lines = self._said.read().decode(errors="replace").split("\n")
        self._said.close()
        words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if os.WIFSIGNALED(status):
            how = f"was ended by {signal.Signals(os.WTERMSIG(status)).name}"
        else:
            how = f"ended with exit code {os.waitstatus_to_exitcode(status)}"
        return f"{how}: {words}" if words else how


class _Template:
    """The process that children are forked from."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; "
                f"from batch_scorer.quarantine import serve; serve({theirs.fileno()})"
            )
            # In a session of its own, so that Ctrl-C is ours alone; it ends with our socket.
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                env={**os.environ, **_COUNTED_AS_USED},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._socket = ours
        self._lock = threading.Lock()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, handles: Sequence[int]) -> int:
        """Process id of a new child. Raises Died, as `status` does."""
        return self._ask(b"f", handles)

    def status(self, pid: int) -> int:
        """How a child that is ending ended, as `os.waitpid` has it."""
        return self._ask(b"w" + pid.to_bytes(8))

    def _ask(self, message: bytes, handles: Sequence[int] = ()) -> int:
        with self._lock, suppress(OSError):
            socket.send_fds(self._socket, [message], handles)
            answer = self._socket.recv(8, socket.MSG_WAITALL)
            if len(answer) == 8:
                return int.from_bytes(answer)
        self._process.wait()
        raise Died("is gone, with the one that such processes are forked from")


_is_child = False
_lock = threading.Lock()
_template: _Template | None = None
_idle: list[_Child] = []
"""The oldest first."""
_numbers = count()


def _the_template() -> _Template:
    global _template
    if _template is None or not _template.is_alive:
        _idle.clear()
        _template = _Template()
    return _template


def _asked(request: bytes, bounds: Bounds) -> _Answer:
    """A child's answer. Raises Died."""
    child = _take(bounds.kind)
    try:
        answer = child.ask(request, bounds)
    except Died:
        raise
    except BaseException:
        child.end()
        raise
    # One that was out of memory may be so again, of what it holds on to.
    surplus: _Child | None = child
    if bounds.is_kept and not isinstance(answer[1], MemoryError):
        with _lock:
            insort(_idle, child, key=lambda each: each.number)
            surplus = _surplus() if len(_idle) > _MOST_IDLE else None
    if surplus is not None:
        surplus.end()
    return answer


def _surplus() -> _Child:
    """The newest child of the kind that has most, no longer idle: a reward function's one child is
    not ended for the eighth reader."""
    ((most, _),) = Counter(child.kind for child in _idle).most_common(1)
    place = max(i for i, child in enumerate(_idle) if child.kind == most)
    return _idle.pop(place)


def _take(kind: str) -> _Child:
    """The oldest idle child, which has loaded most of what will be asked for, or a new one."""
    with _lock:
        template = _the_template()
        place = next((i for i, child in enumerate(_idle) if child.kind == kind), None)
        if place is not None:
            return _idle.pop(place)
    return _Child(template, kind)


def _file_in_memory() -> IO[bytes]:
    """A file without a name; in memory where the system has such files."""
    if sys.platform == "linux":
        return open(os.memfd_create("answers"), "w+b")
    return tempfile.TemporaryFile()


def _forget() -> None:
    """In a fork of this process: children and template are the parent's."""
    global _template, _lock
    _template, _lock = None, threading.Lock()
    _idle.clear()


os.register_at_fork(after_in_child=_forget)


# There


def serve(control: int) -> None:
    """The template: fork a child for each connection that comes, until our parent is gone."""
    import_module(_READERS)
    from batch_scorer.arrow import without_pandas

    without_pandas()
    parent = socket.socket(fileno=control)
    while True:
        message, handles, _, _ = socket.recv_fds(parent, 9, 3)
        if not message:
            os._exit(0)
        if message[:1] == b"w":
            _, answer = os.waitpid(int.from_bytes(message[1:]), 0)
        else:
            answer = os.fork()
            if not answer:
                parent.close()
                _be_child(*handles)
        for handle in handles:
            os.close(handle)
        parent.sendall(answer.to_bytes(8))


def _be_child(connection: int, stderr: int, answers: int) -> NoReturn:
    """Answer requests until there are no more."""
    global _is_child
    _is_child = True
    if sys.platform == "linux":  # a child that hangs ends with the template, which sees our parent
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(stderr, 1)
    os.dup2(stderr, 2)
    os.close(stderr)
    log.setLevel(logging.DEBUG)
    data_bytes = _data_bytes()
    pipe = Connection(connection)
    with suppress(EOFError, OSError), open(answers, "r+b") as written:
        while True:
            if (changed := pipe.recv()) is not None:
                folder, environment = changed
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(environment)
            answer = _answer_to(pipe.recv_bytes(), data_bytes)
            try:
                _write(answer, written)
            except MemoryError as error:
                _write((None, error, []), written)
            pipe.send_bytes(b"written")
    os._exit(0)


def _write(answer: _Answer, file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()
    pickle.dump(answer, file, protocol=5)
    file.flush()


def _answer_to(request: bytes, data_bytes: int) -> _Answer:
    records = _Records()
    log.addHandler(records)
    result: Any = None
    error: BaseException | None = None
    try:
        memory_bytes, function, args, kwargs = pickle.loads(request)
        _bound_memory(data_bytes + memory_bytes)
        result = function(*args, **kwargs)
    except ImportError as raised:
        # What the loader says of a library for which there is no memory.
        is_full = "failed to map segment" in str(raised)
        error = MemoryError(str(raised)) if is_full else _portable(raised)
    except Exception as raised:
        error = _portable(raised)
    finally:
        log.removeHandler(records)
    return result, error, records.found


def _portable(error: Exception) -> Exception:
    """The error, if it can be pickled, or one that says the same; with the trace as a note, where
    it is not one that this package raises on purpose."""
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, BatchScorerError):
        error.add_note(trace)
    return error


class _Records(logging.Handler):
    """Keeps what is logged, ready for another process."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None
        record.exc_info, record.exc_text = None, None
        self.found.append(record)


def _data_bytes() -> int:
    """What this process has now, as the kernel counts it for the bound."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()


def _bound_memory(data_bytes: int) -> None:
    """From now on this process has at most so much; on Linux only, where the kernel counts it."""
    if sys.platform == "linux":
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        bound = data_bytes if most == resource.RLIM_INFINITY else min(data_bytes, most)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, most))
