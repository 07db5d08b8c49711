"""The figures of all shards, added up one shard at a time. Pure functions and one sum.

Memory is bounded, whatever the rows are: histograms have at most some ten thousand bins, sources
beyond the largest are one, and what is shown of single rows is a sample. Counts and histograms are
exact. A sample takes the smallest of random numbers that a row has from a fixed seed and its
place, so it is the same however the shards come.

Legend: S sequences (answers), P pairs.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batch_scorer.outputs.by_source import ALL_SOURCES, Sources
from batch_scorer.records import Commit, PairCounts
from batch_scorer.reports.page.values import FloatArray, IntArray, ShardValues

SAMPLE = 1_000
"""Points of the scatter; each is a line of its table, too."""
EXAMPLES = 3
"""Rows shown for each reason."""
LOWEST = 5
"""Pairs shown whose rejected answer scores highest above the chosen one."""
MOST_SOURCES = 20
OTHER_SOURCES = "(all other sources)"
MOST_MESSAGES = 10
"""Conversations of as many messages or more are counted together."""
MOST_ANSWERS = 64
"""How far the curve of best-of-n goes."""
_SEED = 20
_FINEST = 1_000
_BARS = 40
_PAD = 1e-5
"""The ends in a commit have six digits."""


# Histograms


@dataclass(frozen=True, slots=True)
class Grid:
    """Bins of equal width, a power of ten: bin i begins at (first + i) times ten to `power`.
    At least a thousand of them hold the values, so that they can be put together to a few."""

    power: int
    first: int
    size: int

    @classmethod
    def over(cls, low: float, high: float) -> "Grid":
        pad = _PAD * max(abs(low), abs(high))
        low, high = low - pad, high + pad
        span = max(high - low, 1e-9)
        power = math.floor(math.log10(span / _FINEST))
        first = math.floor(_scaled(low, -power)) - 1
        return cls(power, first, math.ceil(_scaled(high, -power)) + 1 - first)

    @property
    def edges(self) -> FloatArray:
        return self.edges_at(np.arange(self.first, self.first + self.size + 1))

    def edges_at(self, places: IntArray) -> FloatArray:
        """Each is the float64 nearest to its decimal number."""
        if self.power >= 0:
            return np.asarray(places * 10.0**self.power, np.float64)
        return np.asarray(places / 10.0**-self.power, np.float64)

    def count(self, values: FloatArray) -> IntArray:
        """int64[size], of finite values."""
        places = np.searchsorted(self.edges, values, side="right") - 1
        return np.bincount(np.clip(places, 0, self.size - 1), minlength=self.size)

    def shown(self, counts: IntArray) -> tuple[FloatArray, IntArray]:
        """Edges and counts of at most some forty bins of 1, 2 or 5 times a power of ten, from the
        first that holds a value to the last; empty without values."""
        held = np.flatnonzero(counts)
        if not len(held):
            return np.zeros(0), np.zeros(0, np.int64)
        low, high = self.first + int(held[0]), self.first + int(held[-1]) + 1
        widths = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
        width = next(w for w in widths if math.ceil(high / w) - low // w <= _BARS)
        places = np.arange(low // width, math.ceil(high / width) + 1) * width
        before = np.concatenate([[0], np.cumsum(counts)])
        at = np.clip(places - self.first, 0, self.size)
        return self.edges_at(places), np.diff(before[at])

    def quantiles(self, counts: IntArray, levels: Sequence[float]) -> list[float]:
        """As exact as a bin is wide."""
        below = np.cumsum(counts)
        places = np.searchsorted(below, np.array(levels) * below[-1])
        middles = (self.edges[:-1] + self.edges[1:]) / 2
        return [float(value) for value in middles[places]]


def _scaled(value: float, power: int) -> float:
    return value * 10.0**power if power >= 0 else value / 10.0**-power


# Sums


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
        return cls(len(x), mean_x, mean_y, float(dx @ dx), float(dy @ dy), float(dx @ dy))

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
    """Scores of one group: `moments` of tokens (x) and scores (y), their ends and histogram."""

    grid: Grid
    moments: Moments = field(default_factory=Moments)
    low: float = math.inf
    high: float = -math.inf
    counts: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, tokens: FloatArray, scores: FloatArray) -> None:
        if not len(scores):
            return
        counted = self.grid.count(scores)
        self.counts = self.counts + counted if len(self.counts) else counted
        self.moments += Moments.of(tokens, scores)
        self.low = min(self.low, float(scores.min()))
        self.high = max(self.high, float(scores.max()))


@dataclass(slots=True)
class LongerCounts:
    """Pairs whose answers differ in tokens: how often the longer one is the chosen one, and how
    often it scores higher (a tie is half)."""

    pairs: int = 0
    by_label: int = 0
    by_score: float = 0.0


@dataclass(slots=True)
class Gain:
    """Groups with at least so many scored answers: by how much the best of so many, drawn without
    putting back, scores above one answer, on the mean over all draws. `squares` are those of each
    group's gain."""

    groups: int = 0
    total: float = 0.0
    squares: float = 0.0


