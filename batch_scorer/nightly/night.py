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
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any

from batch_scorer import logs
from batch_scorer.config import Config
from batch_scorer.errors import ConfigError, OutputError, OutputHeldError
from batch_scorer.inputs.plan import Plan
from batch_scorer.job import AnyJob, Members
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
    latest_receipts,
    numbers,
    write,
)
from batch_scorer.nightly.record import DriftReport, NightlyRecord
from batch_scorer.outputs.claim import claimed
from batch_scorer.outputs.lease import Lease, lease_of
from batch_scorer.outputs.manifest import REPORT_KEY, current_manifest
from batch_scorer.outputs.reuse import Earlier
from batch_scorer.pipeline.session import RaySession
from batch_scorer.records import Source
from batch_scorer.runs.derive import (
    as_begun,
    date_of,
    look_at_models,
    open_output,
    plan_for,
    settle,
)
from batch_scorer.runs.run import Listener, Summary, score_plan
from batch_scorer.storage import ObjectMissing, Store

log = logging.getLogger("batch_scorer")

_DATE = re.compile(r"(?<!\d)\d{4}-\d{2}-\d{2}(?!\d)")
_POLLS = 10

Listen = Callable[[str], AbstractContextManager[Listener | None]]
"""The listener for the scoring of a generation, given the generation's path."""


@dataclass(frozen=True, slots=True)
class Night:
    """The flags of a nightly run.

    Only files of the days from `since` to `until` are read, both included; None: no bound.
    `rescore` computes again what is scored already, into a new generation. At most `max_shards`
    are scored.
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
    summary: Summary | None = None
    record: NightlyRecord | None = None
    report: DriftReport | None = None
    held_by: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether no shard failed; shards left by `max_shards` do not count."""
        return self.summary is None or self.summary.is_complete


@dataclass(frozen=True, slots=True)
class Models:
    """The models of a nightly run, with its settings."""

    config: Config
    members: Members

    def updated(self, **settings: Any) -> "Models":
        """The same with other settings, of the whole job and of each model."""
        members = {
            name: replace(each, config=each.config.model_copy(update=settings))
            for name, each in self.members.items()
        }
        return Models(self.config.model_copy(update=settings), members)


def run_night(config: Config, night: Night, listen: Listen | None = None) -> Ended:
    """Score what is missing; `config.output` is the root of all generations.

    Raises what `score` raises. Another nightly run that holds it is no error: see `Ended.held_by`.
    """
    models = Models(config, look_at_models(config))
    root = _open_root(config)
    with ExitStack() as stack:
        try:
            lease = stack.enter_context(_hold(root, config.lease_s))
        except OutputHeldError as error:
            return Ended(root.root, held_by=str(error))
        session = stack.enter_context(RaySession(config))
        number = max(numbers(root), default=0) + 1
        stack.enter_context(logs.fields(night=number))
        plan = plan_for(config, models.members, night.holds)
        if not plan.shards and not plan.failed:
            return Ended(root.root)  # no files of these days
        started_at = datetime.now(UTC)
        run = _NightlyRun(root, number, night, session, listen or _to_nobody, plan)
        step = run.score(models)
        lease.check()
        return run.record(step, started_at, lease)


def _to_nobody(path: str) -> AbstractContextManager[Listener | None]:
    return nullcontext()


