"""Every report on a terminal: foreign text as it is, figures as the values have them."""

import ast
import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from batch_scorer.decontamination.result import Decontaminated, SourceCounts
from batch_scorer.derived.output import Totals
from batch_scorer.derived.state import DerivedStatus, DerivedVerdict
from batch_scorer.evaluation import Benchmark
from batch_scorer.evaluation.result import (
    Bin,
    Calibration,
    Estimate,
    Evaluation,
    Subset,
    Writer,
)
from batch_scorer.models.adapter import Prompt
from batch_scorer.nightly.drift import Figures, Mover, Ranks
from batch_scorer.nightly.foresee import Prospect
from batch_scorer.nightly.record import (
    DriftReport,
    NightlyRecord,
    RowCounts,
    SeriesDrift,
    SeriesRecord,
    ShardCounts,
)
from batch_scorer.nightly.status import NightlyStatus
from batch_scorer.outputs.verify import Verdict
from batch_scorer.parity import RepliesReport, ScoresReport
from batch_scorer.parity.gate import Compared
from batch_scorer.parity.replies import ComparedReply
from batch_scorer.records import PairCounts
from batch_scorer.render import TemplateFacts
from batch_scorer.reports.blocks import Line, Table, Tone
from batch_scorer.reports.console import show
from batch_scorer.reports.pace import MarkedRow, Pace, Started
from batch_scorer.reports.page.page import ScoredPage
from batch_scorer.reports.page.write import PageReport
from batch_scorer.reports.results import (
    CheckReport,
    FailedShard,
    NightlyPlan,
    NightlyReport,
    PlannedFile,
    PlanReport,
    RunReport,
    VerifyReport,
)
from batch_scorer.reports.views import VIEWS, Report, blocks_of
from batch_scorer.runs.estimate import Estimate as Work
from batch_scorer.runs.marked import SCHEMA, MarkedRows
from batch_scorer.runs.metrics import Metrics
from batch_scorer.runs.status import OutputStatus
from batch_scorer.selection.result import Selected
from batch_scorer.storage import Check, Conformance
from tests.helpers.receipts import JUDGED, ONE, OTHER, REWARDED, RUN

MARKUP_LIKE = ("[/INST]", "[math]", "[bold]x[/bold]", "a[/]b", "[", "\\[red]", ":warning:")


def printed(report: Report | Line, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, record=True)
    show(console, report)
    return console.export_text()


# One example of every report, with the same text wherever a stranger's may stand.


def figures(mean: float = 1.5) -> Figures:
    quantiles = tuple(map(float, range(7)))
    return Figures(120, 20, 10, 90, 5, 240, mean, 1.0, quantiles, PairCounts(100, 75, 0))


def plan(text: str) -> PlanReport:
    return PlanReport(
        files=(
            PlannedFile(
                text, f"s3://in/{text}", 1_234, 2, 5_678_901, f"pairs in {text}", {}, (text,)
            ),
        ),
        shards=2,
        rows=1_234,
        estimated_tokens=5_678_901,
        estimate=None,
        unknown=text,
        failed=(failed(text),),
        rows_not_asked=4_321,
        skipped=(text,),
        rewards={text: {"function": f"{text}:f", "source": "ab" * 32, "columns": {"a": text}}},
    )


def check(text: str) -> CheckReport:
    return CheckReport(
        provenance={"path": text},
        fingerprint={"model": text},
        architecture=text,
        adapter=text,
        adapter_summary=text,
        outputs=("score", text),
        dimensions=None,
        pooling=None,
        normalize=None,
        device="cpu",
        max_tokens=4096,
        example=text,
        rendered=f"<s>{text} hello",
        pooled_tokens=(),
        leading_bos=1,
        truncated=0,
        marked={"too_long": 1},
        template=TemplateFacts(
            "kept", "kept", "lost", (text,), "refused", text, "text", True, asks_for_date=True
        ),
        text={**Prompt().to_json(), "date": text},
        parity=ScoresReport(
            backend="hf", dtype="float32", reference_dtype="float32", problems=(),
            worst=1e-6, allowed_worst=1e-3, rms=1e-6, allowed_rms=1e-3, pairs=1, pairs_agree=1,
            compared=(Compared(text, 12, 1.25, 1.25, 1e-6),),
        ),
    )  # fmt: skip


