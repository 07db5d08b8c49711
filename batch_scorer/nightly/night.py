"""A night: find out what is missing and score it, into the generation that is right for it.

Safe to be triggered at any time, as often as one likes: what is missing is told from what is
committed, never from a clock, and a lease on the root keeps two nights apart.

    ROOT/generations/…, latest.json    outputs, and which of them to read (`generations`)
    ROOT/nights/…                      what each night has changed (`nights`)
"""

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from batch_scorer import logs
from batch_scorer.config import Config
from batch_scorer.errors import ConfigError, OutputError, OutputHeldError
from batch_scorer.inputs.plan import Plan, make_plan
from batch_scorer.job import Job, outputs_of
from batch_scorer.models.directory import ModelFacts
from batch_scorer.nightly.generations import (
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
from batch_scorer.outputs.claim import claimed
from batch_scorer.outputs.lease import Lease, lease_of
from batch_scorer.outputs.manifest import current_manifest
from batch_scorer.outputs.reuse import Earlier
from batch_scorer.pipeline.session import RaySession
from batch_scorer.records import Source, Status
from batch_scorer.runs.derive import as_begun, look_at_model, open_output, settle
from batch_scorer.runs.run import Listener, Summary, score_plan
from batch_scorer.storage import ObjectMissing, Store

log = logging.getLogger("batch_scorer")

_DATE = re.compile(r"(?<!\d)\d{4}-\d{2}-\d{2}(?!\d)")
_POLLS = 10

Listen = Callable[[str], AbstractContextManager[Listener | None]]
"""Gives whoever is told how the scoring of a generation goes, by its path."""


@dataclass(frozen=True, slots=True)
class Night:
    """What a night is asked to do.

    Only files of the days from `since` to `until` are looked at, both included; None: of all days.
    `rescore` computes again what is scored already, into a new generation. At most `max_shards`
    are scored for each model.
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
        """Whether a file is to be looked at; `changed` is when it was last."""
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
    """The day that a file is of: the first ISO date in its key, else that of its last change in
    UTC."""
    for found in _DATE.findall(key):
        try:
            return date.fromisoformat(found)
        except ValueError:
            continue  # no day of any calendar
    return changed.astimezone(UTC).date()


@dataclass(frozen=True, slots=True)
class Ended:
    """How a night ended.

    `record` and `report` are what it wrote, None where nothing was to do. `held_by` says who else
    is at work: then this night did nothing at all.
    """

    root: str
    summaries: tuple[Summary, ...] = ()
    record: dict[str, Any] | None = None
    report: dict[str, Any] | None = None
    held_by: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all was done that the night was to do."""
        return all(summary.is_complete for summary in self.summaries)


@dataclass(frozen=True, slots=True)
class Series:
    """One model of a night: its name, the settings that are its own, and what its files say."""

    name: str
    config: Config
    model: ModelFacts


def run_night(config: Config, night: Night, listen: Listen | None = None) -> Ended:
    """Score what is missing; `config.output` is the root of all generations.

    Raises what `score` raises. Another night at work is no error: see `Ended.held_by`.
    """
    lines = series_of(config)
    root = _open_root(config)
    with ExitStack() as stack:
        try:
            lease = stack.enter_context(_hold(root, config.lease_s))
        except OutputHeldError as error:
            return Ended(root.root, held_by=str(error))
        session = stack.enter_context(RaySession(config))
        number = max(numbers(root), default=0) + 1
        stack.enter_context(logs.fields(night=number))
        plan = plan_night(lines[0], night)
        at_work = _AtWork(root, number, night, session, listen or _to_nobody, lines, plan)
        return at_work.to_the_end(lease)


def _to_nobody(path: str) -> AbstractContextManager[Listener | None]:
    return nullcontext()


def series_of(config: Config) -> list[Series]:
    """All models, checked before anything is scored."""
    settings = {MAIN: config.model_copy(update={"also": {}})}
    for prefix, model in config.also.items():
        own = {"model": model, "column_prefix": prefix, "adapter": None, "step_aggregation": None}
        settings[prefix] = settings[MAIN].model_copy(update=own)
    return [Series(name, own, look_at_model(own)) for name, own in settings.items()]


def _open_root(config: Config) -> Store:
    root = open_output(config)
    if claimed(root):
        raise OutputError(
            f"{root.root} is an output of `score`; name another folder, which is to hold the "
            "generations of all nights"
        )
    return root


def plan_night(first: Series, night: Night) -> Plan:
    return make_plan(first.config, outputs_of(first.config, first.model), night.holds)


@contextmanager
def _hold(root: Store, lease_s: float) -> Iterator[Lease]:
    """The lease on the root. Raises OutputHeldError if another night is alive.

    One on another machine that does not renew its lease has died with it, and a scheduler may well
    have started this one for that reason: it waits until that is certain.
    """
    before = lease_of(root)
    for _ in range(_POLLS):
        now = lease_of(root)
        if now is None or not now.is_held or now.is_here or now != before:
            break  # free, or certainly held: it has been renewed, or taken by a third
        time.sleep(lease_s / (_POLLS - 1))
    with Lease(root, "nights", lease_s) as lease:
        yield lease


class _AtWork:
    """Night `number` under its lease: the chain of generations that it works on, link by link.

    `plan` is that of the first line; the others plan the shards of the one above them.
    """

    def __init__(
        self,
        root: Store,
        number: int,
        night: Night,
        session: RaySession,
        listen: Listen,
        lines: Sequence[Series],
        plan: Plan,
    ) -> None:
        self._root = root
        self._number = number
        self._night = night
        self._session = session
        self._listen = listen
        self.series_of = lines
        self._plan = plan
        self._latest = read_latest(root)
        self._steps: list[Step] = []
        self._origins: dict[str, str] = {}  # input file by output key of the last step

    def to_the_end(self, lease: Lease) -> Ended:
        """Score all lines, record what has changed, and move the pointer once that is right."""
        started_at = datetime.now(UTC)
        for line in self.series_of:
            above = self._steps[-1] if self._steps else None
            plan = self._plan if above is None else self._plan_below(line, above)
            if not plan.shards and not plan.failed:
                break  # no files of these days, or nothing above that could be taken
            self._score(line, plan, above)
            lease.check()
        if not self._steps:
            return Ended(self._root.root)
        return self._record(started_at, lease)

    def _plan_below(self, line: Series, above: Step) -> Plan:
        """The shards of the generation above, as far as they are of the night's files. Those whose
        input is gone are passed over."""
        if not self._origins:
            return Plan([], [], [])
        selected = {file.source.key for file in self._plan.files}
        receipts = above.summary.receipts
        gone = {receipt.output_key for receipt in receipts if receipt.status is Status.INPUT_GONE}

        def choice(source: Source, changed: datetime) -> bool | None:
            return None if source.key in gone else self._origins.get(source.key) in selected

        config = self._placed(line, above)
        return make_plan(config, outputs_of(config, line.model), choice)

    def _placed(self, line: Series, above: Step | None) -> Config:
        """The line's settings, with inputs and output as far as they are known before its
        generation is chosen."""
        if above is None:
            return line.config
        folder = self._root.url(f"generations/{line.name}")
        return line.config.model_copy(update={"inputs": (above.store.root,), "output": folder})

    def _score(self, line: Series, plan: Plan, above: Step | None) -> None:
        """Choose the line's generation, and score what it lacks."""
        config = self._placed(line, above)
        known = read_generations(self._root)
        prepared = as_any_begun(line.name, config, line.model, known, self._root)
        prepared = prepared or settle(config, line.model, plan, self._session)
        wanted = wanted_generation(
            line.name, prepared, above.generation if above else None, self._night.rescore
        )
        generation = choose(known, wanted, self._latest)
        if generation not in known:
            record_generations(self._root, [*known, generation])
        # What was left open stays as the generation was begun with.
        pins = {"dtype": prepared.dtype, "backend": prepared.engines[0]}
        output = self._root.url(generation.path)
        config = config.model_copy(update={"output": output, **pins})
        donors = _scored_by(donor_of(known, generation, self._latest), self._root)
        summary = self._patiently(config, line.model, plan, generation, donors)
        self._steps.append(Step(generation, line.config.model, summary, open_output(config)))
        self._origins = {
            receipt.output_key: receipt.input if above is None else self._origins[receipt.input]
            for receipt in summary.receipts
            if receipt.status is Status.COMMITTED
            and (above is None or receipt.input in self._origins)
        }

    def _patiently(
        self,
        config: Config,
        model: ModelFacts,
        plan: Plan,
        generation: Generation,
        donors: Sequence[Earlier],
    ) -> Summary:
        """Score; if the generation is held, once more when that hold must have ended.

        A night that died with its machine renewed it a moment after that on the root.
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
        lines = [describe(root, step) for step in self._steps]
        paths = {step.generation.line: step.generation.path for step in self._steps}
        is_latest = latest is not None and [*latest.paths.items()] == [*paths.items()]
        lacking = None if is_latest else self._lacking()
        has_moved = lacking is not None and not lacking
        summaries = tuple(step.summary for step in self._steps)
        if not has_moved and not any(has_changed(root, line) for line in lines):
            return Ended(root.root, summaries)
        record = {
            "night": number,
            "started_at": started_at.isoformat(timespec="seconds"),
            "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": self._night.to_json(),
            "files_aside": len(self._plan.aside),
            "lines": lines,
            "latest": paths if has_moved else dict(latest.paths) if latest else None,
            "has_moved": has_moved,
            "lacking": lacking,
        }
        report = drift_report(root, number, self._steps, lines, latest)
        lease.confirm()
        write(root, record, report)
        if has_moved:
            move_latest(root, [step.generation for step in self._steps], number, latest)
        return Ended(root.root, summaries, record, report)

    def _lacking(self) -> list[str]:
        """Why readers are not to be pointed at the night's generations yet; [] if they are."""
        reasons = []
        if len(self._steps) < len(self.series_of):
            reasons.append(f"{self.series_of[len(self._steps)].name}: not begun")
        for step in self._steps:
            if left := step.summary.totals["shards_left"]:
                reasons.append(f"{step.generation.path}: {left} shards are left")
        if self._latest is not None:
            chain = [receipts for _, receipts in latest_chain(self._root, self._latest)]
            there = held(chain)
            here = held([step.summary.receipts for step in self._steps])
            now = self._plan.inputs
            absent = [
                key
                for key, etag in sorted(there.items())
                if key in now and here.get(key, "") not in (etag, now[key])
            ]
            if absent:
                more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
                reasons.append(f"{absent[0]}{more}: not scored, and in what readers have now")
        return reasons


def as_any_begun(
    line: str, config: Config, model: ModelFacts, known: Sequence[Generation], root: Store
) -> Job | None:
    """The job as a generation of this line was begun, the newest first; None if none was."""
    for generation in reversed([g for g in known if g.line == line]):
        try:
            prepared = as_begun(config, model, root.below(generation.path))
        except ObjectMissing:
            continue
        if prepared is not None:
            return prepared
    return None


def wanted_generation(
    line: str, prepared: Job, above: Generation | None, is_rescore: bool
) -> Generation:
    """What tonight's generation of a line has to be; its number is open."""
    return Generation(
        line=line,
        number=0,
        fingerprint=prepared.fingerprint.digest,
        layout=prepared.config.with_role("layout"),
        follows=above.path if above else None,
        is_rescore=above.is_rescore if above else is_rescore,
    )


def _scored_by(generation: Generation | None, root: Store) -> list[Earlier]:
    """All that a generation has committed."""
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
