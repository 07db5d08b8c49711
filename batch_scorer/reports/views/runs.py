"""Views of a run: before it, while it goes, after it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from batch_scorer.models.adapter import Prompt
from batch_scorer.parity import ParityReport, RepliesReport, ScoresReport
from batch_scorer.records import Judged, PairCounts, Rewarded
from batch_scorer.reports.blocks import Block, Line, Table, Tone
from batch_scorer.reports.figures import duration, figure_rows, reward_rows, scaled, verdict_rows
from batch_scorer.reports.pace import MarkedRow, Pace, Started
from batch_scorer.reports.results import (
    CheckReport,
    FailedShard,
    PlanReport,
    RunReport,
    VerifyReport,
)
from batch_scorer.runs.marked import MarkedRows
from batch_scorer.runs.status import OutputStatus
from batch_scorer.storage import Conformance

_FILES_SHOWN = 40
_LAYOUTS_SHOWN = 8
_ROWS_SHOWN = 100
_CHARACTERS_SHOWN = 600
_VALUE_SHOWN = 80
_WORTH_SAYING = 0.05
"""Of what shards have in common: a template's own words are less."""


# Before a run


def plan_view(report: PlanReport) -> Iterator[Block]:
    shown = report.files[:_FILES_SHOWN]
    more = len(report.files) - len(shown)
    yield Table(
        "Plan",
        ("file", "rows", "shards", "tokens (est.)", "rows are"),
        [
            (file.key, f"{file.rows:,}", f"{file.shards:,}", f"{file.tokens:,}", file.rows_are)
            for file in shown
        ],
        words=(0, 4),
        note=f"and {more:,} more files" if more else "",
    )
    for each in report.failed:
        yield _failure("cannot be scored", each)
    for file in report.files:
        if file.lost_types:
            text = f"{file.key}: {', '.join(file.lost_types)}"
            yield Line(text, "Parquet types that are lost", Tone.WARNING)
    yield from _skipped(report.skipped)
    for name, facts in report.rewards.items():
        columns = ", ".join(facts["columns"].values())
        reads = f", reads {columns}" if columns else ""
        yield Line(f"{facts['function']} (source {facts['source'][:12]}{reads})", f"reward {name}:")
    yield Line(
        f"{len(report.files):,} files, {report.shards:,} shards, {report.rows:,} rows"
        f"{_besides(report.rows_not_asked)}, about {report.estimated_tokens:,} tokens by their size"
    )
    if (found := report.estimate) is not None:
        flop = "" if found.flop is None else f", {scaled(found.flop, 'FLOP')}"
        yield Line(
            f"tokenised, about {found.row_tokens:,} tokens; {found.computed_tokens:,} of them "
            f"computed ({report.computed_ratio:.1%}){flop}; estimated from "
            f"{found.sampled_rows:,} rows"
        )
        if found.common >= _WORTH_SAYING:
            yield Line(
                f"rows of different shards have {found.common:.0%} of computed tokens in common, "
                f"among those {found.sampled_rows:,}: they would be computed once if the rows of a "
                "prompt were side by side in one file"
            )
    elif report.unknown is not None:
        yield Line(report.unknown, "computed tokens are not known:", Tone.WARNING)


def _besides(rows_not_asked: int) -> str:
    return f" ({rows_not_asked:,} more are not asked for)" if rows_not_asked else ""


def _reference(parity: ParityReport) -> str:
    streamed = ", layer by layer" if parity.reference_streamed else ""
    return f"plain Hugging Face, eager, one by one, {parity.reference_dtype}{streamed}"


def check_view(report: CheckReport) -> Iterator[Block]:
    parity = report.parity
    outputs = ", ".join(report.outputs)
    if report.dimensions is not None:
        outputs = f"an embedding of {report.dimensions} dimensions"
    yield Table(
        "Model",
        (),
        [
            ("architecture", report.architecture),
            ("family", f"{report.adapter}: {report.adapter_summary}"),
            ("outputs", outputs),
            ("engine", f"{parity.backend} in {parity.dtype} on {report.device}"),
            ("reference", _reference(parity)),
            ("longest sequence", f"{report.max_tokens:,} tokens"),
            ("BOS", _bos(report.leading_bos)),
            ("pooled tokens", ", ".join(map(repr, report.pooled_tokens)) or _pooling(report)),
            ("truncated", f"{report.truncated} of the sequences below"),
            ("without a score", _marked(report.marked) or "none"),
        ],
        words=(0, 1),
    )
    yield Table("Text", (), _text_rows(report), words=(0, 1))
    text = report.rendered
    if len(text) > _CHARACTERS_SHOWN:
        half = _CHARACTERS_SHOWN // 2
        text = f"{text[:half]} […] {text[-half:]}"
    yield Line("", f"{report.example}, as the model sees it:")
    yield Line(text)
    explained = ", ".join(f"{name} ({count})" for name, count in parity.explained.items())
    yield Table(
        "Token ids",
        (),
        [
            ("rows compared", f"{parity.rows_compared}, each read again from its file"),
            ("they hold", ", ".join(f"{name} ({n})" for name, n in parity.covered.items()) or "-"),
            ("other than transformers' call by", explained or "nothing"),
        ],
        words=(0, 1),
    )
    if isinstance(parity, RepliesReport):
        yield from _replies_compared(parity)
    elif isinstance(parity, ScoresReport):
        yield from _scores_compared(parity)
    if parity.agrees:
        given = "tokens" if isinstance(parity, RepliesReport) else "scores"
        yield Line("", f"The engine gives the model's own {given}.", Tone.GOOD)


