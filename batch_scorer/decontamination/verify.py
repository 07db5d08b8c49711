"""A second look at what `decontaminate` wrote: its shards are recounted, and its rows compared with
the evaluation sets, or with each other, again."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields

from batch_scorer.decontamination.decontaminate import (
    AT_ONCE,
    PROVENANCE,
    REMOVED_KEY,
    ShardRemovals,
    Sought,
    deciding,
    look_up,
    removed_lines,
)
from batch_scorer.decontamination.index import Removed
from batch_scorer.decontamination.recipe import Decontamination, Match
from batch_scorer.derived.output import Derivation
from batch_scorer.derived.parts import unchanged_parts
from batch_scorer.derived.state import DerivedVerdict, compare_counts, compare_shards, recount
from batch_scorer.errors import BatchScorerError
from batch_scorer.storage import ObjectMissing, Store, in_threads


def verify_decontamination(
    store: Store, derivation: Derivation, options: Mapping[str, str]
) -> DerivedVerdict:
    """Check an output; it is made again where rows, evaluation files and the versions of what
    compares them are as they were."""
    verdict = recount(store, derivation)
    if verdict.problems or verdict.unfinished:
        return verdict
    if (sought := _unchanged(derivation, options)) is None:
        return verdict
    found: list[ShardRemovals] = []

    def made() -> Iterator[tuple[str, bytes]]:
        with deciding(sought) as decide:
            parts = sought.parts.parts
            again = in_threads(lambda part: decide(part, derivation.digest), parts, AT_ONCE)
            for part, (removals, data) in zip(parts, again, strict=True):
                found.append(removals)
                yield part.key, data

    compare_shards(verdict, store, made())
    compare_counts(verdict, store, sought.counts(found))
    try:
        listed = store.read(REMOVED_KEY)
    except ObjectMissing:
        listed = b""
    if not _same_decisions(listed, removed_lines(found), sought.recipe.match):
        verdict.problems.append(f"{store.url(REMOVED_KEY)} lists other rows than are left out")
    return verdict


def _unchanged(derivation: Derivation, options: Mapping[str, str]) -> Sought | None:
    """What was looked for, in which rows; None where that has changed since, or is gone."""
    versions = derivation.provenance | {"batch_scorer": PROVENANCE["batch_scorer"]}
    if versions != PROVENANCE or unchanged_parts(derivation, options) is None:
        return None
    asked = derivation.recipe
    recipe = Decontamination(**{name: asked[name] for name in Decontamination.model_fields})
    try:
        sought = look_up(derivation.sources["places"], asked["against"], recipe, options)
    except BatchScorerError:
        return None
    return sought if sought.asked == asked else None


def _same_decisions(listed: bytes, again: bytes, match: Match) -> bool:
    """Whether two `removed.jsonl` are of the same rows for the same reasons. Of embeddings the rows
    alone count: which of two equally close ones is closest, a processor's rounding decides."""
    names = [field.name for field in fields(Removed)]
    if match is Match.EMBEDDING:
        names = ["file", "row"]

    def decisions(lines: bytes) -> list[list[object]]:
        read = [json.loads(line) for line in lines.splitlines()]
        return [[each[name] for name in names] for each in read]

    try:
        return decisions(listed) == decisions(again)
    except (ValueError, KeyError, TypeError):  # no such list
        return False
