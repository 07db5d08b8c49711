"""Credentials from AWS's own files, through boto3 where it is installed."""

import importlib.util
import sys
from pathlib import Path

import pytest

from batch_scorer.errors import ConfigError, MissingExtraError
from batch_scorer.storage import Store
from cluster.local.seaweed import ACCESS_KEY, SECRET_KEY, S3Server

needs_boto3 = pytest.mark.skipif(
    importlib.util.find_spec("boto3") is None, reason="boto3 is not installed"
)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS's files, in which `lab` has the server's keys and the default profile has others."""
    (tmp_path / "config").write_text("[profile lab]\nregion = us-east-1\n")
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
        "[default]\naws_access_key_id = other\naws_secret_access_key = other\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


@needs_boto3
def test_a_profile_signs_requests(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "lab")
    store = Store(s3.url("profiles"), {"endpoint": s3.endpoint, "region": "us-east-1"})
    store.create("a", b"1")
    assert store.read("a") == b"1"


@needs_boto3
def test_the_default_profile_is_used_without_a_name(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = (tmp_path / "credentials").read_text().split("[default]")[0]
    (tmp_path / "credentials").write_text(lab.replace("[lab]", "[default]"))
    store = Store(s3.url("profiles"), {"endpoint": s3.endpoint, "region": "us-east-1"})
    store.create("b", b"1")
    assert store.read("b") == b"1"


@needs_boto3
def test_a_profile_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "lba")
    with pytest.raises(ConfigError, match="lba"):
        Store("s3://bkt/x", {})


def test_keys_in_the_environment_go_before_a_profile(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "default")
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    store = Store(s3.url("profiles"), {"endpoint": s3.endpoint, "region": "us-east-1"})
    store.create("c", b"1")


def test_only_a_profile_by_name_needs_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    Store("s3://bkt/x", {})
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with pytest.raises(MissingExtraError, match="pip install boto3"):
        Store("s3://bkt/x", {})
    Store("s3://bkt/x", {"skip_signature": "true"})
