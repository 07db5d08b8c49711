"""A command of this program as a job on a Ray cluster, over Ray's Jobs API.

The job runs this very package, which travels with it, so an image needs only its dependencies. Its
name is made from what it does: the same command with the same config file has the same name, so two
triggers do not start it twice. The token goes into a header and nowhere else.
"""

import asyncio
import hashlib
import json
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from batch_scorer.config import RewardSettings
from batch_scorer.errors import ConfigError, IncompleteError, cause_of

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
CONFIG_NAME = "config.yaml"
"""The shipped config file's name, in the folder that the job runs in."""
_PAGES = "judges"
"""The folder in it with the shipped page."""
_REWARDS = "rewards"
"""The folder in it with a folder for each shipped reward function."""

_STOP_GRACE_S = 60
"""How long a stopped job may take to record what it has; Ray's default is three seconds."""
_LOST_AFTER_S = 60
_POLL_S = 1.0
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Ray's loggers that report every upload and every closed connection."""
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_LIKE_AN_ATTEMPT = re.compile(r"(.*-)?r\d+")


@dataclass(frozen=True, slots=True)
class Submission:
    """A command without the program's name. `config` and `page`, if any, are the files that its
    settings and a judge's page are in. `rewards` are its reward functions, where any of them lies
    in a file of this machine."""

    words: tuple[str, ...]
    config: Path | None = None
    tag: str | None = None
    page: Path | None = None
    rewards: Mapping[str, RewardSettings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tag is not None and (
            not _TAG.fullmatch(self.tag) or _LIKE_AN_ATTEMPT.fullmatch(self.tag)
        ):
            raise ConfigError(
                f"tag: {self.tag!r} cannot be part of a job's name; use up to 40 letters, digits, "
                "dots, hyphens and underscores, not ending like an attempt (r2)"
            )

    @property
    def shipped_words(self) -> list[str]:
        """The command as the job runs it, with these files under their names there."""
        words = list(self.words)
        for place, word in enumerate(words):
            if word == "--config":
                words[place + 1] = CONFIG_NAME
            elif word.startswith("--config="):
                words[place] = f"--config={CONFIG_NAME}"
        if self.page is not None:  # the last flag of a name counts, and any before the config file
            words += ["--judge", f"{_PAGES}/{self.page.name}"]
        for name, entry in self.rewards.items():  # all, because flags go in place of the file's
            file = self._reward_files.get(name)
            given = entry.model_dump(mode="json", exclude_defaults=True)
            if file is not None:
                function = entry.function.rpartition(":")[2]
                given["function"] = f"{_REWARDS}/{name}/{file.name}:{function}"
            words += ["--reward", f"{name}={json.dumps(given)}"]
        return words

    @property
    def _reward_files(self) -> dict[str, Path]:
        """The files of this machine that hold reward functions, by the function's name."""
        files = {name: file_here(entry) for name, entry in self.rewards.items()}
        return {name: file for name, file in files.items() if file is not None}

    @property
    def _shipped(self) -> dict[str, Path]:
        """Files of this machine by their paths in the folder that the job runs in."""
        found = {
            f"{_REWARDS}/{name}/{file.name}": file for name, file in self._reward_files.items()
        }
        if self.page is not None:
            found[f"{_PAGES}/{self.page.name}"] = self.page
        return found | ({} if self.config is None else {CONFIG_NAME: self.config})

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", "batch_scorer.cli", *self.shipped_words])

    @property
    def name(self) -> str:
        """The first attempt's submission id: a digest of what it does, and the tag."""
        files = [self.config, self.page, *self._reward_files.values()]
        contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file]
        what = json.dumps([self.shipped_words, *contents])
        digest = hashlib.sha256(what.encode()).hexdigest()[:12]
        return f"bs-{digest}-{self.tag}" if self.tag else f"bs-{digest}"

    def attempts(self) -> Iterator[str]:
        """Submission ids, which Ray gives out once each: the name, and then with -r2, -r3, …"""
        yield self.name
        yield from (f"{self.name}-r{number}" for number in count(2))

    @contextmanager
    def runtime_env(self) -> Iterator[dict[str, Any]]:
        """What Ray ships: this package, the config file, the judge's page and reward functions.
        Everybody who may use the cluster can read it, so it holds no secrets."""
        shipped: dict[str, Any] = {
            "py_modules": [str(Path(__file__).parents[1])],
            "excludes": ["__pycache__"],
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_GRACE_S)},
        }
        with tempfile.TemporaryDirectory() as folder:
            for key, file in self._shipped.items():
                there = Path(folder) / key
                there.parent.mkdir(parents=True, exist_ok=True)
                there.write_bytes(file.read_bytes())
                shipped["working_dir"] = folder
            yield shipped


