"""View of an evaluation: the leaderboard's row, and the subsets behind it, in percent."""

from collections.abc import Iterator, Mapping

from batch_scorer.evaluation import Benchmark
from batch_scorer.evaluation.result import Estimate, Evaluation
from batch_scorer.reports.blocks import Block, Line, Table, Tone

_TITLES: Mapping[Benchmark, str] = {
    Benchmark.REWARDBENCH: "RewardBench",
    Benchmark.REWARDBENCH_2: "RewardBench 2",
    Benchmark.RM_BENCH: "RM-Bench",
    Benchmark.JUDGEBENCH: "JudgeBench",
}


def evaluation_view(evaluation: Evaluation) -> Iterator[Block]:
    """Columns as the leaderboard has them, the same with 95 % intervals by subset, and notes."""
    columns = evaluation.columns
    model = evaluation.model.rstrip("/").rsplit("/", 1)[-1]
    yield Table(
        _TITLES[evaluation.benchmark],
        ("Model", *columns),
        [(model, *(_value(estimate) for estimate in columns.values()))],
    )
    # A column of one subset is shown as that subset.
    subsets = {subset.name for subset in evaluation.subsets}
    yield Table(
        "With 95 % intervals",
        ("column", "subset", "accuracy", "95 %", "n", "ties", "unscored"),
        [
            *(
                (name, "", _value(estimate), _interval(estimate), "", "", "")
                for name, estimate in columns.items()
                if name not in subsets
            ),
            *(
                (
                    subset.section or "(none)",
                    subset.name,
                    _value(subset.accuracy),
                    _interval(subset.accuracy),
                    f"{subset.rows:,}",
                    f"{subset.ties:,}",
                    f"{subset.unscored:,}",
                )
                for subset in evaluation.subsets
            ),
        ],
        words=(0, 1),
    )
    notes = list(evaluation.notes)
    if evaluation.missing:
        notes.append(f"missing, in no column: {', '.join(evaluation.missing)}")
    if absent := [name for name, estimate in columns.items() if estimate is None]:
        notes.append(f"cannot be computed for lack of rows: {', '.join(absent)}")
    for note in notes:
        yield Line(note, "note:", Tone.WARNING)


def _value(estimate: Estimate | None) -> str:
    return "n/a" if estimate is None else f"{100 * estimate.value:.1f}"


def _interval(estimate: Estimate | None) -> str:
    return (
        "" if estimate is None else f"{100 * estimate.low:.1f}\N{EN DASH}{100 * estimate.high:.1f}"
    )
