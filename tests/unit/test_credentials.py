"""What may stand in settings, and what never: held to the options that obstore itself takes."""

import ast
import re
from pathlib import Path
from typing import Any

import obstore
import pytest
import yaml
from obstore.exceptions import UnknownConfigurationKeyError
from obstore.store import from_url

from batch_scorer.cli.commands import _checked_here
from batch_scorer.config import load_config, load_partial_config
from batch_scorer.credentials import CREDENTIALS, PLAIN, is_http, stem, wrong_options, wrong_url
from batch_scorer.errors import ConfigError
from batch_scorer.storage import open_store

CANARY = "canary-4f1d"
STUBS = Path(obstore.__file__).parent / "_store"
STORES = {
    "_aws": ("S3Config", "s3://bucket/x", ("aws_",)),
    "_azure": ("AzureConfig", "az://container/x", ("azure_", "azure_storage_")),
    "_gcs": ("GCSConfig", "gs://bucket/x", ("google_",)),
}
NEEDED: dict[str, Any] = {"model": "m", "inputs": ("in",), "output": "out"}


def named_in(stub: str) -> set[str]:
    """The options that a stub of obstore names, as keys or as environment variables."""
    text = (STUBS / f"{stub}.pyi").read_text()
    keys = {
        line.target.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef) and node.name == STORES[stub][0]
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
    variables = re.findall(r"`((?:AWS|AZURE|GOOGLE)_[A-Z0-9_]+)`", text)
    return keys | {name.lower() for name in variables}


def is_taken(url: str, option: str) -> bool:
    try:
        from_url(url, config={option: "1"})  # type: ignore[call-overload]
    except UnknownConfigurationKeyError:
        return False
    except Exception:  # a wrong value of a right option
        return True
    return True


@pytest.mark.parametrize("stub", STORES)
def test_every_option_of_obstore_is_classified(stub: str) -> None:
    _, url, prefixes = STORES[stub]
    named = named_in(stub)
    assert len(named) > 8
    stems = {stem(name) for name in named}
    spelled = named | stems | {prefix + name for prefix in prefixes for name in stems}
    taken = {name for name in spelled if is_taken(url, name)}
    known = PLAIN | CREDENTIALS.keys()
    assert {name for name in named | taken if stem(name) not in known} == set()


def test_an_option_is_one_or_the_other() -> None:
    assert not PLAIN & CREDENTIALS.keys()
    secret = re.compile("secret|password|token$|_key$|access_key")
    assert [name for name in PLAIN if secret.search(name)] == []


