"""A nightly run: find out what is missing and score it, into the right generation.

Safe to trigger at any time, any number of times: what is missing is computed from what is
committed, never from a clock, and a lease on the root keeps two runs apart.

    ROOT/generations/…, latest.json    outputs, and which of them to read (`generations`)
    ROOT/nights/…                      what each nightly run changed (`history`)
"""

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from batch_scorer import formats, logs
from batch_scorer.config import Config
from batch_scorer.errors import ConfigError, OutputError, OutputHeldError
from batch_scorer.formats.kinds import BESIDE_NAMES
from batch_scorer.inputs.plan import Plan
from batch_scorer.inputs.selection import kept_columns
from batch_scorer.job import Job
from batch_scorer.models.directory import ModelFacts
from batch_scorer.nightly.generations import (
    LATEST_KEY,
    MAIN,
    Generation,
    choose,
    donor_of,
    held,
    move_latest,
    read_generations,
    read_latest,
    record_generations,
)
from batch_scorer.nightly.history import (
    Step,
    describe,
    drift_report,
    has_changed,
    latest_chain,
    numbers,
    write,
)
from batch_scorer.nightly.record import DriftReport, NightlyRecord
from batch_scorer.outputs.claim import claimed, claimed_fingerprint
from batch_scorer.outputs.lease import Lease, lease_of
from batch_scorer.outputs.manifest import current_manifest
from batch_scorer.outputs.reuse import Earlier
from batch_scorer.pipeline.session import RaySession
from batch_scorer.records import Source, Status
from batch_scorer.runs.derive import (
    as_begun,
    date_of,
    look_at_model,
    open_output,
    plan_for,
    settle,
)
from batch_scorer.runs.run import Listener, Summary, score_plan
from batch_scorer.storage import ObjectMissing, Store

log = logging.getLogger("batch_scorer")

_DATE = re.compile(r"(?<!\d)\d{4}-\d{2}-\d{2}(?!\d)")
_POLLS = 10
_SELECTION = ("limit", "where", "keep_columns", "drop_columns")

Listen = Callable[[str], AbstractContextManager[Listener | None]]
"""The listener for the scoring of a generation, given the generation's path."""


@dataclass(frozen=True, slots=True)
class Night:
    """The flags of a nightly run.

    Only files of the days from `since` to `until` are read, both included; None: no bound.
    `rescore` computes again what is scored already, into a new generation. At most `max_shards`
    are scored with each model.
    """

    since: date | None = None
    until: date | None = None
    rescore: bool = False
    max_shards: int | None = None

    def __post_init__(self) -> None:
        if self.since and self.until and self.until < self.since:
            raise ConfigError(f"since {self.since} is after until {self.until}")
        if self.max_shards is not None and self.max_shards < 1:
            raise ConfigError("max_shards: at least one")

    def holds(self, source: Source, changed: datetime) -> bool:
        """Whether a file's day is within the bounds; `changed` is the time of its last change."""
        day = day_of(source.key, changed)
        return (self.since or day) <= day <= (self.until or day)

    def to_json(self) -> dict[str, Any]:
        return {
            "since": self.since and self.since.isoformat(),
            "until": self.until and self.until.isoformat(),
            "rescore": self.rescore,
            "max_shards": self.max_shards,
        }


def day_of(key: str, changed: datetime) -> date:
    """A file's day: the first ISO date in its key, else the date of its last change in UTC."""
    for found in _DATE.findall(key):
        try:
            return date.fromisoformat(found)
        except ValueError:
            continue  # digits like a date, but no day of the calendar
    return changed.astimezone(UTC).date()


