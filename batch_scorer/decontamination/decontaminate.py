"""Rows that are not too close to evaluation sets: as many shards as were read, in their order.

OUT/_batch_scorer/removed/<shard>.json   what was left out of a shard; written before it
                  removed.jsonl          all of these rows
                  decontamination.json   counts by source, and of entries
"""

import json
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import datasketch
import numpy as np
import pyarrow as pa

from batch_scorer.config import expanded, load_partial_config
from batch_scorer.decontamination.embeddings import (
    EmbeddingIndex,
    Vectors,
    require_one_model,
    vectors_of,
)
from batch_scorer.decontamination.index import (
    PERMUTATIONS,
    SCHEME,
    Hit,
    Index,
    Place,
    Removed,
)
from batch_scorer.decontamination.recipe import (
    ITSELF,
    Decontamination,
    Match,
)
from batch_scorer.decontamination.result import Decontaminated, SourceCounts
from batch_scorer.decontamination.seen import Seen
from batch_scorer.decontamination.seen_embeddings import SeenEmbeddings
from batch_scorer.decontamination.texts import texts_of_rows
from batch_scorer.decontamination.words import NORMAL_FORM
from batch_scorer.derived.output import Counts, DerivedOutput, Totals, encode_shard
from batch_scorer.derived.parts import Part, Parts, list_parts, read_apart, read_part
from batch_scorer.derived.recipes import load_recipe
from batch_scorer.errors import ConfigError, InputError, ShardError
from batch_scorer.formats import read_json_table
from batch_scorer.inputs.files import open_parquet
from batch_scorer.inputs.sources import FileKind, kind_of, list_inputs
from batch_scorer.outputs.by_source import row_sources
from batch_scorer.outputs.lease import RECORDS
from batch_scorer.records import Source
from batch_scorer.records.digest import digest_of
from batch_scorer.records.reading import read_record
from batch_scorer.storage import ObjectDamaged, ObjectMissing, in_threads, open_store
from batch_scorer.version import __version__

REMOVED_KEY = f"{RECORDS}/removed.jsonl"
SUMMARY_KEY = f"{RECORDS}/decontamination.json"
KIND = "decontamination"
AnyIndex: TypeAlias = Index | EmbeddingIndex

PROVENANCE: Mapping[str, Any] = {
    "batch_scorer": __version__,
    "datasketch": datasketch.__version__,
    "normal_form": NORMAL_FORM,
    "minhash": {"permutations": PERMUTATIONS, "scheme": SCHEME},
}
MOST_COMPARED_ROWS = 1_000_000
"""Of which every two are compared by their embeddings: the time grows with the square."""
AT_ONCE = 2
"""Shards in memory, each in a process of its own."""


@dataclass(frozen=True, slots=True)
class ShardRemovals:
    """What was left out of one shard; `sources` counts its rows by source."""

    rows: int
    without_text: int
    sources: dict[str, int]
    removed: list[Removed] = field(default_factory=list)


Decide: TypeAlias = Callable[[Part, str | None], tuple[ShardRemovals, bytes]]
"""What is left out of a part, and the bytes of its shard in the derivation with this digest; none
without one."""


@dataclass(frozen=True, slots=True)
class Sought:
    """What is looked for in which rows. `against_digest` says which version of the evaluation files
    was read; the index is empty where rows are compared with each other."""

    recipe: Decontamination
    options: Mapping[str, str]
    parts: Parts
    against: tuple[str, ...]
    against_digest: str
    index: AnyIndex

    @property
    def is_itself(self) -> bool:
        return self.against == (ITSELF,)

    @property
    def asked(self) -> dict[str, Any]:
        """What the record of the output keeps as its recipe."""
        against = {"against": list(self.against), "against_digest": self.against_digest}
        return {**self.recipe.to_json(), **against}

    def counts(self, found: Sequence[ShardRemovals]) -> Counts:
        removed = sum(len(each.removed) for each in found)
        reason = "duplicate" if self.is_itself else "contaminated"
        return Counts(self.parts.num_rows, {reason: removed} if removed else {})


def decontaminate(
    scored: Sequence[str],
    against: Sequence[str],
    output: str,
    recipe: Decontamination | Path | None = None,
    *,
    store_options: Mapping[str, str] | None = None,
    dry_run: bool = False,
) -> Decontaminated:
    """Write the rows of scored outputs that match nothing of the evaluation files `against`; with
    "self", those that are like no earlier row: earlier by place, file name and row number.

    Raises ConfigError, InputError and OutputError; IncompleteError where what is read is not whole.
    """
    recipe = recipe if isinstance(recipe, Decontamination) else load_recipe(Decontamination, recipe)
    output, options = expanded(output), dict(store_options or {})
    sought = look_up(scored, against, recipe, options)
    made: DerivedOutput | None = None
    if not dry_run:
        sources = sought.parts.to_json()
        made = DerivedOutput(output, options, KIND, sought.asked, sources, PROVENANCE)
        made.plan(len(sought.parts.parts))
    with deciding(sought) as decide:

        def find(part: Part) -> ShardRemovals:
            if made is None:
                return decide(part, None)[0]
            if (found := _committed(made, part)) is not None:
                return found
            found, shard = decide(part, made.digest)
            made.record(_removed_key(part), json.dumps(asdict(found)).encode())
            made.commit(part.key, shard, found.rows - len(found.removed))
            return found

        found = list(in_threads(find, sought.parts.parts, AT_ONCE))
    if made is None:
        return _summary(output, sought.index, found, None)
    made.record(REMOVED_KEY, removed_lines(found))
    totals = made.conclude(sought.counts(found))
    summary = _summary(output, sought.index, found, totals)
    made.record(SUMMARY_KEY, json.dumps(summary.to_json(), indent=1).encode())
    return summary