def file_here(entry: RewardSettings) -> Path | None:
    """The file of this machine that holds a reward function; None for a module, and for a file that
    only the cluster has."""
    place, _, _ = entry.function.rpartition(":")
    return Path(place) if place.endswith(".py") and Path(place).is_file() else None


def find_token(file: Path | None) -> str | None:
    """The cluster's token, from where Ray looks for it; `file` goes first. Raises ConfigError."""
    if file is None:
        if token := os.environ.get("RAY_AUTH_TOKEN"):
            return token
        named = os.environ.get("RAY_AUTH_TOKEN_PATH")
        file = Path(named or Path.home() / ".ray" / "auth_token")
        if not named and not file.exists():
            return None
    try:
        token = file.read_text().strip()
    except OSError as error:
        raise ConfigError(f"{file}: the token cannot be read: {cause_of(error)}") from error
    if not token:
        raise ConfigError(f"{file} holds no token")
    return token


def submit(
    submission: Submission,
    address: str,
    token: str | None,
    *,
    say: Callable[[str], None],
    out: TextIO,
    wait: bool = True,
) -> int:
    """Have the cluster run the command, once; follow it, and return its exit code.

    Where the same submission runs already, that job is followed. Where one with a tag has
    succeeded, nothing is done and 0 returned. Otherwise it is the next attempt. With `wait` the
    job's output is written to `out`; without, 0 is returned at once. A KeyboardInterrupt stops
    the job. `say` gets a line for everything that happens.

    Raises ConfigError where no such cluster is or it refuses the token, and IncompleteError for
    a job that was stopped, that never ran, or that the cluster lost.
    """
    jobs = _Jobs(address, token)
    job = _start(jobs, submission, say)
    if job is None:
        return 0
    if not wait:
        say("not followed; the same command without --no-wait follows it")
        return 0
    say("following it; Ctrl-C stops the job")
    log = _Log(out)
    try:
        ended = log.follow(jobs, job)
    except KeyboardInterrupt:
        say(f"stopping {job}; it has {_STOP_GRACE_S} s to release its output")
        jobs.stop(job)
        ended = log.follow(jobs, job)
    return _exit_code(job, ended)


def _start(jobs: "_Jobs", submission: Submission, say: Callable[[str], None]) -> str | None:
    """Submission id of the job to follow, started if need be; None if it is done."""
    while True:
        known = jobs.list()
        for job in submission.attempts():
            before = known.get(job)
            if before is None:
                break
            if not before.status.is_terminal():
                say(f"{job} is already running")
                return job
            if before.status == "SUCCEEDED" and submission.tag:
                say(f"{job} has already succeeded; nothing to do")
                return None
        if jobs.submit(job, submission):
            say(f"submitted {job} to {jobs.address}")
            return job
        # Somebody else gave out this id meanwhile: it is known now.


