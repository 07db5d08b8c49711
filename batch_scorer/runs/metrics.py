"""A run's speed, computed from its receipts: one definition for every place that shows it.

`batch-scorer score` shows these figures as shards are committed and at the end, `status` from the
records, `--json` in both. docs/metrics.md explains them to users.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from pydantic import FiniteFloat

from batch_scorer.models.cost import ModelCost
from batch_scorer.outputs.lease import RECORDS
from batch_scorer.outputs.puts import put
from batch_scorer.records import Effort, Outcome, Receipt
from batch_scorer.records.reading import read_record
from batch_scorer.storage import Store


@dataclass(frozen=True, slots=True)
class Run:
    """What a run has to do and with what; its receipts do not hold it.

    `shards`, `rows` and `estimated_tokens` are those that it had to score. `devices` counts the
    devices of all its `workers`, which are the most at the same time where `is_elastic`: their
    number then changes during the run. `cost` is None where the model's config and weights do not
    determine it, and where no model computes; of several models `costs` has each one's, by name.
    `token_prices`, of a million tokens, are a served judge's.
    """

    epoch: int
    shards: int
    rows: int
    estimated_tokens: int
    workers: int
    devices: int
    cost: ModelCost | None
    token_prices: Mapping[str, float] = field(default_factory=dict)
    is_elastic: bool = False
    costs: Mapping[str, ModelCost | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_name(output: str, epoch: int) -> str:
    """What logs and metrics call a run: its output's last part, and the epoch."""
    return f"{output.rstrip('/').rsplit('/', 1)[-1]}:{epoch}"