def _replies_compared(parity: RepliesReport) -> Iterator[Block]:
    yield Table(
        "Compared",
        ("question", "tokens", "written tokens compared", "differs"),
        [
            (row.name, f"{row.tokens:,}", f"{row.compared}", row.difference)
            for row in parity.compared
        ],
    )
    yield Line(
        f"{parity.tokens_compared} of {parity.tokens_written} written tokens compared: where the "
        f"two best logits are at least {parity.noise:.3g} apart"
    )


def _scores_compared(parity: ScoresReport) -> Iterator[Block]:
    yield Table(
        "Compared",
        ("sequence", "tokens", "plain", parity.backend, "error, of the spread"),
        [
            (
                row.name,
                f"{row.tokens:,}",
                "-" if row.reference is None else f"{row.reference:.4f}",
                "-" if row.engine is None else f"{row.engine:.4f}",
                f"{row.error:.3%}",
            )
            for row in parity.compared
        ],
    )
    yield Line(
        f"worst {parity.worst:.3%} ({parity.allowed_worst:.3%} allowed), "
        f"rms {parity.rms:.3%} ({parity.allowed_rms:.3%} allowed), mean {parity.mean:.3%}; "
        f"{parity.pairs_agree} of {parity.pairs} clear pairs rank alike"
    )
    if parity.rounding_worst is not None:
        yield Line(
            f"plain Hugging Face in {parity.dtype}: worst {parity.rounding_worst:.3%}, "
            f"mean {parity.rounding_mean:.3%}"
        )


def _text_rows(report: CheckReport) -> list[tuple[str, str]]:
    """How rows become text: what the template does, and the settings that are not as usual."""
    rows = []
    if (facts := report.template) is not None:
        contents = {"text": "text; parts are joined", "parts": "parts", "both": "text and parts"}
        rows = [
            ("system message", facts.system),
            ("judged answer", facts.answer),
            ("its <think>…</think>", facts.reasoning_text),
            ("fields of reasoning", ", ".join(facts.reasoning_fields) or "none is read"),
            ("tools", facts.tools),
            ("content", contents[facts.content]),
            ("added before the first turn", repr(facts.added) if facts.added else "nothing"),
        ]
    usual = Prompt().to_json()
    changed = {name: value for name, value in report.text.items() if value != usual[name]}
    return rows + [(name, _short(str(value))) for name, value in changed.items()]


def _short(text: str) -> str:
    return text if len(text) <= _VALUE_SHOWN else f"{text[:_VALUE_SHOWN]} […]"


def _pooling(report: CheckReport) -> str:
    if report.pooling is None:
        return "chosen by the model itself"
    return f"{report.pooling}, scaled to length 1" if report.normalize else report.pooling


def _bos(leading: int | None) -> str:
    if leading is None:
        return "this tokenizer has none"
    if leading == 0:
        return "0: neither template nor tokenizer puts one, so the model saw none in training"
    return str(leading)


def _marked(marked: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(marked.items()))


# While a run goes


def started_view(start: Started) -> Iterator[Block]:
    yield Line(
        f"{start.files} files, {start.shards} shards, {start.rows:,} rows"
        f"{_besides(start.rows_not_asked)}; {start.shards_done} shards are done"
        + (f", marked rows of {start.shards_again} are tried again" if start.shards_again else "")
    )
    for layout, keys in list(start.layouts.items())[:_LAYOUTS_SHOWN]:
        which = keys[0] if len(keys) == 1 else f"{len(keys)} files"
        yield Line(f"  {which}: {layout}")
    if (more := len(start.layouts) - _LAYOUTS_SHOWN) > 0:
        yield Line(f"  … and {more} more kinds of rows")
    yield from _skipped(start.skipped)
    for each in start.failed:
        yield _failure("failed", each)
    for key in start.input_gone:
        yield Line(key, "its input is gone", Tone.WARNING)


