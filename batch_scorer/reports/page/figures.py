"""The figures of the page: each is a drawing and a table of the values in it. Pure functions."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from batch_scorer.evaluation.result import Calibration, wilson
from batch_scorer.nightly.drift import ranks
from batch_scorer.records import PairCounts
from batch_scorer.reports.page.sums import Histogram, Moments, Spread, correlation
from batch_scorer.reports.page.tally import (
    MOST_MESSAGES,
    MOST_SOURCES,
    OTHER_SOURCES,
    RANKED,
    SAMPLE,
    Members,
    Tally,
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
    `diagonal` draws where x is y. With `is_log` x is drawn by its logarithm,
    with `is_whole` it has whole numbers only."""

    x_label: str
    y_label: str
    xs: Sequence[float]
    ys: Sequence[float]
    is_joined: bool = False
    lows: Sequence[float] = ()
    highs: Sequence[float] = ()
    diagonal: bool = False
    is_log: bool = False
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class Lines:
    """Several values over one axis of whole numbers, at most four, each a line with its name."""

    x_label: str
    y_label: str
    xs: Sequence[float]
    lines: Mapping[str, Sequence[float]]


Drawing: TypeAlias = Intervals | Bars | Points | Lines


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


def sections_of(tally: Tally) -> Iterator[Section]:
    """Those that the rows have values for."""
    if not tally.every.moments.n:
        return
    yield Section("Scores", list(_scores(tally)))
    if tally.pairs:
        yield Section("Pairs", list(_pairs(tally)))
    yield Section("Length", list(_length(tally)))
    if len(tally.gains) > 1:
        yield Section("Best of n", [_best_of_n(tally)])
    if tally.members is not None:
        yield Section("Members", list(_members(tally.members)))


# Scores


def _scores(tally: Tally) -> Iterator[Figure]:
    every = tally.every
    yield _histogram(
        "scores",
        "All scores",
        f"{every.moments.n:,} answers have a score. Every one is counted.",
        every.histogram,
        ("score", "answers"),
    )
    named = sorted(tally.by_source.items(), key=lambda item: (item[0] == OTHER_SOURCES, item[0]))
    yield _spreads("by-source", "Scores by source", "source", named)
    if tally.by_model:
        yield _by_model(tally.by_model)
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


def _histogram(
    key: str,
    title: str,
    text: str,
    histogram: Histogram,
    labels: tuple[str, str],
    reference: float | None = None,
) -> Figure:
    """`labels` are those of the values and of what is counted."""
    edges, counts = (found.tolist() for found in histogram.shown())
    return Figure(
        key,
        title,
        text,
        ("from", "to before", labels[1]),
        list(zip(edges[:-1], edges[1:], counts, strict=True)),
        Bars(labels[0], edges, counts, labels[1], reference),
        words=(),
    )


def _by_model(spreads: Mapping[str, Spread]) -> Figure:
    named = sorted(spreads.items(), key=lambda item: (-item[1].moments.n, item[0]))
    shown = named[:MOST_SOURCES]
    if rest := named[MOST_SOURCES:]:
        shown.append(("(all other models)", sum((spread for _, spread in rest), Spread())))
    return _spreads(
        "by-model",
        "Scores by the model that wrote the answer",
        "model",
        shown,
        "Where rows name it.",
    )