def removed_lines(found: Sequence[ShardRemovals]) -> bytes:
    """What `removed.jsonl` holds."""
    removed = [row for each in found for row in each.removed]
    lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in removed)
    # Half a surrogate pair is no UTF-8; in JSON it may be written so.
    return lines.encode(errors="backslashreplace")


def _removed_key(part: Part) -> str:
    return f"{RECORDS}/removed/{part.key}.json"


def _committed(made: DerivedOutput, part: Part) -> ShardRemovals | None:
    """What was left out of a shard that is there; None: it has to be found (again)."""
    if (shard := made.committed.get(part.key)) is None:
        return None
    try:
        found = read_record(made.store, _removed_key(part), ShardRemovals)
    except (ObjectMissing, ObjectDamaged):
        return None
    return found if found.rows - len(found.removed) == shard.rows else None


def _summary(
    output: str, index: AnyIndex, found: Sequence[ShardRemovals], totals: Totals | None
) -> Decontaminated:
    rows: Counter[str] = Counter()
    for each in found:
        rows.update(each.sources)
    removed = Counter(row.source for each in found for row in each.removed)
    return Decontaminated(
        output=output,
        rows=sum(each.rows for each in found),
        removed=removed.total(),
        rows_without_text=sum(each.without_text for each in found),
        entries=len(index.entries),
        entries_without_text=index.without_text,
        sources={name: SourceCounts(rows[name], removed[name]) for name in sorted(rows)},
        totals=totals,
    )


def look_up(
    scored: Sequence[str],
    against: Sequence[str],
    recipe: Decontamination,
    options: Mapping[str, str],
) -> Sought:
    """List the rows and read what is looked for; raises as `decontaminate`."""
    itself = list(against) == [ITSELF]
    scored = [expanded(place) for place in scored]
    against = [expanded(place) for place in against]
    if itself and recipe.match is Match.NGRAM:
        raise ConfigError("match: rows are compared with each other by exact, near or embedding")
    parts = list_parts(scored, options)
    index: AnyIndex
    if itself:
        index, files = Index(recipe, []), ""
        if recipe.match is Match.EMBEDDING:
            _require_comparable(parts, options)
    elif recipe.match is Match.EMBEDDING:
        index, files = _read_embedded(against, recipe, options, parts)
    else:
        entries, files = _read_entries(against, recipe, options)
        index = Index(recipe, entries)
    if not itself and not index.entries:
        raise InputError(f"{', '.join(against)}: no entry has text to look for")
    return Sought(recipe, options, parts, tuple(against), files, index)


@contextmanager
def deciding(sought: Sought) -> Iterator[Decide]:
    """What is left out of each part, for as long as the context lasts."""
    recipe, options = sought.recipe, sought.options
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = _compare(sought.parts.parts, recipe, options, folder) if sought.is_itself else {}
        stored = folder / "index"
        stored.write_bytes(pickle.dumps(sought.index, protocol=5))

        def decide(part: Part, derivation: str | None) -> tuple[ShardRemovals, bytes]:
            finder = known[part.key] if sought.is_itself else stored
            return read_apart(part.source, _make, part, recipe, options, finder, derivation)

        yield decide


# Evaluation files


def _read_entries(
    against: Sequence[str], recipe: Decontamination, options: Mapping[str, str]
) -> tuple[list[tuple[Place, list[str]]], str]:
    """The texts of every row of these files, and a digest of the files' versions."""
    config = load_partial_config(inputs=tuple(against), store_options=dict(options))
    listing = list_inputs(config)
    if listing.unusable:
        source, problem = listing.unusable[0]
        raise InputError(f"{source.url}: {problem}")
    entries: list[tuple[Place, list[str]]] = []
    for source, _ in listing.found:
        texts = read_apart(source, _entry_texts, source, recipe, options)
        entries += [(Place(source.key, row), each) for row, each in enumerate(texts)]
    return entries, digest_of([[s.key, s.version.etag] for s, _ in listing.found])


