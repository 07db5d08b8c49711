"""Whose output this is: `run.json`, written by the first run and checked by every other."""

import json
from collections.abc import Mapping
from typing import Any

from batch_scorer.errors import OutputError
from batch_scorer.failpoints import failpoint
from batch_scorer.fingerprint import Fingerprint
from batch_scorer.outputs.lease import RECORDS
from batch_scorer.storage import (
    AccessDenied,
    ObjectChanged,
    ObjectMissing,
    PlaceMissing,
    Store,
    open_store,
    require_conditional_writes,
)

GENERATIONS_KEY = f"{RECORDS}/generations.json"
"""Where `nightly` remembers its generations, in the folder above them."""
_RUN_KEY = f"{RECORDS}/run.json"
_FORMAT = 3
"""How the records beside the shards, and the commits in their footers, are written."""


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
    if not (there := claimed(store)):
        try:
            require_conditional_writes(store, RECORDS)
            failpoint("claim.before_put")
            data = json.dumps(body, indent=1, sort_keys=True).encode()
            store.put(_RUN_KEY, data, instead_of=None)
            return
        except (AccessDenied, PlaceMissing) as error:
            raise OutputError(str(error)) from error
        except ObjectChanged:  # another run has begun this output at the same moment
            there = claimed(store)
    differences = fingerprint.differences(Fingerprint(there["fingerprint"]))
    differences += Fingerprint(layout).differences(Fingerprint(there["layout"]))
    if differences:
        raise OutputError(
            f"{store.root} belongs to another run. Use another output, or the same settings:\n  "
            + "\n  ".join(differences)
        )


def claimed(store: Store) -> dict[str, Any]:
    """What `claim_output` wrote when this output was begun; {} before.

    Raises OutputError, also for an output whose records are written in another way.
    """
    claim = _read_claim(store, _RUN_KEY)
    if claim and claim.get("format") != _FORMAT:
        raise OutputError(
            f"{store.root} was written by another version of this program, whose records this one "
            "does not read; use that version, or score into another output"
        )
    return claim


def _read_claim(store: Store, key: str) -> dict[str, Any]:
    try:
        claim: dict[str, Any] = store.read_json(key)
    except (AccessDenied, PlaceMissing) as error:
        raise OutputError(str(error)) from error
    except ObjectMissing:
        return {}
    return claim


def claimed_fingerprint(store: Store) -> dict[str, Any]:
    """The parts of the fingerprint that this output is for; {} before any run has claimed it."""
    parts: dict[str, Any] = claimed(store).get("fingerprint", {})
    return parts


def open_scored(output: str, store_options: Mapping[str, str]) -> tuple[Store, dict[str, Any]]:
    """An output of ours and its `run.json`; raises OutputError if there is none at `output`."""
    try:
        store = open_store(output, store_options)
    except (AccessDenied, PlaceMissing) as error:
        raise OutputError(str(error)) from error
    if not (claim := claimed(store)):
        refuse_nights(store)
        raise OutputError(f"{output}: no scored output here ({_RUN_KEY} is missing)")
    return store, claim


def refuse_nights(store: Store) -> None:
    """Raise OutputError where `nightly` keeps its generations: each of them is an output."""
    if found := _read_claim(store, GENERATIONS_KEY):
        names = ", ".join(generation["path"] for generation in found["generations"])
        raise OutputError(f"{store.root} belongs to `nightly`; its outputs are {names}")
