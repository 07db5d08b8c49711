"""The tables at the end: what was scored, how fast, and how often the chosen answer wins."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from batch_scorer import formats
from batch_scorer.errors import ExitCode
from batch_scorer.nightly.status import NightlyStatus
from batch_scorer.outputs.verify import Verdict
from batch_scorer.records import Status, layout_to_json
from batch_scorer.reports.figures import duration, figure_rows, scaled
from batch_scorer.reports.night import print_night
from batch_scorer.runs.preview import Outlook
from batch_scorer.runs.run import Summary
from batch_scorer.runs.status import OutputStatus

_FILES_SHOWN = 40


def print_summary(console: Console, summary: Summary) -> None:
    """What a person wants to know after a run."""
    totals = summary.totals
    table = Table(title="Scored", show_header=False, title_justify="left")
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("rows", f"{totals['rows']:,}")
    table.add_row("  scored", f"{totals['rows_scored']:,}")
    for reason, count in sorted(totals["marked"].items()):
        table.add_row(f"  marked: {reason}", f"{count:,}")
    if totals["shards_failed"]:
        table.add_row("  in failed shards", f"{totals['rows_failed']:,}")
    if totals["shards_left"]:
        table.add_row("  left for another run", f"{totals['rows_left']:,}")
    table.add_row("shards", f"{totals['shards']:,}")
    table.add_row("sequences", f"{totals['sequences']:,}")
    table.add_row("tokens", f"{totals['tokens']:,}")
    if summary.metrics.scored_tokens or summary.metrics.reused_tokens:
        start_up_s = max(0.0, summary.elapsed_s - summary.metrics.span_s)
        table.add_row("time", f"{summary.elapsed_s:.1f} s, {start_up_s:.1f} s of it start-up")
        for name, value in figure_rows(summary.metrics.to_json(summary.run)):
            table.add_row(name, value)
    if summary.parity:
        table.add_row("against plain Hugging Face", parity_line(summary.parity))
    console.print(table)
    if totals["pairs"]:
        console.print(pair_table(totals["pairs"]))


def parity_line(parity: Mapping[str, Any]) -> str:
    """The verdict of the gate in a few words."""
    verdict = "agrees" if parity["agrees"] else "DIFFERS"
    return (
        f"{verdict} on {len(parity['compared'])} sequences (worst {parity['worst']:.2%} of the "
        f"spread, {parity['allowed_worst']:.2%} allowed)"
    )


def pair_table(pairs: Mapping[str, list[int]]) -> Table:
    """Accuracy by source: a pair counts if chosen scores strictly higher; a tie is a miss."""
    table = Table(title="Preference pairs", title_justify="left")
    table.add_column("source")
    for name in ("pairs", "chosen higher", "ties", "accuracy"):
        table.add_column(name, justify="right")
    for source, (count, wins, ties) in sorted(pairs.items()):
        table.add_row(source, f"{count:,}", f"{wins:,}", f"{ties:,}", _share(wins, count))
    if len(pairs) > 1:
        count, wins, ties = (sum(column) for column in zip(*pairs.values(), strict=True))
        table.add_section()
        table.add_row("all", f"{count:,}", f"{wins:,}", f"{ties:,}", _share(wins, count))
    return table


def summary_json(summary: Summary) -> dict[str, Any]:
    """The same for machines: the totals, this run's timings, and every shard that failed."""
    return {
        **summary.totals,
        "output": summary.output,
        "complete": summary.is_complete,
        "elapsed_s": round(summary.elapsed_s, 3),
        "metrics": summary.metrics.to_json(summary.run),
        "parity": summary.parity,
        "input_gone": [r.output_key for r in summary.receipts if r.status is Status.INPUT_GONE],
        "failed": [
            {"input": r.input, "output_key": r.output_key, "reason": r.reason, "detail": r.detail}
            for r in summary.receipts
            if r.status is Status.FAILED
        ],
    }


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "n/a"


