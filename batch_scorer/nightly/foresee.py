"""What a nightly run would do, without doing it: `nightly --dry-run`."""

from dataclasses import asdict, dataclass
from typing import Any

from batch_scorer.config import Config
from batch_scorer.inputs.plan import Plan
from batch_scorer.nightly.generations import MAIN, Generation, choose, read_generations, read_latest
from batch_scorer.nightly.night import Models, Night, as_any_begun, wanted_generation
from batch_scorer.records import Status
from batch_scorer.runs.derive import look_at_models, plan_for
from batch_scorer.runs.remaining import remaining
from batch_scorer.storage import ObjectMissing, open_store


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a nightly run would do. `path` is its generation, None for one that is not begun yet."""

    series: str
    model: str
    path: str | None
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


def foresee_night(config: Config, night: Night) -> Prospect:
    """Show what `run_night` would do. Writes nothing, takes no lease, starts no Ray."""
    models = Models(config, look_at_models(config))
    plan = plan_for(config, models.members, night.holds)
    try:
        root = open_store(config.output, config.store_options)
    except ObjectMissing:
        known, job, latest = [], None, None
    else:
        known, latest = read_generations(root), read_latest(root)
        job = as_any_begun(models, known, root)
    chosen: Generation | None = None
    if job is not None:
        chosen = choose(known, wanted_generation(job, is_rescore=night.rescore), latest)
    if job is None or chosen is None or chosen not in known:
        return _of_new(config, plan, night)
    work = remaining(plan, job, root.below(chosen.path), max_shards=night.max_shards)
    done = [receipt for receipt in work.done if receipt.status is Status.COMMITTED]
    return Prospect(
        series=MAIN,
        model=config.shown_model,
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


def _of_new(config: Config, plan: Plan, night: Night) -> Prospect:
    """The whole plan, in a new generation."""
    most = len(plan.shards) if night.max_shards is None else night.max_shards
    now, later = plan.shards[:most], plan.shards[most:]
    return Prospect(
        series=MAIN,
        model=config.shown_model,
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
