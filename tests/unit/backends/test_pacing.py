"""Rate limits and waits, on a clock of numbers."""

import itertools
import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_scorer.backends.pacing import LONGEST_ASKED_WAIT_S, Pace, asked_wait_s, wait_s

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
ARRIVALS = st.lists(st.tuples(st.floats(0, 30), st.integers(0, 5000)), min_size=2, max_size=40)
LIMITS = st.none() | st.floats(1, 1e5)


@given(ARRIVALS, LIMITS, LIMITS)
def test_no_stretch_of_time_has_more_than_its_share(
    arrivals: list[tuple[float, int]], requests: float | None, tokens: float | None
) -> None:
    """Between two starts lies the time that the limits give to the first and those after it."""
    pace = Pace(requests, tokens)
    times = list(itertools.accumulate(gap for gap, _ in arrivals))
    counts = [count for _, count in arrivals]
    starts = [pace.start(now, count) for now, count in zip(times, counts, strict=True)]
    assert all(start >= now for start, now in zip(starts, times, strict=True))
    for first, last in itertools.combinations(range(len(starts)), 2):
        gap = starts[last] - starts[first] + 1e-6
        if requests is not None:
            assert gap >= (last - first) * 60 / requests
        if tokens is not None:
            assert gap >= sum(counts[first:last]) * 60 / tokens


@given(ARRIVALS)
def test_without_limits_nothing_waits(arrivals: list[tuple[float, int]]) -> None:
    pace = Pace(None, None)
    for now in itertools.accumulate(gap for gap, _ in arrivals):
        assert pace.start(now, 1000) == now


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_a_corrected_estimate_is_as_good_as_a_right_one(estimate: int, counted: int) -> None:
    corrected, right = Pace(None, 6000), Pace(None, 6000)
    corrected.start(0.0, estimate)
    corrected.correct(counted - estimate)
    right.start(0.0, counted)
    assert corrected.start(0.0, 1) == pytest.approx(max(0.0, right.start(0.0, 1)), abs=1e-9)


@given(st.integers(1, 10_000), st.none() | st.floats(0, 1e9), st.integers())
def test_a_wait_grows_up_to_a_bound_and_is_never_less_than_asked_for(
    tries: int, asked: float | None, seed: int
) -> None:
    wait = wait_s(tries, asked, random.Random(seed))
    assert 0.25 <= wait <= 1.1 * LONGEST_ASKED_WAIT_S
    if asked is None:
        assert wait <= 0.5 * 2.0 ** min(tries - 1, 30)
    else:
        assert wait >= min(asked, LONGEST_ASKED_WAIT_S)


def test_those_that_failed_together_do_not_come_back_together() -> None:
    for asked in (None, 7.0):
        waits = {wait_s(3, asked, random.Random(seed)) for seed in range(50)}
        assert len(waits) == 50


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("17", 17),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0),
        ("Sun, 29 Nov 2026 12:00:05 -0000", 5),
        ("", None),
        ("soon", None),
        ("-3", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str, seconds: float | None) -> None:
    assert asked_wait_s({"Retry-After": text}, NOW) == seconds


def test_no_retry_after_asks_for_no_wait() -> None:
    assert asked_wait_s({}, NOW) is None


@given(st.text(max_size=60) | st.from_regex(r"\w{3}, \d+ \w{3} \d+ \d+:\d+:\d+ .\d{0,9}"))
def test_any_retry_after_is_read(text: str) -> None:
    wait = asked_wait_s({"Retry-After": text}, NOW)
    assert wait is None or wait >= 0