def failed_shard_view(shard: FailedShard) -> Iterator[Block]:
    yield _failure("failed", shard)


def _skipped(urls: Sequence[str]) -> Iterator[Line]:
    if urls:
        more = f" and {len(urls) - _FILES_SHOWN:,} more" if len(urls) > _FILES_SHOWN else ""
        yield Line(f"{', '.join(urls[:_FILES_SHOWN])}{more}", "not read:")


def _failure(label: str, shard: FailedShard) -> Line:
    return Line(f"{shard.input}: {shard.reason}: {shard.detail}", label, Tone.BAD)


def marked_row_view(row: MarkedRow) -> Iterator[Block]:
    text = f"{row.input} row {row.row}: {row.reason}: {row.detail}"
    yield Line(text, "marked", Tone.WARNING)


def pace_view(pace: Pace) -> Iterator[Block]:
    yield Line(" · ".join(filter(None, (*pace_parts(pace), time_left(pace)))))


def pace_parts(pace: Pace) -> list[str]:
    """What is known of a run's pace, but for the time left."""
    parts = [f"{pace.shards}/{pace.todo_shards} shards", f"{pace.rows:,} rows"]
    if pace.tokens_per_s is not None:
        parts.append(f"{pace.tokens_per_s:,.0f} tokens/s")
    if pace.computed_ratio is not None:
        parts.append(f"{pace.computed_ratio:.0%} computed")
    if pace.idle_share is not None:
        parts.append(f"{pace.idle_share:.0%} idle")
    if pace.rows_marked:
        parts.append(f"{pace.rows_marked:,} marked")
    if pace.shards_failed:
        parts.append(f"{pace.shards_failed:,} failed")
    return parts


def time_left(pace: Pace) -> str:
    """How long the run will still take; empty before the first commit."""
    if pace.is_over:
        return "done"
    return "" if pace.left_s is None else f"{duration(pace.left_s)} left"


# After a run


def run_view(report: RunReport) -> Iterator[Block]:
    totals = report.totals
    rows = [("rows", f"{totals['rows']:,}"), ("  scored", f"{totals['rows_scored']:,}")]
    for reason, count in sorted(totals["marked"].items()):
        rows.append((f"  marked: {reason}", f"{count:,}"))
    for note, count in sorted(totals["notes"].items()):
        rows.append((f"  noted: {note}", f"{count:,}"))
    if totals["rows_not_asked"]:
        rows.append(("  not asked for", f"{totals['rows_not_asked']:,}"))
    if totals["shards_failed"]:
        rows.append(("  in failed shards", f"{totals['rows_failed']:,}"))
    if totals["shards_left"]:
        rows.append(("  left for another run", f"{totals['rows_left']:,}"))
    rows += [(name, f"{totals[name]:,}") for name in ("shards", "sequences", "tokens")]
    rows += verdict_rows(report.judged)
    rows += reward_rows(report.rewards)
    if report.has_scored:
        start_up = f"{report.start_up_s:.1f} s of it start-up"
        rows.append(("time", f"{report.elapsed_s:.1f} s, {start_up}"))
        rows += figure_rows(report.metrics)
    rows += [("the template", change) for change in report.template]
    parities = {} if report.parity is None else report.parity.get("models", {"": report.parity})
    for model, parity in parities.items():
        name = f"{model} against plain Hugging Face" if model else "against plain Hugging Face"
        rows.append((name, _parity_line(parity)))
    yield Table("Scored", (), rows)
    title = "Preference pairs, by the mean of the models" if report.models else "Preference pairs"
    yield from _pairs_table(title, report.pairs, report.all_pairs)
    for model, counts in report.models.items():
        together = sum(counts.pairs.values(), PairCounts())
        yield from _pairs_table(f"Preference pairs, by {model}", counts.pairs, together)
        marked = [(reason, f"{count:,}") for reason, count in sorted(counts.marked.items())]
        if marked:
            yield Table(f"Rows marked by {model}", ("reason", "rows"), marked)


def _parity_line(parity: Mapping[str, Any]) -> str:
    verdict = "agrees" if parity["agrees"] else "DIFFERS"
    if "noise" in parity:
        text = f"{len(parity['compared'])} questions ({parity['tokens_compared']} tokens)"
    else:
        text = (
            f"{len(parity['compared'])} sequences (worst {parity['worst']:.2%} of the spread, "
            f"{parity['allowed_worst']:.2%} allowed; {parity['pairs_agree']} of "
            f"{parity['pairs']} clear pairs rank alike)"
        )
    return f"{verdict} on {text}"