OPTIONS = [
    "aws_secret_access_key", "ACCESS_KEY_ID", "token", "azure_storage_account_key", "access_key",
    "AZURE_STORAGE_MASTER_KEY", "sas_key", "azure_storage_sas_token", "azure_client_secret",
    "bearer_token", "google_service_account_key", "fabric_session_token",
    "sse_customer_key_base64",
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_a_credential_is_refused_wherever_it_stands(option: str, tmp_path: Path) -> None:
    options = {option: CANARY}
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({**NEEDED, "inputs": ["in"], "store_options": options}))
    as_flag = ["--store-option", f"{option}={CANARY}"]
    variable = CREDENTIALS[stem(option)]
    for refused in (
        lambda: load_config(file),
        # The flag replaces it, and the file is sent all the same.
        lambda: load_config(file, store_options={"region": "x"}),
        lambda: load_config(**NEEDED, store_options=options),
        lambda: load_partial_config(store_options=options),
        lambda: open_store("s3://bucket/x", options),
        lambda: _checked_here(["score", "--model", "m", "in", "--output", "out", *as_flag]),
        lambda: _checked_here(["score", "--config", str(file)]),
        lambda: _checked_here(["verify", "s3://bucket/out", *as_flag]),
        lambda: _checked_here(["doctor", "s3://bucket/out", *as_flag]),
    ):
        with pytest.raises(ConfigError, match=f"set {variable} in the environment") as error:
            refused()
        assert CANARY not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("regoin", "x", "did you mean `region`"),
        ("nonsense-9", "x", "no option of an object store"),
        ("endpoint", f"http://user:{CANARY}@host:9000", "before its host"),
        ("endpoint", f"https://account.example/?sv=1&sig={CANARY}", "`sig`"),
        ("application_credentials", f'{{"private_key": "{CANARY}"}}', "name the file"),
        ("service_account", f"-----BEGIN PRIVATE KEY-----{CANARY}", "name the file"),
    ],
)
def test_other_wrong_options(option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(**NEEDED, store_options={option: value})
    assert CANARY not in str(error.value)


def test_a_value_of_a_wrong_type_is_not_shown(tmp_path: Path) -> None:
    for wrong in (f"account_key={CANARY}", {"region": [CANARY]}):
        with pytest.raises(ConfigError, match="store_options") as error:
            load_config(**NEEDED, store_options=wrong)
        assert CANARY not in str(error.value)


def test_plain_options_and_files_with_credentials_are_taken() -> None:
    options = {
        "AWS_REGION": "eu-central-1", "endpoint": "http://127.0.0.1:9000", "allow_http": "true",
        "azure_storage_account_name": "a", "application_credentials": "/var/run/key.json",
        "web_identity_token_file": "/var/run/token", "sse_kms_key_id": "arn:aws:kms:k",
    }  # fmt: skip
    assert list(wrong_options(options)) == []
    assert load_config(**NEEDED, store_options=options).store_options == options


URLS = [
    f"az://container/x?sv=2024-01-01&sp=r&sig={CANARY}",
    f"https://account.blob.core.windows.net/c/x?SIG={CANARY}",
    f"https://bucket.s3.amazonaws.com/x?X-Amz-Credential={CANARY}&X-Amz-Signature={CANARY}",
    f"https://storage.googleapis.com/b/x?X-Goog-Signature={CANARY}",
    f"https://bucket.s3.amazonaws.com/x?AWSAccessKeyId=a&Signature={CANARY}",
    f"s3://key:{CANARY}@bucket/x",
    f"https://{CANARY}@huggingface.co/org/model",
    f"https://host/x?access_token={CANARY}",
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "setting",
    ["model", "base_model", "reference_model", "inputs", "output", "chat_template", "ray_address"],
)  # fmt: skip
def test_a_url_with_a_credential_is_refused(setting: str, url: str, tmp_path: Path) -> None:
    value = {"inputs": ["in", url]}.get(setting, url)
    settings = {**NEEDED, "inputs": ["in"], setting: value}
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(settings))
    for refused in (
        lambda: load_config(**settings),
        lambda: load_config(file, **{setting: NEEDED.get(setting)}),
        lambda: open_store(url, {}),
        lambda: _checked_here(["verify", url]),
        lambda: _checked_here(["doctor", url]),
    ):
        with pytest.raises(ConfigError, match="credentials are not settings") as error:
            refused()
        assert CANARY not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "abfss://container@account.dfs.core.windows.net/x", "hf://datasets/org/name@main/x",
        "s3://bucket/part-?.parquet", "s3://bucket/day=?/sig-1/x", "/data/user:name@host/x",
        "org/name@0123abc", "az://container/what?size=3", "ray://head:10001", "data?token=1/x",
    ],
)  # fmt: skip
def test_other_urls_are_taken(url: str) -> None:
    assert wrong_url(url) is None


@pytest.mark.parametrize(
    ("url", "options", "is_without_tls"),
    [
        ("s3://bkt/x", {"endpoint": "http://host:9000"}, True),
        ("s3://bkt/x", {"AWS_ENDPOINT_URL": "HTTP://host"}, True),
        ("s3://bkt/x", {"endpoint": "https://host"}, False),
        ("s3://bkt/x", {"bucket": "http://host"}, False),
        ("http://host/x", {}, True),
        ("s3://bkt/x", {}, False),
    ],
)
def test_http_is_asked_for_by_its_name(
    url: str, options: dict[str, str], is_without_tls: bool
) -> None:
    assert is_http(url, options) is is_without_tls