@dataclass(frozen=True, slots=True)
class Ended:
    """How a nightly run ended.

    `record` and `report` are what it wrote, None if there was nothing to do. `held_by` describes
    another nightly run that holds the output: then this one did nothing.
    """

    root: str
    summaries: tuple[Summary, ...] = ()
    record: NightlyRecord | None = None
    report: DriftReport | None = None
    held_by: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether no shard failed; shards left by `max_shards` do not count."""
        return all(summary.is_complete for summary in self.summaries)


@dataclass(frozen=True, slots=True)
class Series:
    """One model of a nightly run: its series' name, its settings, and the facts of its files."""

    name: str
    config: Config
    model: ModelFacts


def run_night(config: Config, night: Night, listen: Listen | None = None) -> Ended:
    """Score what is missing; `config.output` is the root of all generations.

    Raises what `score` raises. Another nightly run that holds it is no error: see `Ended.held_by`.
    """
    series = series_of(config)
    root = _open_root(config)
    with ExitStack() as stack:
        try:
            lease = stack.enter_context(_hold(root, config.lease_s))
        except OutputHeldError as error:
            return Ended(root.root, held_by=str(error))
        session = stack.enter_context(RaySession(config))
        number = max(numbers(root), default=0) + 1
        stack.enter_context(logs.fields(night=number))
        plan = plan_night(series, night)
        run = _NightlyRun(root, number, night, session, listen or _to_nobody, series, plan)
        return run.score_all(lease)


def _to_nobody(path: str) -> AbstractContextManager[Listener | None]:
    return nullcontext()


OF_ONE_MODEL = (
    "revision",
    "base_model",
    "adapter",
    "step_aggregation",
    "token_scores",
    "output_names",
    "output_weights",
    "reference_model",
    "beta",
    "length_normalize",
    "rewards",
)
"""Settings of `model` that are not those of the models in `also`; nor are the columns of what a
model reads beside the conversation, which others have no use for."""


def series_of(config: Config) -> list[Series]:
    """All models, checked before anything is scored."""
    settings = {MAIN: config.model_copy(update={"also": {}})}
    for prefix, model in config.also.items():
        own = {name: Config.model_fields[name].default for name in OF_ONE_MODEL}
        columns = {k: name for k, name in config.columns.items() if k not in BESIDE_NAMES}
        own |= {"model": model, "column_prefix": prefix, "columns": columns}
        settings[prefix] = settings[MAIN].model_copy(update=own)
    return [Series(name, own, look_at_model(own)) for name, own in settings.items()]


def _open_root(config: Config) -> Store:
    root = open_output(config)
    if claimed(root):
        raise OutputError(
            f"{root.root} is an output of `score`; name another folder for the generations of "
            "`nightly`"
        )
    return root


def plan_night(series: Sequence[Series], night: Night) -> Plan:
    """The plan of the first series. Raises ConfigError where it would not write columns that the
    others score, too."""
    first, *others = series
    config = first.config
    plan = plan_for(config, first.model, night.holds)
    for file in plan.files if others else ():
        kept = kept_columns(file.schema.names, config.keep_columns, config.drop_columns)
        for name in formats.columns_needed(file.layout):
            if name not in kept:
                raise ConfigError(
                    f"keep_columns, drop_columns: {name!r} of {file.source.key} has to be kept, as "
                    "the models of `also` score it too"
                )
    return plan


@contextmanager
def _hold(root: Store, lease_s: float) -> Iterator[Lease]:
    """The lease on the root. Raises OutputHeldError if another nightly run is alive.

    A run on another machine that does not renew its lease may have died with that machine, and a
    scheduler may have started this one for that reason: wait until that is certain.
    """
    before = lease_of(root)
    for _ in range(_POLLS):
        now = lease_of(root)
        if now is None or not now.is_held or now.is_here or now != before:
            break  # free, or certainly held: it has been renewed, or taken by a third
        time.sleep(lease_s / (_POLLS - 1))
    with Lease(root, "nights", lease_s) as lease:
        yield lease