def _pairs_table(
    title: str, pairs: Mapping[str, PairCounts], together: PairCounts
) -> Iterator[Block]:
    if pairs:
        yield Table(
            title,
            ("source", "pairs", "chosen higher", "ties", "accuracy"),
            [_pair_cells(source, counts) for source, counts in sorted(pairs.items())],
            total=_pair_cells("all", together) if len(pairs) > 1 else (),
        )


def _pair_cells(source: str, counts: PairCounts) -> tuple[str, ...]:
    accuracy = "n/a" if counts.accuracy is None else f"{counts.accuracy:.3f}"
    numbers = (counts.pairs, counts.chosen_higher, counts.ties)
    return source, *(f"{number:,}" for number in numbers), accuracy


def verify_view(report: VerifyReport) -> Iterator[Block]:
    verdict = report.verdict
    for problem in verdict.problems:
        yield Line(problem, "wrong", Tone.BAD)
    for each in verdict.unfinished:
        yield Line(each, "unfinished", Tone.WARNING)
    not_asked = f" + {verdict.rows_not_asked:,} not asked for" if verdict.rows_not_asked else ""
    yield Line(
        f"{report.output}: {verdict.shards:,} shards, {verdict.rows:,} rows = "
        f"{verdict.rows_scored:,} scored + {verdict.rows_marked:,} marked{not_asked}; "
        f"{verdict.inputs_compared:,} shards compared with their input"
    )
    for name, value in reward_rows(verdict.rewards):
        yield Line(f"  {name}: {value}")
    if report.is_right:
        yield Line("", "verified", Tone.GOOD)


def conformance_view(found: Conformance) -> Iterator[Block]:
    for check in found.checks:
        if check.holds:
            yield Line(check.need, "holds", Tone.GOOD)
        else:
            yield Line(f"{check.need}: {check.problem}", "fails", Tone.BAD)
    if found.keeps_old_versions:
        yield Line(
            "This bucket keeps old versions: what is replaced or deleted stays in it, out of "
            "sight, until a rule of the bucket removes it."
        )
    verdict = "fit for outputs" if found.holds else "not fit for outputs"
    yield Line(f"{found.url}: {verdict}")


def status_view(status: OutputStatus) -> Iterator[Block]:
    yield Line(f"{status.output}: {status.state}{heartbeat(status.holder, status.renewed_s)}")
    left = f", {status.shards_left:,} left for another run" if status.shards_left else ""
    yield Line(
        f"{status.shards_committed:,} of {status.planned_shards:,} shards committed, "
        f"{status.shards_failed:,} failed{left}; {status.rows_scored:,} rows scored, "
        f"{status.rows_marked:,} marked, of {status.planned_rows:,}"
    )
    if status.rows_not_asked:
        yield Line(f"  not asked for: {status.rows_not_asked:,} rows")
    if status.left_s is not None:
        yield Line(f"about {duration(status.left_s)} left")
    for reason, count in sorted(status.marked.items()):
        yield Line(f"  marked: {reason}: {count:,}")
    for each in status.failed[:_FILES_SHOWN]:
        yield Line(f"{each['input']}: {each['reason']}: {each['detail']}", "failed", Tone.BAD)
    if (more := len(status.failed) - _FILES_SHOWN) > 0:
        yield Line(f"… and {more} more failed shards")
    judged = verdict_rows(None if status.judged is None else Judged(**status.judged))
    rewards = {name: Rewarded(**counts) for name, counts in status.rewards.items()}
    figures = figure_rows(status.metrics) if status.metrics else []
    for name, value in [*judged, *reward_rows(rewards), *figures]:
        yield Line(f"  {name}: {value}")


def marked_rows_view(found: MarkedRows) -> Iterator[Block]:
    more = found.rows.num_rows - _ROWS_SHOWN
    yield Table(
        f"{found.output}: {found.rows.num_rows:,} rows without a score",
        ("file", "row", "reason", "detail"),
        [
            (row["file"], _known(row["row"]), _reason(row), row["detail"] or "")
            for row in found.rows.slice(0, _ROWS_SHOWN).to_pylist()
        ],
        words=(0, 2, 3),
        note=f"and {more:,} more; --json and --to FILE have all" if more > 0 else "",
    )


def _known(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _reason(row: Mapping[str, str]) -> str:
    """The reason, and behind it which of several models it is about."""
    prefix = row["column"].removesuffix("score_error")
    return f"{row['reason']} ({prefix})" if prefix else row["reason"]


def heartbeat(holder: str | None, renewed_s: float | None) -> str:
    """Who holds an output, and since when nothing was heard; empty if nobody does."""
    if holder is None or renewed_s is None:
        return ""
    return f" ({holder}, last heartbeat {duration(renewed_s)} ago)"
