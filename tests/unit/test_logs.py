"""How a line of the log looks, what it knows, and what it does not say."""

import contextvars
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from obstore.exceptions import PermissionDeniedError

from batch_scorer import logs
from batch_scorer.storage import AccessDenied, Store

SECRET = "canary/secret+value=="


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The logger and the environment, as they were before any set-up."""
    monkeypatch.delenv("RAY_LOGGING_CONFIG_ENCODING", raising=False)
    log, hook = logs.log, sys.excepthook
    before = log.handlers, log.propagate, log.level
    log.handlers = []
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])
    sys.excepthook = hook


def test_a_person_reads_level_name_and_message(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up()
    with logs.fields(run="out:1", shard="a.parquet"):
        logs.log.warning("%s holds no rows; skipped", "b.parquet")
        logs.log.info("read")
        logging.getLogger("batch_scorer.backends.hf").warning("no head")
    assert capsys.readouterr().err.splitlines() == [
        "WARNING batch_scorer: b.parquet holds no rows; skipped",
        "WARNING batch_scorer.backends.hf: no head",
    ]


def test_a_machine_reads_one_object_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", "JSON")
    logs.set_up()
    with logs.fields(run="out:1", night=7):
        with logs.fields(shard="a.parquet", attempt=2):
            logs.log.info("read")
        try:
            raise ValueError(SECRET)
        except ValueError:
            monkeypatch.setenv("HF_TOKEN", SECRET)
            logs.log.exception("unforeseen failure")
    read, unforeseen = map(json.loads, capsys.readouterr().err.splitlines())
    known: dict[str, object] = {"levelname": "INFO", "message": "read", "name": "batch_scorer"}
    known |= {"run": "out:1", "night": 7, "shard": "a.parquet", "attempt": 2}
    assert known.items() <= read.items()
    assert {"asctime", "filename", "lineno", "process", "timestamp_ns"} <= read.keys()
    assert "shard" not in unforeseen and unforeseen["run"] == "out:1"
    assert unforeseen["exc_text"].endswith("ValueError: ***")


@pytest.mark.parametrize("encoding", ["", "JSON"])
def test_a_worker_logs_as_its_driver_does_with_the_attempt(
    encoding: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs.log, "handlers", [])  # as in a process that is new
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", encoding)
    with logs.fields(run="out:1"):
        carried = logs.carry(attempt=2)
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", "of the worker's machine")

    def work() -> None:
        logs.resume(carried, retries=1)
        with logs.fields(shard="a.parquet"):
            logs.log.warning("torn")

    contextvars.copy_context().run(work)
    line = capsys.readouterr().err.strip()
    if encoding:
        fields = {"message": "torn", "run": "out:1", "shard": "a.parquet", "attempt": 3}
        assert fields.items() <= json.loads(line).items()
    else:
        assert line.endswith("WARNING batch_scorer: torn run=out:1 attempt=3 shard=a.parquet")


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN",
     "HF_TOKEN", "GOOGLE_SERVICE_ACCOUNT_KEY", "AZURE_CLIENT_SECRET", "db_password"],
)  # fmt: skip
def test_values_of_secrets_are_masked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, SECRET)
    assert logs.mask(f"signed with {SECRET}") == "signed with ***"
    assert logs.mask("?token=canary%2Fsecret%2Bvalue%3D%3D&x=1") == "?token=***&x=1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RAY_AUTH_TOKEN_PATH", "/run/secrets/token"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/run/secrets/token"),
        ("TOKENIZERS_PARALLELISM", "the false one"),
        ("KEYBOARD", "a keyboard"),
        ("SOME_KEY", "short"),
    ],
)
def test_what_is_no_secret_is_told(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert logs.mask(f"cannot read {value}") == f"cannot read {value}"


def test_of_two_secrets_the_one_inside_the_other_hides_no_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A_TOKEN", "canary-12")
    monkeypatch.setenv("B_TOKEN", "canary-12345")
    assert logs.mask("canary-12345 canary-12") == "*** ***"


def test_a_store_s_answer_is_masked_before_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers print the request that they refuse, session token and all."""
    token = "canary" * 50
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    store = Store(str(tmp_path), {})
    with pytest.raises(AccessDenied) as refused, store._translated("a.parquet"):
        raise PermissionDeniedError(f"403 Forbidden: x-amz-security-token:{token}")
    assert str(refused.value).endswith("(403 Forbidden: x-amz-security-token:***)")


@pytest.mark.parametrize("encoding", ["", "JSON"])
def test_what_nobody_catches_is_masked_too(
    encoding: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", encoding)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    logs.set_up()
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        sys.excepthook(KeyError, error, error.__traceback__)
    said = capsys.readouterr().err
    assert SECRET not in said
    assert "KeyError: '***'" in (json.loads(said)["exc_text"] if encoding else said)
