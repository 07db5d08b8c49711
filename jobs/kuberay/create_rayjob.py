#!/usr/bin/env python3
"""Create a night's RayJob, once, from a pod inside the cluster. Standard library only.

    create_rayjob.py --template rayjob.yaml [--wait]

The template is a RayJob as one would `kubectl create` it; the night's date is appended to its
name. So there is one RayJob per night, however often it is triggered: the API server refuses the
second name, and that is success. Talks to the API server as the pod's service account, which may
create and get RayJobs and nothing else.

Exit codes:
0  created, or there already; with --wait: ended well
1  the API server cannot be reached or is busy: try again
2  refused (permission, a wrong template): trying again will not help
3  --wait: the RayJob failed, after the retries that KubeRay makes itself
"""

import argparse
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, date, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn

DONE, TRY_AGAIN, REFUSED, FAILED = 0, 1, 2, 3

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TIMEOUT_S = 30
_MOST_NAME_CHARS = 47
"""KubeRay's limit for a RayJob: it derives the names of clusters, services and pods from it."""

_ENDED = ("Complete", "Failed", "ValidationFailed")
"""States of `jobDeploymentStatus` that KubeRay does not leave again."""

# The name in a manifest that kubectl or kustomize would print: two spaces below `metadata:`.
_NAME = re.compile(r"^metadata:\n(?:(?:[ #].*)?\n)*?  name: *([a-z0-9-]+) *(?:#.*)?$", re.MULTILINE)


class ApiError(Exception):
    """The API server's answer where it is no success: `status`, `reason` and its message.

    Status 0: no answer at all.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(status, reason, message)
        self.status = status
        self.reason = reason
        self.message = message

    @property
    def may_pass(self) -> bool:
        return self.status in (0, 429) or self.status >= 500


class RayJobs:
    """The RayJobs of this pod's namespace, at the API server."""

    def __init__(self, server: str, account: Path) -> None:
        self._account = account
        namespace = (account / "namespace").read_text().strip()
        self._url = f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        context = ssl.create_default_context(cafile=str(account / "ca.crt"))
        # From Python 3.13 on it is stricter than the certificates of many clusters.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        self._opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=context),
            urllib.request.ProxyHandler({}),  # what is set for the pod is not for in here
        )

    def create(self, manifest: str) -> None:
        """Raises ApiError; a key that the API server does not know is one too."""
        self._call("POST", "?fieldValidation=Strict", manifest)

    def status(self, name: str) -> dict[str, Any]:
        """Raises ApiError."""
        found: dict[str, Any] = self._call("GET", f"/{name}").get("status", {})
        return found

    def _call(self, method: str, path: str, body: str | None = None) -> dict[str, Any]:
        # Read again every time: the kubelet replaces the token before it expires.
        token = (self._account / "token").read_text().strip()
        request = urllib.request.Request(
            self._url + path,
            method=method,
            data=None if body is None else body.encode(),
            headers={
                "Authorization": f"Bearer {token}",
                "Accept": "application/json",
                "Content-Type": "application/yaml",
            },
        )
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            raise _told(error) from None
        except (OSError, HTTPException, ValueError) as error:
            raise ApiError(0, "NoAnswer", str(error)) from None


def _told(error: urllib.error.HTTPError) -> ApiError:
    """The API server's own message; a proxy in between may answer in something other than JSON."""
    text = error.read().decode(errors="replace")
    try:
        body = json.loads(text)
        return ApiError(error.code, str(body["reason"]), str(body["message"]))
    except (ValueError, KeyError, TypeError):
        return ApiError(error.code, str(error.reason), text[:500])


def night_of(job: str, now: datetime) -> date:
    """The schedule's day (UTC), though the pod may have started after midnight.

    Kubernetes names the Job of a tick `<cronjob>-<minutes since 1970>`. Any other name is a
    trigger by hand, which means today.
    """
    minutes = re.search(r"-(\d{8})$", job)
    return (datetime.fromtimestamp(int(minutes[1]) * 60, UTC) if minutes else now).date()


def named(template: str, night: date) -> tuple[str, str]:
    """The RayJob's name with its date, and the manifest that has it.

    Raises ValueError if the template has not exactly one name, or one too long for a date.
    """
    found = list(_NAME.finditer(template))
    if len(found) != 1:
        raise ValueError(
            f"expected one manifest with a `  name:` below its `metadata:`, found {len(found)}"
        )
    name = f"{found[0][1]}-{night:%Y%m%d}"
    if len(name) > _MOST_NAME_CHARS:
        raise ValueError(
            f"{name} has {len(name)} characters and KubeRay allows {_MOST_NAME_CHARS}; "
            "shorten the name in the template"
        )
    return name, template[: found[0].start(1)] + name + template[found[0].end(1) :]


def create(jobs: RayJobs, name: str, manifest: str) -> None:
    """Create it, or find that it exists. Raises ApiError for everything else."""
    try:
        jobs.create(manifest)
    except ApiError as error:
        if error.reason != "AlreadyExists":
            raise
        _say(f"{name} exists already: this night has been triggered before")
    else:
        _say(f"{name} created")


def wait(jobs: RayJobs, name: str, poll_s: float) -> int:
    """Follow the RayJob to its end and return the exit code. Raises ApiError if it is gone."""
    last = ""
    while True:
        try:
            status = jobs.status(name)
        except ApiError as error:
            if not error.may_pass:
                raise
            state = f"API server does not answer, waiting for it: {error.message}"
        else:
            ended, result = status.get("jobDeploymentStatus"), status.get("jobStatus")
            state = f"{ended or 'not started'}, job {result or 'not submitted'}"
            if ended in _ENDED:
                _say(f"{name}: {state}. {status.get('message', '')}".rstrip(". ") + ".")
                return DONE if result == "SUCCEEDED" else FAILED
        if state != last:
            _say(f"{name}: {state}")
            last = state
        time.sleep(poll_s)


def _say(line: str) -> None:
    print(line, flush=True)


def _stop(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def main() -> NoReturn:
    arguments = argparse.ArgumentParser(description="Create a night's RayJob, once.")
    arguments.add_argument("--template", type=Path, required=True, help="the RayJob's manifest")
    arguments.add_argument("--wait", action="store_true", help="follow it to its end")
    arguments.add_argument("--poll-s", type=float, default=15.0, help="seconds between two looks")
    arguments.add_argument("--server", help="URL of the API server; default: this pod's")
    arguments.add_argument("--account", type=Path, default=_SERVICE_ACCOUNT, metavar="FOLDER")
    given = arguments.parse_args()
    host, port = (os.environ.get(f"KUBERNETES_SERVICE_{part}", "") for part in ("HOST", "PORT"))
    server = given.server or f"https://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        night = night_of(os.environ.get("JOB_NAME", ""), datetime.now(UTC))
        name, manifest = named(given.template.read_text(), night)
        jobs = RayJobs(server, given.account)
    except OSError as error:
        _stop(str(error), REFUSED)
    except ValueError as error:
        _stop(f"{given.template}: {error}", REFUSED)
    try:
        create(jobs, name, manifest)
        sys.exit(wait(jobs, name, given.poll_s) if given.wait else DONE)
    except ApiError as error:
        _stop(
            f"{name}: {error.status} {error.reason}: {error.message}",
            TRY_AGAIN if error.may_pass else REFUSED,
        )


if __name__ == "__main__":
    main()