class _NightlyRun:
    """Nightly run `number` under its lease: the chain of generations it scores, one after another.

    `plan` is that of the first series; each other one plans the shards of the series above it.
    """

    def __init__(
        self,
        root: Store,
        number: int,
        night: Night,
        session: RaySession,
        listen: Listen,
        series: Sequence[Series],
        plan: Plan,
    ) -> None:
        self._root = root
        self._number = number
        self._night = night
        self._session = session
        self._listen = listen
        self._series = series
        self._plan = plan
        self._latest = read_latest(root)
        self._steps: list[Step] = []
        self._origins: dict[str, str] = {}  # input file by output key of the last step

    def score_all(self, lease: Lease) -> Ended:
        """Score all series, record what has changed, and move the pointer if nothing is lacking."""
        started_at = datetime.now(UTC)
        for series in self._series:
            above = self._steps[-1] if self._steps else None
            plan = self._plan if above is None else self._plan_below(series, above)
            if not plan.shards and not plan.failed:
                break  # no files of these days, or no scored shard above
            self._score(series, plan, above)
            lease.check()
        if not self._steps:
            return Ended(self._root.root)
        return self._record(started_at, lease)

    def _plan_below(self, series: Series, above: Step) -> Plan:
        """The shards of the generation above that come from this run's files. Those whose input is
        gone are passed over."""
        if not self._origins:
            return Plan([], [], [])
        selected = {file.source.key for file in self._plan.files}
        receipts = above.summary.receipts
        gone = {receipt.output_key for receipt in receipts if receipt.status is Status.INPUT_GONE}

        def choice(source: Source, changed: datetime) -> bool | None:
            return None if source.key in gone else self._origins.get(source.key) in selected

        config = self._placed(series, above)
        return plan_for(config, series.model, choice)

    def _placed(self, series: Series, above: Step | None) -> Config:
        """The series' settings, with inputs and output as far as they are known before its
        generation is chosen."""
        if above is None:
            return series.config
        folder = self._root.url(f"generations/{series.name}")
        # Above, rows and columns have been chosen already.
        every = {name: Config.model_fields[name].default for name in _SELECTION}
        places = {"inputs": (above.store.root,), "output": folder}
        return series.config.model_copy(update=every | places)

    def _score(self, series: Series, plan: Plan, above: Step | None) -> None:
        """Choose the series' generation, and score what it lacks."""
        config = self._placed(series, above)
        known = read_generations(self._root)
        job = as_any_begun(series.name, config, series.model, known, self._root)
        if job is None:  # a new generation; its templates read the date of the one before
            date = config.template_date or date_of_series(series.name, known, self._root)
            dated = config.model_copy(update={"template_date": date})
            job = settle(dated, series.model, plan, self._session)
        wanted = wanted_generation(
            series.name, job, above.generation if above else None, self._night.rescore
        )
        generation = choose(known, wanted, self._latest)
        if generation not in known:
            record_generations(self._root, [*known, generation])
        # Settings that were left open stay as they were when the generation was begun.
        date = job.model.prompt.date
        pins = {"dtype": job.dtype, "backend": job.engines[0], "template_date": date}
        output = self._root.url(generation.path)
        config = config.model_copy(update={"output": output, **pins})
        donors = _scored_by(donor_of(known, generation, self._latest), self._root)
        summary = self._score_once_free(config, series.model, plan, generation, donors)
        self._steps.append(Step(generation, series.config.model, summary, open_output(config)))
        self._origins = {
            receipt.output_key: receipt.input if above is None else self._origins[receipt.input]
            for receipt in summary.receipts
            if receipt.status is Status.COMMITTED
            and (above is None or receipt.input in self._origins)
        }

    def _score_once_free(
        self,
        config: Config,
        model: ModelFacts,
        plan: Plan,
        generation: Generation,
        donors: Sequence[Earlier],
    ) -> Summary:
        """Score; if the generation is held, retry once its lease must have expired.

        A nightly run that died with its machine renewed that lease a moment after the root's.
        """

        def score() -> Summary:
            with self._listen(generation.path) as listener:
                listeners = [listener] if listener else []
                most = self._night.max_shards
                return score_plan(
                    config, model, plan, self._session, listeners, max_shards=most, donors=donors
                )

        try:
            return score()
        except OutputHeldError as error:
            log.warning("%s", error)
            time.sleep(config.lease_s)
            return score()

    def _record(self, started_at: datetime, lease: Lease) -> Ended:
        root, number, latest = self._root, self._number, self._latest
        described = [describe(root, step) for step in self._steps]
        paths = {step.generation.series: step.generation.path for step in self._steps}
        is_latest = latest is not None and [*latest.paths.items()] == [*paths.items()]
        lacking = None if is_latest else self._lacking()
        has_moved = lacking is not None and not lacking
        summaries = tuple(step.summary for step in self._steps)
        if not has_moved and not any(has_changed(root, each) for each in described):
            return Ended(root.root, summaries)
        record = NightlyRecord(
            night=number,
            started_at=started_at.isoformat(timespec="seconds"),
            ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
            settings=self._night.to_json(),
            files_aside=len(self._plan.aside),
            series=tuple(described),
            latest=paths if has_moved else latest.paths if latest else None,
            has_moved=has_moved,
            lacking=None if lacking is None else tuple(lacking),
        )
        report = drift_report(root, number, self._steps, described, latest)
        lease.confirm()
        write(root, record, report)
        if has_moved:
            move_latest(root, [step.generation for step in self._steps], number, latest)
        return Ended(root.root, summaries, record, report)

    def _lacking(self) -> list[str]:
        """Why `latest.json` may not name this run's generations yet; [] if it may."""
        reasons = []
        if len(self._steps) < len(self._series):
            reasons.append(f"{self._series[len(self._steps)].name}: not begun")
        for step in self._steps:
            if left := step.summary.totals["shards_left"]:
                reasons.append(f"{step.generation.path}: {left} shards are left")
        if self._latest is not None:
            chain = [receipts for _, receipts in latest_chain(self._root, self._latest)]
            there = held(chain)
            here = held([step.summary.receipts for step in self._steps])
            now = self._plan.inputs
            not_asked = {receipt.input for receipt in self._plan.not_asked}
            absent = [
                key
                for key, etag in sorted(there.items())
                if key in now.keys() - not_asked and here.get(key, "") not in (etag, now[key])
            ]
            if absent:
                more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
                reasons.append(f"{absent[0]}{more}: not scored, but {LATEST_KEY}'s rows include it")
        return reasons


