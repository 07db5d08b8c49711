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
from batch_scorer.storage.faults import (
    AccessDenied,
    ObjectChanged,
    ObjectDamaged,
    ObjectMissing,
    PlaceMissing,
    first_line,
)
from batch_scorer.storage.folders import Unusable, is_speakable, printable
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
    "ObjectDamaged",
    "ObjectInfo",
    "ObjectMissing",
    "PlaceMissing",
    "Store",
    "Unusable",
    "Version",
    "examine",
    "first_line",
    "glob_matches",
    "in_threads",
    "is_remote",
    "is_speakable",
    "open_store",
    "pinned",
    "place_of",
    "printable",
    "require_conditional_writes",
]