def _spreads(
    key: str, title: str, name: str, spreads: Sequence[tuple[str, Spread]], text: str = ""
) -> Figure:
    rows, drawn = [], []
    for label, spread in spreads:
        moments, histogram = spread.moments, spread.histogram
        low, lower, middle, upper, high = histogram.quantiles(_LEVELS)
        rows.append(
            (
                *(label, moments.n, moments.mean_y, moments.std_y),
                *(histogram.low, low, lower, middle, upper, high, histogram.high),
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


def _pairs(tally: Tally) -> Iterator[Figure]:
    every = sum(tally.pairs.values(), PairCounts())
    named = [*sorted(tally.pairs.items()), *([("all", every)] if len(tally.pairs) > 1 else [])]
    left_out = ""
    if tally.same_tokens:
        left_out = (
            f" {tally.same_tokens:,} pairs are left out here, whose sides have the same tokens: no "
            "model can tell them apart."
        )
    yield accuracy_figure(
        "accuracy",
        "Chosen above rejected",
        "The share of pairs whose chosen answer scores strictly higher; a tie is a miss, and "
        f"counted beside it. The lines are 95 % intervals (Wilson).{left_out}",
        "source",
        named,
    )
    yield _histogram(
        "margins",
        "Margins",
        "score_chosen minus score_rejected, of the same pairs. Left of 0 the label is missed.",
        tally.margins,
        ("margin", "pairs"),
        reference=0.0,
    )
    if tally.calibration is not None and (found := tally.calibration.result()) is not None:
        yield _calibration(found)


def accuracy_figure(
    key: str, title: str, text: str, name: str, named: Sequence[tuple[str, PairCounts]]
) -> Figure:
    """How often chosen scores higher, a line for each name; `name` says what they are."""
    shares = [(label, c, wilson(c.chosen_higher / c.pairs, c.pairs)) for label, c in named]
    return Figure(
        key,
        title,
        text,
        (name, "pairs", "chosen higher", "ties", "accuracy", "from", "to"),
        [
            (label, c.pairs, c.chosen_higher, c.ties, share.value, share.low, share.high)
            for label, c, share in shares
        ],
        Intervals(
            "accuracy",
            [Interval(label, (share.low, share.high), share.value) for label, _, share in shares],
            limits=(0.0, 1.0),
            reference=0.5,
        ),
    )


def _calibration(found: Calibration) -> Figure:
    return Figure(
        "calibration",
        "How sure, and how often right",
        f"The probability that the answer with the higher score is the better one, by {found.basis}"
        ", against how often the label agrees (a tie is half). On the diagonal the scores are as "
        f"right as they are sure. Expected calibration error: {found.expected_error:.4f}, Brier "
        f"score: {found.brier:.4f}.",
        ("sure from", "to before", "pairs", "sure (mean)", "right", "from", "to"),
        [
            (b.low, b.high, b.pairs, b.sure, b.right.value, b.right.low, b.right.high)
            for b in found.bins
        ],
        Points(
            "sure",
            "right",
            [b.sure for b in found.bins],
            [b.right.value for b in found.bins],
            is_joined=True,
            lows=[b.right.low for b in found.bins],
            highs=[b.right.high for b in found.bins],
            diagonal=True,
        ),
        words=(),
    )


# Length


def _length(tally: Tally) -> Iterator[Figure]:
    every = tally.every.moments
    _, tokens, scores = tally.points.T.tolist()
    yield Figure(
        "length-points",
        "Score and length",
        "Each point is an answer: its score and the tokens of its sequence, prompt included. "
        + sampled(len(tokens), every.n),
        ("tokens", "score"),
        [(int(x), y) for x, y in zip(tokens, scores, strict=True)],
        Points("tokens", "score", tokens, scores, is_log=True),
        words=(),
    )
    held = [
        (2**power, 2 ** (power + 1), spread, spread.histogram.quantiles((0.05, 0.5, 0.95)))
        for power, spread in sorted(tally.by_length.items())
    ]
    yield Figure(
        "length-means",
        "Scores by length",
        "All answers, by the tokens of their sequences: the mean score, and a line that holds nine "
        "in ten.",
        ("tokens from", "to before", "answers", "mean score", "std", "5 %", "median", "95 %"),
        [
            (low, high, spread.moments.n, spread.moments.mean_y, spread.moments.std_y, *quantiles)
            for low, high, spread, quantiles in held
        ],
        Points(
            "tokens",
            "score",
            [math.sqrt(low * high) for low, high, *_ in held],
            [spread.moments.mean_y for _, _, spread, _ in held],
            is_joined=True,
            lows=[quantiles[0] for *_, quantiles in held],
            highs=[quantiles[-1] for *_, quantiles in held],
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


def sampled(shown: int, every: int) -> str:
    """How many of all answers are drawn as points."""
    if shown == every:
        return f"Of {every:,} answers, all of them."
    return f"Of {every:,} answers, a random sample of {shown:,}, always the same ones."


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
            is_whole=True,
        ),
        words=(),
    )


# Members


def _members(members: Members) -> Iterator[Figure]:
    aside = ""
    if members.shards_aside:
        aside = f" {members.shards_aside:,} shards have columns of other members: not counted here."
    yield Figure(
        "members",
        "Each member's scores",
        "What scores the same answers: models of an ensemble, models that scored one after the "
        f"other, or functions beside the model.{aside}",
        ("member", "answers", "mean", "std", "least", "5 %", "median", "95 %", "most"),
        [
            (
                *(name, spread.moments.n, spread.moments.mean_y, spread.moments.std_y),
                *(spread.histogram.low, *spread.histogram.quantiles((0.05, 0.5, 0.95))),
                spread.histogram.high,
            )
            for name, spread in zip(members.names, members.spreads, strict=True)
            if spread.moments.n
        ],
    )
    for number, (name, spread) in enumerate(zip(members.names, members.spreads, strict=True), 1):
        if spread.moments.n:
            yield _histogram(
                f"member-{number}",
                f"Scores of {name}",
                f"{spread.moments.n:,} answers have one. Every one is counted.",
                spread.histogram,
                ("score", "answers"),
            )
    yield _member_correlations(members)
    if len(members.names) == 2 and len(members.points):
        yield _both_members(members)
    if len(members.disagreement.counts):
        yield _histogram(
            "disagreement",
            "How members disagree",
            "Of each row's pairs of answers, the share that two members order differently "
            "(rank_disagreement). 0: all members put the answers in one order.",
            members.disagreement,
            ("rank disagreement", "rows"),
        )
        named = sorted(members.by_source.items())
        total = (
            sum(n for n, _ in members.by_source.values()),
            sum(t for _, t in members.by_source.values()),
        )
        named += [("all", total)] if len(named) > 1 else []
        yield Figure(
            "disagreement-by-source",
            "Mean disagreement by source",
            "",
            ("source", "rows", "mean rank disagreement"),
            [(name, rows, total / rows) for name, (rows, total) in named],
        )
    if len(members.stds.counts):
        yield _histogram(
            "member-stds",
            "Spread over members",
            "The standard deviation of each answer's scores over the members, as they are: a "
            "member with a wider scale weighs more.",
            members.stds,
            ("standard deviation", "answers"),
        )


def _member_correlations(members: Members) -> Figure:
    """Pearson's with Fisher's interval, and Spearman's of the sample."""
    ranked = [ranks(column) for column in members.points[:, 1:].T]
    rows: list[tuple[Cell, ...]] = []
    drawn = []
    for (i, j), moments in members.pairs.items():
        name = f"{members.names[i]}, {members.names[j]}"
        found = moments.correlation
        spearman = Moments.of(ranked[i], ranked[j]).correlation
        low, high = _fisher(found, moments.n)
        rows.append((name, moments.n, found, low, high, spearman))
        if found is not None:
            drawn.append(
                Interval(
                    name, (found if low is None else low, found if high is None else high), found
                )
            )
    of_all = len(members.points) == members.complete
    sample = "all of them" if of_all else f"a random sample of {RANKED:,} of them"
    return Figure(
        "member-correlation",
        "Correlation between members",
        "Pearson's of the scores of two members, over the answers that both have a score for, "
        "drawn with 95 % intervals (Fisher); Spearman's of the ranks, over the answers that all "
        f"members have a score for: of {members.complete:,}, {sample}.",
        ("members", "answers", "Pearson's", "from", "to", "Spearman's"),
        rows,
        Intervals("correlation", drawn, limits=(-1.0, 1.0), reference=0.0) if drawn else None,
    )


def _fisher(value: float | None, count: int) -> tuple[float | None, float | None]:
    """The 95 % interval of a correlation of so many points; None where they are too few."""
    if value is None or count < 4 or abs(value) >= 1:
        return None, None
    middle, half = math.atanh(value), 1.959963984540054 / math.sqrt(count - 3)
    return math.tanh(middle - half), math.tanh(middle + half)


def _both_members(members: Members) -> Figure:
    _, xs, ys = members.points[:SAMPLE].T.tolist()
    a, b = members.names
    return Figure(
        "member-points",
        f"{b} against {a}",
        "Each point is an answer that both have a score for. " + sampled(len(xs), members.complete),
        (a, b),
        list(zip(xs, ys, strict=True)),
        Points(a, b, xs, ys),
        words=(),
    )
