"""What a plan, a check, a run, a verification and a nightly run found, as values.

Pure functions make them of what was read or done. Every figure that any view shows is in them, or
in the values that they hold.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from batch_scorer import formats
from batch_scorer.errors import ExitCode
from batch_scorer.models.registry import adapter_named
from batch_scorer.nightly.foresee import Prospect
from batch_scorer.nightly.night import Ended
from batch_scorer.nightly.record import DriftReport, NightlyRecord
from batch_scorer.outputs.verify import Verdict
from batch_scorer.parity import ParityReport
from batch_scorer.records import (
    Judged,
    ModelCounts,
    PairCounts,
    Receipt,
    Rewarded,
    Status,
    layout_to_json,
)
from batch_scorer.records.reading import parsed
from batch_scorer.render import TemplateFacts
from batch_scorer.runs.estimate import Estimate
from batch_scorer.runs.preview import Checked, Outlook
from batch_scorer.runs.run import Summary


@dataclass(frozen=True, slots=True)
class FailedShard:
    """A shard that is not committed, or a whole file that no shard could be made of."""

    input: str
    output_key: str
    reason: str | None
    detail: str


def failed_shard(receipt: Receipt) -> FailedShard:
    return FailedShard(receipt.input, receipt.output_key, receipt.reason, receipt.detail)


# Before a run


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """An input file; `rows` are those that are asked for, `tokens` the plan's estimate for them,
    `layout` is `layout_to_json`. `lost_types` names the columns whose Parquet type the output
    cannot have."""

    key: str
    url: str
    rows: int
    shards: int
    tokens: int
    rows_are: str
    layout: Mapping[str, Any]
    rows_not_asked: int = 0
    lost_types: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What a run would do. Without an `estimate`, `unknown` is the reason; None: no model given.

    `skipped` are the URLs of files beside the inputs that are not read. `rewards` says what each
    reward function is, by name (`Reward.identity`).
    """

    files: tuple[PlannedFile, ...]
    shards: int
    rows: int
    estimated_tokens: int
    estimate: Estimate | None
    unknown: str | None
    failed: tuple[FailedShard, ...]
    rows_not_asked: int = 0
    skipped: tuple[str, ...] = ()
    rewards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def computed_ratio(self) -> float | None:
        """The tokens that the model would compute, as a share of the rows' tokens."""
        found = self.estimate
        return None if found is None else found.computed_tokens / found.row_tokens

    def to_json(self) -> dict[str, Any]:
        return {
            "files": [
                {
                    "input": file.url,
                    "rows": file.rows,
                    "rows_not_asked": file.rows_not_asked,
                    "rows_are": file.rows_are,
                    "lost_types": list(file.lost_types),
                    **file.layout,
                }
                for file in self.files
            ],
            "shards": self.shards,
            "rows": self.rows,
            "rows_not_asked": self.rows_not_asked,
            "estimated_tokens": self.estimated_tokens,
            "estimate": None if self.estimate is None else asdict(self.estimate),
            "estimate_unknown": self.unknown,
            "failed": [
                {"input": each.input, "reason": each.reason, "detail": each.detail}
                for each in self.failed
            ],
            "skipped": list(self.skipped),
            "rewards": {name: dict(facts) for name, facts in self.rewards.items()},
        }


def plan_report(ahead: Outlook) -> PlanReport:
    plan = ahead.plan
    shards: dict[str, int] = defaultdict(int)
    rows: dict[str, int] = defaultdict(int)
    tokens: dict[str, int] = defaultdict(int)
    for shard in plan.shards:
        shards[shard.source.url] += 1
        rows[shard.source.url] += shard.num_rows
        tokens[shard.source.url] += shard.estimated_tokens
    return PlanReport(
        files=tuple(
            PlannedFile(
                key=file.source.key,
                url=file.source.url,
                rows=rows[file.source.url],
                rows_not_asked=file.num_rows - rows[file.source.url],
                shards=shards[file.source.url],
                tokens=tokens[file.source.url],
                rows_are=formats.describe(file.layout, file.schema),
                layout=layout_to_json(file.layout),
                lost_types=file.lost_types,
            )
            for file in plan.files
        ),
        shards=len(plan.shards),
        rows=plan.num_rows,
        estimated_tokens=plan.estimated_tokens,
        estimate=ahead.estimate,
        unknown=ahead.unknown,
        failed=tuple(map(failed_shard, plan.failed)),
        rows_not_asked=plan.rows_not_asked,
        skipped=tuple(plan.skipped),
        rewards={reward.name: reward.identity for reward in ahead.rewards},
    )


@dataclass(frozen=True, slots=True)
class CheckReport:
    """How the model was understood, one rendered row, and both engines' scores of a sample.

    `dimensions`, `pooling` and `normalize` are an embedding's, None for scores; `outputs` names
    each score. `example` is the row whose text, with special tokens visible, is `rendered`.
    `marked` counts the sequences without a score by reason. `template` is what the chat template
    does to a conversation, None without one; `text` are the settings by which rows become token
    ids (`Prompt.to_json`).
    """

    provenance: Mapping[str, Any]
    fingerprint: Mapping[str, Any]
    architecture: str
    adapter: str
    adapter_summary: str
    outputs: tuple[str, ...]
    dimensions: int | None
    pooling: str | None
    normalize: bool | None
    device: str
    max_tokens: int
    example: str
    rendered: str
    pooled_tokens: tuple[str, ...]
    leading_bos: int | None
    truncated: int
    marked: Mapping[str, int]
    template: TemplateFacts | None
    text: Mapping[str, Any]
    parity: ParityReport

    def to_json(self) -> dict[str, Any]:
        return {
            "model": dict(self.provenance),
            "fingerprint": dict(self.fingerprint),
            "rendered": self.rendered,
            "pooled_tokens": list(self.pooled_tokens),
            "leading_bos": self.leading_bos,
            "truncated": self.truncated,
            "marked": dict(self.marked),
            "template": None if self.template is None else asdict(self.template),
            "text": dict(self.text),
            "parity": self.parity.to_json(),
        }


