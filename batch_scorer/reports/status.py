"""How far an output is, read from anywhere that sees it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from batch_scorer.lease import holder_of
from batch_scorer.manifest import (
    known_receipts,
    newest_run,
    open_scored,
    read_plan,
    read_success,
    total,
)
from batch_scorer.metrics import Metrics
from batch_scorer.storage import ObjectMissing


@dataclass(frozen=True, slots=True)
class OutputStatus:
    """`state` is complete, running or interrupted. Counts are of what the records know, which
    lags a running job by a few seconds; `planned_*` are of its newest run.

    `metrics` (`Metrics.to_json`) are of the newest run that had anything to score, None before
    there is one; `left_s` is judged by them while it runs.
    """

    output: str
    state: str
    holder: str | None
    planned_shards: int
    planned_rows: int
    shards_committed: int
    shards_failed: int
    rows_scored: int
    rows_marked: int
    tokens: int
    metrics: dict[str, Any] | None
    left_s: float | None
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_status(output: str, store_options: Mapping[str, str] | None = None) -> OutputStatus:
    """The state of `output`. Raises OutputError if it is not one of ours."""
    store, run = open_scored(output, store_options or {})
    receipts = known_receipts(store)
    totals = total(receipts.values())
    try:
        plan = read_plan(store)
    except ObjectMissing:
        plan = {"shards": 0, "rows": 0}
    holder = holder_of(store)
    if read_success(store) is not None:
        state = "complete"
    else:
        state = "running" if holder else "interrupted"
    metrics: dict[str, Any] | None = None
    left_s: float | None = None
    if (newest := newest_run(store)) is not None:
        found, metrics = newest
        if metrics is None:
            so_far = Metrics.of(r for r in receipts.values() if r.epoch == found.epoch)
            metrics = so_far.to_json(found)
            left_s = so_far.left_s(found.estimated_tokens) if state == "running" else None
    return OutputStatus(
        output=output,
        state=state,
        holder=holder,
        planned_shards=plan["shards"],
        planned_rows=plan["rows"],
        shards_committed=totals["shards"] - totals["shards_failed"],
        shards_failed=totals["shards_failed"],
        rows_scored=totals["rows_scored"],
        rows_marked=totals["rows_marked"],
        tokens=totals["tokens"],
        metrics=metrics,
        left_s=left_s,
        provenance=run["provenance"],
    )
