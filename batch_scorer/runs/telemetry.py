"""A run's figures as Ray metrics, for whoever scrapes the cluster.

The driver sets them as receipts come; Ray's agent on the driver's node shows them to Prometheus,
under `Instrument.exported`. The figures are those of `metrics.Metrics`. `INSTRUMENTS` is the one
table of names: docs/observability.md, the alert rules and the board are held to it.
"""

import threading
import time
from dataclasses import dataclass
from typing import Any, Literal, Self

from batch_scorer.records import Receipt
from batch_scorer.runs.metrics import Metrics, Run

_RUN = "run"
_SHARD_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 300.0, 900.0)
"""A shard is meant to be 20 to 60 seconds of a device."""


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric. Beside `run` it carries the label `tag`, where that is set."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    tag: str | None = None

    @property
    def exported(self) -> str:
        """What a scrape calls it; a histogram's series add `_bucket`, `_sum` and `_count`."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


ROWS = Instrument(
    "batch_scorer_rows", "counter", "Rows of shards that ended: scored, marked, failed", "outcome"
)
TOKENS = Instrument(
    "batch_scorer_tokens", "counter", "Tokens of commits: scored, computed, padding", "kind"
)
SHARDS = Instrument(
    "batch_scorer_shards", "counter", "Shards that ended: committed, failed", "outcome"
)
RETRIES = Instrument(
    "batch_scorer_retries", "counter", "Tries beyond the first of the shards that ended"
)
GOODPUT = Instrument(
    "batch_scorer_goodput_tokens_per_second", "gauge", "Scored tokens per second and device"
)
COMPUTED_RATIO = Instrument(
    "batch_scorer_computed_ratio", "gauge", "Computed tokens over scored tokens"
)
IDLE_SHARE = Instrument(
    "batch_scorer_idle_share", "gauge", "Share of the workers' time outside the backend"
)
UTILISATION = Instrument("batch_scorer_utilisation", "gauge", "Model-FLOP utilisation")
ROWS_LEFT = Instrument("batch_scorer_rows_left", "gauge", "Rows of shards that have not ended")
ETA = Instrument("batch_scorer_eta_seconds", "gauge", "Seconds until the run is done")
SHARD_SECONDS = Instrument(
    "batch_scorer_shard_seconds", "histogram", "Seconds that a shard was scored for"
)

INSTRUMENTS = (
    ROWS, TOKENS, SHARDS, RETRIES, GOODPUT, COMPUTED_RATIO, IDLE_SHARE, UTILISATION, ROWS_LEFT,
    ETA, SHARD_SECONDS,
)  # fmt: skip
_SHOW_EVERY_S = 1.0
"""Ray exports a gauge once each time it is set, and its agent forgets it two intervals later (ten
seconds each, or RAY_metrics_report_interval_ms, from one second up)."""


class Telemetry:
    """Listens to one run, in a process that has joined Ray; a thread keeps its gauges in sight."""

    def __init__(self, name: str, run: Run) -> None:
        self._run = run
        self._metrics = Metrics()
        self._rows_left = run.rows
        self._judged_at = time.monotonic()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_shown, name="telemetry", daemon=True)
        # Ray takes labels in ASCII only.
        tags = {_RUN: name.encode("ascii", "backslashreplace").decode()}
        self._made = {instrument.name: _made(instrument, tags) for instrument in INSTRUMENTS}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._show()

    def planned(self, work: object) -> None:
        """Nothing to show yet: `Run` has what there is to do."""

    def finished(self, receipt: Receipt) -> None:
        commit = receipt.commit
        if commit is None:
            self._count(SHARDS, 1, "failed")
            self._count(ROWS, receipt.num_rows, "failed")
        else:
            one = Metrics.of([receipt])
            self._count(SHARDS, 1, "committed")
            self._count(ROWS, commit.rows_scored, "scored")
            self._count(ROWS, commit.rows_marked, "marked")
            self._count(TOKENS, one.scored_tokens, "scored")
            self._count(TOKENS, one.effort.computed_tokens, "computed")
            self._count(TOKENS, one.effort.padding_tokens, "padding")
            self._made[SHARD_SECONDS.name].observe(one.score_s)
        self._count(RETRIES, receipt.spent.retries)
        with self._lock:
            self._rows_left -= receipt.num_rows
            self._metrics.add(receipt)
            self._judged_at = time.monotonic()

    def _keep_shown(self) -> None:
        while not self._over.wait(_SHOW_EVERY_S):
            self._show()

    def _show(self) -> None:
        with self._lock:
            left_s = self._metrics.left_s(self._run.estimated_tokens)
            if left_s is not None:
                left_s = max(0.0, left_s - (time.monotonic() - self._judged_at))
            self._set(ROWS_LEFT, self._rows_left)
            self._set(ETA, left_s)
            self._set(GOODPUT, self._metrics.goodput(self._run))
            self._set(COMPUTED_RATIO, self._metrics.computed_ratio)
            self._set(IDLE_SHARE, self._metrics.idle_share)
            self._set(UTILISATION, self._metrics.utilisation(self._run))

    def _count(self, instrument: Instrument, amount: int, tag: str | None = None) -> None:
        if amount:  # Ray refuses to count nothing
            tags = {instrument.tag: tag} if instrument.tag else None
            self._made[instrument.name].inc(amount, tags=tags)

    def _set(self, instrument: Instrument, value: float | None) -> None:
        self._made[instrument.name].set(value)  # None leaves it as it is


def _made(instrument: Instrument, tags: dict[str, str]) -> Any:
    from ray.util.metrics import Counter, Gauge, Histogram

    keys = (_RUN, instrument.tag) if instrument.tag else (_RUN,)
    if instrument.kind == "histogram":
        made = Histogram(instrument.name, instrument.help, list(_SHARD_SECONDS), keys)
    else:
        kind = Counter if instrument.kind == "counter" else Gauge
        made = kind(instrument.name, instrument.help, keys)
    return made.set_default_tags(tags)
