"""An evaluation's result, and how sure it is: estimates, subsets, intervals. Pure functions.

Legend: P prompts or pairs of a benchmark. A credit is what one of them earns, in [0, 1].
All intervals are for 95 % and two-sided; all values are fractions (RewardBench 2's Ties runs from
-0.01 to 1.01).
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_scorer.config import expanded
from batch_scorer.errors import OutputError, cause_of
from batch_scorer.evaluation import Benchmark
from batch_scorer.formats.values import is_text, texts_of

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_Z = 1.959963984540054
"""The normal distribution's 97.5 % point."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the bounds of its interval."""

    value: float
    low: float
    high: float


def mean_of(credits: FloatArray) -> Estimate | None:
    """Mean of P independent credits with Wilson's interval; None without any.

    Wilson's is made for credits of 0 or 1. Credits between have less variance than it assumes,
    so for them it is wider than it need be.
    """
    return wilson(float(credits.mean()), len(credits)) if len(credits) else None


def wilson(value: float, count: int) -> Estimate:
    """The score interval of Wilson (1927) around a mean of `count` credits.

    Unlike the normal one it stays in [0, 1] and has a width where all are right or all wrong.
    """
    share = min(max(value, 0.0), 1.0)
    scale = 1 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / scale
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2)) / scale
    # At the ends a bound is the value itself, up to rounding; the value of Ties may lie outside.
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(value, min(value, low), max(value, high))


def weighted_mean(parts: Iterable[tuple[float, Estimate]]) -> Estimate:
    """The mean of independent estimates, each with its weight, and an interval of its own.

    The distances from value to bound add up as standard errors do: the square root of the sum
    of their squares times squared weights (Zou, Huang, Zhang 2009, Comput. Stat. Data Anal. 53,
    "linear function of binomial proportions"). So a mean of means has the interval that the mean
    of their parts has, and parts that are all right keep their Wilson width, where the plug-in
    variance of a stratified mean would be 0.
    """
    parts = list(parts)
    total = sum(weight for weight, _ in parts)
    shares = [(weight / total, estimate) for weight, estimate in parts]
    value = sum(share * e.value for share, e in shares)
    below = math.sqrt(sum((share * (e.value - e.low)) ** 2 for share, e in shares))
    above = math.sqrt(sum((share * (e.high - e.value)) ** 2 for share, e in shares))
    return Estimate(value, value - below, value + above)


def mean_of_all(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """Their unweighted mean; None where one is missing, for that mean would be of other things."""
    there = [estimate for estimate in estimates if estimate is not None]
    return weighted_mean((1, e) for e in there) if len(there) == len(estimates) > 0 else None


@dataclass(frozen=True, slots=True)
class Subset:
    """One named part of a benchmark.

    `rows` are those found; `published_rows` those of the published data, None where we know no
    number. `ties` counts rows where the right answer is not alone at the top, `unscored` rows
    without a finite score for each answer; these earn nothing. `section` is the column that the
    subset enters, "" for a subset that the benchmark does not have.
    """

    name: str
    section: str
    accuracy: Estimate | None
    rows: int
    ties: int
    unscored: int
    published_rows: int | None


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs whose preferred answer is the better one with a probability from `low` to before `high`
    by the scores: `sure` is the mean of it, `right` the share where the label agrees."""

    low: float
    high: float
    pairs: int
    sure: float
    right: Estimate


@dataclass(frozen=True, slots=True)
class Calibration:
    """What scores say of how sure they are, against labels.

    `basis` is what the probabilities are made of, `pairs` those with scores, `bins` those that hold
    any. `expected_error` is the mean distance of `sure` and `right` over pairs (the expected
    calibration error), `brier` the mean squared distance of the right answer's probability from 1.
    """

    basis: str
    pairs: int
    bins: list[Bin]
    expected_error: float
    brier: float


@dataclass(frozen=True, slots=True)
class Writer:
    """A model that wrote answers: of `pairs` in which one of them meets another model's, the shares
    that it wins by the labels and by the scores, where a tie is half."""

    name: str
    pairs: int
    won_by_label: float
    won_by_score: Estimate


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of a benchmark.

    `columns` are the leaderboard's, in its order; None for a column that cannot be computed because
    a part is missing. `subsets` are those found, `missing` the benchmark's own that were not.
    `details` are the benchmark's further numbers, as JSON. `calibration` and `writers` are of
    pairs, where scores and columns allow them. `model`, `output` and `scored_with` (the parts of
    the score fingerprint) show whose result this is.
    """

    benchmark: Benchmark
    columns: dict[str, Estimate | None]
    subsets: list[Subset]
    missing: list[str]
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    writers: list[Writer] = field(default_factory=list)
    model: str = ""
    output: str = ""
    scored_with: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(subset.rows for subset in self.subsets)

    @property
    def unscored(self) -> int:
        return sum(subset.unscored for subset in self.subsets)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": self.rows, "unscored": self.unscored}

    def save(self, path: str | Path) -> None:
        """Write it as JSON, into a folder made if need be. Raises OutputError."""
        file = Path(expanded(path))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self.to_json()) + "\n")
        except OSError as error:
            raise OutputError(f"{file}: the report cannot be written: {cause_of(error)}") from error