def check_report(checked: Checked) -> CheckReport:
    job, sample = checked.job, checked.sample
    model, embedding = job.model, job.embedding
    adapter = adapter_named(model.adapter)
    return CheckReport(
        provenance=job.provenance,
        fingerprint=job.fingerprint.parts,
        architecture=model.architecture,
        adapter=adapter.name,
        adapter_summary=adapter.summary,
        outputs=(*(("score",) if model.has_score else ()), *model.attributes),
        dimensions=model.hidden_size if embedding else None,
        pooling=embedding.pooling if embedding else None,
        normalize=embedding.normalize if embedding else None,
        device=job.device,
        max_tokens=job.max_tokens,
        example=sample.names[0],
        rendered=sample.shown,
        pooled_tokens=sample.pooled,
        leading_bos=sample.leading_bos,
        truncated=sample.num_truncated,
        marked=sample.marked,
        template=job.template_facts,
        text=job.fingerprint.parts["text"],
        parity=checked.report,
    )


# After a run


@dataclass(frozen=True, slots=True)
class RunReport:
    """How a run ended. `totals` as in `_SUCCESS`; `metrics` are `Metrics.to_json`, of the shards
    that this run scored. `parity` as in `Summary`.
    `template` names what the chat template leaves out of the rows, and what it adds."""

    output: str
    totals: Mapping[str, Any]
    is_complete: bool
    elapsed_s: float
    metrics: Mapping[str, Any]
    parity: Mapping[str, Any] | None
    template: tuple[str, ...]
    input_gone: tuple[str, ...]
    failed: tuple[FailedShard, ...]

    @property
    def has_scored(self) -> bool:
        return bool(self.metrics["scored_tokens"] or self.metrics["reused_tokens"])

    @property
    def start_up_s(self) -> float:
        """Seconds before the first shard and after the last one."""
        span_s: float = self.metrics["span_s"]
        return max(0.0, self.elapsed_s - span_s)

    @property
    def pairs(self) -> dict[str, PairCounts]:
        """By source."""
        counts = sorted(self.totals["pairs"].items())
        return {source: PairCounts(**numbers) for source, numbers in counts}

    @property
    def models(self) -> dict[str, ModelCounts]:
        """Of several models the rows that each one marked, and its pairs, by name."""
        found = self.totals.get("models", {})
        return {name: parsed(json.dumps(own), ModelCounts) for name, own in found.items()}

    @property
    def judged(self) -> Judged | None:
        """What became of a judge's questions; None without a judge."""
        counts = self.totals.get("judged")
        return None if counts is None else Judged(**counts)

    @property
    def rewards(self) -> dict[str, Rewarded]:
        """What each reward function gave."""
        found = self.totals.get("rewards", {})
        return {name: Rewarded(**counts) for name, counts in found.items()}

    @property
    def all_pairs(self) -> PairCounts:
        return sum(self.pairs.values(), PairCounts())

    def to_json(self) -> dict[str, Any]:
        return {
            **self.totals,
            "output": self.output,
            "complete": self.is_complete,
            "elapsed_s": self.elapsed_s,
            "metrics": dict(self.metrics),
            "parity": None if self.parity is None else dict(self.parity),
            "template": list(self.template),
            "input_gone": list(self.input_gone),
            "failed": [asdict(each) for each in self.failed],
        }


def run_report(summary: Summary) -> RunReport:
    receipts = summary.receipts
    return RunReport(
        output=summary.output,
        totals=summary.totals,
        is_complete=summary.is_complete,
        elapsed_s=round(summary.elapsed_s, 3),
        metrics=summary.metrics.to_json(summary.run),
        parity=summary.parity,
        template=summary.template,
        input_gone=tuple(r.output_key for r in receipts if r.status is Status.INPUT_GONE),
        failed=tuple(failed_shard(r) for r in receipts if r.status is Status.FAILED),
    )


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification of `output` found."""

    output: str
    verdict: Verdict

    @property
    def is_right(self) -> bool:
        """Whether the output is complete and free of problems."""
        return self.verdict.exit_code == ExitCode.DONE

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.verdict), "ok": self.is_right}


# Nightly runs


@dataclass(frozen=True, slots=True)
class NightlyReport:
    """How a nightly run ended; `record` and `drift` are None if there was nothing to do. `models`
    has a report of the scoring, if there was any. `held_by` as in `Ended`."""

    root: str
    held_by: str | None
    record: NightlyRecord | None
    drift: DriftReport | None
    models: tuple[RunReport, ...]
    is_complete: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "held": self.held_by,
            "night": self.record.to_json() if self.record else None,
            "drift": self.drift.to_json() if self.drift else None,
            "complete": self.is_complete,
            "models": [model.to_json() for model in self.models],
        }


def nightly_report(ended: Ended) -> NightlyReport:
    return NightlyReport(
        root=ended.root,
        held_by=ended.held_by,
        record=ended.record,
        drift=ended.report,
        models=() if ended.summary is None else (run_report(ended.summary),),
        is_complete=ended.is_complete,
    )


@dataclass(frozen=True, slots=True)
class NightlyPlan:
    """What a nightly run would do; in JSON a list of one."""

    prospect: Prospect

    def to_json(self) -> list[dict[str, Any]]:
        return [self.prospect.to_json()]
