"""A second look at what `normalize` wrote: its shards are recounted, and made again."""

from collections.abc import Mapping

from batch_scorer.derived.output import Counts, Derivation
from batch_scorer.derived.parts import unchanged_parts
from batch_scorer.derived.state import DerivedVerdict, compare_counts, compare_shards, recount
from batch_scorer.normalization.normalize import SUMMARY_KEY, grouping, summary_bytes
from batch_scorer.normalization.recipe import Normalization
from batch_scorer.storage import ObjectMissing, Store


def verify_normalization(
    store: Store, derivation: Derivation, options: Mapping[str, str]
) -> DerivedVerdict:
    """Check an output; it is made again where what it was made of is as it was."""
    verdict = recount(store, derivation)
    if verdict.problems or verdict.unfinished:
        return verdict
    if (parts := unchanged_parts(derivation, options)) is None:
        return verdict
    with grouping(parts, Normalization(**derivation.recipe), options) as grouped:
        made = grouped.encoded(derivation.digest, ())
        compare_shards(verdict, store, ((key, data) for key, data, _ in made))
        compare_counts(verdict, store, Counts(parts.num_rows, {}))
        try:
            there = store.read(SUMMARY_KEY)
        except ObjectMissing:
            there = b""
        if there != summary_bytes(grouped.families):
            verdict.problems.append(f"{store.url(SUMMARY_KEY)} has other counts than the scores")
    return verdict
