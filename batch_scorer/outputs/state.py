"""What is stored at an output, and what its records hold: one reading for all who need it."""

from collections.abc import Iterator
from functools import cached_property

from batch_scorer.outputs.lease import LeaseState, lease_of
from batch_scorer.outputs.ledger import Segment, read_ledger
from batch_scorer.outputs.manifest import (
    Planned,
    Success,
    committed,
    current_manifest,
    is_record,
    outcomes_of_manifest,
    read_plan,
    read_success,
)
from batch_scorer.records import Outcome, Receipt
from batch_scorer.storage import ObjectInfo, ObjectMissing, Store


class OutputState:
    """An output as it stands. Each record is read once, when it is first asked for.

    Truth is the stored objects (`shards`); the records only save reading them, and lag a run at
    work by a few seconds.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    @cached_property
    def success(self) -> Success | None:
        """The totals in `_SUCCESS`; None while the output is not complete."""
        return read_success(self.store)

    @cached_property
    def manifest(self) -> list[Receipt]:
        """The receipts of the newest run that came to its end."""
        return current_manifest(self.store)

    @cached_property
    def ledger(self) -> list[Segment[Receipt]]:
        """What runs have recorded since that manifest, oldest first."""
        return list(read_ledger(self.store, Receipt))

    @cached_property
    def receipts(self) -> dict[str, Receipt]:
        """The newest receipt of each output key."""
        newest = {receipt.output_key: receipt for receipt in self.manifest}
        for segment in self.ledger:
            newest.update((receipt.output_key, receipt) for receipt in segment.receipts)
        return newest

    @cached_property
    def counted_ledger(self) -> list[Segment[Outcome]]:
        """`ledger`, read as far as it is counted."""
        return list(read_ledger(self.store, Outcome))

    @cached_property
    def outcomes(self) -> dict[str, Outcome]:
        """`receipts`, read as far as they are counted."""
        found = outcomes_of_manifest(self.store, Outcome)
        newest = {outcome.output_key: outcome for outcome in found}
        for segment in self.counted_ledger:
            newest.update((outcome.output_key, outcome) for outcome in segment.receipts)
        return newest

    @cached_property
    def plan(self) -> Planned | None:
        """How much the newest run set out to do; None before any run has planned."""
        try:
            return read_plan(self.store)
        except ObjectMissing:
            return None

    @cached_property
    def lease(self) -> LeaseState | None:
        return lease_of(self.store)

    @property
    def holder(self) -> LeaseState | None:
        """The run at work, if there is one."""
        return self.lease if self.lease is not None and self.lease.is_held else None

    def objects(self) -> Iterator[ObjectInfo]:
        """All stored objects that are not records; listed anew each time."""
        return (info for info in self.store.list() if not is_record(info.key))

    def shards(self) -> Iterator[tuple[ObjectInfo, Receipt | None]]:
        """The stored objects with their receipts; None for what is no scored shard of ours.

        A receipt is trusted where it names the stored version; other objects are read.
        """
        return committed(self.store, self.objects(), self.receipts)
