"""Sums over values that come a shard at a time: histograms, means, spreads. Pure functions.

All of them add up to the same in whatever order the values come, up to the rounding of the sums
of floats, and in memory that does not grow with the values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from batch_scorer.reports.page.values import FloatArray, IntArray

_MOST_BINS = 10_000
_DIGITS = 12
"""A bin's place has at most so many, so that its edges are exact."""
_LEAST_POWER = -30
_BARS = 40


@dataclass(slots=True)
class Histogram:
    """Values counted in bins of equal width, a power of ten: bin i holds those from first + i to
    before first + i + 1 times ten to `power`. `low` and `high` are the least and the most of them.

    The width is the least that needs no more than ten thousand bins between these two. As values
    come that lie farther apart, ten bins become one, so that the counts are those of the last width
    from the beginning.
    """

    power: int = _LEAST_POWER
    first: int = 0
    counts: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    low: float = math.inf
    high: float = -math.inf

    @property
    def edges(self) -> FloatArray:
        return self._edges_at(np.arange(self.first, self.first + len(self.counts) + 1))

    def add(self, values: FloatArray) -> None:
        """Count finite values."""
        if not len(values):
            return
        self._hold(float(values.min()), float(values.max()))
        places = np.searchsorted(self.edges, values, side="right") - 1
        self.counts += np.bincount(places, minlength=len(self.counts))

    def __add__(self, other: "Histogram") -> "Histogram":
        both = Histogram()
        if (ends := (min(self.low, other.low), max(self.high, other.high)))[0] <= ends[1]:
            both._hold(*ends)
            for each in (self, other):
                both._take(each.power, each.first, each.counts)
        return both

    def shown(self) -> tuple[FloatArray, IntArray]:
        """Edges and counts of at most some forty bins of 1, 2 or 5 times a power of ten, from the
        first that holds a value to the last; empty without values."""
        held = np.flatnonzero(self.counts)
        if not len(held):
            return np.zeros(0), np.zeros(0, np.int64)
        low, high = self.first + int(held[0]), self.first + int(held[-1]) + 1
        widths = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
        width = next(w for w in widths if math.ceil(high / w) - low // w <= _BARS)
        places = np.arange(low // width, math.ceil(high / width) + 1) * width
        before = np.concatenate([[0], np.cumsum(self.counts)])
        at = np.clip(places - self.first, 0, len(self.counts))
        return self._edges_at(places), np.diff(before[at])

    def quantiles(self, levels: Sequence[float]) -> list[float]:
        """As exact as a bin is wide."""
        below = np.cumsum(self.counts)
        places = np.searchsorted(below, np.array(levels) * below[-1])
        edges = self.edges
        middles = np.clip((edges[:-1] + edges[1:]) / 2, self.low, self.high)
        return [float(value) for value in middles[places]]

    def _hold(self, low: float, high: float) -> None:
        """Make room for values from `low` to `high`."""
        before = (self.power, self.first, self.counts)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.power = _power(self.low, self.high)
        # A bin more at each end: what is scaled here is rounded, and the edges are exact.
        self.first = math.floor(_scaled(self.low, -self.power)) - 1
        size = math.floor(_scaled(self.high, -self.power)) + 2 - self.first
        self.counts = np.zeros(size, np.int64)
        self._take(*before)

    def _take(self, power: int, first: int, counts: IntArray) -> None:
        """Count what finer bins have counted."""
        held = np.flatnonzero(counts)
        if len(held):
            # Beyond 18 digits every place is that of the first bin above or below 0.
            places = (first + held) // 10 ** min(self.power - power, 18)
            np.add.at(self.counts, places - self.first, counts[held])

    def _edges_at(self, places: IntArray) -> FloatArray:
        """Each is the float64 nearest to its decimal number."""
        if self.power >= 0:
            return np.asarray(places * 10.0**self.power, np.float64)
        return np.asarray(places / 10.0**-self.power, np.float64)


def _power(low: float, high: float) -> int:
    """That of the width for values from `low` to `high`; never less for values farther apart."""
    most = max(abs(low), abs(high))
    if not most:
        return _LEAST_POWER
    power = max(math.floor(math.log10(most)) - _DIGITS, _LEAST_POWER)
    while math.floor(_scaled(high, -power)) - math.floor(_scaled(low, -power)) >= _MOST_BINS:
        power += 1
    return power


def _scaled(value: float, power: int) -> float:
    return value * 10.0**power if power >= 0 else value / 10.0**-power


@dataclass(slots=True)
class Moments:
    """Means and centred sums of x and y over n points; adds up without loss (Chan, Golub, LeVeque
    1983)."""

    n: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0

    @classmethod
    def of(cls, x: FloatArray, y: FloatArray) -> "Moments":
        if not len(x):
            return cls()
        mean_x, mean_y = float(x.mean()), float(y.mean())
        dx, dy = x - mean_x, y - mean_y
        # Not `dx @ dx`: BLAS wakes its threads for it, which takes longer than the sum.
        xx, yy, xy = (float((a * b).sum()) for a, b in ((dx, dx), (dy, dy), (dx, dy)))
        return cls(len(x), mean_x, mean_y, xx, yy, xy)

    def __add__(self, other: "Moments") -> "Moments":
        n = self.n + other.n
        if not n:
            return Moments()
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.n * other.n / n
        return Moments(
            n,
            self.mean_x + dx * other.n / n,
            self.mean_y + dy * other.n / n,
            self.xx + other.xx + dx * dx * weight,
            self.yy + other.yy + dy * dy * weight,
            self.xy + other.xy + dx * dy * weight,
        )

    @property
    def correlation(self) -> float | None:
        """Pearson's; None where x or y does not vary."""
        return correlation(self.xx, self.yy, self.xy)

    @property
    def std_y(self) -> float:
        return math.sqrt(self.yy / self.n) if self.n else math.nan


def correlation(xx: float, yy: float, xy: float) -> float | None:
    # What is left of rounding is no variance.
    return xy / math.sqrt(xx * yy) if xx > 1e-12 and yy > 1e-12 else None


@dataclass(slots=True)
class Spread:
    """Scores of one group: `moments` of tokens (x) and scores (y), and their histogram."""

    moments: Moments = field(default_factory=Moments)
    histogram: Histogram = field(default_factory=Histogram)

    def add(self, tokens: FloatArray, scores: FloatArray) -> None:
        self.moments += Moments.of(tokens, scores)
        self.histogram.add(scores)

    def __add__(self, other: "Spread") -> "Spread":
        return Spread(self.moments + other.moments, self.histogram + other.histogram)
