"""An output's progress, computed from what is stored there."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batch_scorer.config import expanded
from batch_scorer.outputs.claim import open_scored
from batch_scorer.outputs.lease import LeaseState
from batch_scorer.outputs.manifest import Planned, counted
from batch_scorer.outputs.state import OutputState
from batch_scorer.records import Status
from batch_scorer.runs.metrics import Metrics, newest_run


@dataclass(frozen=True, slots=True)
class OutputStatus:
    """`state` is complete, running, failed (the newest run came to its end and shards failed) or
    interrupted. Counts come from the records, which lag a
    running job by a few seconds; `planned_*` are the newest run's, without rows that are not asked
    for (`limit`, `where`). `marked` counts rows by reason,
    `failed` lists each failed shard's input, reason and detail; `shards_left` are those that the
    newest run left because of `max_shards`.

    `holder` renewed its lease `renewed_s` seconds ago, by this machine's clock; a live run does so
    every ten seconds. `metrics` (`Metrics.to_json`) are those of the newest run that had anything
    to score, None before there is one; `left_s`, the seconds until it ends, is estimated from them
    while it runs. `judged` counts a judge's questions (`records.Judged`), None without a judge;
    `rewards` what each reward function gave (`records.Rewarded`).
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
    rows_not_asked: int
    marked: dict[str, int]
    failed: list[dict[str, str | None]]
    tokens: int
    metrics: dict[str, Any] | None
    left_s: float | None
    provenance: dict[str, Any]
    judged: dict[str, Any] | None
    rewards: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_status(output: str | Path, store_options: Mapping[str, str] | None = None) -> OutputStatus:
    """The state of `output`. Raises OutputError if `score` and `nightly` did not write it."""
    output = expanded(output)
    store, claim = open_scored(output, store_options or {})
    state = OutputState(store)
    holder, outcomes = state.holder, state.outcomes.values()
    totals = counted(outcomes)
    metrics, left_s = _pace(state)
    plan = state.plan or Planned(shards=0, rows=0, estimated_tokens=0)
    if state.success is not None:
        how = "complete"
    elif holder:
        how = "running"
    else:
        # A run that was stopped has shards without a receipt.
        is_over = totals["shards"] >= plan.shards and not totals["shards_left"]
        how = "failed" if is_over and totals["shards_failed"] else "interrupted"
    return OutputStatus(
        output=output,
        state=how,
        holder=holder.holder if holder else None,
        renewed_s=silent_s(holder, datetime.now(UTC)) if holder else None,
        planned_shards=plan.shards,
        planned_rows=plan.rows,
        shards_committed=totals["shards"] - totals["shards_failed"] - totals["shards_left"],
        shards_failed=totals["shards_failed"],
        shards_left=totals["shards_left"],
        rows_scored=totals["rows_scored"],
        rows_marked=totals["rows_marked"],
        rows_not_asked=totals["rows_not_asked"],
        marked=totals["marked"],
        failed=[
            {"input": r.input, "reason": r.reason, "detail": r.detail}
            for r in outcomes
            if r.status is Status.FAILED
        ],
        tokens=totals["tokens"],
        metrics=metrics,
        left_s=left_s,
        provenance=claim.provenance,
        judged=totals.get("judged"),
        rewards=totals.get("rewards", {}),
    )


def silent_s(holder: LeaseState, now: datetime) -> float:
    """Seconds since the holder last renewed its lease, by this machine's clock; never negative,
    though the store's clock may be ahead."""
    return max(0.0, (now - holder.renewed_at).total_seconds())


def _pace(state: OutputState) -> tuple[dict[str, Any] | None, float | None]:
    """The newest run's figures, and the seconds that it still needs while it runs."""
    if (newest := newest_run(state.store)) is None:
        return None, None
    run, figures = newest
    if figures is not None:
        return figures, None
    lease, holder = state.lease, state.holder
    segments = state.counted_ledger
    ours = [segment for segment in segments if lease and segment.holder_id == lease.holder_id]
    so_far = Metrics.of(receipt for segment in ours for receipt in segment.receipts)
    left_s = so_far.left_s(run.estimated_tokens)
    if left_s is None or holder is None or not ours:
        return so_far.to_json(run), None
    # As of the newest record; since then time has passed, by the store's clock: a holder that is
    # alive has just renewed its lease.
    since_s = max(0.0, (holder.renewed_at - ours[-1].written_at).total_seconds())
    return so_far.to_json(run), max(0.0, left_s - since_s)
