"""The figures of the page: each is a drawing and a table of the values in it. Pure functions."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from batch_scorer.evaluation.result import Estimate, wilson
from batch_scorer.records import PairCounts
from batch_scorer.reports.page.tally import (
    MOST_MESSAGES,
    OTHER_SOURCES,
    SAMPLE,
    Moments,
    Spread,
    Tally,
    correlation,
)

_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)

Cell: TypeAlias = str | int | float | None
"""A value in a table; None where there is none."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A line of a drawing that names its rows: `ends` are drawn thin, `inner` thick, `value` as a
    dot."""

    name: str
    ends: tuple[float, float]
    value: float
    inner: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Intervals:
    """One row for each, over one axis."""

    label: str
    rows: Sequence[Interval]
    limits: tuple[float, float] | None = None
    reference: float | None = None
    """Where a line is drawn to compare with."""


@dataclass(frozen=True, slots=True)
class Bars:
    """A histogram: n + 1 edges and n heights."""

    label: str
    edges: Sequence[float]
    heights: Sequence[float]
    height_label: str
    reference: float | None = None


@dataclass(frozen=True, slots=True)
class Points:
    """Points, joined by a line or not; `lows` and `highs` are the ends of each one's interval, and
    `diagonal` draws where x is y. With `is_log` x is drawn by its logarithm."""

    x_label: str
    y_label: str
    xs: Sequence[float]
    ys: Sequence[float]
    is_joined: bool = False
    lows: Sequence[float] = ()
    highs: Sequence[float] = ()
    diagonal: bool = False
    is_log: bool = False


Drawing: TypeAlias = Intervals | Bars | Points


@dataclass(frozen=True, slots=True)
class Figure:
    """What the page shows of one question. The columns at the places `words` hold text."""

    key: str
    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    drawing: Drawing | None = None
    words: Collection[int] = (0,)


@dataclass(frozen=True, slots=True)
class Section:
    """Figures under one heading."""

    title: str
    figures: Sequence[Figure]


def sections_of(tally: Tally, *, has_odds: bool) -> Iterator[Section]:
    """Those that the rows have values for. `has_odds`: scores are a reward model's, whose margins
    can be taken for log odds."""
    if not tally.scores:
        return
    yield Section("Scores", list(_scores(tally)))
    if tally.pairs:
        yield Section("Pairs", list(_pairs(tally, has_odds=has_odds)))
    yield Section("Length", list(_length(tally)))
    if len(tally.gains) > 1:
        yield Section("Best of n", [_best_of_n(tally)])


# Scores


def _scores(tally: Tally) -> Iterator[Figure]:
    all_counts = np.sum([spread.counts for spread in tally.by_source.values()], axis=0)
    edges, counts = tally.grid.shown(all_counts)
    yield Figure(
        "scores",
        "All scores",
        f"{tally.scores:,} answers have a score. Every one is counted.",
        ("from", "to before", "answers"),
        list(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)),
        Bars("score", edges.tolist(), counts.tolist(), "answers"),
        words=(),
    )
    named = sorted(tally.by_source.items(), key=lambda item: (item[0] == OTHER_SOURCES, item[0]))
    yield _spreads("by-source", "Scores by source", "source", named)
    if len(tally.by_messages) > 1:
        by_messages = [
            (f"{number}{' or more' if number == MOST_MESSAGES else ''}", spread)
            for number, spread in sorted(tally.by_messages.items())
        ]
        yield _spreads(
            "by-messages",
            "Scores by length of the conversation",
            "messages",
            by_messages,
            "Messages in the columns of prompt and answer, where they can be counted.",
        )


def _spreads(
    key: str, title: str, name: str, spreads: Sequence[tuple[str, Spread]], text: str = ""
) -> Figure:
    rows, drawn = [], []
    for label, spread in spreads:
        low, lower, middle, upper, high = spread.grid.quantiles(spread.counts, _LEVELS)
        moments = spread.moments
        rows.append(
            (
                *(label, moments.n, moments.mean_y, moments.std_y),
                *(spread.low, low, lower, middle, upper, high, spread.high),
            )
        )
        drawn.append(Interval(label, (low, high), middle, (lower, upper)))
    return Figure(
        key,
        title,
        f"{text} The dot is the median, the thick line holds the middle half, the thin one nine in "
        "ten.".strip(),
        (name, "answers", "mean", "std", "least", "5 %", "25 %", "median", "75 %", "95 %", "most"),
        rows,
        Intervals("score", drawn),
    )


# Pairs


def _pairs(tally: Tally, *, has_odds: bool) -> Iterator[Figure]:
    every = sum(tally.pairs.values(), PairCounts())
    named = [*sorted(tally.pairs.items()), *([("all", every)] if len(tally.pairs) > 1 else [])]
    shares = [(name, counts, _accuracy(counts)) for name, counts in named]
    yield Figure(
        "accuracy",
        "Chosen above rejected",
        "The share of pairs whose chosen answer scores higher; a tie is a miss. The lines are 95 % "
        "intervals (Wilson).",
        ("source", "pairs", "chosen higher", "ties", "accuracy", "from", "to"),
        [
            (name, c.pairs, c.chosen_higher, c.ties, share.value, share.low, share.high)
            for name, c, share in shares
        ],
        Intervals(
            "accuracy",
            [Interval(name, (share.low, share.high), share.value) for name, _, share in shares],
            limits=(0.0, 1.0),
            reference=0.5,
        ),
    )
    edges, counts = tally.margin_grid.shown(tally.margins)
    yield Figure(
        "margins",
        "Margins",
        "score_chosen minus score_rejected, of every pair. Left of 0 the label is missed.",
        ("from", "to before", "pairs"),
        list(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)),
        Bars("margin", edges.tolist(), counts.tolist(), "pairs", reference=0.0),
        words=(),
    )
    if has_odds:
        yield _calibration(tally)


def _accuracy(counts: PairCounts) -> Estimate:
    return wilson(counts.chosen_higher / counts.pairs, counts.pairs)


def _calibration(tally: Tally) -> Figure:
    bins = []
    for place, (pairs, sure, right) in enumerate(tally.sure.T.tolist()):
        if pairs:
            share = wilson(right / pairs, int(pairs))
            bins.append((0.5 + place / 20, 0.55 + place / 20, int(pairs), sure / pairs, share))
    error = sum(n * abs(sure - share.value) for _, _, n, sure, share in bins)
    return Figure(
        "calibration",
        "How sure, and how often right",
        "The sigmoid of the margin, taken as the probability that the answer with the higher score "
        "is the better one, against how often the label agrees (a tie is half). On the diagonal "
        "the scores are as right as they are sure. Expected calibration error: "
        f"{error / tally.sure[0].sum():.4f}.",
        ("sure from", "to before", "pairs", "sure (mean)", "right", "from", "to"),
        [
            (round(low, 2), round(high, 2), n, sure, share.value, share.low, share.high)
            for low, high, n, sure, share in bins
        ],
        Points(
            "sure",
            "right",
            [sure for *_, sure, _ in bins],
            [share.value for *_, share in bins],
            is_joined=True,
            lows=[share.low for *_, share in bins],
            highs=[share.high for *_, share in bins],
            diagonal=True,
        ),
        words=(),
    )


# Length


def _length(tally: Tally) -> Iterator[Figure]:
    every = sum((spread.moments for spread in tally.by_source.values()), Moments())
    _, tokens, scores = tally.points.T.tolist()
    sample = len(tally.points)
    shown = "all of them" if sample == every.n else f"a random sample of {sample:,} of them"
    yield Figure(
        "length-points",
        "Score and length",
        f"Each point is an answer: its score and the tokens of its sequence, prompt included. Of "
        f"{every.n:,} answers, {shown} ({SAMPLE:,} at most are drawn, always the same ones).",
        ("tokens", "score"),
        [(int(x), y) for x, y in zip(tokens, scores, strict=True)],
        Points("tokens", "score", tokens, scores, is_log=True),
        words=(),
    )
    held = [
        (2**place, 2 ** (place + 1), int(n), total / n)
        for place, (n, total) in enumerate(tally.by_length.T.tolist())
        if n
    ]
    yield Figure(
        "length-means",
        "Mean score by length",
        "All answers, by the tokens of their sequences.",
        ("tokens from", "to before", "answers", "mean score"),
        held,
        Points(
            "tokens",
            "mean score",
            [math.sqrt(low * high) for low, high, *_ in held],
            [mean for *_, mean in held],
            is_joined=True,
            is_log=True,
        ),
        words=(),
    )
    yield _correlations(tally, every)
    if (longer := tally.longer).pairs:
        shares = [longer.by_label / longer.pairs, longer.by_score / longer.pairs]
        names = ("the longer answer is the chosen one", "the longer answer scores higher")
        yield Figure(
            "longer",
            "Does the longer answer win?",
            f"Of {longer.pairs:,} pairs whose answers differ in tokens. Where the scores prefer "
            "the longer answer more often than the labels do, they reward length itself. A tie is "
            "half.",
            ("", "pairs", "share"),
            [(name, longer.pairs, share) for name, share in zip(names, shares, strict=True)],
            Intervals(
                "share",
                [
                    Interval(name, (found.low, found.high), share)
                    for name, share in zip(names, shares, strict=True)
                    for found in [wilson(share, longer.pairs)]
                ],
                limits=(0.0, 1.0),
                reference=0.5,
            ),
        )


def _correlations(tally: Tally, every: Moments) -> Figure:
    parts = [spread.moments for spread in tally.by_source.values()]
    within = tally.within
    rows: list[tuple[Cell, ...]] = [("all answers", every.n, every.correlation)]
    if len(parts) > 1:
        sums = (sum(getattr(part, name) for part in parts) for name in ("xx", "yy", "xy"))
        rows.append(("partial, given the source", every.n, correlation(*sums)))
    if within.n:
        rows.append(("partial, given the row", within.n, within.correlation))
    return Figure(
        "length-correlation",
        "Correlation of score and length",
        "Pearson's, of score and tokens. A partial one is of what is left without the means of "
        "the source, or of the row: the last compares only answers to one prompt.",
        ("among", "answers", "correlation"),
        rows,
    )


# Best of n


def _best_of_n(tally: Tally) -> Figure:
    rows, lows, highs = [], [], []
    for number, gain in sorted(tally.gains.items()):
        mean = gain.total / gain.groups
        spread = max(gain.squares / gain.groups - mean**2, 0.0)
        error = math.sqrt(spread / gain.groups)
        rows.append((number, gain.groups, mean, error))
        lows.append(mean - 2 * error)
        highs.append(mean + 2 * error)
    return Figure(
        "best-of-n",
        "What the best of n gains",
        "By how much the highest of n answers to a prompt scores above one answer, the mean over "
        "all ways to draw n of those there are, and over the prompts with as many. Lines are two "
        "standard errors over prompts. It is a gain in score, not a proof of quality.",
        ("n", "prompts", "gain", "standard error"),
        rows,
        Points(
            "n",
            "gain",
            [float(number) for number, *_ in rows],
            [mean for _, _, mean, _ in rows],
            is_joined=True,
            lows=lows,
            highs=highs,
        ),
        words=(),
    )
