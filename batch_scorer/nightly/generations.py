"""The generations of a nightly output: outputs side by side, and a pointer to those to read.

    ROOT/generations/<series>/<12 hex of the fingerprint>-<n>/   an output, as `score` writes it
    ROOT/latest.json                                             which of them to read
    ROOT/_batch_scorer/generations.json                          the list of all of them

A *series* is `main`. Roots of earlier versions have others, of further models, whose inputs were
the scored shards of `main`; they are left alone. In JSON a series is a `line`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

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

    `layout` are the settings of that role. `is_rescore`: it was begun to compute again what another
    of the same fingerprint has.
    """

    series: Annotated[str, Field(alias="line")]
    number: int
    fingerprint: str
    layout: dict[str, Any]
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
    """What `latest.json` holds: the path of each series' generation."""

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


def move_latest(root: Store, generation: Generation, night: int, found: Latest | None) -> None:
    """Point at this generation.

    Raises LeaseLostError if the pointer is not as it was `found`.
    """
    path = generation.path
    body = {
        "generation": path.rsplit("/", 1)[-1],
        "path": path,
        "lines": [{"line": generation.series, "path": path}],
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
        if (generation.fingerprint, generation.layout) == (wanted.fingerprint, wanted.layout)
        and (not wanted.is_rescore or generation.number > newest_complete)
    ]
    if alike:
        return max(alike, key=lambda generation: generation.number)
    number = 1 + max((generation.number for generation in series), default=0)
    return replace(wanted, number=number)


def donor_of(
    known: Iterable[Generation], chosen: Generation, latest: Latest | None
) -> Generation | None:
    """The generation whose scores the chosen one may reuse: of the same fingerprint, cut in another
    way; or else the one that readers take, which may have those of some of the models. None where
    the chosen one has to compute everything, or is complete.
    """
    named = latest.paths.get(chosen.series) if latest else None
    if chosen.is_rescore or chosen.path == named:
        return None
    donors = [
        generation
        for generation in known
        if generation.series == chosen.series and generation.path != chosen.path
    ]

    def worth(donor: Generation) -> tuple[bool, bool, int]:
        return donor.fingerprint == chosen.fingerprint, donor.path == named, donor.number

    return max(donors, key=worth, default=None)


def held(receipts: Iterable[Receipt]) -> dict[str, str]:
    """The inputs whose every row is committed, each with the entity tag of its committed version;
    found from the receipts of a generation."""
    receipts = list(receipts)
    lacking = {r.input for r in receipts if r.status in (Status.FAILED, Status.LEFT)}
    return {
        receipt.input: stored.commit.input_etag
        for receipt in receipts
        if receipt.status is Status.COMMITTED
        and receipt.input not in lacking
        and (stored := receipt.stored)
    }
