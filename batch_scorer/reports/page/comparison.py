"""Two models' scores of the same rows, added up one shard at a time, and their figures. Pure.

Legend: S answers that both have a score for, of R rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batch_scorer.evaluation.result import wilson
from batch_scorer.nightly.drift import ranks
from batch_scorer.records import Commit
from batch_scorer.reports.page.figures import Cell, Figure, Interval, Intervals, Points, Section
from batch_scorer.reports.page.sums import Moments
from batch_scorer.reports.page.tally import (
    LOWEST,
    RANKED,
    SAMPLE,
    Pick,
    largest_sources,
    random_of,
    shown_names,
)
from batch_scorer.reports.page.values import FloatArray, IntArray, ShardValues, places_of


@dataclass(slots=True)
class Decided:
    """Rows with several answers: in how many both models have the same answers at the top."""

    rows: int = 0
    same: int = 0


@dataclass(slots=True)
class Comparison:
    """What the shards of both hold.

    `scales` are mean and standard deviation of A's and B's scores. `answers` counts those with a
    score of both, of A alone, and of B alone. `moments` are of A's score (x) and B's (y). `pairs`
    is int64[2, 2]: A right or not, B right or not; right is chosen above rejected. `points` are
    float64[k, 3]: the random number and both scores of a sample. `apart` are the rows that differ
    most, by the negative of their difference.
    """

    scales: tuple[tuple[float, float], tuple[float, float]]
    shown_sources: frozenset[str]
    answers: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("both", "a", "b"), 0))
    moments: Moments = field(default_factory=Moments)
    pairs: IntArray = field(default_factory=lambda: np.zeros((2, 2), np.int64))
    by_source: dict[str, Decided] = field(default_factory=dict)
    points: FloatArray = field(default_factory=lambda: np.zeros((0, 3)))
    apart: list[Pick] = field(default_factory=list)

    @classmethod
    def for_commits(cls, a: Sequence[Commit], b: Sequence[Commit]) -> "Comparison":
        return cls((_scale(a), _scale(b)), largest_sources([*a, *b]))

    def add(self, key: str, a: ShardValues, b: ShardValues) -> None:
        """Count a shard of the same rows; `key` is A's object."""
        # A row without any score may have no list of scores, so answers are found by their place.
        places_a, places_b = places_of(a.rows), places_of(b.rows)
        _, at_a, at_b = np.intersect1d(places_a, places_b, return_indices=True)
        x, y, rows = a.scores[at_a], b.scores[at_b], a.rows[at_a]
        both = ~np.isnan(x) & ~np.isnan(y)
        num_both = int(both.sum())
        self.answers["both"] += num_both
        self.answers["a"] += int((~np.isnan(a.scores)).sum()) - num_both
        self.answers["b"] += int((~np.isnan(b.scores)).sum()) - num_both
        x, y, rows = x[both], y[both], rows[both]
        if not len(x):
            return
        self.moments += Moments.of(x, y)
        found = np.stack([random_of(key).random(len(x)), x, y], axis=1)
        points = np.concatenate([self.points, found])
        self.points = points[np.argsort(points[:, 0], kind="stable")[:RANKED]]
        self._count_rows(key, x, y, rows, a.sources)
        if a.sides == 2:
            of_both = np.bincount(rows, minlength=len(a.sources)) == 2
            of_both &= ~(a.same_tokens | b.same_tokens)  # no model can tell these apart
            in_pairs = of_both[rows]
            sides_a, sides_b = (s[in_pairs].reshape(-1, 2) for s in (x, y))
            wrong = [(s[:, 0] <= s[:, 1]).astype(np.int64) for s in (sides_a, sides_b)]
            np.add.at(self.pairs, (wrong[0], wrong[1]), 1)

    def _count_rows(
        self, key: str, x: FloatArray, y: FloatArray, rows: IntArray, sources: Any
    ) -> None:
        owners, firsts, sizes = np.unique(rows, return_index=True, return_counts=True)
        tops = (s == np.repeat(np.maximum.reduceat(s, firsts), sizes) for s in (x, y))
        differs = np.logical_xor(*tops)
        same = np.add.reduceat(differs.astype(np.int64), firsts) == 0
        named = shown_names(sources, self.shown_sources)[owners]
        for source in sorted(set(named[sizes > 1])):
            here = (named == source) & (sizes > 1)
            decided = self.by_source.setdefault(source, Decided())
            decided.rows += int(here.sum())
            decided.same += int(same[here].sum())
        (mean_a, std_a), (mean_b, std_b) = self.scales
        gaps = (x - mean_a) / std_a - (y - mean_b) / std_b
        alone = np.abs(gaps)[firsts]
        reach = np.maximum.reduceat(gaps, firsts) - np.minimum.reduceat(gaps, firsts)
        apart = np.where(sizes > 1, reach, alone)
        largest = np.argsort(-apart, kind="stable")[:LOWEST]
        picks = [Pick(-float(apart[i]), key, int(owners[i])) for i in largest if apart[i] > 0]
        self.apart = sorted([*self.apart, *picks])[:LOWEST]