@dataclass(frozen=True, slots=True, order=True)
class Pick:
    """A row to be shown: what it is picked by (the smallest), its shard, and its place there."""

    order: float
    key: str
    place: int


@dataclass(slots=True)
class Tally:
    """What the shards that were added hold.

    `by_source` and `by_messages` are the spreads of the scores; `pairs` by source; `margins` are
    counts on `margin_grid`. `sure` is float64[3, 10]: pairs, the sum of how sure their margin is
    and of how often the label agrees, by bins of the former from 0.5 to 1. `within` are the centred
    sums of tokens and score where each row has its own means; `by_length` is float64[2, 32], scores
    and their sum by the power of two below the tokens. `points` are float64[k, 3]: the random
    number, tokens and score of the sample.
    """

    grid: Grid
    margin_grid: Grid
    shown_sources: frozenset[str]
    by_source: dict[str, Spread] = field(default_factory=dict)
    by_messages: dict[int, Spread] = field(default_factory=dict)
    pairs: dict[str, PairCounts] = field(default_factory=dict)
    margins: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    sure: FloatArray = field(default_factory=lambda: np.zeros((3, 10)))
    longer: LongerCounts = field(default_factory=LongerCounts)
    within: Moments = field(default_factory=Moments)
    by_length: FloatArray = field(default_factory=lambda: np.zeros((2, 32)))
    gains: dict[int, Gain] = field(default_factory=dict)
    points: FloatArray = field(default_factory=lambda: np.zeros((0, 3)))
    marked: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[Pick]] = field(default_factory=dict)
    lowest: list[Pick] = field(default_factory=list)

    @classmethod
    def for_commits(cls, commits: Iterable[Commit]) -> "Tally":
        """An empty one, with bins for the scores that these commits say they hold, and with their
        largest sources apart."""
        commits = list(commits)
        low, high = math.inf, -math.inf
        for commit in commits:
            for spread in commit.spread.values():
                if spread.quantiles:
                    low, high = min(low, spread.quantiles[0]), max(high, spread.quantiles[-1])
        if low > high:
            low, high = 0.0, 1.0
        reach = high - low + _PAD * max(abs(low), abs(high))
        return cls(Grid.over(low, high), Grid.over(-reach, reach), largest_sources(commits))

    @property
    def scores(self) -> int:
        return sum(spread.moments.n for spread in self.by_source.values())

    def add(self, key: str, values: ShardValues) -> None:
        """Count a shard, whose object is `key`."""
        rng = random_of(key)
        sources = shown_names(values.sources, self.shown_sources)
        self._count_scores(values, sources, rng)
        if values.sides == 2:
            self._count_pairs(key, values, sources)
        if values.is_group:
            self._count_groups(values)
        for (place, reason), order in zip(
            values.marked, rng.random(len(values.marked)).tolist(), strict=True
        ):
            self.marked[reason] = self.marked.get(reason, 0) + 1
            picks = self.examples.setdefault(reason, [])
            picks.append(Pick(order, key, place))
            if len(picks) > 4 * EXAMPLES:
                self.examples[reason] = sorted(picks)[:EXAMPLES]

    def _count_scores(self, values: ShardValues, sources: Any, rng: np.random.Generator) -> None:
        is_there = ~np.isnan(values.scores)
        rows, scores = values.rows[is_there], values.scores[is_there]
        tokens, messages = values.tokens[is_there], values.messages[is_there]
        owners = sources[rows]
        for source in sorted(set(owners)):
            here = owners == source
            self.by_source.setdefault(source, Spread(self.grid)).add(tokens[here], scores[here])
        capped = np.minimum(messages, MOST_MESSAGES)
        for number in np.unique(capped[capped >= 0]).tolist():
            here = capped == number
            self.by_messages.setdefault(number, Spread(self.grid)).add(tokens[here], scores[here])
        self.within += _within(rows, tokens, scores)
        places = np.clip(np.floor(np.log2(np.maximum(tokens, 1))).astype(np.int64), 0, 31)
        self.by_length[0] += np.bincount(places, minlength=32)
        self.by_length[1] += np.bincount(places, weights=scores, minlength=32)
        found = np.stack([rng.random(len(scores)), tokens, scores], axis=1)
        points = np.concatenate([self.points, found])
        self.points = points[np.argsort(points[:, 0], kind="stable")[:SAMPLE]]

    def _count_pairs(self, key: str, values: ShardValues, sources: Any) -> None:
        scores, tokens = values.scores.reshape(-1, 2), values.tokens.reshape(-1, 2)
        both = ~np.isnan(scores).any(axis=1)
        margins = (scores[:, 0] - scores[:, 1])[both]
        wins, ties, owners = margins > 0, margins == 0, sources[both]
        for source in sorted(set(owners)):
            here = owners == source
            counts = PairCounts(int(here.sum()), int(wins[here].sum()), int(ties[here].sum()))
            self.pairs[source] = self.pairs.get(source, PairCounts()) + counts
        if not len(margins):
            return
        counted = self.margin_grid.count(margins)
        self.margins = self.margins + counted if len(self.margins) else counted
        # Bradley and Terry: the margin is the log odds of the answer that scores higher.
        sure = 1 / (1 + np.exp(-np.abs(margins)))
        places = np.clip(np.floor((sure - 0.5) * 20).astype(np.int64), 0, 9)
        right = np.where(ties, 0.5, wins)
        for line, weights in enumerate((np.ones(len(sure)), sure, right)):
            self.sure[line] += np.bincount(places, weights=weights, minlength=10)
        longer = np.sign(tokens[both, 0] - tokens[both, 1])
        differ = longer != 0
        self.longer.pairs += int(differ.sum())
        self.longer.by_label += int((longer > 0).sum())
        self.longer.by_score += float(((longer * np.sign(margins))[differ] + 1).sum() / 2)
        found = np.flatnonzero(both)
        lowest = np.argsort(margins, kind="stable")[:LOWEST]
        picks = [Pick(float(margins[i]), key, int(found[i])) for i in lowest if margins[i] < 0]
        self.lowest = sorted([*self.lowest, *picks])[:LOWEST]

    def _count_groups(self, values: ShardValues) -> None:
        is_there = ~np.isnan(values.scores)
        rows, scores = values.rows[is_there], values.scores[is_there]
        order = np.lexsort((scores, rows))
        scores = scores[order]
        _, firsts, sizes = np.unique(rows[order], return_index=True, return_counts=True)
        for size in np.unique(sizes).tolist():
            groups = scores[firsts[sizes == size][:, None] + np.arange(size)]
            most = min(size, MOST_ANSWERS)
            gains = groups @ _best_of(size, most) - groups.mean(axis=1, keepdims=True)
            for k in range(1, most + 1):
                gain = self.gains.setdefault(k, Gain())
                gain.groups += len(groups)
                gain.total += float(gains[:, k - 1].sum())
                gain.squares += float((gains[:, k - 1] ** 2).sum())


