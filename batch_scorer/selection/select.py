"""`select`: rows of scored outputs that a recipe keeps, in an output of their own."""

import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batch_scorer.config import expanded
from batch_scorer.derived.output import (
    Counts,
    Derivation,
    DerivedOutput,
    Totals,
    encode_shard,
    read_totals,
)
from batch_scorer.derived.parts import Part, Parts, list_parts, read_apart
from batch_scorer.errors import IntegrityError
from batch_scorer.selection.candidates import Found, find_candidates
from batch_scorer.selection.choose import Candidates, IntArray
from batch_scorer.selection.flat import FlatPart
from batch_scorer.selection.gather import gathered
from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.result import Selected
from batch_scorer.selection.stored_pairs import StoredPairs
from batch_scorer.storage import in_threads
from batch_scorer.version import __version__

KIND = "select"
_READERS = 2
"""Processes that read at the same time, each a row group."""


def select(
    places: Sequence[str],
    output: str,
    selection: Selection,
    store_options: Mapping[str, str] | None = None,
    beside: Mapping[str, str] | None = None,
) -> Selected:
    """Write the rows of scored outputs that `selection` keeps, one shard for each that they are
    read from. An output that is complete is left as it is; one that was begun is finished.

    `beside` are outputs of the same inputs by prefix: their score columns come with the rows, under
    the prefix and their name. Rows are counted flat: each response of a list is one. Raises
    ConfigError, InputError, OutputError and IncompleteError.
    """
    options = store_options or {}
    output, parts = expanded(output), _parts(places, options, beside)
    recipe, sources = selection.to_json(), parts.to_json()
    derived = DerivedOutput(output, options, KIND, recipe, sources, {"batch_scorer": __version__})
    totals = read_totals(derived.store)
    if totals is None:
        with choosing(parts, selection, options) as chosen:
            derived.plan(len(chosen.shard_rows()))
            for key, encoded, count in chosen.encoded(derived.digest, derived.committed, options):
                derived.commit(key, encoded, count)
        totals = derived.conclude(chosen.counts)
    return Selected(output, parts.places, recipe, totals)


def preview(
    places: Sequence[str],
    selection: Selection,
    store_options: Mapping[str, str] | None = None,
    beside: Mapping[str, str] | None = None,
) -> Selected:
    """What `select` would count. Writes nothing."""
    options = store_options or {}
    parts = _parts(places, options, beside)
    recipe = selection.to_json()
    derivation = Derivation.of(KIND, recipe, parts.to_json()).digest
    with choosing(parts, selection, options) as chosen:
        totals = Totals.of(chosen.counts, chosen.shard_rows(), derivation)
    return Selected(None, parts.places, recipe, totals)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The rows that a selection keeps, and `counts` of all that were read."""

    selection: Selection
    parts: Sequence[Part]
    candidates: Candidates
    folder: Path
    counts: Counts

    def shard_rows(self) -> list[int]:
        """How many rows each shard has."""
        if self.selection.reorders:
            return [rows for _, _, rows in self.candidates.shards()]
        return [len(places) for _, _, places in self._shards()]

    def encoded(
        self, derivation: str, committed: Collection[str], options: Mapping[str, str]
    ) -> Iterator[tuple[str, bytes, int]]:
        """Key, bytes and rows of every shard but those that are `committed`."""
        if self.selection.reorders:
            yield from gathered(
                self.parts,
                self.candidates,
                self.selection,
                derivation,
                committed,
                options,
                self.folder,
            )
            return

        def encode(shard: tuple[str, Part, IntArray]) -> tuple[str, bytes, int]:
            key, part, places = shard
            encoded = read_apart(
                part.source, _encoded, part, places, self.selection, derivation, key, options
            )
            return key, encoded, len(places)

        left = (shard for shard in self._shards() if shard[0] not in committed)
        yield from in_threads(encode, left, _READERS)

    def _shards(self) -> Iterator[tuple[str, Part, IntArray]]:
        """Key, part and places of each shard in the order of the inputs."""
        for number, part in enumerate(self.parts):
            for split, places in self.candidates.kept(number):
                yield f"{split}/{part.key}" if split else part.key, part, places


def _parts(
    places: Sequence[str], options: Mapping[str, str], beside: Mapping[str, str] | None
) -> Parts:
    others = {prefix: expanded(output) for prefix, output in (beside or {}).items()}
    return list_parts([expanded(place) for place in places], options, others)


@contextmanager
def choosing(parts: Parts, selection: Selection, options: Mapping[str, str]) -> Iterator[Chosen]:
    """What a selection keeps of these parts, for as long as the context lasts. Writes nothing but
    files of its own on the local disk."""

    def find(part: Part) -> Found:
        return read_apart(part.source, find_candidates, part, selection, options)

    with tempfile.TemporaryDirectory(prefix="batch_scorer-select-") as folder:
        candidates = Candidates(Path(folder))
        try:
            rows, dropped = 0, Counter[str]()
            for number, found in enumerate(in_threads(find, parts.parts, _READERS)):
                if found.candidates.num_rows:
                    candidates.add(number, found.candidates)
                rows += found.rows
                dropped.update(found.dropped)
            choice = candidates.choose(selection)
            dropped.update(choice.dropped)
            if rows != len(candidates) + sum(dropped.values()):
                raise IntegrityError(f"{rows} rows, {len(candidates)} kept, {dropped} dropped")
            counts = Counts(rows, _by_text(dropped))
            if choice.prompts is not None:
                prompts, without = choice.prompts.prompts, _by_text(choice.prompts.without_pair)
                counts = replace(counts, prompts=prompts, prompts_without_pair=without)
            yield Chosen(selection, parts.parts, candidates, Path(folder), counts)
        finally:
            candidates.close()


def _by_text(counts: Mapping[Any, int]) -> dict[str, int]:
    """Counts by the text of their reasons, those of none left out."""
    return {str(reason): count for reason, count in sorted(counts.items()) if count}


def _encoded(
    part: Part,
    places: IntArray,
    selection: Selection,
    derivation: str,
    key: str,
    options: Mapping[str, str],
) -> bytes:
    flat = FlatPart(part, options)
    table = flat.taken(places)
    if selection.lays_out:
        table = StoredPairs(flat, selection.columns).table(table)
    return encode_shard(table, derivation, key)
