"""Reports as people read them: each value in lines and tables. Figures are formatted here, never
computed.

`console.show` shows what has a view in `VIEWS` and nothing else; `tests/unit/reports` renders each.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from batch_scorer.decontamination.result import Decontaminated
from batch_scorer.derived.state import DerivedStatus, DerivedVerdict
from batch_scorer.evaluation.result import Evaluation
from batch_scorer.nightly.record import DriftReport, NightlyRecord
from batch_scorer.nightly.status import NightlyStatus
from batch_scorer.normalization.result import Normalized
from batch_scorer.reports.blocks import Block
from batch_scorer.reports.pace import MarkedRow, Pace, Started
from batch_scorer.reports.page.write import PageReport
from batch_scorer.reports.results import (
    CheckReport,
    FailedShard,
    NightlyPlan,
    NightlyReport,
    PlanReport,
    RunReport,
    VerifyReport,
)
from batch_scorer.reports.views.decontamination import decontaminated_view
from batch_scorer.reports.views.evaluation import evaluation_view
from batch_scorer.reports.views.nightly import (
    drift_view,
    nightly_plan_view,
    nightly_record_view,
    nightly_status_view,
    nightly_view,
)
from batch_scorer.reports.views.normalization import normalized_view
from batch_scorer.reports.views.page import page_view
from batch_scorer.reports.views.runs import (
    check_view,
    conformance_view,
    failed_shard_view,
    marked_row_view,
    marked_rows_view,
    pace_view,
    plan_view,
    run_view,
    started_view,
    status_view,
    verify_view,
)
from batch_scorer.reports.views.selection import (
    derived_status_view,
    derived_verdict_view,
    selected_view,
)
from batch_scorer.runs.marked import MarkedRows
from batch_scorer.runs.status import OutputStatus
from batch_scorer.selection.result import Selected
from batch_scorer.storage import Conformance

Result: TypeAlias = (
    PlanReport
    | CheckReport
    | RunReport
    | VerifyReport
    | Conformance
    | OutputStatus
    | MarkedRows
    | Evaluation
    | NightlyPlan
    | NightlyReport
    | NightlyRecord
    | NightlyStatus
    | DriftReport
    | Selected
    | Normalized
    | DerivedStatus
    | DerivedVerdict
    | Decontaminated
    | PageReport
)
"""What a command ends with; `to_json` is the same for machines."""

Report: TypeAlias = Result | Started | FailedShard | MarkedRow | Pace
"""All that can be shown: also a run while it goes."""

VIEWS: Mapping[type[Report], Callable[[Any], Iterator[Block]]] = {
    PlanReport: plan_view,
    CheckReport: check_view,
    Started: started_view,
    FailedShard: failed_shard_view,
    MarkedRow: marked_row_view,
    Pace: pace_view,
    RunReport: run_view,
    VerifyReport: verify_view,
    Conformance: conformance_view,
    OutputStatus: status_view,
    MarkedRows: marked_rows_view,
    Evaluation: evaluation_view,
    NightlyPlan: nightly_plan_view,
    NightlyReport: nightly_view,
    NightlyRecord: nightly_record_view,
    NightlyStatus: nightly_status_view,
    DriftReport: drift_view,
    Selected: selected_view,
    Normalized: normalized_view,
    DerivedStatus: derived_status_view,
    DerivedVerdict: derived_verdict_view,
    Decontaminated: decontaminated_view,
    PageReport: page_view,
}


def blocks_of(report: Report) -> Iterator[Block]:
    """What a report shows, from top to bottom."""
    return VIEWS[type(report)](report)
