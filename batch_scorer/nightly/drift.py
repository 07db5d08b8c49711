"""What has changed since an earlier nightly run: rows that came and went, scores that moved.

By source, from the figures that every commit carries, so nothing is read back. Where the model has
changed, a sample of the rows that both generations hold is read, and their ranks are compared:
scores of two models have no common scale.

Legend: R rows, n scores that both generations have.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import FiniteFloat

from batch_scorer.config import PartialConfig
from batch_scorer.errors import ShardError, StorageError
from batch_scorer.inputs.files import open_parquet, read_apart
from batch_scorer.outputs.by_source import LEVELS
from batch_scorer.outputs.columns import score_items
from batch_scorer.records import (
    Commit,
    Format,
    PairCounts,
    Receipt,
    Source,
    Spread,
    Status,
    family_prefix,
)
from batch_scorer.records.digest import digest_of
from batch_scorer.storage import Store

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SAMPLE_ROWS = 200_000
SAMPLE_SHARDS = 64
"""At most: each costs two requests to two generations."""
MOVERS = 20
_GRID = 1000


# Rows and scores by source


@dataclass(frozen=True, slots=True)
class Figures:
    """The rows of one source, or of all sources, and their scores.

    Of the `rows`, the `new` were scored, or marked, since the record before, the `reused` are in
    shards that were written anew and have their earlier scores, and the `kept` are in unchanged
    shards; `gone` rows were there before and are not counted in `rows`. `quantiles` are at
    `by_source.LEVELS`. Without a score `mean` and `std` are None, `quantiles` ().
    """

    rows: int = 0
    new: int = 0
    reused: int = 0
    kept: int = 0
    gone: int = 0
    scores: int = 0
    mean: FiniteFloat | None = None
    std: FiniteFloat | None = None
    quantiles: tuple[FiniteFloat, ...] = ()
    pairs: PairCounts = field(default_factory=PairCounts)

    @property
    def accuracy(self) -> float | None:
        return self.pairs.accuracy

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Before:
    """A shard as an earlier nightly run left it: its identity, how often its marked rows had been
    tried again, and its rows by source."""

    identity: str
    retries: int
    rows: Mapping[str, int]


def committed_before(receipts: Iterable[Receipt]) -> dict[str, Before]:
    """The committed shards by their key."""
    return {
        receipt.output_key: Before(
            receipt.commit.identity, receipt.commit.retries, rows_by_source(receipt.commit)
        )
        for receipt in receipts
        if receipt.commit is not None and receipt.status is Status.COMMITTED
    }


def rows_by_source(commit: Commit) -> dict[str, int]:
    return {source: spread.rows for source, spread in commit.spread.items()}


def figures_by_source(
    receipts: Sequence[Receipt], before: Mapping[str, Before], model: str = ""
) -> dict[str, Figures]:
    """The figures of each source, from the committed shards after a nightly run and before it; of
    one of several models with its scores and pairs."""
    committed = [
        (receipt, receipt.commit)
        for receipt in receipts
        if receipt.commit is not None and receipt.status is Status.COMMITTED
    ]
    rows: dict[str, dict[str, int]] = {}

    def count(source: str, what: str, number: int) -> None:
        names = ("before", "rows", "kept", "reused", "again")
        row = rows.setdefault(source, dict.fromkeys(names, 0))
        row[what] += number

    parts: dict[str, list[Spread]] = {}
    pairs: dict[str, PairCounts] = {}
    for receipt, commit in committed:
        there = before.get(receipt.output_key)
        is_same = there is not None and there.identity == commit.identity
        is_kept = there is not None and (there.identity, there.retries) == (
            commit.identity,
            commit.retries,
        )
        for source, number in rows_by_source(commit).items():
            count(source, "rows", number)
            reused = receipt.reused.rows.get(source, 0)
            count(source, "kept" if is_kept else "reused", number if is_kept else reused)
            if is_same and not is_kept:  # its marked rows were tried again, and are still there
                count(source, "again", number - reused)
        spreads, of_pairs = commit.spread, commit.pairs
        if model:
            spreads, of_pairs = commit.models[model].spread, commit.models[model].counts.pairs
        for source, spread in spreads.items():
            parts.setdefault(source, []).append(spread)
        for source, counts in of_pairs.items():
            pairs[source] = pairs.get(source, PairCounts()) + counts
    for shard in before.values():
        for source, number in shard.rows.items():
            count(source, "before", number)
    return {
        source: replace(
            _spread(parts.get(source, [])),
            rows=row["rows"],
            new=row["rows"] - row["kept"] - row["reused"],
            reused=row["reused"],
            kept=row["kept"],
            gone=max(0, row["before"] - row["kept"] - row["reused"] - row["again"]),
            pairs=pairs.get(source, PairCounts()),
        )
        for source, row in sorted(rows.items())
    }


def _spread(parts: Sequence[Spread]) -> Figures:
    """The figures of shards together; the quantiles are exact at the ends, and between them as near
    as straight lines between those of each shard."""
    scored = [part for part in parts if part.scores]
    if not scored:
        return Figures()
    weights, means, stds = np.array([(p.scores, p.mean, p.std) for p in scored], np.float64).T
    quantiles = np.array([part.quantiles for part in scored])
    number = weights.sum()
    mean = float((weights * means).sum() / number)
    variance = float((weights * (stds**2 + (means - mean) ** 2)).sum() / number)
    points = np.unique(quantiles)
    if len(points) > _GRID:
        points = points[np.linspace(0, len(points) - 1, _GRID).astype(int)]
    below = np.zeros(len(points))
    for weight, part in zip(weights, quantiles, strict=True):
        below += weight * np.interp(points, part, LEVELS, left=0.0, right=1.0)
    return Figures(
        scores=int(number),
        mean=mean,
        std=variance**0.5,
        quantiles=tuple(np.interp(LEVELS, below / number, points).tolist()),
    )


def together(figures: Mapping[str, Figures]) -> Figures:
    """The rows of all sources; without the figures of their scores."""
    sums = {
        name: sum(getattr(part, name) for part in figures.values())
        for name in ("rows", "new", "reused", "kept", "gone", "scores")
    }
    pairs = sum((part.pairs for part in figures.values()), PairCounts())
    return Figures(**sums, pairs=pairs)


# Ranks


@dataclass(frozen=True, slots=True)
class Mover:
    """A score that has moved among the others: from one share of them below it to another."""

    input: str
    row: int
    place: int
    before: float
    after: float
    below_before: float
    below_after: float


@dataclass(frozen=True, slots=True)
class Ranks:
    """How `scores` of `rows` that two generations have are ordered by each.

    `spearman` is their rank correlation, None where one of them gives a single score. `movers` are
    those whose share of lower scores has changed most. Of `pairs` with both scores in both,
    `lost` had the chosen answer higher before and not after, `won` the reverse.
    """

    rows: int
    scores: int
    spearman: float | None
    pairs: int
    won: int
    lost: int
    movers: tuple[Mover, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Scored:
    """Some rows of one input, scored twice.

    `rows` is int64[n] of the input file, `places` int64[n] of the sequences within their rows,
    `before` and `after` float64[n], without NaN.
    """

    input: str
    is_pair: bool
    rows: IntArray
    places: IntArray
    before: FloatArray
    after: FloatArray


def ranks(values: FloatArray) -> FloatArray:
    """float64[n]: the rank of each value, from 0; equal ones have their mean rank."""
    distinct, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return (starts + (counts - 1) / 2)[index] if len(distinct) else np.zeros(0)


def spearman(before: FloatArray, after: FloatArray) -> float | None:
    """Rank correlation; None for less than two values, or all equal ones."""
    if len(before) < 2:
        return None
    left, right = ranks(before), ranks(after)
    if left.std() == 0 or right.std() == 0:
        return None
    return float(np.corrcoef(left, right)[0, 1])


def compare(parts: Sequence[Scored]) -> Ranks:
    """The ranks of all parts' scores together."""
    before, after = (
        np.concatenate([np.zeros(0), *(getattr(part, name) for part in parts)])
        for name in ("before", "after")
    )
    scale = max(1, len(before) - 1)
    below_before, below_after = ranks(before) / scale, ranks(after) / scale
    order = np.argsort(-np.abs(below_after - below_before), kind="stable")[:MOVERS]
    bounds = np.cumsum([0, *(len(part.rows) for part in parts)])
    movers = []
    for place in order.tolist():
        index = int(np.searchsorted(bounds, place, side="right")) - 1
        part, item = parts[index], place - int(bounds[index])
        movers.append(
            Mover(
                part.input,
                int(part.rows[item]),
                int(part.places[item]),
                float(before[place]),
                float(after[place]),
                float(below_before[place]),
                float(below_after[place]),
            )
        )
    flips = [_flips(part) for part in parts if part.is_pair]
    pairs, won, lost = (sum(column) for column in zip(*flips, strict=True)) if flips else (0, 0, 0)
    return Ranks(
        rows=sum(len(np.unique(part.rows)) for part in parts),
        scores=len(before),
        spearman=spearman(before, after),
        pairs=pairs,
        won=won,
        lost=lost,
        movers=tuple(movers),
    )


