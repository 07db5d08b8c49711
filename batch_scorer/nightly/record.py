"""What a nightly run leaves behind, as values: its record, and its drift report.

Both are JSON under `ROOT/nights/` (docs/nightly.md explains every key). There a series is a `line`,
and the series are `lines`, which their aliases say to whoever reads them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field

from batch_scorer.nightly.drift import Figures, Ranks, together
from batch_scorer.outputs.by_source import LEVELS

_LEVELS_SHOWN = (0.05, 0.5, 0.95)


@dataclass(frozen=True, slots=True)
class RowCounts:
    """The rows of a generation after a nightly run; `new`, `reused`, `kept`, `gone` as in
    `Figures`. `not_asked` are rows of its inputs that `limit` and `where` leave out."""

    total: int
    new: int
    reused: int
    kept: int
    gone: int
    marked: int
    failed: int
    left: int
    not_asked: int = 0


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """The shards of a generation after a nightly run."""

    total: int
    failed: int
    left: int


@dataclass(frozen=True, slots=True)
class SeriesRecord:
    """What a nightly run did for one model: its series, and that series' generation afterwards.

    `manifest` is the key of the generation's manifest, `metrics` are `Metrics.to_json`. Of several
    models `sources` are of the mean of their scores, and `models` has each one's, by name.
    """

    series: Annotated[str, Field(alias="line")]
    model: str
    path: str
    manifest: str
    rows: RowCounts
    shards: ShardCounts
    sources: Mapping[str, Figures]
    metrics: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Figures]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "line": self.series,
            "model": self.model,
            "path": self.path,
            "manifest": self.manifest,
            "rows": asdict(self.rows),
            "shards": asdict(self.shards),
            "sources": _figures_to_json(self.sources),
            "metrics": dict(self.metrics),
            "models": {name: _figures_to_json(own) for name, own in self.models.items()},
        }


@dataclass(frozen=True, slots=True)
class NightlyRecord:
    """What nightly run number `night` changed.

    `latest` holds the paths that `latest.json` names after it, by series; `has_moved` is true if
    this run made it name them. `lacking` gives the reasons why it did not; None if it named the
    run's generations before.
    """

    night: int
    started_at: str
    ended_at: str
    settings: Mapping[str, Any]
    files_aside: int
    series: Annotated[tuple[SeriesRecord, ...], Field(alias="lines")]
    latest: Mapping[str, str] | None
    has_moved: bool
    lacking: tuple[str, ...] | None

    def to_json(self) -> dict[str, Any]:
        return {
            "night": self.night,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "settings": dict(self.settings),
            "files_aside": self.files_aside,
            "lines": [each.to_json() for each in self.series],
            "latest": None if self.latest is None else dict(self.latest),
            "has_moved": self.has_moved,
            "lacking": None if self.lacking is None else list(self.lacking),
        }


@dataclass(frozen=True, slots=True)
class Shift:
    """A figure after a nightly run and before it; None where there was none."""

    now: float | None
    then: float | None

    @property
    def change(self) -> float | None:
        return None if self.now is None or self.then is None else self.now - self.then


@dataclass(frozen=True, slots=True)
class SourceDrift:
    """The figures of one source after a nightly run, and before it."""

    name: str
    now: Figures
    then: Figures

    @property
    def shifts(self) -> dict[str, Shift]:
        """How the scores moved: mean, standard deviation, three quantiles, accuracy of pairs."""
        shifts = {name: self._shift(name) for name in ("mean", "std")}
        for level in _LEVELS_SHOWN:
            place = LEVELS.index(level)
            now, then = (f.quantiles[place] if f.quantiles else None for f in (self.now, self.then))
            shifts[f"{level:.0%}"] = Shift(now, then)
        return shifts | {"accuracy": self._shift("accuracy")}

    def _shift(self, name: str) -> Shift:
        return Shift(getattr(self.now, name), getattr(self.then, name))


@dataclass(frozen=True, slots=True)
class ModelDrift:
    """How the scores of one of several models have moved; as in `SeriesDrift`."""

    sources: Mapping[str, Figures]
    sources_before: Mapping[str, Figures]
    ranks: Ranks | None

    def by_source(self) -> list[SourceDrift]:
        """The source with most rows first."""
        return _by_source(self.sources, self.sources_before)

    def all_sources(self) -> SourceDrift:
        """All rows together."""
        return SourceDrift("all", together(self.sources), together(self.sources_before))

    def to_json(self) -> dict[str, Any]:
        return {
            "sources": _figures_to_json(self.sources),
            "sources_before": _figures_to_json(self.sources_before),
            "ranks": None if self.ranks is None else self.ranks.to_json(),
        }


@dataclass(frozen=True, slots=True)
class SeriesDrift:
    """How the scores of one series have moved, from the generation at `before`, as nightly run
    `since` left it, to the one at `path`.

    `since` and `before` are None where no record describes what `latest.json` named. `ranks`
    compares the scores with those of the generation at `ranks_of`; None if there is no other.
    """

    series: Annotated[str, Field(alias="line")]
    path: str
    since: int | None
    before: str | None
    sources: Mapping[str, Figures]
    sources_before: Mapping[str, Figures]
    ranks_of: str | None
    ranks: Ranks | None
    models: Mapping[str, ModelDrift] = field(default_factory=dict)

    def by_source(self) -> list[SourceDrift]:
        """The source with most rows first."""
        return _by_source(self.sources, self.sources_before)

    def all_sources(self) -> SourceDrift:
        """All rows together."""
        return SourceDrift("all", together(self.sources), together(self.sources_before))

    def to_json(self) -> dict[str, Any]:
        return {
            "line": self.series,
            "path": self.path,
            "since": self.since,
            "before": self.before,
            "sources": _figures_to_json(self.sources),
            "sources_before": _figures_to_json(self.sources_before),
            "ranks_of": self.ranks_of,
            "ranks": None if self.ranks is None else self.ranks.to_json(),
            "models": {name: own.to_json() for name, own in self.models.items()},
        }


def _by_source(now: Mapping[str, Figures], then: Mapping[str, Figures]) -> list[SourceDrift]:
    names = sorted(now, key=lambda name: (-now[name].rows, name))
    return [SourceDrift(name, now[name], then.get(name, Figures())) for name in names]


@dataclass(frozen=True, slots=True)
class DriftReport:
    """How nightly run number `night` moved the scores."""

    night: int
    series: Annotated[tuple[SeriesDrift, ...], Field(alias="lines")]

    def to_json(self) -> dict[str, Any]:
        return {"night": self.night, "lines": [each.to_json() for each in self.series]}


def _figures_to_json(sources: Mapping[str, Figures]) -> dict[str, Any]:
    return {name: figures.to_json() for name, figures in sources.items()}