def print_plan(console: Console, ahead: Outlook) -> None:
    """Every file with what its rows are, then what will be done."""
    plan = ahead.plan
    table = Table(title="Plan", title_justify="left")
    for name in ("file", "rows", "shards", "tokens (est.)", "rows are"):
        is_text = name in ("file", "rows are")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for file in plan.files[:_FILES_SHOWN]:
        shards = [shard for shard in plan.shards if shard.source is file.source]
        tokens = sum(shard.estimated_tokens for shard in shards)
        what = formats.describe(file.layout, file.schema)
        table.add_row(file.source.key, f"{file.num_rows:,}", str(len(shards)), f"{tokens:,}", what)
    console.print(table)
    if len(plan.files) > _FILES_SHOWN:
        console.print(f"… and {len(plan.files) - _FILES_SHOWN} more files")
    for receipt in plan.failed:
        line = f"[red]cannot be scored[/] {receipt.input}: {receipt.reason}: {receipt.detail}"
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"{len(plan.files):,} files, {len(plan.shards):,} shards, {plan.num_rows:,} rows, "
        f"about {plan.estimated_tokens:,} tokens by their size"
    )
    if (found := ahead.estimate) is not None:
        computed = found.computed_tokens / found.row_tokens
        flop = "" if found.flop is None else f", {scaled(found.flop, 'FLOP')}"
        console.print(
            f"tokenised, about {found.row_tokens:,} tokens; {found.computed_tokens:,} of them "
            f"computed ({computed:.1%}){flop}; estimated from {found.sampled_rows:,} rows",
            soft_wrap=True,
        )
    elif ahead.unknown is not None:
        line = f"[yellow]computed tokens are not known:[/] {ahead.unknown}"
        console.print(line, highlight=False, soft_wrap=True)


def plan_json(ahead: Outlook) -> dict[str, Any]:
    plan = ahead.plan
    return {
        "files": [
            {
                "input": file.source.url,
                "rows": file.num_rows,
                "rows_are": formats.describe(file.layout, file.schema),
                **layout_to_json(file.layout),
            }
            for file in plan.files
        ],
        "shards": len(plan.shards),
        "rows": plan.num_rows,
        "estimated_tokens": plan.estimated_tokens,
        "estimate": None if ahead.estimate is None else asdict(ahead.estimate),
        "estimate_unknown": ahead.unknown,
        "failed": [{"input": r.input, "reason": r.reason, "detail": r.detail} for r in plan.failed],
    }


def print_nightly_status(console: Console, status: NightlyStatus) -> None:
    at_work = "a night is at work" if status.holder else "no night is at work"
    line = f"{status.root}: {at_work}{_holder(status)}"
    console.print(line, highlight=False, soft_wrap=True)
    for line, path in (status.latest or {}).items():
        console.print(f"readers have {path} ({line})", highlight=False, soft_wrap=True)
    if status.latest is None:
        console.print("readers have nothing yet: no generation is complete", highlight=False)
    for path, generation in status.generations.items():
        if generation is None:
            console.print(f"{path}: nothing is scored yet", highlight=False, soft_wrap=True)
        else:
            print_status(console, generation)
    if status.night is not None:
        print_night(console, status.night)


def _holder(status: OutputStatus | NightlyStatus) -> str:
    if status.holder is None or status.renewed_s is None:
        return ""
    return f" ({status.holder}, heard of {duration(max(0.0, status.renewed_s))} ago)"


def print_status(console: Console, status: OutputStatus) -> None:
    line = f"{status.output}: {status.state}{_holder(status)}"
    console.print(line, highlight=False, soft_wrap=True)
    left = f", {status.shards_left:,} left for another run" if status.shards_left else ""
    console.print(
        f"{status.shards_committed:,} of {status.planned_shards:,} shards committed, "
        f"{status.shards_failed:,} failed{left}; {status.rows_scored:,} rows scored, "
        f"{status.rows_marked:,} marked, of {status.planned_rows:,}",
        highlight=False,
    )
    if status.left_s is not None:
        console.print(f"about {duration(status.left_s)} left", highlight=False)
    for reason, count in sorted(status.marked.items()):
        console.print(f"  marked: {reason}: {count:,}", highlight=False)
    for each in status.failed[:_FILES_SHOWN]:
        line = f"[red]failed[/] {each['input']}: {each['reason']}: {each['detail']}"
        console.print(line, highlight=False, soft_wrap=True)
    if len(status.failed) > _FILES_SHOWN:
        console.print(f"… and {len(status.failed) - _FILES_SHOWN} more failed shards")
    for name, value in figure_rows(status.metrics) if status.metrics else ():
        console.print(f"  {name}: {value}", highlight=False)


def print_verdict(console: Console, output: str, verdict: Verdict) -> None:
    for problem in verdict.problems:
        console.print(f"[red]wrong[/] {problem}", highlight=False, soft_wrap=True)
    for line in verdict.unfinished:
        console.print(f"[yellow]unfinished[/] {line}", highlight=False, soft_wrap=True)
    console.print(
        f"{output}: {verdict.shards:,} shards, {verdict.rows:,} rows = "
        f"{verdict.rows_scored:,} scored + {verdict.rows_marked:,} marked; "
        f"{verdict.inputs_compared:,} shards compared with their input",
        highlight=False,
        soft_wrap=True,
    )
    if verdict.exit_code == ExitCode.DONE:
        console.print("[green]verified[/]")


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {**asdict(verdict), "ok": verdict.exit_code == ExitCode.DONE}