def started(text: str) -> Started:
    return Started(
        *(3, 4, 50, 1, 3, 40, 4000, {f"pairs in {text}": (text,)}),
        *((failed(text),), (text,), 70, (text,)),
    )


def failed(text: str) -> FailedShard:
    return FailedShard(text, text, "unreadable_file", text)


def run(text: str) -> RunReport:
    totals = {
        "rows": 13, "rows_scored": 8, "rows_marked": 1, "rows_not_asked": 3, "rows_failed": 1,
        "rows_left": 0,
        "shards": 2, "shards_failed": 1, "shards_left": 0, "sequences": 18, "tokens": 1_500,
        "marked": {"too_long": 1}, "notes": {"answer_rewritten": 2}, "pairs": {
            text: {"pairs": 6, "chosen_higher": 3, "ties": 1},
            f"{text}2": {"pairs": 2, "chosen_higher": 1, "ties": 0},
        },
        "judged": asdict(JUDGED),
        "rewards": {text: asdict(REWARDED)},
    }  # fmt: skip
    metrics = Metrics.of([ONE, OTHER]).to_json(RUN)
    parity = check(text).parity.to_json()
    return RunReport(text, totals, False, 12.0, metrics, parity, (text,), (text,), (failed(text),))


def verification(text: str) -> VerifyReport:
    missing, left = [f"{text}: missing"], [f"{text}: left"]
    found = Verdict(2, 13, 9, 1, 3, 2, missing, left, {text: REWARDED})
    return VerifyReport(text, found)


def conformance(text: str) -> Conformance:
    return Conformance(text, True, (Check("a", text), Check("b", text, f"{text} was seen")))


def status(text: str) -> OutputStatus:
    return OutputStatus(
        output=text, state="running", holder=text, renewed_s=3.2, planned_shards=5, planned_rows=50,
        shards_committed=2, shards_failed=1, shards_left=0, rows_scored=19, rows_marked=1,
        rows_not_asked=6,
        marked={"too_long": 1}, failed=[{"input": text, "reason": "internal", "detail": text}],
        tokens=1500, metrics=Metrics.of([ONE]).to_json(RUN), left_s=754.0, provenance={},
        judged=asdict(JUDGED), rewards={text: asdict(REWARDED)},
    )  # fmt: skip


def marked_rows(text: str) -> MarkedRows:
    rows = [
        {"file": text, "row": 1_234, "reason": "too_long", "detail": text, "column": "score_error"},
        {"file": text, "row": None, "reason": "empty", "detail": None, "column": "b_score_error"},
    ]
    return MarkedRows(text, pa.Table.from_pylist(rows, SCHEMA))


def evaluation(text: str) -> Evaluation:
    estimate = Estimate(0.8, 0.75, 0.85)
    return Evaluation(
        Benchmark.REWARDBENCH_2,
        columns={"Score": estimate, text: None},
        subsets=[Subset(text, text, estimate, 100, 1, 2, 100)],
        missing=[text],
        notes=[f"not of this benchmark: {text}"],
        calibration=Calibration(text, 1_234, [Bin(0.95, 1.0, 1_234, 0.97, estimate)], 0.17, 0.125),
        writers=[Writer(text, 1_234, 0.75, estimate)],
        model=f"/models/{text}",
    )


def nightly_plan(text: str) -> NightlyPlan:
    return NightlyPlan(Prospect("main", text, text))


def record(text: str) -> NightlyRecord:
    rows, shards = RowCounts(75, 8, 27, 30, 3, 0, 0, 2, 8), ShardCounts(5, 0, 1)
    series = SeriesRecord("main", text, text, "m", rows, shards, {text: figures()}, {})
    return NightlyRecord(
        7, "2026-11-21T01:00:00+00:00", "2026-11-21T01:10:00+00:00", {}, 0, (series,),
        latest={"main": text}, has_moved=False, lacking=(f"{text}: not begun",),
    )  # fmt: skip


