"""What can go wrong with a store, and the one place where foreign errors become ours.

obstore has a type for what a store answers to a request for one object; from listings and for
whatever stands in the way of all requests (no such bucket, a wrong region) it passes on the store's
own answer as text, and this is read for the code that the store's documentation promises.
"""

import re

from obstore.exceptions import (
    AlreadyExistsError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from batch_scorer.errors import OutputError, StorageError
from batch_scorer.logs import mask


class ObjectMissing(StorageError):
    """Nothing is stored under the key."""


class PlaceMissing(ObjectMissing):
    """The bucket, the container or the local folder itself is not there."""


class ObjectChanged(StorageError):
    """What is stored under the key is not the version that the request was pinned to."""


class ObjectDamaged(OutputError, StorageError):
    """What is stored under the key is not what belongs there.

    A command that begins with it ends as with any other unusable output; in the middle of a run it
    is one more answer of the store that is of no use.
    """


class AccessDenied(StorageError):
    """The store refuses every such request: wrong key, expired key, no permission, wrong region."""


_CODE = re.compile(r"<Code>\s*(?P<code>\w+)\s*</Code>|\(code: (?P<of_deletion>\w+)\)")
_STATUS = re.compile(r"status code: (\d{3} [A-Za-z ]+)")
_EXPECTED_REGION = re.compile(r"(?:expecting '|<Region>)([\w-]+)")

_NO_PLACE = {"NoSuchBucket": "bucket", "ContainerNotFound": "container"}
_WRONG_KEY = {
    "SignatureDoesNotMatch", "InvalidAccessKeyId",  # S3
    "AuthenticationFailed", "InvalidAuthenticationInfo",  # Azure
    "AuthenticationRequired", "InvalidToken", "InvalidSecurity",  # GCS, S3's session tokens
}  # fmt: skip
_EXPIRED = {"ExpiredToken", "TokenRefreshRequired"}
_WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"}
_REDIRECTED = "incorrectly configured region"
"""obstore's text for a redirect without an address, which is S3's answer from another region."""
_METADATA_SERVICE = "169.254.169.254"
"""Where obstore asks for credentials when it was given none; off the clouds nobody answers."""
_REFUSED = ("401", "403", "AccessDenied")
_REFUSED_HERE = "Permission denied"


def translated(error: Exception, url: str, place: str) -> StorageError:
    """What this error means, in one line. `url` is what was asked for, in the bucket, container or
    folder `place`."""
    text = str(error)
    code = found["code"] or found["of_deletion"] if (found := _CODE.search(text)) else ""
    status = found[1].strip() if (found := _STATUS.search(text)) else ""
    # First what holds for all requests, whatever type obstore makes of it: it takes a conditional
    # replacement in a bucket that is not there for a failed condition.
    if code in _NO_PLACE:
        return PlaceMissing(f"{place}: no such {_NO_PLACE[code]}")
    if code in _WRONG_REGION or _REDIRECTED in text:
        expected = _EXPECTED_REGION.search(text)
        hint = f"; the store expects {expected[1]}" if expected else ""
        return AccessDenied(f"{place}: the bucket is in another region{hint}")
    if code in _WRONG_KEY:
        return AccessDenied(f"{url}: no permission: the key is wrong ({code})")
    if code in _EXPIRED:
        return AccessDenied(f"{url}: no permission: the credentials have expired ({code})")
    if _METADATA_SERVICE in text:
        return AccessDenied(f"{url}: no permission: no credentials were found")
    if isinstance(error, (NotFoundError, FileNotFoundError)):
        return ObjectMissing(f"{url}: not there")
    if isinstance(error, (AlreadyExistsError, PreconditionError)):
        return ObjectChanged(f"{url}: another version is stored")
    is_refused = isinstance(error, (PermissionDeniedError, UnauthenticatedError, PermissionError))
    is_refused |= code.startswith(_REFUSED) or status.startswith(_REFUSED)
    if is_refused or _REFUSED_HERE in text:
        return AccessDenied(f"{url}: no permission ({code or status or first_line(error)})")
    return StorageError(f"{url}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The beginning of an error's text, without secrets."""
    # A store's answer may hold what it was asked with, a session token for one.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return mask(lines[0])[:200]
