"""The figures of all shards, added up one shard at a time. Pure functions and one sum.

Memory is bounded, whatever the rows are: histograms have at most some ten thousand bins, sources
beyond the largest are one, and what is shown of single rows is a sample. Counts and histograms are
exact. A sample takes the smallest of random numbers that a row has from a fixed seed and its
place, so it is the same however the shards come.

Legend: S sequences (answers), P pairs.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from batch_scorer.evaluation.pairs import CalibrationSums
from batch_scorer.outputs.by_source import ALL_SOURCES, Sources
from batch_scorer.records import Commit, PairCounts
from batch_scorer.reports.page.sums import Histogram, Moments, Spread
from batch_scorer.reports.page.values import FloatArray, IntArray, MemberValues, ShardValues

SAMPLE = 1_000
"""Points of the scatter; each is a line of its table, too."""
RANKED = 20_000
"""Answers whose ranks are compared."""
EXAMPLES = 3
"""Rows shown for each reason."""
LOWEST = 5
"""Rows shown because they are farthest off: pairs whose rejected answer scores highest above the
chosen one, rows whose answers members order most differently."""
MOST_SOURCES = 20
OTHER_SOURCES = "(all other sources)"
MOST_MODELS = 100
"""Names in a column of more are taken for something else than models that wrote answers."""
MOST_MESSAGES = 10
"""Conversations of as many messages or more are counted together."""
MOST_ANSWERS = 64
"""How far the curve of best-of-n goes."""
_SEED = 20
_ANSWERS_SHOWN = 8


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
    """A row to be shown: what it is picked by (the smallest, and of equal ones by `then`), its
    shard, and its place there."""

    order: float
    then: float = field(default=0.0, kw_only=True)
    key: str
    place: int


@dataclass(slots=True)
class Members:
    """What several models or functions say of the same answers.

    `spreads` are histograms and moments (y) of each one's scores, `pairs` the moments of the scores
    of two of them (x and y) by their places in `names`, over the answers that both have a score
    for. `points` are float64[k, 1 + M]: the random number and all scores of a sample of the answers
    that every member has a score for, of which there are `complete`. `shards_aside` have columns of
    other members and are not counted. `disagreement` counts rows,
    and `by_source` has their number and the sum of their disagreements. `stds` are standard
    deviations over members. `apart` are the rows that members order most differently, each with the
    members' scores in words.
    """

    names: tuple[str, ...]
    spreads: list[Spread]
    pairs: dict[tuple[int, int], Moments]
    points: FloatArray
    complete: int = 0
    shards_aside: int = 0
    disagreement: Histogram = field(default_factory=Histogram)
    by_source: dict[str, tuple[int, float]] = field(default_factory=dict)
    stds: Histogram = field(default_factory=Histogram)
    apart: list[tuple[Pick, str]] = field(default_factory=list)

    @classmethod
    def of(cls, names: tuple[str, ...]) -> "Members":
        """None of their scores yet."""
        places = range(len(names))
        return cls(
            names,
            [Spread() for _ in names],
            {(i, j): Moments() for j in places for i in range(j)},
            np.zeros((0, 1 + len(names))),
        )

    def add(self, key: str, values: MemberValues, sources: Sources) -> None:
        """Count a shard. `sources` is str[R], as they are shown."""
        is_there = ~np.isnan(values.scores)
        for member, spread in enumerate(self.spreads):
            own = values.scores[is_there[:, member], member]
            spread.add(np.zeros(len(own)), own)
        for i, j in self.pairs:
            both = is_there[:, i] & is_there[:, j]
            self.pairs[i, j] += Moments.of(values.scores[both, i], values.scores[both, j])
        complete = values.scores[is_there.all(axis=1)]
        self.complete += len(complete)
        random = random_of(f"{key} members").random(len(complete))
        self.points = _smallest(self.points, np.column_stack([random, complete]), RANKED)
        self.stds.add(values.stds[~np.isnan(values.stds)])
        ordered = np.flatnonzero(~np.isnan(values.disagreement))
        found = values.disagreement[ordered]
        self.disagreement.add(found)
        for source in sorted(set(sources[ordered])):
            here = found[sources[ordered] == source]
            rows, total = self.by_source.get(source, (0, 0.0))
            self.by_source[source] = (rows + len(here), total + float(here.sum()))
        stds = np.zeros(len(values.disagreement))
        np.maximum.at(stds, values.rows, np.nan_to_num(values.stds))
        most = np.lexsort((ordered, -stds[ordered], -found))[:LOWEST]
        picked = [
            (Pick(-float(found[i]), key, row, then=-float(stds[row])), values)
            for i, row in zip(most.tolist(), ordered[most].tolist(), strict=True)
            if found[i] > 0
        ]
        told = [(pick, self._told(each, pick.place)) for pick, each in picked]
        self.apart = sorted([*self.apart, *told])[:LOWEST]

    def _told(self, values: MemberValues, row: int) -> str:
        """Each member's scores of a row, in words."""
        scores = values.scores[values.rows == row]
        more = " …" if len(scores) > _ANSWERS_SHOWN else ""
        return "; ".join(
            f"{name} {', '.join(f'{value:.4g}' for value in column[:_ANSWERS_SHOWN])}{more}"
            for name, column in zip(self.names, scores.T.tolist(), strict=True)
        )


