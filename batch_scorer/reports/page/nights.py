"""What nightly runs have changed, night by night: figures of their records and drift reports.

Legend: a night is a nightly run that changed anything; runs that found nothing to do leave no
record.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batch_scorer.evaluation.result import wilson
from batch_scorer.nightly.drift import Figures, together
from batch_scorer.nightly.history import numbers, read_drift, read_record
from batch_scorer.nightly.record import DriftReport, NightlyRecord, SeriesDrift, SeriesRecord
from batch_scorer.outputs.by_source import LEVELS
from batch_scorer.reports.page.figures import (
    Cell,
    Figure,
    Interval,
    Intervals,
    Lines,
    Points,
    Section,
    accuracy_figure,
)
from batch_scorer.reports.page.tally import MOST_SOURCES
from batch_scorer.storage import Store, in_threads

MOST_NIGHTS = 90
"""The newest ones that are shown."""
_SOURCES_DRAWN = 6
_READERS = 8
_LOW, _HIGH = LEVELS.index(0.05), LEVELS.index(0.95)


@dataclass(frozen=True, slots=True)
class Night:
    """What one night did: its record, and how it moved the scores."""

    record: NightlyRecord
    drift: DriftReport


@dataclass(frozen=True, slots=True)
class _Of:
    """One night of one series; `drift` is None where the report has nothing of the series."""

    number: int
    ended_at: str
    record: SeriesRecord
    drift: SeriesDrift | None


def read_nights(root: Store) -> list[Night]:
    """The newest nights of a nightly root, oldest first. Raises ObjectDamaged."""

    def read(number: int) -> Night:
        return Night(read_record(root, number), read_drift(root, number))

    newest = sorted(numbers(root)[:MOST_NIGHTS])
    return list(in_threads(read, newest, _READERS))


def night_sections(nights: Sequence[Night]) -> Iterator[Section]:
    """A section for each series that the nights scored."""
    names = dict.fromkeys(each.series for night in nights for each in night.record.series)
    for place, name in enumerate(names):
        of = [
            _Of(night.record.night, night.record.ended_at, record, drift)
            for night in nights
            for record in night.record.series
            if record.series == name
            for drift in [next((d for d in night.drift.series if d.series == name), None)]
        ]
        key = f"nights-{place + 1}" if len(names) > 1 else "nights"
        title = f"Nights of {name}" if len(names) > 1 else "Nights"
        yield Section(title, list(_figures(key, of)))


def _figures(key: str, nights: Sequence[_Of]) -> Iterator[Figure]:
    yield _rows(f"{key}-rows", nights)
    newest = nights[-1].record.sources
    by_rows = sorted(newest, key=lambda source: (-newest[source].rows, source))
    for place, source in enumerate(by_rows[:_SOURCES_DRAWN], 1):
        found = [(n, n.record.sources[source]) for n in nights if source in n.record.sources]
        if scored := [(night, figures) for night, figures in found if figures.scores]:
            yield _scores(f"{key}-scores-{place}", source, scored)
    if any(together(night.record.sources).pairs.pairs for night in nights):
        yield _accuracy(f"{key}-accuracy", nights)
    named = [(source, newest[source].pairs) for source in by_rows if newest[source].pairs.pairs]
    if named:
        yield accuracy_figure(
            f"{key}-accuracy-sources",
            f"Chosen above rejected after night {nights[-1].number}",
            "By source; a tie is a miss, and counted beside it.",
            "source",
            named[:MOST_SOURCES],
        )
    if nights[-1].drift is not None:
        yield _drift(f"{key}-drift", nights[-1].number, nights[-1].drift)
    compared = [(n.number, n.drift) for n in nights if n.drift is not None and n.drift.ranks]
    if compared:
        yield _ranks(f"{key}-ranks", compared)
        yield _movers(f"{key}-movers", *compared[-1])


def _rows(key: str, nights: Sequence[_Of]) -> Figure:
    counts = [night.record.rows for night in nights]
    of_all = f"The newest {len(nights):,} nights are shown. " if len(nights) == MOST_NIGHTS else ""
    return Figure(
        key,
        "Rows of each night",
        f"{of_all}New rows were scored or marked in that night, reused ones are in shards that "
        "were written anew and have their earlier scores, marked ones have no score. Nights that "
        "changed nothing have no record.",
        (
            *("night", "ended", "generation", "rows", "new", "reused", "kept", "gone", "marked"),
            *("failed", "left", "not asked for"),
        ),
        [
            (
                *(night.number, night.ended_at, night.record.path),
                *(rows.total, rows.new, rows.reused, rows.kept, rows.gone, rows.marked),
                *(rows.failed, rows.left, rows.not_asked),
            )
            for night, rows in zip(nights, counts, strict=True)
        ],
        Lines(
            "night",
            "rows",
            [night.number for night in nights],
            {
                "in all": [rows.total for rows in counts],
                "new": [rows.new for rows in counts],
                "reused": [rows.reused for rows in counts],
                "marked": [rows.marked for rows in counts],
            },
        ),
        words=(1, 2),
    )


def _scores(key: str, source: str, nights: Sequence[tuple[_Of, Figures]]) -> Figure:
    return Figure(
        key,
        f"Scores of {source} by night",
        "The dot is the mean, the line holds nine in ten. Another generation is another model or "
        "other settings: its scores have a scale of their own.",
        (
            *("night", "generation", "scores", "mean", "std"),
            *(f"{level:.0%}" for level in LEVELS),
        ),
        [
            (night.number, night.record.path, f.scores, f.mean, f.std, *f.quantiles)
            for night, f in nights
        ],
        Points(
            "night",
            "score",
            [float(night.number) for night, _ in nights],
            [f.mean or 0.0 for _, f in nights],
            is_joined=True,
            lows=[f.quantiles[_LOW] for _, f in nights],
            highs=[f.quantiles[_HIGH] for _, f in nights],
            is_whole=True,
        ),
        words=(1,),
    )


def _accuracy(key: str, nights: Sequence[_Of]) -> Figure:
    found = [
        (night, counts, wilson(counts.chosen_higher / counts.pairs, counts.pairs))
        for night in nights
        if (counts := together(night.record.sources).pairs).pairs
    ]
    return Figure(
        key,
        "Accuracy by night",
        "Of all pairs of the generation after that night, the share whose chosen answer scores "
        "strictly higher; a tie is a miss, and counted beside it. The lines are 95 % intervals "
        "(Wilson).",
        ("night", "generation", "pairs", "chosen higher", "ties", "accuracy", "from", "to"),
        [
            (
                *(night.number, night.record.path, c.pairs, c.chosen_higher, c.ties),
                *(share.value, share.low, share.high),
            )
            for night, c, share in found
        ],
        Points(
            "night",
            "accuracy",
            [float(night.number) for night, *_ in found],
            [share.value for *_, share in found],
            is_joined=True,
            lows=[share.low for *_, share in found],
            highs=[share.high for *_, share in found],
            is_whole=True,
        ),
        words=(1,),
    )


def _drift(key: str, number: int, drift: SeriesDrift) -> Figure:
    """How the newest night has moved the scores, by source."""
    rows: list[tuple[Cell, ...]] = []
    drawn = []
    for source in drift.by_source()[:MOST_SOURCES]:
        shifts, now = source.shifts, source.now
        cells = [cell for shift in shifts.values() for cell in (shift.now, shift.change)]
        rows.append((source.name, now.rows, now.new, now.reused, now.kept, now.gone, *cells))
        mean = shifts["mean"]
        if mean.now is not None:
            then = mean.now if mean.then is None else mean.then
            drawn.append(
                Interval(source.name, (min(then, mean.now), max(then, mean.now)), mean.now)
            )
    before = "nothing before"
    if drift.since is not None:
        before = f"night {drift.since}, {drift.before}"
    names = drift.all_sources().shifts
    return Figure(
        key,
        f"What night {number} has moved",
        f"{drift.path} against {before}. The dot is the mean score after the night; the line "
        "reaches to the one before.",
        (
            *("source", "rows", "new", "reused", "kept", "gone"),
            *(text for name in names for text in (name, f"{name}, change")),
        ),
        rows,
        Intervals("mean score", drawn) if drawn else None,
    )


def _ranks(key: str, compared: Sequence[tuple[int, SeriesDrift]]) -> Figure:
    """The nights whose scores were compared with those of another generation."""
    found = [(number, drift, drift.ranks) for number, drift in compared if drift.ranks is not None]
    known = [(float(number), r.spearman) for number, _, r in found if r.spearman is not None]
    xs, ys = [number for number, _ in known], [value for _, value in known]
    return Figure(
        key,
        "Ranks against the generation before",
        "Where a night worked on another generation, Spearman's correlation over the rows that "
        "both have scored (a sample); and of the pairs, how many prefer the chosen answer only "
        "now, or no longer.",
        (
            *("night", "generation", "against", "rows", "scores", "rank correlation", "pairs"),
            *("won", "lost"),
        ),
        [
            (
                *(number, drift.path, drift.ranks_of, r.rows, r.scores, r.spearman),
                *(r.pairs, r.won, r.lost),
            )
            for number, drift, r in found
        ],
        Points("night", "rank correlation", xs, ys, is_joined=True, is_whole=True)
        if known
        else None,
        words=(1, 2),
    )


def _movers(key: str, number: int, drift: SeriesDrift) -> Figure:
    assert drift.ranks is not None  # it was compared
    return Figure(
        key,
        f"Scores that moved farthest in night {number}",
        "Among all scores that were compared: the share of them below this one, before and after.",
        ("file", "row", "sequence", "before", "after", "above, before", "above, after"),
        [
            (m.input, m.row, m.place + 1, m.before, m.after, m.below_before, m.below_after)
            for m in drift.ranks.movers
        ],
    )
