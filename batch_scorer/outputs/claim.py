"""Whose output this is: `run.json`, written by the first run and checked by every other."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from batch_scorer.errors import OutputError
from batch_scorer.failpoints import failpoint
from batch_scorer.fingerprint import Fingerprint
from batch_scorer.outputs.lease import RECORDS
from batch_scorer.records.reading import parsed, read_record
from batch_scorer.storage import (
    AccessDenied,
    ObjectChanged,
    ObjectMissing,
    PlaceMissing,
    Store,
    open_store,
    require_conditional_writes,
)

T = TypeVar("T")

GENERATIONS_KEY = f"{RECORDS}/generations.json"
"""Where `nightly` remembers its generations, in the folder above them."""
RUN_KEY = f"{RECORDS}/run.json"
_FORMAT = 3
"""How the records beside the shards, and the commits in their footers, are written."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What `claim_output` writes when an output is begun: the parts of its fingerprint, its layout
    settings, and with what it was begun."""

    format: int
    fingerprint: dict[str, Any]
    layout: dict[str, Any]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        for parts in self.parts_by_model.values():
            text = parts.get("text", {})
            if not isinstance(text, dict):
                raise ValueError("fingerprint.text is no object")
            if date := text.get("date"):
                datetime.fromisoformat(str(date))
        rewards = self.fingerprint.get("rewards", {})
        if not isinstance(rewards, dict) or not all(isinstance(r, dict) for r in rewards.values()):
            raise ValueError("fingerprint.rewards is no object of objects")

    @property
    def parts_by_model(self) -> dict[str, dict[str, Any]]:
        """The parts of each model's own fingerprint by its name; the name of a single one is ""."""
        models = self.fingerprint.get("models", {"": self.fingerprint})
        if not isinstance(models, dict) or not all(isinstance(m, dict) for m in models.values()):
            raise ValueError("fingerprint.models is no object of objects")
        return models


def claim_output(
    store: Store, fingerprint: Fingerprint, layout: dict[str, Any], provenance: dict[str, Any]
) -> None:
    """Make sure this output is for this work: `run.json` is created, or agrees.

    Before the first write, the store has to show that it refuses a conditional write. Raises
    OutputError that names what differs, or a store that does not.
    """
    body = {
        "format": _FORMAT,
        "fingerprint": fingerprint.parts,
        "layout": layout,
        "provenance": provenance,
    }
    there = claimed(store)
    if there is None:
        try:
            require_conditional_writes(store, RECORDS)
            failpoint("claim.before_put")
            data = json.dumps(body, indent=1, sort_keys=True).encode()
            store.put(RUN_KEY, data, instead_of=None)
            return
        except (AccessDenied, PlaceMissing) as error:
            raise OutputError(str(error)) from error
        except ObjectChanged:  # another run has begun this output at the same moment
            there = claimed(store)
    assert there is not None  # nobody removes it
    differences = fingerprint.differences(Fingerprint(there.fingerprint))
    differences += Fingerprint(layout).differences(Fingerprint(there.layout))
    if differences:
        raise OutputError(
            f"{store.root} belongs to another run. Use another output, or the same settings:\n  "
            + "\n  ".join(differences)
        )


def claimed(store: Store) -> Claim | None:
    """What `claim_output` wrote when this output was begun; None before.

    Raises OutputError, also for an output whose records are written in another way.
    """

    def of_this_version(data: bytes) -> Claim:
        if parsed(data, dict[str, Any]).get("format") != _FORMAT:
            raise OutputError(
                f"{store.root} was written by another version of this program, whose records this "
                "one does not read; use that version, or score into another output"
            )
        return parsed(data, Claim)

    return _if_there(lambda: store.read_parsed(RUN_KEY, of_this_version)[0])


def _if_there(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except (AccessDenied, PlaceMissing) as error:
        raise OutputError(str(error)) from error
    except ObjectMissing:
        return None


def claimed_parts(store: Store) -> dict[str, dict[str, Any]]:
    """The parts of each model's fingerprint that this output is for, as `Claim.parts_by_model`; {}
    before any run has claimed it."""
    claim = claimed(store)
    return {} if claim is None else claim.parts_by_model


def open_scored(output: str, store_options: Mapping[str, str]) -> tuple[Store, Claim]:
    """An output of ours and its `run.json`; raises OutputError if there is none at `output`."""
    try:
        store = open_store(output, store_options)
    except (AccessDenied, PlaceMissing) as error:
        raise OutputError(str(error)) from error
    if (claim := claimed(store)) is None:
        refuse_nights(store)
        raise OutputError(f"{output}: no scored output here ({RUN_KEY} is missing)")
    return store, claim


def refuse_nights(store: Store) -> None:
    """Raise OutputError where `nightly` keeps its generations: each of them is an output."""
    if found := _if_there(lambda: read_record(store, GENERATIONS_KEY, _Generations)):
        names = ", ".join(generation.path for generation in found.generations)
        raise OutputError(f"{store.root} belongs to `nightly`; its outputs are {names}")


@dataclass(frozen=True, slots=True)
class _Generation:
    path: str


@dataclass(frozen=True, slots=True)
class _Generations:
    generations: list[_Generation]
