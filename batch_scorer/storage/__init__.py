"""One layer over every store: local disk, S3, GCS, Azure; data sets of the Hugging Face hub, to
read.

What the commit protocol needs and nothing more: reads pinned to a version, a conditional create, a
conditional replace, and a listing that carries versions. What the stores show differently is made
alike here: the records of objects in `versions.py`, errors in `faults.py`. `conformance.py` proves
that a store keeps what the protocol needs.
"""

from batch_scorer.storage.conformance import (
    Check,
    Conformance,
    examine,
    require_conditional_writes,
)
from batch_scorer.storage.faults import AccessDenied, ObjectChanged, ObjectMissing, PlaceMissing
from batch_scorer.storage.hub import pinned
from batch_scorer.storage.store import (
    Store,
    glob_matches,
    in_threads,
    is_remote,
    open_store,
    place_of,
)
from batch_scorer.storage.versions import ObjectInfo, Version

__all__ = [
    "AccessDenied",
    "Check",
    "Conformance",
    "ObjectChanged",
    "ObjectInfo",
    "ObjectMissing",
    "PlaceMissing",
    "Store",
    "Version",
    "examine",
    "glob_matches",
    "in_threads",
    "is_remote",
    "open_store",
    "pinned",
    "place_of",
    "require_conditional_writes",
]
