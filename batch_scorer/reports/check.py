"""What `check` prints: how the model reads a row, and both engines' scores side by side."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from batch_scorer.job import Job
from batch_scorer.models.registry import adapter_named
from batch_scorer.runs.preview import Checked

_SHOWN_CHARACTERS = 600


def print_check(console: Console, checked: Checked) -> None:
    """The model as it was understood, one rendered row, and the comparison."""
    job, sample, report = checked.job, checked.sample, checked.report
    facts = Table(title="Model", show_header=False, title_justify="left")
    facts.add_column(style="dim")
    facts.add_column()
    adapter = adapter_named(job.model.adapter)
    for name, value in (
        ("architecture", job.model.architecture),
        ("family", f"{adapter.name}: {adapter.summary}"),
        ("outputs", _outputs(job)),
        ("engine", f"{report.backend} in {report.dtype} on {job.device}"),
        ("reference", f"plain Hugging Face, eager, one by one, {report.reference_dtype}"),
        ("longest sequence", f"{job.max_tokens:,} tokens"),
        ("BOS", _bos(sample.leading_bos)),
        ("pooled tokens", ", ".join(repr(token) for token in sample.pooled) or _pooled(job)),
        ("truncated", f"{sample.num_truncated} of the sequences below"),
        ("without a score", _marked(sample.marked)),
    ):
        facts.add_row(name, Text(value))
    console.print(facts)
    shown = sample.shown
    if len(shown) > _SHOWN_CHARACTERS:
        half = _SHOWN_CHARACTERS // 2
        shown = f"{shown[:half]} […] {shown[-half:]}"
    console.print(f"{sample.names[0]}, as the model sees it:", style="dim", markup=False)
    console.print(Text(shown))

    table = Table(title="Compared", title_justify="left")
    table.add_column("sequence")
    for name in ("tokens", "plain", report.backend, "error, of the spread"):
        table.add_column(name, justify="right")
    for row in report.compared:
        values = ("-" if v is None else f"{v:.4f}" for v in (row.reference, row.engine))
        table.add_row(Text(row.name), f"{row.tokens:,}", *values, f"{row.error:.3%}")
    console.print(table)
    console.print(
        f"worst {report.worst:.3%} ({report.allowed_worst:.3%} allowed), "
        f"rms {report.rms:.3%} ({report.allowed_rms:.3%} allowed); "
        f"{report.pairs_agree} of {report.pairs} clear pairs rank alike",
        highlight=False,
    )
    if report.agrees:
        console.print("The engine gives the model's own scores.", style="green")


def check_json(checked: Checked) -> dict[str, Any]:
    """The same for a machine."""
    sample = checked.sample
    return {
        "model": checked.job.provenance,
        "fingerprint": dict(checked.job.fingerprint.parts),
        "rendered": sample.shown,
        "pooled_tokens": list(sample.pooled),
        "leading_bos": sample.leading_bos,
        "truncated": sample.num_truncated,
        "marked": sample.marked,
        "parity": checked.report.to_json(),
    }


def _outputs(job: Job) -> str:
    if job.embedding is not None:
        return f"an embedding of {job.model.hidden_size} dimensions"
    return ", ".join(("score", *job.model.attributes))


def _pooled(job: Job) -> str:
    if job.embedding is None:
        return "chosen by the model itself"
    scaled = ", scaled to length 1" if job.embedding.normalize else ""
    return f"{job.embedding.pooling}{scaled}"


def _bos(leading: int | None) -> str:
    if leading is None:
        return "this tokenizer has none"
    if leading == 0:
        return "0: neither template nor tokenizer puts one, so the model saw none in training"
    return str(leading)


def _marked(marked: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(marked.items())) or "none"