def _entry_texts(
    source: Source, recipe: Decontamination, options: Mapping[str, str]
) -> list[list[str]]:
    store = open_store(source.root, options)
    kind = kind_of(source.key)
    try:
        if kind is FileKind.PARQUET:
            table = open_parquet(store, source).read(use_threads=False)
        elif kind is FileKind.JSON:
            data = store.read_whole(source.key, source.version, source.size_bytes)
            table, _ = read_json_table(data, source.key)
        else:
            raise InputError(f"{source.url}: evaluation files are Parquet or JSON")
        return texts_of_rows(table, recipe.scope, recipe.against_column, source.url)
    except ShardError as error:
        raise InputError(f"{source.url}: {error}") from None


def _read_embedded(
    against: Sequence[str], recipe: Decontamination, options: Mapping[str, str], rows: Parts
) -> tuple[AnyIndex, str]:
    """The embeddings of these outputs, and a digest of what they are."""
    entries = list_parts(against, options)
    require_one_model([*rows.parts, *entries.parts], options)
    index = EmbeddingIndex(recipe.threshold)
    for part in entries.parts:
        column = recipe.against_column
        index.add(part.key, *read_apart(part.source, _embedded, part, recipe, options, column))
    return index, str(entries.to_json()["digest"])


def _embedded(
    part: Part, recipe: Decontamination, options: Mapping[str, str], column: str | None
) -> tuple[Vectors, list[str]]:
    table = read_part(part, options)
    texts = texts_of_rows(table, recipe.scope, column, part.source.url)
    return vectors_of(table, part), ["\n".join(each) for each in texts]


# Shards


@lru_cache(maxsize=1)
def _read_index(file: Path) -> AnyIndex:
    """A process that looks through many shards reads it once."""
    index: AnyIndex = pickle.loads(file.read_bytes())
    return index


def _require_comparable(parts: Parts, options: Mapping[str, str]) -> None:
    """Raise ConfigError or InputError unless the embeddings of all rows can be compared."""
    if parts.num_rows > MOST_COMPARED_ROWS:
        raise ConfigError(
            f"match: embedding compares every two rows, of at most {MOST_COMPARED_ROWS:,}; these "
            f"are {parts.num_rows:,}: leave out exact and near ones first, or take fewer"
        )
    require_one_model(parts.parts, options)


def _compare(
    parts: Sequence[Part], recipe: Decontamination, options: Mapping[str, str], folder: Path
) -> dict[str, dict[int, Hit]]:
    """By shard, the rows that are like an earlier one. Files go into `folder`."""
    if recipe.match is Match.EMBEDDING:
        close = SeenEmbeddings(recipe.threshold, folder)

        def embedded(part: Part) -> tuple[Vectors, list[str]]:
            column = recipe.prompt_column
            return read_apart(part.source, _embedded, part, recipe, options, column)

        read_parts = zip(parts, in_threads(embedded, parts, AT_ONCE), strict=True)
        return {part.key: close.hits(part.key, *read) for part, read in read_parts}
    seen = Seen(recipe)
    found: dict[str, dict[int, Hit]] = {}

    def read(part: Part) -> list[list[str]]:
        return read_apart(part.source, _row_texts, part, recipe, options)

    for part, rows in zip(parts, in_threads(read, parts, AT_ONCE), strict=True):
        found[part.key] = {
            row: hit
            for row, texts in enumerate(rows)
            if (hit := seen.hit(Place(part.key, row), texts)) is not None
        }
    return found


def _row_texts(part: Part, recipe: Decontamination, options: Mapping[str, str]) -> list[list[str]]:
    table = read_part(part, options)
    return texts_of_rows(table, recipe.scope, recipe.prompt_column, part.source.url)


def _make(
    part: Part,
    recipe: Decontamination,
    options: Mapping[str, str],
    finder: Path | Mapping[int, Hit],
    derivation: str | None,
) -> tuple[ShardRemovals, bytes]:
    """The rows of a shard that match, by a stored index or as they are known, and the bytes of the
    others; none where there is no derivation."""
    table = read_part(part, options)
    texts = texts_of_rows(table, recipe.scope, recipe.prompt_column, part.source.url)
    without_text = sum(not each for each in texts)
    if recipe.match is Match.EMBEDDING:
        vectors = vectors_of(table, part)
        without_text = table.num_rows - len(np.unique(vectors.rows))
    if not isinstance(finder, Path):
        hits = finder
    elif isinstance(index := _read_index(finder), Index):
        hits = index.hits(texts)
    else:
        hits = index.hits(vectors, ["\n".join(each) for each in texts])
    sources = row_sources(table)
    removals = ShardRemovals(
        rows=table.num_rows,
        without_text=without_text,
        sources=dict(Counter(sources.tolist())),
        removed=[
            Removed(
                file=part.key,
                row=row,
                source=str(sources[row]),
                entry_file=hit.entry.file,
                entry_row=hit.entry.row,
                text=hit.text,
                entry_text=hit.entry_text,
                overlap=hit.overlap,
            )
            for row, hit in sorted(hits.items())
        ],
    )
    if derivation is None:
        return removals, b""
    keep = np.ones(table.num_rows, dtype=bool)  # bool[R]
    keep[list(hits)] = False
    return removals, encode_shard(table.filter(pa.array(keep)), derivation, part.key)
