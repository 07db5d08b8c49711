"""What is a credential, so that none stands where it would travel or be recorded.

Settings are written down: in files, in command lines that other users of a machine can list, in
Ray's Jobs API. So an option of a store is taken only if it is known to be none, and a URL only
without a password or a signature in it. Credentials come from the environment, from a file that a
setting names, or from the identity that a cloud gives to a machine.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from batch_scorer.errors import ConfigError, MissingExtraError

_PREFIXES = ("aws_", "azure_storage_", "azure_", "google_")
"""What may stand before an option's name; obstore takes most names with and without."""

CREDENTIALS = {
    "access_key_id": "AWS_ACCESS_KEY_ID",
    "secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
    "container_credentials_full_uri": "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "container_credentials_relative_uri": "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "sse_customer_key_base64": "AWS_SSE_CUSTOMER_KEY_BASE64",
    "token": "AWS_SESSION_TOKEN or AZURE_STORAGE_TOKEN",
    "access_key": "AZURE_STORAGE_ACCOUNT_KEY",
    "account_key": "AZURE_STORAGE_ACCOUNT_KEY",
    "master_key": "AZURE_STORAGE_ACCOUNT_KEY",
    "client_secret": "AZURE_CLIENT_SECRET",
    "encryption_key": "AZURE_STORAGE_ENCRYPTION_KEY",
    "fabric_session_token": "AZURE_FABRIC_SESSION_TOKEN",
    "sas_key": "AZURE_STORAGE_SAS_TOKEN",
    "sas_token": "AZURE_STORAGE_SAS_TOKEN",
    "bearer_token": "GOOGLE_BEARER_TOKEN",
    "service_account_key": "GOOGLE_SERVICE_ACCOUNT_KEY",
}
"""Options of obstore's stores, without their prefix, that are credentials: the environment variable
that takes each."""

PLAIN = frozenset(
    {
        *("allow_http", "bucket", "bucket_name", "conditional_put", "copy_if_not_exists"),
        *("disable_tagging", "endpoint", "skip_signature"),
        *("checksum_algorithm", "container_authorization_token_file", "default_region"),
        *("disable_bulk_delete", "endpoint_url", "endpoint_url_s3", "endpoint_url_sts"),
        *("imdsv1_fallback", "metadata_endpoint", "region", "request_payer", "role_arn"),
        *("role_session_name", "s3_express", "server_side_encryption", "sse_bucket_key_enabled"),
        *("sse_kms_key_id", "sts_endpoint", "unsigned_payload", "virtual_hosted_style_request"),
        *("web_identity_token_file",),
        *("account_name", "authority_host", "authority_id", "client_id", "container_name"),
        *("credential_type", "fabric_cluster_identifier", "fabric_token_service_url"),
        *("fabric_workload_host", "federated_token_file", "identity_endpoint", "msi_endpoint"),
        *("msi_resource_id", "object_id", "tenant_id", "use_azure_cli", "use_emulator"),
        *("use_fabric_endpoint",),
        *("application_credentials", "base_url", "service_account", "service_account_path"),
    }
)
"""The other options; those that name a file with a credential are among them."""

_ENDPOINTS = frozenset({"endpoint", "endpoint_url", "endpoint_url_s3", "base_url"})
_AWS_FILES = {
    "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
    "AWS_CONFIG_FILE": "~/.aws/config",
}
"""The variables that name AWS's own files, and where these are otherwise."""

_ELSEWHERE = "credentials are not settings, which are recorded and sent"
_WHERE = "leave it out, the environment is their place (docs/security.md)"
_PASSWORD = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<user>[^/?#@]*)@", re.IGNORECASE)
_SIGNATURE = re.compile(
    "[?&;](sig|signature|skoid|x-(?:amz|goog)-(?:credential|security-token|signature)|sas"
    "|awsaccesskeyid|googleaccessid|(?:access_|auth_|id_)?token|(?:api|account|access)_?key"
    "|password|secret)=",
    re.IGNORECASE,
)
_INLINE = re.compile(r"\s*\{|-----BEGIN ")


def stem(option: str) -> str:
    """The name of a store's option without case and prefix."""
    name = option.lower()
    prefix = next((each for each in _PREFIXES if name.startswith(each)), "")
    return name.removeprefix(prefix)


def wrong_options(options: Mapping[str, str]) -> Iterator[str]:
    """A line for every option that is a credential, holds one, or is not known; no line holds a
    value."""
    for option, value in options.items():
        name = stem(option)
        if name in CREDENTIALS:
            yield f"{option}: {_ELSEWHERE}; set {CREDENTIALS[name]} in the environment"
        elif name not in PLAIN:
            known = sorted(PLAIN | CREDENTIALS.keys())
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            yield f"{option}: no option of an object store{hint}"
        elif why := wrong_url(value):
            yield f"{option}: {why}"
        elif _INLINE.match(value):
            yield f"{option}: {_ELSEWHERE}; name the file that holds it"


def wrong_url(url: str) -> str | None:
    """Why a URL, or a path, may not stand in the settings: it holds a credential. The reason holds
    nothing of it."""
    found = _PASSWORD.match(url)
    # What stands before the @ of other URLs is no secret: abfss://CONTAINER@ACCOUNT….
    if found and (":" in found["user"] or found["scheme"].lower() in ("http", "https", "hf")):
        return f"the URL holds a user or a password before its host; {_ELSEWHERE}; {_WHERE}"
    if "://" in url and (signed := _SIGNATURE.search(url)):
        return f"the URL holds a credential, `{signed[1]}`; {_ELSEWHERE}; {_WHERE}"
    return None


def is_http(url: str, options: Mapping[str, str]) -> bool:
    """Whether a store's URL or endpoint is without TLS, which then needs no `allow_http`."""
    named = [value for option, value in options.items() if stem(option) in _ENDPOINTS]
    return any(value.lower().startswith("http://") for value in [url, *named])


def aws_provider(options: Mapping[str, str]) -> Any | None:
    """obstore's credential provider for what AWS's own files set up: profiles, SSO, assumed roles.

    None where obstore finds the credentials itself: keys in the environment, which go before a
    profile as in AWS's own tools, and the roles of instances, containers and service accounts.
    Without a profile's name the files' default profile is used if boto3 is installed. Raises
    MissingExtraError for a profile without boto3, ConfigError for one that cannot be used.
    """
    profile = os.environ.get("AWS_PROFILE")
    unsigned = {stem(option): value for option, value in options.items()}.get("skip_signature")
    if unsigned == "true" or "AWS_ACCESS_KEY_ID" in os.environ:
        return None
    files = (Path(os.environ.get(name, usual)).expanduser() for name, usual in _AWS_FILES.items())
    if not profile and not any(file.is_file() for file in files):
        return None
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        if not profile:
            return None
        raise MissingExtraError(
            f"AWS_PROFILE is {profile}: profiles need boto3; pip install boto3, or unset it"
        ) from None
    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            if not profile:
                return None
            raise ConfigError(f"AWS_PROFILE is {profile}: the profile has no credentials")
        return Boto3CredentialProvider(session)
    except BotoCoreError as error:
        raise ConfigError(f"AWS credentials: {' '.join(str(error).split())}") from error