@dataclass(slots=True)
class Metrics:
    """Sums over receipts of one run; seconds add up over workers. Ratios are None over nothing.

    Only what this run scored may be added: a shard that was committed before has cost it nothing.
    """

    scored_tokens: int = 0
    """Tokens of the committed rows' scored sequences, as if each were alone; without the reused."""
    reused_rows: int = 0
    """Rows whose every sequence was reused, because an equal one had been scored before."""
    reused_sequences: int = 0
    reused_tokens: int = 0
    estimated_tokens: int = 0
    """The plan's estimate for the shards that have ended, failed ones included."""
    effort: Effort = field(default_factory=Effort)
    efforts: dict[str, Effort] = field(default_factory=dict)
    """Of several models each one's, by name; `effort` is of all."""
    tokenized_sequences: int = 0
    """Sequences that were rendered and tokenised, each once for all models that read the same
    tokens; with those of which the scores were reused."""
    read_s: float = 0.0
    tokenize_s: float = 0.0
    wait_s: float = 0.0
    score_s: float = 0.0
    reward_s: float = 0.0
    write_s: float = 0.0
    peaks: dict[str, float] = field(default_factory=dict)
    """FLOP/s by engine record (`Receipt.engine`): the best that any of its workers has measured, as
    each look at the peak may have been disturbed."""
    scored_s: dict[str, float] = field(default_factory=dict)
    """`score_s` by engine record."""
    is_peak_known: bool = True
    began_at: float = float("inf")
    """When the first shard began to be scored; clock time, in seconds since 1970."""
    ended_at: float = float("-inf")
    """When the newest shard was committed."""

    @classmethod
    def of(cls, receipts: Iterable[Receipt | Outcome]) -> Self:
        metrics = cls()
        for receipt in receipts:
            metrics.add(receipt)
        return metrics

    def add(self, receipt: Receipt | Outcome) -> None:
        """Count a shard that has ended; one that is not committed leaves only its estimate."""
        self.estimated_tokens += receipt.estimated_tokens
        if receipt.commit is None:
            return
        spent, reused = receipt.spent, receipt.reused
        self.scored_tokens += receipt.commit.tokens - reused.tokens
        self.reused_rows += sum(reused.rows.values())
        self.reused_sequences += reused.sequences
        self.reused_tokens += reused.tokens
        self.effort.add(spent.effort)
        for model, effort in spent.efforts.items():
            self.efforts.setdefault(model, Effort()).add(effort)
        self.tokenized_sequences += spent.tokenized_sequences
        for name in ("read_s", "tokenize_s", "wait_s", "score_s", "reward_s", "write_s"):
            setattr(self, name, getattr(self, name) + getattr(spent, name))
        engine = receipt.engine
        self.peaks[engine] = max(self.peaks.get(engine, 0.0), spent.peak_flops)
        self.scored_s[engine] = self.scored_s.get(engine, 0.0) + spent.score_s
        self.is_peak_known &= spent.peak_flops > 0
        self.began_at = min(self.began_at, spent.started_at)
        self.ended_at = max(self.ended_at, spent.committed_at)

    @property
    def possible_flop(self) -> float:
        """What the devices could have computed while they scored: `score_s` times their peak."""
        return sum(self.peaks[engine] * seconds for engine, seconds in self.scored_s.items())

    @property
    def span_s(self) -> float:
        """Seconds from the start of the first shard to the newest commit; starting up is over."""
        return max(0.0, self.ended_at - self.began_at)

    @property
    def tokens_per_s(self) -> float | None:
        """Scored tokens per second of the span, all devices together."""
        return _ratio(self.scored_tokens, self.span_s)

    def goodput(self, run: Run) -> float | None:
        """Scored tokens per second and device: padding, what was not committed and what was reused
        do not count."""
        if run.is_elastic:  # a worker counts from its first shard to the end of its last
            device_s = (self.wait_s + self.score_s) * run.devices / run.workers
        else:
            device_s = self.span_s * run.devices
        return _ratio(self.scored_tokens, device_s)

    @property
    def computed_ratio(self) -> float | None:
        """Tokens that went through the model, of the scored ones: below 1 where sequences share
        prefixes."""
        return _ratio(self.effort.computed_tokens, self.scored_tokens)

    @property
    def padding_share(self) -> float | None:
        """Of the places that went through the model, those that held no token."""
        padding = self.effort.padding_tokens
        return _ratio(padding, padding + self.effort.computed_tokens)

    @property
    def idle_share(self) -> float | None:
        """Of the workers' time from their first shard to their last, that outside the backend."""
        return _ratio(self.wait_s, self.wait_s + self.score_s)

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of a worker's devices in large matrix products, as measured by the workers."""
        return _ratio(self.possible_flop, self.score_s) if self.is_peak_known else None

    def model_flop(self, run: Run) -> float | None:
        """Operations of the computed tokens; padding and activations do not count."""
        costs, efforts = run.costs, self.efforts
        if not costs:
            costs, efforts = {"": run.cost}, {"": self.effort}
        flop = 0.0
        for model, cost in costs.items():
            if cost is None:
                return None
            effort = efforts.get(model, Effort())
            flop += cost.flops(effort.computed_tokens, effort.attended_pairs)
        return flop

    def utilisation(self, run: Run) -> float | None:
        """Model-FLOP utilisation: the computed tokens' operations, as a share of those that the
        devices could do in large matrix products while they scored.

        At most 1. The measured peak is a lower bound of the real one: other processes may have
        used the device while it was measured, and a quantised body may compute faster than the
        dtype that it was measured in. So a quotient above 1 shows an underestimated peak, not
        more work than was possible.
        """
        flop = self.model_flop(run)
        if flop is None or not self.is_peak_known:
            return None
        ratio = _ratio(flop, self.possible_flop)
        return None if ratio is None else min(1.0, ratio)

    def left_s(self, estimated_tokens: int) -> float | None:
        """Seconds until `estimated_tokens` have ended, at the pace so far. By the plan's estimates,
        since shards differ in size. None before the first commit."""
        ratio = _ratio(estimated_tokens, self.estimated_tokens)
        if ratio is None or not self.span_s:
            return None
        return self.span_s * max(0.0, ratio - 1)

    def token_cost(self, run: Run) -> float | None:
        """What a served judge's tokens cost by the prices of the settings; those that its server
        had cached at the full price."""
        if not run.token_prices:
            return None
        prompt = self.effort.computed_tokens + self.effort.shared_tokens
        generated = self.effort.generated_tokens
        prices = run.token_prices
        return (prompt * prices["prompt"] + generated * prices["generated"]) / 1e6

    def to_json(self, run: Run) -> dict[str, Any]:
        """All figures, with units in their names; the same keys wherever they are shown."""
        return {
            "goodput_tokens_per_s_per_device": self.goodput(run),
            "computed_ratio": self.computed_ratio,
            "padding_share": self.padding_share,
            "model_flop_utilisation": self.utilisation(run),
            "idle_share": self.idle_share,
            "scored_tokens": self.scored_tokens,
            "reused_rows": self.reused_rows,
            "reused_sequences": self.reused_sequences,
            "reused_tokens": self.reused_tokens,
            "tokenized_sequences": self.tokenized_sequences,
            **asdict(self.effort),
            "token_cost": self.token_cost(run),
            "model_flop": self.model_flop(run),
            "peak_flop_per_s": self.peak_flops,
            "span_s": self.span_s,
            "read_s": self.read_s,
            "tokenize_s": self.tokenize_s,
            "wait_s": self.wait_s,
            "score_s": self.score_s,
            "reward_s": self.reward_s,
            "write_s": self.write_s,
            "workers": run.workers,
            "devices": run.devices,
        }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


_RUNS = f"{RECORDS}/runs"


def record_run(store: Store, run: Run, metrics: dict[str, Any] | None) -> None:
    """Keep what a run has to do and, once it has ended, its `Metrics.to_json`."""
    body = {"run": run.to_json(), "metrics": metrics}
    put(store, f"{_RUNS}/{run.epoch:06d}.json", json.dumps(body, indent=1).encode())


@dataclass(frozen=True, slots=True)
class _Recorded:
    run: Run
    metrics: dict[str, int | FiniteFloat | None] | None


def newest_run(store: Store) -> tuple[Run, dict[str, Any] | None] | None:
    """The newest run that had anything to score, and its figures; None for those of a run that
    has not ended."""
    key = max((info.key for info in store.list(_RUNS)), default=None)
    if key is None:
        return None
    record = read_record(store, key, _Recorded)
    if record.metrics is None:
        return record.run, None
    metrics = Metrics().to_json(record.run) | record.metrics
    if (utilisation := metrics["model_flop_utilisation"]) is not None:
        # A record may be older than the bound in `Metrics.utilisation`.
        metrics["model_flop_utilisation"] = min(1.0, utilisation)
    return record.run, metrics
