"""Counts and score statistics by the input's text column `source`. Pure functions."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_scorer.outputs.columns import numbers, pick
from batch_scorer.records import ScoredRows

ALL_SOURCES = "all"
"""The source of rows that tell none."""

_MAX_SOURCES = 100


# Counts by source


def pair_counts(scored: ScoredRows, table: pa.Table) -> dict[str, list[int]]:
    """Of preference pairs: [pairs with both scores, chosen higher, ties] by source
    (`row_sources`)."""
    scores = numbers(scored.values[:, 0])
    chosen, rejected = (
        pick(scores, scored.row_offsets, place, of=2).to_numpy(zero_copy_only=False)
        for place in (0, 1)
    )
    both = ~(np.isnan(chosen) | np.isnan(rejected))
    sources = row_sources(table)
    counts = {}
    for source in sorted(set(sources[both])):
        here = both & (sources == source)
        wins, ties = chosen[here] > rejected[here], chosen[here] == rejected[here]
        counts[str(source)] = [int(here.sum()), int(wins.sum()), int(ties.sum())]
    return counts


def spread_by_source(scored: ScoredRows, table: pa.Table) -> dict[str, list[float]]:
    """By source (`row_sources`): [rows, scores, their mean, their standard deviation, and their
    quantiles at `LEVELS`]; without a score only the first two.

    In six digits: enough for statistics, and a commit is read with every listing.
    """
    sources = row_sources(table)
    owners = np.repeat(np.arange(scored.num_rows), np.diff(scored.row_offsets))
    scores = scored.values[:, 0].astype(np.float64)
    has_score = ~np.isnan(scores)
    if scored.outputs.embedding_size is not None:
        has_score[:] = False
    spread = {}
    for source in sorted(set(sources)):
        here = sources == source
        found = scores[has_score & here[owners]]
        figures = [float(here.sum()), float(len(found))]
        if len(found):
            figures += [found.mean(), found.std(), *np.quantile(found, LEVELS)]
        spread[str(source)] = [float(f"{figure:.6g}") for figure in figures]
    return spread


LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def row_sources(table: pa.Table) -> npt.NDArray[np.object_]:
    """str[R]: the text column `source` of the rows.

    Without such a column, or with more than a hundred values in it, all rows are of "all".
    """
    found = _source_column(table)
    if found is None or len(set(found)) > _MAX_SOURCES:
        return np.full(table.num_rows, ALL_SOURCES, dtype=object)
    return np.array([str(value) for value in found], dtype=object)


def _source_column(table: pa.Table) -> list[str | None] | None:
    if "source" not in table.column_names:
        return None
    column = table["source"]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return None
    return column.to_pylist()  # type: ignore[no-any-return]
