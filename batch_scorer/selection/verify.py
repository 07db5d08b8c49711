"""A second look at a selection: its shards are recounted, and its rows chosen again."""

from collections.abc import Mapping

from batch_scorer.derived.output import Derivation
from batch_scorer.derived.parts import unchanged_parts
from batch_scorer.derived.state import DerivedVerdict, compare_counts, compare_shards, recount
from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.select import choosing
from batch_scorer.storage import Store


def verify_selection(
    store: Store, derivation: Derivation, options: Mapping[str, str]
) -> DerivedVerdict:
    """Check a selection; it is made again where what it was made of is as it was."""
    verdict = recount(store, derivation)
    if verdict.problems or verdict.unfinished:
        return verdict
    if (parts := unchanged_parts(derivation, options)) is None:
        return verdict
    with choosing(parts, Selection(**derivation.recipe), options) as chosen:
        encoded = chosen.encoded(derivation.digest, (), options)
        compare_shards(verdict, store, ((key, data) for key, data, _ in encoded))
        compare_counts(verdict, store, chosen.counts)
    return verdict
