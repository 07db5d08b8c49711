"""Counts and score statistics by the input's text column `source`. Pure functions.

Legend: R rows, S sequences.
"""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_scorer.formats.values import is_text, texts_of
from batch_scorer.records import PairCounts, ScoredRows, Spread

FloatArray = npt.NDArray[np.float32]
Sources = npt.NDArray[np.object_]

ALL_SOURCES = "all"
"""The source of rows that have none."""
LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MAX_SOURCES = 100


def pair_counts(
    chosen: pa.Array, rejected: pa.Array, sources: Sources, same_tokens: Collection[int] = ()
) -> dict[str, PairCounts]:
    """Counts by source, from R scores of each side. Rows whose two texts have the same tokens are
    left out: their scores are equal whatever the model is like."""
    right, wrong = (side.to_numpy(zero_copy_only=False) for side in (chosen, rejected))
    both = ~(np.isnan(right) | np.isnan(wrong))
    both[list(same_tokens)] = False
    counts = {}
    for source in sorted(set(sources[both])):
        here = both & (sources == source)
        wins, ties = right[here] > wrong[here], right[here] == wrong[here]
        counts[str(source)] = PairCounts(int(here.sum()), int(wins.sum()), int(ties.sum()))
    return counts


def spread_by_source(
    scored: ScoredRows, sources: Sources, *, has_scores: bool = True
) -> dict[str, Spread]:
    """By source. Without `has_scores` the values are an embedding, or outputs without a score."""
    owners = np.repeat(np.arange(scored.num_rows), np.diff(scored.row_offsets))
    scores = scored.scores.values[:, 0].astype(np.float64)
    has_score = ~np.isnan(scores) & has_scores
    spread = {}
    for source in sorted(set(sources)):
        here = sources == source
        rows, found = int(here.sum()), scores[has_score & here[owners]]
        if not len(found):
            spread[str(source)] = Spread(rows)
            continue
        mean, std, *quantiles = (
            float(f"{figure:.6g}")
            for figure in (found.mean(), found.std(), *np.quantile(found, LEVELS))
        )
        spread[str(source)] = Spread(rows, len(found), mean, std, tuple(quantiles))
    return spread


def row_sources(table: pa.Table) -> Sources:
    """str[R]: the text column `source` of the rows.

    Without such a column, or with more than a hundred values in it, every row's source is "all".
    """
    found = _source_column(table)
    if found is None or len(set(found)) > MAX_SOURCES:
        return np.full(table.num_rows, ALL_SOURCES, dtype=object)
    return np.array([str(value) for value in found], dtype=object)


def _source_column(table: pa.Table) -> list[str | None] | None:
    if "source" not in table.column_names:
        return None
    column = table["source"]
    is_words = pa.types.is_dictionary(column.type)
    if not is_text(column.type.value_type if is_words else column.type):
        return None
    return texts_of(column)
