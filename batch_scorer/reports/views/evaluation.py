"""View of an evaluation: the leaderboard's row, and the subsets behind it, in percent."""

from collections.abc import Iterator, Mapping, Sequence

from batch_scorer.evaluation import Benchmark
from batch_scorer.evaluation.result import Calibration, Estimate, Evaluation, Writer
from batch_scorer.reports.blocks import Block, Line, Table, Tone

_WRITERS_SHOWN = 20

_TITLES: Mapping[Benchmark, str] = {
    Benchmark.REWARDBENCH: "RewardBench",
    Benchmark.REWARDBENCH_2: "RewardBench 2",
    Benchmark.RM_BENCH: "RM-Bench",
    Benchmark.JUDGEBENCH: "JudgeBench",
    Benchmark.PAIRS: "Preference pairs",
}


def evaluation_view(evaluation: Evaluation) -> Iterator[Block]:
    """Columns as the leaderboard has them, the same with 95 % intervals by subset, what the scores
    say of how sure they are, whose answers they prefer, and notes."""
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
    if evaluation.calibration is not None:
        yield from _calibration(evaluation.calibration)
    if evaluation.writers:
        yield _writers(evaluation.writers)
    notes = list(evaluation.notes)
    if evaluation.missing:
        notes.append(f"missing, in no column: {', '.join(evaluation.missing)}")
    if absent := [name for name, estimate in columns.items() if estimate is None]:
        notes.append(f"cannot be computed for lack of rows: {', '.join(absent)}")
    for note in notes:
        yield Line(note, "note:", Tone.WARNING)


def _calibration(found: Calibration) -> Iterator[Block]:
    yield Table(
        "How sure, and how often right",
        ("sure", "pairs", "mean", "right", "95 %"),
        [
            (
                f"{100 * each.low:.0f} to {100 * each.high:.0f}",
                f"{each.pairs:,}",
                f"{100 * each.sure:.1f}",
                _value(each.right),
                _interval(each.right),
            )
            for each in found.bins
        ],
    )
    yield Line(
        f"expected calibration error {100 * found.expected_error:.1f} %, "
        f"Brier score {found.brier:.3f}: {found.pairs:,} pairs, by {found.basis}"
    )


def _writers(found: Sequence[Writer]) -> Table:
    more = len(found) - _WRITERS_SHOWN
    return Table(
        "Whose answers win against another model's",
        ("model", "pairs", "by label", "by score", "95 %", "difference"),
        [
            (
                each.name,
                f"{each.pairs:,}",
                f"{100 * each.won_by_label:.1f}",
                _value(each.won_by_score),
                _interval(each.won_by_score),
                f"{100 * (each.won_by_score.value - each.won_by_label):+.1f}",
            )
            for each in found[:_WRITERS_SHOWN]
        ],
        note=f"and {more} more in the JSON" if more > 0 else "",
    )


def _value(estimate: Estimate | None) -> str:
    return "n/a" if estimate is None else f"{100 * estimate.value:.1f}"


def _interval(estimate: Estimate | None) -> str:
    return (
        "" if estimate is None else f"{100 * estimate.low:.1f}\N{EN DASH}{100 * estimate.high:.1f}"
    )