def _open_root(config: Config) -> Store:
    root = open_output(config)
    if claimed(root):
        raise OutputError(
            f"{root.root} is an output of `score`; name another folder for the generations of "
            "`nightly`"
        )
    return root


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
    """Nightly run `number` under its lease, of this plan."""

    def __init__(
        self,
        root: Store,
        number: int,
        night: Night,
        session: RaySession,
        listen: Listen,
        plan: Plan,
    ) -> None:
        self._root = root
        self._number = number
        self._night = night
        self._session = session
        self._listen = listen
        self._plan = plan
        self._latest = read_latest(root)

    def score(self, models: Models) -> Step:
        """Choose the generation, and score what it lacks."""
        known = read_generations(self._root)
        job = as_any_begun(models, known, self._root)
        if job is None:  # a new generation; its templates read the date of the one before
            date = models.config.template_date or date_of_newest(known, self._root)
            dated = models.updated(template_date=date)
            job = settle(dated.config, dated.members, self._plan, self._session)
        wanted = wanted_generation(job, is_rescore=self._night.rescore)
        generation = choose(known, wanted, self._latest)
        if generation not in known:
            record_generations(self._root, [*known, generation])
        placed = models.updated(output=self._root.url(generation.path))
        donors = _scored_by(donor_of(known, generation, self._latest), self._root)
        summary = self._score_once_free(_pinned(placed, job), generation, donors)
        store = open_output(placed.config)
        return Step(generation, models.config.shown_model, summary, store)

    def _score_once_free(
        self, models: Models, generation: Generation, donors: Sequence[Earlier]
    ) -> Summary:
        """Score; if the generation is held, retry once its lease must have expired.

        A nightly run that died with its machine renewed that lease a moment after the root's.
        """

        def score() -> Summary:
            with self._listen(generation.path) as listener:
                listeners = [listener] if listener else []
                return score_plan(
                    models.config,
                    models.members,
                    self._plan,
                    self._session,
                    listeners,
                    max_shards=self._night.max_shards,
                    donors=donors,
                )

        try:
            return score()
        except OutputHeldError as error:
            log.warning("%s", error)
            time.sleep(models.config.lease_s)
            return score()

    def record(self, step: Step, started_at: datetime, lease: Lease) -> Ended:
        """Record what has changed, and move the pointer if nothing is lacking."""
        root, number, latest = self._root, self._number, self._latest
        described = describe(root, step)
        path = step.generation.path
        is_latest = latest is not None and latest.paths == {MAIN: path}
        lacking = None if is_latest else self._lacking(step)
        has_moved = lacking is not None and not lacking
        summary = step.summary
        if not has_moved and not has_changed(root, described):
            return Ended(root.root, summary)
        record = NightlyRecord(
            night=number,
            started_at=started_at.isoformat(timespec="seconds"),
            ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
            settings=self._night.to_json(),
            files_aside=len(self._plan.aside),
            series=(described,),
            latest={MAIN: path} if has_moved else latest.paths if latest else None,
            has_moved=has_moved,
            lacking=None if lacking is None else tuple(lacking),
        )
        report = drift_report(root, number, step, described, latest)
        lease.confirm()
        root.delete(REPORT_KEY)  # the page is of the nights before
        write(root, record, report)
        if has_moved:
            move_latest(root, step.generation, number, latest)
        return Ended(root.root, summary, record, report)

    def _lacking(self, step: Step) -> list[str]:
        """Why `latest.json` may not name this run's generation yet; [] if it may."""
        reasons = []
        if left := step.summary.totals["shards_left"]:
            reasons.append(f"{step.generation.path}: {left} shards are left")
        if self._latest is not None:
            there = held(latest_receipts(self._root, self._latest))
            here = held(step.summary.receipts)
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


def as_any_begun(models: Models, known: Sequence[Generation], root: Store) -> AnyJob | None:
    """The job as the newest generation of these models was begun; None if none was."""
    for generation in reversed(known):
        try:
            job = as_begun(models.config, models.members, root.below(generation.path))
        except ObjectMissing:
            continue
        if job is not None:
            return job
    return None


def date_of_newest(known: Sequence[Generation], root: Store) -> datetime | None:
    """What the templates of the newest generation read as today's date."""
    for generation in reversed(known):
        try:
            return date_of(root.below(generation.path))
        except ObjectMissing:
            continue
    return None


def _pinned(models: Models, job: AnyJob) -> Models:
    """The models with the settings that were left open as they were when the generation was
    begun."""
    members = {}
    for name, own in job.members.items():
        date = own.model.prompt.date
        pins = {"dtype": own.dtype, "backend": own.backend, "template_date": date}
        config = models.members[name].config.model_copy(update=pins)
        members[name] = replace(models.members[name], config=config)
    return Models(models.config, members)


def wanted_generation(job: AnyJob, *, is_rescore: bool) -> Generation:
    """What this run's generation has to be; its number is open."""
    return Generation(
        series=MAIN,
        number=0,
        fingerprint=job.fingerprint.digest,
        layout=job.config.with_role("layout"),
        is_rescore=is_rescore,
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
