"""An evaluation as a leaderboard shows it, and the subsets behind it. Values are in percent."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from batch_scorer.evaluation.result import Estimate, Evaluation

_TITLES = {
    "rewardbench": "RewardBench",
    "rewardbench-2": "RewardBench 2",
    "rm-bench": "RM-Bench",
    "judgebench": "JudgeBench",
}
_ABSENT = "n/a"


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """The leaderboard's row, the same with its intervals by subset, and what to know about it."""
    console.print(leaderboard_table(evaluation))
    console.print(subset_table(evaluation))
    lines = list(evaluation.notes)
    if evaluation.missing:
        lines.append(f"missing, in no column: {', '.join(evaluation.missing)}")
    if absent := [name for name, estimate in evaluation.columns.items() if estimate is None]:
        lines.append(f"cannot be computed for lack of rows: {', '.join(absent)}")
    for line in lines:
        console.print(f"[yellow]note:[/] {escape(line)}", highlight=False, soft_wrap=True)


def leaderboard_table(evaluation: Evaluation) -> Table:
    """One row: the model's name, then the columns."""
    table = Table(title=_TITLES[evaluation.benchmark], title_justify="left")
    table.add_column("Model", overflow="fold")
    for name in evaluation.columns:
        table.add_column(name, justify="right")
    model = evaluation.model.rstrip("/").rsplit("/", 1)[-1]
    table.add_row(escape(model), *(_value(e) for e in evaluation.columns.values()))
    return table


def subset_table(evaluation: Evaluation) -> Table:
    """Columns and subsets with their 95 % intervals; subsets also with their counts."""
    table = Table(title="With 95 % intervals", title_justify="left")
    for name in ("column", "subset"):
        table.add_column(name)
    for name in ("accuracy", "95 %", "n", "ties", "unscored"):
        table.add_column(name, justify="right")
    alone = {subset.name for subset in evaluation.subsets}  # a column of one subset is shown below
    for name, estimate in evaluation.columns.items():
        if name not in alone:
            table.add_row(name, "", _value(estimate), _interval(estimate))
    table.add_section()
    for subset in evaluation.subsets:
        table.add_row(
            subset.section or "(none)",
            escape(subset.name),
            _value(subset.accuracy),
            _interval(subset.accuracy),
            f"{subset.rows:,}",
            f"{subset.ties:,}",
            f"{subset.unscored:,}",
        )
    return table


def _value(estimate: Estimate | None) -> str:
    return _ABSENT if estimate is None else f"{100 * estimate.value:.1f}"


def _interval(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"
