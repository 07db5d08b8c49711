"""The generations of a nightly output: outputs side by side, and a pointer to those to read.

    ROOT/generations/<series>/<12 hex of the fingerprint>-<n>/   an output, as `score` writes it
    ROOT/latest.json                                             which of them to read
    ROOT/_batch_scorer/generations.json                          the list of all of them

A *series* holds the generations of one model: `main`, or the column prefix of a further model. The
series of a nightly run form a chain: the second takes the scored shards of the first as its inputs,
so the last has all columns. In JSON a series is a `line`.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from batch_scorer.errors import LeaseLostError
from batch_scorer.outputs.claim import GENERATIONS_KEY
from batch_scorer.outputs.puts import put
from batch_scorer.records import Receipt, Status
from batch_scorer.records.reading import read_record, read_record_with_info
from batch_scorer.storage import ObjectChanged, ObjectMissing, Store, Version

MAIN = "main"
LATEST_KEY = "latest.json"


@dataclass(frozen=True, slots=True)
class Generation:
    """All scores of one series under one fingerprint, number `number` of its series.

    `layout` are the settings of that role. `follows` is the path of the generation whose shards it
    takes as inputs, None for the first series. `is_rescore`: it was begun to compute again what
    another of the same fingerprint has.
    """

    series: Annotated[str, Field(alias="line")]
    number: int
    fingerprint: str
    layout: dict[str, Any]
    follows: str | None = None
    is_rescore: bool = False

    @property
    def path(self) -> str:
        return f"generations/{self.series}/{self.fingerprint[:12]}-{self.number}"

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {"path": self.path, "line": fields.pop("series"), **fields}


@dataclass(frozen=True, slots=True)
class _Generations:
    generations: list[Generation]


def read_generations(root: Store) -> list[Generation]:
    """All generations that were ever begun, oldest first. Raises ObjectDamaged."""
    try:
        return read_record(root, GENERATIONS_KEY, _Generations).generations
    except ObjectMissing:
        return []


def record_generations(root: Store, generations: Sequence[Generation]) -> None:
    """Keep the list; only the holder of the root's lease may."""
    body = {"generations": [generation.to_json() for generation in generations]}
    put(root, GENERATIONS_KEY, json.dumps(body, indent=1).encode())


@dataclass(frozen=True, slots=True)
class Latest:
    """What `latest.json` holds: the path of each series' generation, in the order of the chain."""

    paths: Mapping[str, str]
    version: Version


@dataclass(frozen=True, slots=True)
class _Named:
    line: str
    path: str


@dataclass(frozen=True, slots=True)
class _Pointer:
    lines: list[_Named]


def read_latest(root: Store) -> Latest | None:
    """None before any generation was complete. Raises ObjectDamaged."""
    try:
        pointer, info = read_record_with_info(root, LATEST_KEY, _Pointer)
    except ObjectMissing:
        return None
    return Latest({entry.line: entry.path for entry in pointer.lines}, info.version)


def move_latest(root: Store, chain: Sequence[Generation], night: int, found: Latest | None) -> None:
    """Point at these generations; the last one is what readers take.

    Raises LeaseLostError if the pointer is not as it was `found`.
    """
    last = chain[-1].path
    body = {
        "generation": last.rsplit("/", 1)[-1],
        "path": last,
        "lines": [{"line": generation.series, "path": generation.path} for generation in chain],
        "night": night,
    }
    data = json.dumps(body, indent=1).encode()
    try:
        root.put(LATEST_KEY, data, instead_of=None if found is None else found.version)
    except ObjectChanged:
        raise LeaseLostError(f"{root.root}: another run has moved {LATEST_KEY}") from None


def choose(known: Iterable[Generation], wanted: Generation, latest: Latest | None) -> Generation:
    """The generation to work on: the newest that is as `wanted`, but for its number, or a new one.

    A `wanted.is_rescore` resumes only one that was begun after that which `latest` names, and so is
    not complete; without it any will do, begun as a rescore or not.
    """
    series = [generation for generation in known if generation.series == wanted.series]
    named = latest.paths.get(wanted.series) if latest else None
    newest_complete = max((g.number for g in series if g.path == named), default=0)
    alike = [
        generation
        for generation in series
        if (generation.fingerprint, generation.layout, generation.follows)
        == (wanted.fingerprint, wanted.layout, wanted.follows)
        and (not wanted.is_rescore or generation.number > newest_complete)
    ]
    if alike:
        return max(alike, key=lambda generation: generation.number)
    number = 1 + max((generation.number for generation in series), default=0)
    return replace(wanted, number=number)


def donor_of(
    known: Iterable[Generation],
    chosen: Generation,
    latest: Latest | None,
    *,
    has_models: bool = False,
) -> Generation | None:
    """The generation whose scores the chosen one may reuse: of the same fingerprint, cut or chained
    in another way; or, where it `has_models`, several, one that may have the scores of some.
    None where the chosen one has to compute everything, or is complete.
    """
    named = latest.paths.get(chosen.series) if latest else None
    if chosen.is_rescore or chosen.path == named:
        return None
    donors = [
        generation
        for generation in known
        if generation.series == chosen.series
        and (has_models or generation.fingerprint == chosen.fingerprint)
        and generation.path != chosen.path
    ]

    def worth(donor: Generation) -> tuple[bool, bool, int]:
        return donor.fingerprint == chosen.fingerprint, donor.path == named, donor.number

    return max(donors, key=worth, default=None)


def held(chain: Sequence[Sequence[Receipt]]) -> dict[str, str]:
    """The inputs whose every row is committed in all generations of a chain, each with the entity
    tag of its committed version.

    Found from the receipts; a generation's shards are the next one's inputs.
    """
    if not chain:
        return {}
    lacking = _unfinished(chain[0])
    files = dict(_committed(chain[0]))  # input file by the last shard made of it
    for receipts in chain[1:]:
        unfinished = _unfinished(receipts)
        pieces = defaultdict(list)
        for stored, read in _committed(receipts):
            pieces[read].append(stored)
        above, files = files, {}
        for shard, file in above.items():
            if shard in pieces and shard[0] not in unfinished:
                files |= dict.fromkeys(pieces[shard], file)
            else:
                lacking.add(file[0])
    return {key: etag for key, etag in files.values() if key not in lacking}


_Version: TypeAlias = tuple[str, str]
"""A key and an entity tag."""


def _committed(receipts: Iterable[Receipt]) -> Iterator[tuple[_Version, _Version]]:
    """The shards that are stored, and the files that were read for them."""
    for receipt in receipts:
        if receipt.status is Status.COMMITTED and (stored := receipt.stored):
            scored = receipt.output_key, stored.version.etag
            yield scored, (receipt.input, stored.commit.input_etag)


def _unfinished(receipts: Iterable[Receipt]) -> set[str]:
    return {r.input for r in receipts if r.status in (Status.FAILED, Status.LEFT)}