def decontaminated(text: str) -> Decontaminated:
    return Decontaminated(text, 3, 1, 1, 2, 1, {text: SourceCounts(3, 1)}, None)


def page(text: str) -> PageReport:
    counts = {"rows": 5, "rows_scored": 3, "rows_marked": 1, "rows_not_asked": 1}
    return PageReport(text, 999, ScoredPage(text, text, counts, (), {}, (), (), (), (), (), {}))


def drift(text: str) -> DriftReport:
    mover = Mover(text, 3, 1, 1.0, 3.0, 0.0, 1.0)
    return DriftReport(
        7,
        (
            SeriesDrift(
                series="main",
                path=text,
                since=6,
                before=text,
                sources={text: figures(), f"{text}2": figures()},
                sources_before={text: figures(1.0)},
                ranks_of=text,
                ranks=Ranks(3, 3, -1.0, 1, 0, 1, (mover,)),
            ),
        ),
    )


def nightly_status(text: str) -> NightlyStatus:
    return NightlyStatus(
        text, text, 3.2, {"main": text}, {text: status(text), f"{text}2": None}, record(text)
    )


def selected(text: str) -> Selected:
    dropped, without_pair = {"marked": 34, "no_pair": 200}, {"equal": 20, text: 1}
    totals = Totals(1_234, 1_000, dropped, 500, 3, "0" * 64, 521, without_pair)
    return Selected(text, (text,), {"by": text}, totals)


def derived_status(text: str) -> DerivedStatus:
    totals = selected(text).totals
    return DerivedStatus(text, "select", {"by": text}, (text,), 3, 3, totals)


EXAMPLES: dict[type, Callable[[str], Any]] = {
    PlanReport: plan,
    CheckReport: check,
    Started: started,
    FailedShard: failed,
    MarkedRow: lambda text: MarkedRow(text, 3, "too_long", text),
    Pace: lambda _: Pace(3, 10, 1234, 56_789.0, 0.85, 0.03, 754.0, 5, 1),
    RunReport: run,
    VerifyReport: verification,
    Conformance: conformance,
    OutputStatus: status,
    MarkedRows: marked_rows,
    Evaluation: evaluation,
    NightlyPlan: nightly_plan,
    NightlyReport: lambda text: NightlyReport(text, None, record(text), drift(text), (), True),
    NightlyRecord: record,
    NightlyStatus: nightly_status,
    DriftReport: drift,
    Selected: selected,
    DerivedStatus: derived_status,
    DerivedVerdict: lambda text: DerivedVerdict(
        text, "select", 3, 500, 3, [text], [text], selected(text).totals.counts
    ),
    Decontaminated: decontaminated,
    PageReport: page,
}
WITHOUT_FOREIGN_TEXT = {Pace}


def test_every_view_has_an_example() -> None:
    assert EXAMPLES.keys() == VIEWS.keys()


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("text", MARKUP_LIKE)
def test_foreign_text_appears_as_it_is(kind: type, text: str) -> None:
    report = EXAMPLES[kind](text)
    expected = 0
    for block in blocks_of(report):
        if isinstance(block, Line):
            strings = [block.label, block.text]
        else:
            rows = (block.columns, *block.rows, block.total)
            strings = [block.title, block.note, *(cell for row in rows for cell in row)]
        expected += sum(string.count(text) for string in strings)
    assert printed(report).count(text) >= expected
    assert expected or kind in WITHOUT_FOREIGN_TEXT


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("text", ["web", "generations/main/595c10002358-1"])
def test_no_figure_is_cut_off_in_80_columns(kind: type, text: str) -> None:
    report = EXAMPLES[kind](text)
    shown = printed(report)
    for table in blocks_of(report):
        if not isinstance(table, Table):
            continue
        for row in (table.columns, *table.rows, table.total):
            for place, cell in enumerate(row):
                if place not in table.words and text not in cell:
                    assert all(word in shown for word in cell.split()), cell