def _exit_code(job: str, ended: Any) -> int:
    if ended.status == "SUCCEEDED":
        return 0
    if ended.status == "STOPPED":
        raise IncompleteError(f"{job} was stopped; run the same command again to resume")
    code: int | None = ended.driver_exit_code
    if code is None:
        why = (ended.message or "no reason given").strip().splitlines()[-1]
        raise IncompleteError(f"{job} did not finish: {why}; run the same command again")
    return code if code > 0 else 128 - code  # as a shell shows a signal


class _Jobs:
    """The Jobs API of one cluster; its errors become ours."""

    def __init__(self, address: str, token: str | None) -> None:
        if not address.startswith(("http://", "https://")):
            raise ConfigError(
                f"address: expected the URL of the cluster's dashboard, like {DEFAULT_ADDRESS}; "
                f"got {address!r}"
            )
        # For Ray these go before what it is given, the address and the header.
        os.environ.update({ADDRESS_VARIABLE: address, "RAY_AUTH_MODE": "disabled"})
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address
        headers = {"Authorization": f"Bearer {token}"} if token else None
        try:
            self._client = JobSubmissionClient(address, headers=headers)
        except AuthenticationError:
            raise ConfigError(
                f"{address} refuses the token"
                if token
                else f"{address} asks for a token: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or "
                "give --token-file"
            ) from None
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise ConfigError(
                f"no Ray Jobs API answers at {address}; is the cluster up, and its dashboard's "
                f"port forwarded to this machine? ({error})"
            ) from error

    def list(self) -> dict[str, Any]:
        """`JobDetails` by submission id."""
        try:
            return {job.submission_id: job for job in self._client.list_jobs()}
        except (OSError, RuntimeError) as error:
            raise IncompleteError(f"{self.address}: {_last_line(error)}") from error

    def submit(self, job: str, submission: Submission) -> bool:
        """Whether the job was started; False if its id has been given out."""
        try:
            with submission.runtime_env() as runtime_env:
                self._client.submit_job(
                    entrypoint=submission.entrypoint, submission_id=job, runtime_env=runtime_env
                )
        except (OSError, RuntimeError) as error:
            if job in self.list():
                return False
            raise IncompleteError(f"{self.address}: {_last_line(error)}") from error
        return True

    def details(self, job: str) -> Any:
        """`JobDetails`. Raises OSError or RuntimeError."""
        return self._client.get_job_info(job)

    def output(self, job: str) -> AsyncIterator[str]:
        """The job's output, from its beginning, as it comes. Raises aiohttp's errors as well."""
        lines: AsyncIterator[str] = self._client.tail_job_logs(job)
        return lines

    def stop(self, job: str) -> None:
        """Ask the job to stop; one that is still being started stops only afterwards."""
        try:
            while not self._client.stop_job(job) and not self.details(job).status.is_terminal():
                time.sleep(_POLL_S)
        except (OSError, RuntimeError) as error:
            raise IncompleteError(f"{job} could not be stopped: {_last_line(error)}") from error


class _Log:
    """A job's output, written to `out` once; the cluster sends it from the start every time."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._written = 0  # characters

    def follow(self, jobs: _Jobs, job: str) -> Any:
        """`JobDetails` once the job is over. Raises IncompleteError if the cluster is gone."""
        import aiohttp

        silent_since: float | None = None
        while True:
            try:
                asyncio.run(self._copy(jobs.output(job)))
                details = jobs.details(job)
                if details.status.is_terminal():
                    return details
                silent_since = None  # only the connection broke
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() - silent_since > _LOST_AFTER_S:
                    raise IncompleteError(
                        f"{jobs.address} no longer answers ({_last_line(error)}); {job} may still "
                        "be running: run the same command again to follow it"
                    ) from error
            time.sleep(_POLL_S)

    async def _copy(self, output: AsyncIterator[str]) -> None:
        passed = 0
        async for text in output:
            new = text[max(0, self._written - passed) :]
            passed += len(text)
            self._out.write(new)
            self._out.flush()
            self._written += len(new)


def _last_line(error: Exception) -> str:
    """Ray answers with whole traces."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
