"""What stands in the way of every request is one clear line, whichever store and request."""

import base64
from collections.abc import Callable

import pytest

from batch_scorer.errors import StorageError
from batch_scorer.storage import AccessDenied, ObjectMissing, PlaceMissing, Store, Version
from cluster.local.azurite import AzureServer
from cluster.local.seaweed import S3Server
from tests.helpers.answers import answering, error
from tests.helpers.gcs import GcsServer

REQUESTS: dict[str, Callable[[Store], object]] = {
    "list": lambda store: list(store.list()),
    "read": lambda store: store.read("k"),
    "replace": lambda store: store.replace("k", b"1", Version('"x"', "7")),
    "create": lambda store: store.create("k", b"1"),
}


def lines(store: Store, kind: type[StorageError]) -> set[str]:
    """What each request shows, which is one line of this type."""
    found = set()
    for request in REQUESTS.values():
        with pytest.raises(StorageError) as raised:
            request(store)
        assert type(raised.value) is kind, raised.value
        found.add(str(raised.value))
    assert not any("\n" in line for line in found)
    return found


KEY = base64.b64encode(b"k" * 64).decode()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of every store, so that requests are signed."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "a-token")


def s3_at(endpoint: str) -> Store:
    options = {"endpoint": endpoint, "region": "us-east-1", "allow_http": "true"}
    return Store("s3://bkt/out", options)


def azure_at(endpoint: str) -> Store:
    options = {"endpoint": endpoint, "account_name": "a", "allow_http": "true"}
    return Store("az://box/out", options)


def gcs_at(endpoint: str) -> Store:
    return Store("gs://bkt/out", {"base_url": endpoint, "allow_http": "true"})


AT = {"s3": s3_at, "azure": azure_at, "gcs": gcs_at}

REGION = "the region 'us-east-1' is wrong; expecting 'eu-central-1'"


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("s3", "NoSuchBucket", "s3://bkt: no such bucket"),
        ("azure", "ContainerNotFound", "az://box: no such container"),
        ("gcs", "NoSuchBucket", "gs://bkt: no such bucket"),
    ],
)
def test_a_missing_place_is_one_line(kind: str, code: str, line: str) -> None:
    with answering(404, error(code)) as endpoint:
        assert lines(AT[kind](endpoint), PlaceMissing) == {line}


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    ("kind", "status", "code", "message", "line"),
    [
        ("s3", 403, "SignatureDoesNotMatch", "", "no permission: the key is wrong"),
        ("s3", 403, "InvalidAccessKeyId", "", "no permission: the key is wrong"),
        ("s3", 400, "ExpiredToken", "", "no permission: the credentials have expired"),
        ("s3", 403, "AccessDenied", "", "no permission (AccessDenied)"),
        ("s3", 400, "AuthorizationHeaderMalformed", REGION, "expects eu-central-1"),
        ("s3", 301, "PermanentRedirect", "", "s3://bkt: the bucket is in another region"),
        ("azure", 403, "AuthenticationFailed", "", "no permission: the key is wrong"),
        ("azure", 403, "AuthorizationPermissionMismatch", "", "no permission (Authorization"),
        ("gcs", 401, "AuthenticationRequired", "", "no permission: the key is wrong"),
        ("gcs", 403, "AccessDenied", "", "no permission (AccessDenied)"),
        ("gcs", 403, "", "", "no permission (403 Forbidden)"),
    ],
)
def test_a_refusal_is_one_line(kind: str, status: int, code: str, message: str, line: str) -> None:
    with answering(status, error(code, message) if code else "") as endpoint:
        found = lines(AT[kind](endpoint), AccessDenied)
    assert all(line in each and len(each) < 120 for each in found), found


@pytest.mark.usefixtures("keys")
def test_a_refused_deletion_is_one_line() -> None:
    """S3 deletes in bulk, and answers 200 with an error for each key."""
    refused = error("AccessDenied", "Access Denied").replace("<Error>", "<Error><Key>out/k</Key>")
    refused = refused.replace("<Error>", "<DeleteResult><Error>") + "</DeleteResult>"
    with (
        answering(200, refused) as endpoint,
        pytest.raises(AccessDenied, match=r"^s3://bkt/out/k: no permission \(AccessDenied\)$"),
    ):
        s3_at(endpoint).delete("k")


def test_s3_answers_so(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its listing and reads: a create would make the bucket, and this server ignores regions."""
    store = Store("s3://no-such-bucket/out", s3.options)
    for request in ("list", "read"):
        with pytest.raises(PlaceMissing, match=r"^s3://no-such-bucket: no such bucket$"):
            REQUESTS[request](store)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    wrong = lines(Store(s3.url("wrong-key"), s3.options), AccessDenied)
    assert all("no permission: the key is wrong" in line for line in wrong)


def test_azure_answers_so(azure: AzureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(Store("az://nobox/out", azure.options), PlaceMissing) == {
        "az://nobox: no such container"
    }
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    wrong = lines(Store(azure.url("x"), azure.options), AccessDenied)
    assert all("no permission (AuthorizationFailure)" in line for line in wrong)


def test_gcs_answers_so(gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(Store("gs://nobkt/out", gcs.options), PlaceMissing) == {
        "gs://nobkt: no such bucket"
    }
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "wrong")
    wrong = lines(Store(gcs.url("x"), gcs.options), AccessDenied)
    assert all("no permission: the key is wrong" in line for line in wrong)


def test_an_object_that_is_not_there_is_no_missing_place(gcs: GcsServer) -> None:
    store = Store(gcs.url("nothing"), gcs.options)
    with pytest.raises(ObjectMissing, match="gs://bkt/nothing/k: not there") as raised:
        store.read("k")
    assert type(raised.value) is ObjectMissing