def test_what_a_judge_writes_is_shown_as_tokens() -> None:
    parity = RepliesReport(
        backend="vllm", dtype="bfloat16", reference_dtype="float32", problems=("differs",),
        noise=0.125, tokens_compared=25, tokens_written=48,
        compared=(ComparedReply("row 1", 310, 24, None), ComparedReply("row 2", 300, 1, 0)),
    )  # fmt: skip
    tables = [b for b in blocks_of(replace(check("x"), parity=parity)) if isinstance(b, Table)]
    compared = next(table for table in tables if table.title == "Compared")
    assert compared.rows == [
        ("row 1", "310", "24", "-"),
        ("row 2", "300", "1", "from token 1 on"),
    ]
    shown = printed(replace(check("x"), parity=parity))
    assert "25 of 48 written tokens" in shown and "model's own" not in shown
    assert "model's own tokens" in printed(replace(check("x"), parity=replace(parity, problems=())))
    shown = printed(replace(run("x"), parity=parity.to_json()))
    assert "DIFFERS on 2 questions (25 tokens)" in shown


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1))
def test_any_text_is_shown_in_lines_and_tables(text: str) -> None:
    console = Console(width=10_000, file=io.StringIO(), record=True)
    show(console, Line(text, text, Tone.BAD))
    assert console.export_text() == f"{text} {text}\n"
    report = replace(evaluation("x"), columns={text: None}, subsets=[], model="m")
    show(console, report)
    assert text in console.export_text()


def test_a_file_name_does_not_command_the_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    show(console, Line("a\x1b[2Jb"))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "a␛[2Jb\n"


def test_rich_is_met_in_two_files_only() -> None:
    """So no view can hand it text that it would read as markup."""
    folder = Path(__file__).parents[3] / "batch_scorer" / "reports"
    found = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {file.name for name in names if name.split(".")[0] == "rich"}
    assert found == {"console.py", "progress.py"}


# What the views show


def test_machines_and_people_see_the_same_figures() -> None:
    report = run("web")
    value = json.loads(json.dumps(report.to_json()))
    shown = printed(report)
    assert (value["rows"], value["complete"]) == (13, False)
    assert value["pairs"]["web"] == {"pairs": 6, "chosen_higher": 3, "ties": 1}
    assert value["failed"] == [
        {"input": "web", "output_key": "web", "reason": "unreadable_file", "detail": "web"}
    ]
    assert "12.0 s, 7.0 s of it start-up" in shown  # the span is 5 s
    assert (report.pairs["web"].accuracy, report.all_pairs.accuracy) == (0.5, 0.5)
    (web2,) = [line.split() for line in shown.splitlines() if "web2" in line]
    assert web2 == ["web2", "2", "1", "0", "0.500"]


def test_rows_that_are_not_asked_for_are_shown_wherever_rows_are() -> None:
    assert "1,234 rows (4,321 more are not asked for)" in printed(plan("a"))
    assert "50 rows (70 more are not asked for)" in printed(started("a"))
    (row,) = [line.split() for line in printed(run("a")).splitlines() if "not asked" in line]
    assert row == ["not", "asked", "for", "3"]
    assert "13 rows = 9 scored + 1 marked + 3 not asked for" in printed(verification("a"))
    assert "not asked for: 6 rows" in printed(status("a"))
    (row,) = [line.split() for line in printed(record("a")).splitlines() if "not asked" in line]
    assert row == ["not", "asked", "8"]
    ahead = NightlyPlan(Prospect("main", "m", "g", rows_to_do=5, rows_not_asked=9))
    assert "not asked for: 9 rows" in printed(ahead)
    everything = printed(replace(plan("a"), rows_not_asked=0))
    assert "1,234 rows, about" in everything


@pytest.mark.parametrize("report", [run("a"), status("a")])
def test_a_judge_s_figures_are_shown(report: Report) -> None:
    shown = " ".join(printed(report).split())
    for figure in ("17 of 20 questions", "25% of 8 comparisons", "62% of 16 verdicts"):
        assert figure in shown
    assert "prefer the longer answer" in shown and "60% of 15 verdicts" in shown
    assert "900 tokens in 23 replies" in shown