@dataclass(slots=True)
class Tally:
    """What the shards that were added hold.

    `by_source`, `by_messages`, `by_model` (that wrote the answer) and `by_length` (the power of two
    not above the tokens) are the spreads of the scores; `by_model` is None where there are too many
    names. `pairs` are by source, without those that no model can tell apart, of which there are
    `same_tokens`; `margins` and `calibration` (None where scores say nothing of how sure they are)
    are of the same pairs. `within` are the centred sums of tokens and score where each row has its
    own means. `points` are float64[k, 3]: the random number, tokens and score of the sample.
    `members` is None of an output with one score for an answer.
    """

    shown_sources: frozenset[str]
    calibration: CalibrationSums | None = None
    by_source: dict[str, Spread] = field(default_factory=dict)
    by_messages: dict[int, Spread] = field(default_factory=dict)
    by_model: dict[str, Spread] | None = field(default_factory=dict)
    by_length: dict[int, Spread] = field(default_factory=dict)
    pairs: dict[str, PairCounts] = field(default_factory=dict)
    same_tokens: int = 0
    margins: Histogram = field(default_factory=Histogram)
    longer: LongerCounts = field(default_factory=LongerCounts)
    within: Moments = field(default_factory=Moments)
    gains: dict[int, Gain] = field(default_factory=dict)
    points: FloatArray = field(default_factory=lambda: np.zeros((0, 3)))
    members: Members | None = None
    marked: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[Pick]] = field(default_factory=dict)
    lowest: list[Pick] = field(default_factory=list)

    @classmethod
    def for_commits(
        cls, commits: Iterable[Commit], judge: Mapping[str, Any] | None = None
    ) -> "Tally":
        """An empty one, which shows the largest sources of these commits apart. `judge` is a
        judge's page as JSON, None for a reward model."""
        return cls(largest_sources(commits), CalibrationSums.of_scores(judge))

    @property
    def every(self) -> Spread:
        """All scores."""
        return sum(self.by_source.values(), Spread())

    def add(self, key: str, values: ShardValues) -> None:
        """Count a shard, whose object is `key`."""
        rng = random_of(key)
        sources = shown_names(values.sources, self.shown_sources)
        self._count_scores(values, sources, rng)
        if values.sides == 2:
            self._count_pairs(key, values, sources)
        if values.is_group:
            self._count_groups(values)
        if values.members is not None:
            names = values.members.names
            self.members = self.members or Members.of(names)
            if names == self.members.names:
                self.members.add(key, values.members, sources)
            else:
                self.members.shards_aside += 1
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
        _count(self.by_source, sources[rows], tokens, scores)
        capped = np.minimum(messages, MOST_MESSAGES)
        known = capped >= 0
        _count(self.by_messages, capped[known], tokens[known], scores[known])
        powers = np.floor(np.log2(np.maximum(tokens, 1))).astype(np.int64)
        _count(self.by_length, powers, tokens, scores)
        if len(values.models) and self.by_model is not None:
            models = np.asarray(values.models)[is_there]
            named = np.array([name is not None for name in models], dtype=bool)
            _count(self.by_model, models[named], tokens[named], scores[named])
            if len(self.by_model) > MOST_MODELS:
                self.by_model = None
        self.within += _within(rows, tokens, scores)
        found = np.stack([rng.random(len(scores)), tokens, scores], axis=1)
        self.points = _smallest(self.points, found, SAMPLE)

    def _count_pairs(self, key: str, values: ShardValues, sources: Any) -> None:
        scores, tokens = values.scores.reshape(-1, 2), values.tokens.reshape(-1, 2)
        both = ~np.isnan(scores).any(axis=1)
        self.same_tokens += int((both & values.same_tokens).sum())
        both &= ~values.same_tokens
        margins = (scores[:, 0] - scores[:, 1])[both]
        wins, ties, owners = margins > 0, margins == 0, sources[both]
        for source in sorted(set(owners)):
            here = owners == source
            counts = PairCounts(int(here.sum()), int(wins[here].sum()), int(ties[here].sum()))
            self.pairs[source] = self.pairs.get(source, PairCounts()) + counts
        if not len(margins):
            return
        self.margins.add(margins)
        if self.calibration is not None:
            self.calibration.add(scores[both, 0], scores[both, 1])
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


def _count(spreads: dict[Any, Spread], groups: Any, tokens: FloatArray, scores: FloatArray) -> None:
    """Count S scores by their group."""
    encoded = pa.array(groups).dictionary_encode()
    codes = encoded.indices.to_numpy()
    for group, code in sorted((g, c) for c, g in enumerate(encoded.dictionary.to_pylist())):
        here = codes == code
        spreads.setdefault(group, Spread()).add(tokens[here], scores[here])


def _smallest(points: FloatArray, found: FloatArray, most: int) -> FloatArray:
    """Of both, float64[k, n] each, those with the smallest first value."""
    points = np.concatenate([points, found])
    return points[np.argsort(points[:, 0], kind="stable")[:most]]


def _within(rows: IntArray, tokens: FloatArray, scores: FloatArray) -> Moments:
    """The sums of what is left of tokens and score without their row's means; rows with one answer
    have nothing left, and are not counted."""
    if not len(rows):
        return Moments()
    _, places, sizes = np.unique(rows, return_inverse=True, return_counts=True)
    dx = tokens - (np.bincount(places, tokens) / sizes)[places]
    dy = scores - (np.bincount(places, scores) / sizes)[places]
    left = Moments.of(dx, dy)  # whose means are 0 already, up to rounding
    return replace(left, n=int(sizes[sizes > 1].sum()), mean_x=0.0, mean_y=0.0)


def _best_of(size: int, most: int) -> FloatArray:
    """float64[size, most]: the probability that the i-th lowest of `size` values is the highest of
    k + 1 of them, C(i, k) / C(size, k + 1)."""
    weights = [[math.comb(i, k) / math.comb(size, k + 1) for k in range(most)] for i in range(size)]
    return np.array(weights)