def largest_sources(commits: Iterable[Commit]) -> frozenset[str]:
    """Those with the most rows, which are shown apart."""
    rows: dict[str, int] = {}
    for commit in commits:
        for source, spread in commit.spread.items():
            rows[source] = rows.get(source, 0) + spread.rows
    largest = sorted(rows, key=lambda source: (-rows[source], source))[:MOST_SOURCES]
    return frozenset({*largest, ALL_SOURCES})


def shown_names(sources: Sources, shown: frozenset[str]) -> Sources:
    """str[R], the source of each row as it is shown."""
    return np.array([s if s in shown else OTHER_SOURCES for s in sources], object)


def random_of(key: str) -> np.random.Generator:
    """The random numbers of a shard's rows."""
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.default_rng([_SEED, int.from_bytes(digest[:8], "big")])


def _within(rows: IntArray, tokens: FloatArray, scores: FloatArray) -> Moments:
    """The sums of what is left of tokens and score without their row's means; rows with one answer
    have nothing left, and are not counted."""
    if not len(rows):
        return Moments()
    _, places, sizes = np.unique(rows, return_inverse=True, return_counts=True)
    dx = tokens - (np.bincount(places, tokens) / sizes)[places]
    dy = scores - (np.bincount(places, scores) / sizes)[places]
    return Moments(
        n=int(sizes[sizes > 1].sum()), xx=float(dx @ dx), yy=float(dy @ dy), xy=float(dx @ dy)
    )


def _best_of(size: int, most: int) -> FloatArray:
    """float64[size, most]: the probability that the i-th lowest of `size` values is the highest of
    k + 1 of them, C(i, k) / C(size, k + 1)."""
    weights = [[math.comb(i, k) / math.comb(size, k + 1) for k in range(most)] for i in range(size)]
    return np.array(weights)