def subsets_of(
    names: npt.NDArray[np.str_],
    credits: FloatArray,
    is_tie: BoolArray,
    is_unscored: BoolArray,
    *,
    sections: Mapping[str, str],
    published: Mapping[str, int],
) -> dict[str, Subset]:
    """One Subset per name, those of `sections` (subset → section) first and in its order.

    All arrays are [P].
    """
    found = set(names.tolist())
    ordered = [name for name in sections if name in found] + sorted(found - set(sections))
    subsets = {}
    for name in ordered:
        here = names == name
        subsets[name] = Subset(
            name=name,
            section=sections.get(name, ""),
            accuracy=mean_of(credits[here]),
            rows=int(here.sum()),
            ties=int(is_tie[here].sum()),
            unscored=int(is_unscored[here].sum()),
            published_rows=published.get(name),
        )
    return subsets


def notes_on(subsets: Collection[Subset]) -> list[str]:
    """What a reader of the columns has to know about the rows behind them."""
    notes = []
    unscored = sum(subset.unscored for subset in subsets)
    if unscored:
        rows = sum(subset.rows for subset in subsets)
        notes.append(f"{unscored:,} of {rows:,} rows lack a score and count as wrong")
    other_size = [s for s in subsets if s.published_rows not in (None, s.rows)]
    if other_size:
        listed = ", ".join(f"{s.name} {s.rows:,} of {s.published_rows:,}" for s in other_size)
        notes.append(f"not the published number of rows: {listed}")
    strange = [subset.name for subset in subsets if not subset.section]
    if strange:
        notes.append(f"not of this benchmark, in no column: {', '.join(strange)}")
    return notes


# Columns of a table as numpy sees them.

NULL = "(null)"


def texts(table: pa.Table, name: str) -> npt.NDArray[np.str_]:
    """str[P]; a null is `NULL`."""
    column = table[name]
    found = texts_of(column if is_text(column.type) else column.cast(pa.string()))
    return np.array([NULL if text is None else text for text in found], dtype=np.str_)


def floats(table: pa.Table, name: str) -> FloatArray:
    """float64[P]; NaN for a null and for what is not finite."""
    return _floats(table[name].to_pylist())


def float_lists(table: pa.Table, name: str) -> list[FloatArray]:
    """P arrays of any length, with NaN as in `floats`; a null list is empty."""
    return [_floats(values or []) for values in table[name].to_pylist()]


def _floats(values: list[float | None]) -> FloatArray:
    # Python floats hold float32 exactly, so no tie appears or goes.
    array = np.array([math.nan if v is None else v for v in values], dtype=np.float64)
    return np.where(np.isfinite(array), array, math.nan)
