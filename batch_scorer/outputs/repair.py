"""Scored shards that should not be there, because a glob finds their rows twice.

On Azure and on S3 with versioning, older runs could not remove the pieces of a rewritten file that
was cut in another way: they ended well, and the old pieces stayed beside the new ones. What the
manifest does not name is such a stray. Finding and removing are two steps, so that people see the
list in between:

    strays = find_strays("s3://bucket/scored", options)
    remove("s3://bucket/scored", options, strays)

In a bucket that keeps old versions, a removed stray stays as one of those, under a delete marker:
no listing and no glob finds it, and a rule of the bucket ends it (on S3
`NoncurrentVersionExpiration`). So a removal can be undone there, and frees no space by itself.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batch_scorer.errors import OutputError, OutputHeldError
from batch_scorer.outputs.claim import open_scored
from batch_scorer.outputs.lease import Lease
from batch_scorer.outputs.ledger import READERS
from batch_scorer.outputs.manifest import SUCCESS_KEY, committed
from batch_scorer.outputs.state import OutputState
from batch_scorer.storage import Version, in_threads

_LEASE_S = 60.0
_PLAN = "repair"
"""A plan of its own in the lease: it raises the epoch, so a run that planned before stops."""


@dataclass(frozen=True, slots=True)
class Stray:
    """A scored shard that no manifest names: `num_rows` rows of `input` from `first_row` on."""

    key: str
    version: Version
    size_bytes: int
    input: str
    first_row: int
    num_rows: int


def find_strays(output: str, store_options: Mapping[str, str]) -> list[Stray]:
    """All strays of an output, by key; changes nothing, and reads no shard that is in the manifest.

    Only where every run has ended: before that, a shard without a record is none. Raises
    OutputError for an output that is not complete, OutputHeldError where a run is at work.
    """
    store, _ = open_scored(output, store_options)
    state = OutputState(store)
    if (holder := state.holder) is not None:
        raise OutputHeldError(
            f"{store.root}: {holder.holder} is working on this output. Wait until it is done; if "
            "it is dead, run the same command again"
        )
    return sorted(_strays(state), key=lambda stray: stray.key)


def remove(output: str, store_options: Mapping[str, str], strays: Sequence[Stray]) -> list[Stray]:
    """Remove exactly these versions, under the lease; returns those that were strays still.

    What has been stored under a stray's key since it was found is left alone, and so is what a
    manifest names by now. Killed in the middle, the rest is found again. Raises what `find_strays`
    raises, StorageError, and LeaseLostError if a run takes the output over.
    """
    store, _ = open_scored(output, store_options)
    with Lease(store, _PLAN, _LEASE_S) as lease:
        named = _named(OutputState(store))
        still = [stray for stray in strays if stray.key not in named]
        lease.confirm()
        removals = in_threads(
            lambda stray: store.delete_version(stray.key, stray.version), still, READERS
        )
        deque(removals, maxlen=0)
        lease.check()
    return still


def _strays(state: OutputState) -> list[Stray]:
    named = _named(state)
    others = (
        info for info in state.objects() if info.key.endswith(".parquet") and info.key not in named
    )
    return [
        Stray(
            info.key,
            info.version,
            info.size_bytes,
            receipt.commit.input,
            receipt.commit.first_row,
            receipt.commit.num_rows,
        )
        for info, receipt in committed(state.store, others, {})
        if receipt is not None and receipt.commit is not None
    ]


def _named(state: OutputState) -> set[str]:
    """The shards that the newest manifest names. Raises OutputError where it may not be the last
    word."""
    if state.success is None:
        raise OutputError(
            f"{state.store.root}: no {SUCCESS_KEY}, so the output is not complete and nothing in "
            "it is known to be left over. Run the same command again: it finishes the output, and "
            "removes what does not belong there"
        )
    return {receipt.output_key for receipt in state.manifest if receipt.commit is not None}
