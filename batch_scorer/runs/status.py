"""How far an output is, from what is stored there."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from batch_scorer.outputs.claim import open_scored
from batch_scorer.outputs.lease import Standing
from batch_scorer.outputs.ledger import Segment
from batch_scorer.outputs.manifest import total
from batch_scorer.outputs.state import OutputState
from batch_scorer.records import Status
from batch_scorer.runs.metrics import Metrics, newest_run


@dataclass(frozen=True, slots=True)
class OutputStatus:
    """`state` is complete, running or interrupted. Counts are of what the records know, which
    lags a running job by a few seconds; `planned_*` are of its newest run. `marked` counts rows by
    reason, `failed` names each failed shard's input, reason and detail; `shards_left` are those
    that the newest run was told to leave.

    `holder` renewed its lease `renewed_s` ago, by this machine's clock; a run that is alive does
    so every ten seconds. `metrics` (`Metrics.to_json`) are of the newest run that had anything to
    score, None before there is one; `left_s` is judged by them while it runs.
    """

    output: str
    state: str
    holder: str | None
    renewed_s: float | None
    planned_shards: int
    planned_rows: int
    shards_committed: int
    shards_failed: int
    shards_left: int
    rows_scored: int
    rows_marked: int
    marked: dict[str, int]
    failed: list[dict[str, str | None]]
    tokens: int
    metrics: dict[str, Any] | None
    left_s: float | None
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_status(output: str, store_options: Mapping[str, str] | None = None) -> OutputStatus:
    """The state of `output`. Raises OutputError if it is not one of ours."""
    store, run = open_scored(output, store_options or {})
    there = OutputState(store)
    lease, holder, receipts = there.lease, there.holder, there.receipts
    ours = [segment for segment in there.ledger if lease and segment.holder_id == lease.holder_id]
    totals = total(receipts.values())
    plan = there.plan or {"shards": 0, "rows": 0}
    unfinished = "running" if holder else "interrupted"
    metrics: dict[str, Any] | None = None
    left_s: float | None = None
    if (newest := newest_run(store)) is not None:
        found, metrics = newest
        if metrics is None:
            so_far = Metrics.of(receipt for segment in ours for receipt in segment.receipts)
            metrics = so_far.to_json(found)
            if holder is not None and ours:
                left_s = _left_s(so_far.left_s(found.estimated_tokens), ours[-1], holder)
    return OutputStatus(
        output=output,
        state=unfinished if there.success is None else "complete",
        holder=holder.holder if holder else None,
        renewed_s=silent_s(holder) if holder else None,
        planned_shards=plan["shards"],
        planned_rows=plan["rows"],
        shards_committed=totals["shards"] - totals["shards_failed"] - totals["shards_left"],
        shards_failed=totals["shards_failed"],
        shards_left=totals["shards_left"],
        rows_scored=totals["rows_scored"],
        rows_marked=totals["rows_marked"],
        marked=totals["marked"],
        failed=[
            {"input": r.input, "reason": r.reason, "detail": r.detail}
            for r in receipts.values()
            if r.status is Status.FAILED
        ],
        tokens=totals["tokens"],
        metrics=metrics,
        left_s=left_s,
        provenance=run["provenance"],
    )


def silent_s(holder: Standing) -> float:
    """Since it renewed its lease, by this machine's clock."""
    return (datetime.now(UTC) - holder.renewed_at).total_seconds()


def _left_s(at_last_record: float | None, newest: Segment, holder: Standing) -> float | None:
    """What is left of the time that was left when the ledger was written last, all by the store's
    clock: a holder that is alive has just renewed its lease."""
    if at_last_record is None:
        return None
    since_s = max(0.0, (holder.renewed_at - newest.written_at).total_seconds())
    return max(0.0, at_last_record - since_s)