def _flips(part: Scored) -> tuple[int, int, int]:
    """Pairs, and those whose chosen answer is higher only after, or only before."""
    has_both = np.flatnonzero(part.rows[:-1] == part.rows[1:])  # chosen, with rejected behind it
    before = part.before[has_both] > part.before[has_both + 1]
    after = part.after[has_both] > part.after[has_both + 1]
    return len(has_both), int((after & ~before).sum()), int((before & ~after).sum())


# Reading two generations


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the rows of a scored shard come from: a file of the inputs, and the first row there.

    Of rows picked by `where` the shard itself is the `input`, as they do not follow each other in
    the file; `etag` then stands for the choice, too.
    """

    input: str
    etag: str
    first_row: int


def origins(receipts: Iterable[Receipt]) -> dict[str, Origin]:
    """The origin of each committed shard of a generation."""
    return {
        receipt.output_key: _origin(receipt.output_key, receipt.commit)
        for receipt in receipts
        if receipt.commit is not None and receipt.status is Status.COMMITTED
    }


def _origin(output_key: str, commit: Commit) -> Origin:
    if commit.where is None:
        return Origin(commit.input, commit.input_etag, commit.first_row)
    choice = [commit.input_etag, commit.where, commit.first_row, commit.num_rows]
    return Origin(output_key, digest_of(choice), 0)


def read_both(
    before: tuple[Store, Sequence[Receipt]],
    after: tuple[Store, Sequence[Receipt]],
    model: str = "",
) -> list[Scored]:
    """A sample of the rows that two generations have scored, each a store and its receipts; the
    same sample whenever it is taken.

    Only rows of the same version of their file. Embeddings have no scores and are left out. The
    scores are those of `model`, where both have it, or of all models together.
    """
    overlaps = list(_overlaps(before[1], after[1]))
    overlaps.sort(key=lambda overlap: digest_of([overlap.origin.input, overlap.origin.first_row]))
    overlaps = overlaps[:SAMPLE_SHARDS]
    limit = SAMPLE_ROWS // max(1, len(overlaps))
    found = [_read(before[0], after[0], overlap, limit, model) for overlap in overlaps]
    return [part for part in found if part is not None]


@dataclass(frozen=True, slots=True)
class _Overlap:
    """Rows that two shards have in common, from `origin` on; `starts` is where in each."""

    origin: Origin
    num_rows: int
    receipts: tuple[Receipt, Receipt]
    starts: tuple[int, int]


def _overlaps(before: Sequence[Receipt], after: Sequence[Receipt]) -> Iterable[_Overlap]:
    there = {r.output_key: r for r in before}
    by_file: dict[tuple[str, str], list[tuple[Receipt, Origin]]] = {}
    for key, origin in origins(before).items():
        by_file.setdefault((origin.input, origin.etag), []).append((there[key], origin))
    here = {r.output_key: r for r in after}
    for key, origin in origins(after).items():
        mine = here[key]
        for other, begun in by_file.get((origin.input, origin.etag), ()):
            start = max(origin.first_row, begun.first_row)
            stop = min(origin.first_row + mine.num_rows, begun.first_row + other.num_rows)
            if start < stop:
                starts = (start - begun.first_row, start - origin.first_row)
                common = replace(origin, first_row=start)
                yield _Overlap(common, stop - start, (other, mine), starts)


def _rows(store: Store, source: Source, names: list[str], rows: IntArray) -> pa.Table:
    table = open_parquet(store, source).read(columns=names, use_threads=False)
    return table.take(pa.array(rows))


def _read(before: Store, after: Store, overlap: _Overlap, limit: int, model: str) -> Scored | None:
    """None where one of the two has no scores, or is no longer there."""
    num_rows = min(limit, overlap.num_rows)
    chosen = np.linspace(0, overlap.num_rows - 1, num_rows).astype(np.int64)  # of the overlap
    found = []
    for store, receipt, start in zip(
        (before, after), overlap.receipts, overlap.starts, strict=True
    ):
        stored = receipt.stored
        assert stored is not None  # `origins` takes committed shards only
        commit = stored.commit
        if model and model not in commit.models:
            return None
        prefix = family_prefix(commit.column_prefix, model) if model else commit.score_prefix
        format = Format(commit.layout["format"])
        source = Source(store.root, receipt.output_key, stored.size_bytes, stored.version)
        names = [n for n in commit.added_columns if n.startswith(f"{prefix}score")]
        names = [n for n in names if not n.endswith(("score_error", "score_notes"))]
        if not names:
            return None
        try:
            table = read_apart(
                PartialConfig(), stored.size_bytes, _rows, store, source, names, start + chosen
            )
        except (StorageError, ShardError, OSError, pa.ArrowException):
            return None
        found.append(score_items(table, format, prefix))
    (rows, old), (rows_after, new) = found
    if not np.array_equal(rows, rows_after):
        return None
    both = ~(np.isnan(old) | np.isnan(new))
    places = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return Scored(
        input=overlap.origin.input,
        is_pair=format is Format.PREFERENCE_PAIR,
        rows=overlap.origin.first_row + chosen[rows][both],
        places=places[both],
        before=old[both].astype(np.float64),
        after=new[both].astype(np.float64),
    )
