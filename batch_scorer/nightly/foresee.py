"""What a nightly run would do, without doing it: `nightly --dry-run`."""

from dataclasses import asdict, dataclass
from typing import Any

from batch_scorer.config import Config
from batch_scorer.inputs.plan import Plan
from batch_scorer.nightly.generations import Generation, choose, read_generations, read_latest
from batch_scorer.nightly.night import (
    Night,
    Series,
    as_any_begun,
    plan_night,
    series_of,
    wanted_generation,
)
from batch_scorer.records import Status
from batch_scorer.runs.remaining import remaining
from batch_scorer.storage import ObjectMissing, open_store


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a nightly run would do for one model. `path` is its generation, None for one that is not
    begun yet; `follows`: its work is known only once the model before it is done."""

    series: str
    model: str
    path: str | None
    follows: bool = False
    files: int = 0
    files_aside: int = 0
    files_failed: int = 0
    shards_committed: int = 0
    shards_to_do: int = 0
    shards_left: int = 0
    rows_committed: int = 0
    rows_to_do: int = 0
    rows_left: int = 0
    rows_not_asked: int = 0

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {"line": fields.pop("series"), **fields}


def foresee_night(config: Config, night: Night) -> list[Prospect]:
    """Show what `run_night` would do. Writes nothing, takes no lease, starts no Ray."""
    series = series_of(config)
    first, *others = series
    plan = plan_night(series, night)
    try:
        root = open_store(config.output, config.store_options)
    except ObjectMissing:
        known, job, latest = [], None, None
    else:
        known, latest = read_generations(root), read_latest(root)
        job = as_any_begun(first.name, first.config, first.model, known, root)
    chosen: Generation | None = None
    if job is not None:
        chosen = choose(known, wanted_generation(first.name, job, None, night.rescore), latest)
    if chosen is None or chosen not in known:
        prospect = _of_new(first, plan, night)
    else:
        assert job is not None
        work = remaining(plan, job, root.below(chosen.path), max_shards=night.max_shards)
        done = [receipt for receipt in work.done if receipt.status is Status.COMMITTED]
        prospect = Prospect(
            series=first.name,
            model=first.config.model,
            path=chosen.path,
            files=len(plan.files),
            files_aside=len(plan.aside),
            files_failed=len(plan.failed),
            shards_committed=len(done),
            shards_to_do=len(work.todo),
            shards_left=len(work.left),
            rows_committed=sum(receipt.num_rows for receipt in done),
            rows_to_do=work.todo.total("num_rows"),
            rows_left=sum(receipt.num_rows for receipt in work.left),
            rows_not_asked=plan.rows_not_asked,
        )
    return [
        prospect,
        *(Prospect(each.name, each.config.model, None, follows=True) for each in others),
    ]


def _of_new(series: Series, plan: Plan, night: Night) -> Prospect:
    """The whole plan, in a new generation."""
    most = len(plan.shards) if night.max_shards is None else night.max_shards
    now, later = plan.shards[:most], plan.shards[most:]
    return Prospect(
        series=series.name,
        model=series.config.model,
        path=None,
        files=len(plan.files),
        files_aside=len(plan.aside),
        files_failed=len(plan.failed),
        shards_to_do=len(now),
        shards_left=len(later),
        rows_to_do=now.total("num_rows"),
        rows_left=later.total("num_rows"),
        rows_not_asked=plan.rows_not_asked,
    )
