"""When the next request to a server may be sent: rate limits, and waits after a failure.

Both are computed from times that the caller gives, in seconds of any one clock.
"""

import random
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 60.0
LONGEST_ASKED_WAIT_S = 120.0
"""Of what a server asks for in Retry-After, the most that is waited."""


class Pace:
    """Starts of requests, far enough apart for a limit on requests and one on tokens per minute.

    None is no limit. There are no bursts: each request keeps the next one waiting for its share of
    the minute, so that no minute has more than the limits and one request.
    """

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._s_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._s_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._request_from = self._token_from = -float("inf")

    def start(self, now: float, tokens: int) -> float:
        """When a request of so many tokens may be sent; its place is taken."""
        start = max(now, self._request_from, self._token_from)
        self._request_from = start + self._s_per_request
        self._token_from = start + tokens * self._s_per_token
        return start

    def correct(self, tokens: int) -> None:
        """So many more tokens than a request was thought to have, or fewer where negative."""
        self._token_from += tokens * self._s_per_token


def wait_s(tries: int, asked_s: float | None, chance: random.Random) -> float:
    """How long to wait after so many failed tries, from 1, when the server asks for `asked_s`.

    It doubles from try to try, up to a minute, and up to half of it is left out at random, so that
    requests that failed together do not come back together. What the server asks for is the least,
    and up to a tenth of it comes on top at random.
    """
    longest = min(_FIRST_WAIT_S * 2.0 ** min(tries - 1, 30), _LONGEST_WAIT_S)
    own = longest * chance.uniform(0.5, 1)
    if asked_s is None:
        return own
    return max(own, min(asked_s, LONGEST_ASKED_WAIT_S) * chance.uniform(1, 1.1))


def asked_wait_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """The wait of a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3); None
    without one that can be read."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if date.tzinfo is None:  # "-0000", which says that the zone is not known
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - now).total_seconds())
