"""A second look at a selection: its shards are recounted, and its rows chosen again."""

from collections.abc import Mapping

from batch_scorer.derived.output import Derivation, read_totals
from batch_scorer.derived.parts import list_parts
from batch_scorer.derived.state import DerivedVerdict, recount, same_rows
from batch_scorer.errors import BatchScorerError
from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.select import KIND, choosing
from batch_scorer.storage import ObjectMissing, Store


def verify_derived(
    store: Store, derivation: Derivation, options: Mapping[str, str]
) -> DerivedVerdict:
    """Check a derived output. A selection is made again where what it was made of is as it was."""
    verdict = recount(store, derivation)
    if verdict.problems or verdict.unfinished or derivation.kind != KIND:
        return verdict
    sources = derivation.sources
    try:
        parts = list_parts(sources["places"], options, sources["beside"])
    except BatchScorerError:  # what it was made of is gone
        return verdict
    if parts.to_json()["digest"] != sources["digest"]:
        return verdict
    verdict.remade = 0
    with choosing(parts, Selection(**derivation.recipe), options) as chosen:
        verdict.counts = chosen.counts
        for key, made, _ in chosen.encoded(derivation.digest, (), options):
            try:
                is_same = same_rows(store, key, made)
            except ObjectMissing:
                is_same = False
            verdict.remade += 1
            if not is_same:
                verdict.problems.append(f"{store.url(key)} has other rows than the recipe keeps")
    totals = read_totals(store)
    if totals is not None and totals.counts != verdict.counts:
        verdict.problems.append(f"_SUCCESS has other counts: {totals.counts}, {verdict.counts}")
    if verdict.remade != verdict.shards and not verdict.problems:
        verdict.problems.append(
            f"{store.root} has {verdict.shards} shards and not {verdict.remade}"
        )
    return verdict
