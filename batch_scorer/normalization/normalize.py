"""`normalize`: all rows of scored outputs, with their scores normalised by group beside them.

OUT/_batch_scorer/normalization.json   scores, groups and those without a spread, by prefix
"""

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from batch_scorer.config import expanded
from batch_scorer.derived.output import Counts, DerivedOutput, read_totals
from batch_scorer.derived.parts import Part, Parts, list_parts, read_apart
from batch_scorer.errors import InputError
from batch_scorer.normalization.columns import Found, find_scores, normalized_shard
from batch_scorer.normalization.groups import FloatArray, Groups
from batch_scorer.normalization.recipe import Normalization
from batch_scorer.normalization.result import FamilyCounts, Normalized
from batch_scorer.outputs.lease import RECORDS
from batch_scorer.records.reading import read_record
from batch_scorer.storage import in_threads
from batch_scorer.version import __version__

KIND = "normalization"
SUMMARY_KEY = f"{RECORDS}/normalization.json"
_READERS = 2
"""Processes that read at the same time, each a row group, or a part to be written."""


def normalize(
    places: Sequence[str],
    output: str,
    normalization: Normalization | None = None,
    store_options: Mapping[str, str] | None = None,
) -> Normalized:
    """Write the rows of scored outputs, one shard for each that is read, with their scores
    normalised in columns of their own. An output that is complete is left as it is; one that was
    begun is finished.

    Raises ConfigError, InputError, OutputError and IncompleteError.
    """
    asked, options = normalization or Normalization(), store_options or {}
    output = expanded(output)
    parts = list_parts([expanded(place) for place in places], options)
    recipe, sources = asked.to_json(), parts.to_json()
    derived = DerivedOutput(output, options, KIND, recipe, sources, {"batch_scorer": __version__})
    totals = read_totals(derived.store)
    if totals is None:
        derived.plan(len(parts.parts))
        with grouping(parts, asked, options) as grouped:
            for key, encoded, rows in grouped.encoded(derived.digest, derived.committed):
                derived.commit(key, encoded, rows)
        derived.record(SUMMARY_KEY, summary_bytes(grouped.families))
        totals = derived.conclude(Counts(parts.num_rows, {}))
    families = read_record(derived.store, SUMMARY_KEY, dict[str, FamilyCounts])
    return Normalized(output, parts.places, recipe, families, totals)


def summary_bytes(families: Mapping[str, FamilyCounts]) -> bytes:
    """What `normalization.json` holds."""
    body = {prefix: asdict(counts) for prefix, counts in families.items()}
    return json.dumps(body, indent=1).encode()


@dataclass(frozen=True, slots=True)
class Grouped:
    """The groups of all parts' scores; `families` are counted by prefix."""

    parts: Sequence[Part]
    options: Mapping[str, str]
    groups: Groups
    families: Mapping[str, FamilyCounts]

    def encoded(
        self, derivation: str, committed: Collection[str]
    ) -> Iterator[tuple[str, bytes, int]]:
        """Key, bytes and rows of every shard but those that are `committed`."""
        prefixes = tuple(self.families)

        def of_part(numbered: tuple[int, Part]) -> tuple[Part, FloatArray, FloatArray]:
            number, part = numbered
            return part, *self.groups.of_rows(number, part.num_rows, len(prefixes))

        def encode(found: tuple[Part, FloatArray, FloatArray]) -> tuple[str, bytes, int]:
            part, means, stds = found
            arguments = (part, prefixes, means, stds, derivation, self.options)
            return part.key, read_apart(part.source, normalized_shard, *arguments), part.num_rows

        left = ((n, part) for n, part in enumerate(self.parts) if part.key not in committed)
        # The database is asked here, by one thread.
        yield from in_threads(encode, map(of_part, left), _READERS)


@contextmanager
def grouping(
    parts: Parts, normalization: Normalization, options: Mapping[str, str]
) -> Iterator[Grouped]:
    """The groups of these parts' scores, for as long as the context lasts. Writes nothing but files
    of its own on the local disk."""

    def find(part: Part) -> Found:
        return read_apart(part.source, find_scores, part, normalization, options)

    with tempfile.TemporaryDirectory(prefix="batch_scorer-normalize-") as folder:
        groups = Groups(Path(folder))
        try:
            prefixes: tuple[str, ...] | None = None
            read = zip(parts.parts, in_threads(find, parts.parts, _READERS), strict=True)
            for number, (part, found) in enumerate(read):
                prefixes = prefixes or tuple(found.scores)
                if set(prefixes) != set(found.scores):
                    raise InputError(
                        f"{part.url} has scores with the prefixes {sorted(found.scores)}, others "
                        f"with {sorted(prefixes)}; name those of all of them as prefix"
                    )
                groups.add(number, found.rows, _scores(found, prefixes))
            groups.settle()
            yield Grouped(parts.parts, options, groups, groups.counts(prefixes or ()))
        finally:
            groups.close()


def _scores(found: Found, prefixes: Sequence[str]) -> pa.Table:
    """The scores of all families, each with the place of its family."""
    tables = []
    for place, prefix in enumerate(prefixes):
        table = found.scores[prefix]
        family = pa.array(np.full(table.num_rows, place, np.int16))
        tables.append(table.set_column(0, table.schema.field(0), family))
    return pa.concat_tables(tables)