def _scale(commits: Iterable[Commit]) -> tuple[float, float]:
    """Mean and standard deviation of all scores; 1 in place of a deviation of 0."""
    every = Moments()
    for commit in commits:
        for spread in commit.spread.values():
            if spread.mean is not None and spread.std is not None:
                n = spread.scores
                every += Moments(n, 0.0, spread.mean, 0.0, n * spread.std**2, 0.0)
    return every.mean_y, every.std_y if every.yy > 0 else 1.0


def compared_sections(found: Comparison) -> Iterator[Section]:
    """Those that the rows have values for."""
    if not found.answers["both"]:
        return
    yield Section("Scores", [_points(found), _correlations(found)])
    decisions = []
    if found.by_source:
        decisions.append(_decisions(found))
    if found.pairs.sum():
        decisions.append(_pairs(found))
    if decisions:
        yield Section("Decisions", decisions)


def _points(found: Comparison) -> Figure:
    _, xs, ys = found.points[:SAMPLE].T.tolist()
    every = found.answers["both"]
    shown = "all of them" if len(xs) == every else f"a random sample of {len(xs):,} of them"
    return Figure(
        "ab-points",
        "B against A",
        f"Each point is an answer. Of {every:,} that both have a score for, {shown} ({SAMPLE:,} at "
        "most are drawn, always the same ones).",
        ("A", "B"),
        list(zip(xs, ys, strict=True)),
        Points("A", "B", xs, ys),
        words=(),
    )


def _correlations(found: Comparison) -> Figure:
    _, xs, ys = found.points.T
    ranked = Moments.of(ranks(xs), ranks(ys))
    every = found.answers["both"]
    sampled = "" if len(xs) == every else " of a random sample"
    rows: list[tuple[Cell, ...]] = [
        ("Pearson's, of the scores", every, found.moments.correlation),
        (f"Spearman's, of the ranks{sampled}", len(xs), ranked.correlation),
    ]
    return Figure(
        "ab-correlation",
        "Correlation of A and B",
        "Two models' scores have no common scale: ranks say more than values.",
        ("", "answers", "correlation"),
        rows,
    )


def _decisions(found: Comparison) -> Figure:
    every = Decided(
        sum(d.rows for d in found.by_source.values()), sum(d.same for d in found.by_source.values())
    )
    named = sorted(found.by_source.items())
    named += [("all", every)] if len(named) > 1 else []
    shares = [(name, d, wilson(d.same / d.rows, d.rows)) for name, d in named]
    return Figure(
        "ab-decisions",
        "The same answer on top",
        "Of rows with several answers, the share in which both models score the same one highest. "
        "The lines are 95 % intervals (Wilson).",
        ("source", "rows", "same", "share", "from", "to"),
        [(name, d.rows, d.same, s.value, s.low, s.high) for name, d, s in shares],
        Intervals(
            "share",
            [Interval(name, (s.low, s.high), s.value) for name, _, s in shares],
            limits=(0.0, 1.0),
        ),
    )


def _pairs(found: Comparison) -> Figure:
    total = int(found.pairs.sum())
    names = ("both are right", "only A is right", "only B is right", "neither is right")
    counts = found.pairs.ravel().tolist()
    shares = [count / total for count in counts]
    intervals = [wilson(share, total) for share in shares]
    return Figure(
        "ab-pairs",
        "Who is right",
        "Of pairs that both have scores for and whose sides have different tokens; right is chosen "
        "strictly above rejected.",
        ("", "pairs", "share"),
        list(zip(names, counts, shares, strict=True)),
        Intervals(
            "share",
            [
                Interval(name, (each.low, each.high), share)
                for name, share, each in zip(names, shares, intervals, strict=True)
            ],
            limits=(0.0, 1.0),
        ),
    )