def as_any_begun(
    series: str, config: Config, model: ModelFacts, known: Sequence[Generation], root: Store
) -> Job | None:
    """The job as the newest generation of this series was begun; None if none was."""
    for generation in reversed([g for g in known if g.series == series]):
        try:
            job = as_begun(config, model, root.below(generation.path))
        except ObjectMissing:
            continue
        if job is not None:
            return job
    return None


def date_of_series(series: str, known: Sequence[Generation], root: Store) -> datetime | None:
    """What the templates of this series' newest generation read as today's date."""
    for generation in reversed([g for g in known if g.series == series]):
        try:
            return date_of(claimed_fingerprint(root.below(generation.path)))
        except ObjectMissing:
            continue
    return None


def wanted_generation(
    series: str, job: Job, above: Generation | None, is_rescore: bool
) -> Generation:
    """What this run's generation of a series has to be; its number is open."""
    return Generation(
        series=series,
        number=0,
        fingerprint=job.fingerprint.digest,
        layout=job.config.with_role("layout"),
        follows=above.path if above else None,
        is_rescore=above.is_rescore if above else is_rescore,
    )


def _scored_by(generation: Generation | None, root: Store) -> list[Earlier]:
    """All shards that a generation has committed."""
    if generation is None:
        return []
    try:
        store = root.below(generation.path)
    except ObjectMissing:
        return []
    return [
        Earlier(store.root, receipt.output_key, receipt.commit)
        for receipt in current_manifest(store)
        if receipt.commit is not None
    ]