def test_an_evaluation_shows_how_sure_the_scores_are_and_whose_answers_win() -> None:
    shown = [line.split() for line in printed(evaluation("m")).splitlines()]
    assert ["95", "to", "100", "1,234", "97.0", "80.0", "75.0\N{EN DASH}85.0"] in shown
    assert ["m", "1,234", "75.0", "80.0", "75.0\N{EN DASH}85.0", "+5.0"] in shown
    told = " ".join(word for line in shown for word in line)
    assert "expected calibration error 17.0 %, Brier score 0.125: 1,234 pairs, by m" in told
    many = replace(evaluation("m"), writers=[Writer("m", 1, 0.0, Estimate(0, 0, 1))] * 25)
    assert "and 5 more in the JSON" in printed(many)
    neither = printed(replace(evaluation("m"), calibration=None, writers=[]))
    assert "How sure" not in neither and "Whose answers" not in neither


def test_a_status_shows_the_last_heartbeat_and_the_time_left() -> None:
    shown = printed(status("out"))
    assert "out: running (out, last heartbeat 0:03 ago)" in shown
    assert "about 12:34 left" in shown


def test_marked_rows_are_counted_and_cut_off_where_there_are_many() -> None:
    found = marked_rows("a")
    assert "a: 2 rows without a score" in printed(found)
    assert "and" not in printed(found)
    many = replace(found, rows=pa.concat_tables([found.rows] * 60))
    shown = printed(many)
    assert "a: 120 rows without a score" in shown
    assert "and 20 more" in shown
    assert len(many.to_json()["rows"]) == 120


def test_a_nightly_status_shows_what_the_pointer_names() -> None:
    shown = printed(nightly_status("g"))
    assert "g: a nightly run is running (g, last heartbeat 0:03 ago)" in shown
    assert "latest.json points to g (main)" in shown
    none = replace(nightly_status("g"), holder=None, renewed_s=None, latest=None)
    shown = printed(none)
    assert "g: no nightly run is running" in shown
    assert "latest.json does not exist yet" in shown


def test_a_nightly_run_that_did_nothing_shows_why() -> None:
    nothing = NightlyReport("root", None, None, None, (), True)
    assert printed(nothing) == "root: nothing to do\n"
    held = printed(replace(nothing, held_by="process 7 on host"))
    assert "another nightly run holds this output" in held and "process 7 on host" in held


@pytest.mark.parametrize("width", [80, 200])
def test_drift_shows_figures_and_how_they_moved(width: int) -> None:
    shown = printed(drift("web"), width)
    assert "web: nightly run 7 against run 6, web" in shown
    assert "against web: rank correlation -1.000 over 3 scores of 3 rows" in shown
    assert "web row 3, sequence 2: 1.000 → 3.000, above 0% → 100%" in shown
    assert "1.500" in shown and "(+0.500)" in shown
    assert "0.750" in shown and "(+0.000)" in shown


def test_a_plan_with_a_model_shows_what_is_computed() -> None:
    estimate = Work(48, row_tokens=2_000, computed_tokens=1_500, flop=3.2e15, common=0.25)
    report = replace(plan("a"), estimate=estimate, unknown=None)
    assert report.computed_ratio == 0.75
    shown = printed(report)
    assert "1,500 of them computed (75.0%), 3.20 PFLOP; estimated from 48 rows" in shown
    assert "have 25% of computed tokens in common, among those 48" in shown
    assert report.to_json()["estimate"]["computed_tokens"] == 1_500
    little = replace(report, estimate=replace(estimate, common=0.04))
    assert "in common" not in printed(little)


def test_an_empty_table_is_no_error() -> None:
    empty = replace(plan("a"), files=(), failed=(), skipped=(), unknown=None, rewards={})
    assert "0 files" in printed(empty)
    assert [type(block) for block in blocks_of(empty)] == [Table, Line]
