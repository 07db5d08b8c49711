"""Histories of a nightly, made up: files that come, change and go, engines that fail at some rows,
triggers, kills, faults, marked rows that are tried again.

Rules of a state machine of Hypothesis: a test runs many, and the planted bugs must fall to them.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import pyarrow as pa
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from batch_scorer import Config
from batch_scorer.backends import fake
from batch_scorer.errors import BatchScorerError, RowReason
from batch_scorer.failpoints import FAILPOINTS, FailpointReached, arm
from batch_scorer.nightly.night import Ended, Night, run_night
from batch_scorer.records import Receipt, Status
from batch_scorer.runs.remaining import Work
from batch_scorer.runs.run import score
from tests.helpers.inputs import Row, pair_rows, parquet, table_of
from tests.helpers.places import Place
from tests.helpers.weak import WeakBackend

SHARD_ROWS = 2
FIRST_DAY = date(2026, 10, 24)  # the night after it has 25 hours in Europe

DAYS = st.integers(0, 3).map(lambda days: FIRST_DAY + timedelta(days))
COUNTS = st.integers(1, 5)
RETRIED = tuple(reason for reason in RowReason if reason.may_pass)
MOST_PUTS = 30
"""Of a trigger; one that makes fewer loses nothing."""


class Killed(BaseException):
    """What no code of ours handles."""


class Watching:
    """Counts commits, and does something after so many of them."""

    def __init__(self, machine: "Histories", path: str) -> None:
        self._machine, self._path = machine, path

    def __enter__(self) -> "Watching":
        return self

    def __exit__(self, *_: object) -> None: ...

    def planned(self, work: Work) -> None: ...

    def finished(self, receipt: Receipt) -> None:
        if receipt.commit is not None:
            commit = receipt.commit
            self._machine.commits[self._path, commit.identity, commit.retries] += 1
        self._machine.after_shard()


class Histories(RuleBasedStateMachine):
    """A root, its inputs, and what is known of both."""

    models: ClassVar[list[Path]]

    def __init__(self) -> None:
        super().__init__()
        self.place = Place(tempfile.mkdtemp(prefix="nights"))
        self.files: dict[str, list[Row]] = {}
        self.files_then: dict[str, list[Row]] = {}
        """As the last trigger found them."""
        self.versions: dict[tuple[str, str], list[Row]] = {}
        self.model = self.models[0]
        self.rows_made = 0
        self.weakness: RowReason | None = None
        """For which the engine fails at some rows."""
        self.commits: Counter[tuple[str, str, int]] = Counter()
        self.readers: str | None = None
        self.after_shard: Callable[[], None] = lambda: None

    def teardown(self) -> None:
        try:
            self.all_is_well_in_the_end()
        finally:
            shutil.rmtree(self.place.url)

    # Files

    def new_rows(self, count: int) -> list[Row]:
        self.rows_made += count
        return pair_rows(count, self.rows_made)

    def write(self, key: str, rows: list[Row]) -> None:
        (self.place / "in").write({key: parquet(table_of(rows), SHARD_ROWS)})
        etag = (self.place / "in").store.head(key).version.etag
        self.files[key] = self.versions[key, etag] = rows

    @rule(day=DAYS, count=COUNTS)
    def a_file_comes(self, day: date, count: int) -> None:
        self.write(f"dt={day}/{len(self.versions)}.parquet", self.new_rows(count))

    @precondition(lambda self: self.files)
    @rule(data=st.data(), at=st.integers(0, 5), drop=st.integers(0, 2), count=COUNTS)
    def a_file_is_rewritten(self, data: st.DataObject, at: int, drop: int, count: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.files)))
        rows = self.files[key]
        self.write(key, [*rows[:at], *self.new_rows(count), *rows[at + drop :]])

    @precondition(lambda self: len(self.files) > 1)
    @rule(data=st.data())
    def a_file_goes(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.files)))
        (self.place / "in").store.delete(key)
        del self.files[key]

    @rule(model=st.integers(0, 1))
    def another_model_is_chosen(self, model: int) -> None:
        self.model = self.models[model]

    @rule(reason=st.sampled_from([None, *RETRIED]))
    def the_engine_fails_at_some_rows_or_at_none(self, reason: RowReason | None) -> None:
        self.weakness = reason

    # Triggers

    def config(self, output: str, *, retries: bool = False) -> Config:
        return Config(
            model=str(self.model),
            inputs=((self.place / "in").url,),
            output=(self.place / output).url,
            backend="fake",
            use_ray=False,
            shard_rows=SHARD_ROWS,
            retry_marked=RETRIED if retries else (),
        )

    def run(self, night: Night, *, retries: bool = False) -> Ended:
        config = self.config("out", retries=retries)
        with patch.object(fake, "BACKEND", lambda settings: WeakBackend(self.weakness)):
            return run_night(config, night, lambda path: Watching(self, path))

    def trigger(self, night: Night | None = None, *, retries: bool = False) -> Ended:
        self.files_then = dict(self.files)
        ended = self.run(night or Night(), retries=retries)
        if (summary := ended.summary) is not None:
            totals = summary.totals
            parts = ("rows_scored", "rows_marked", "rows_not_asked", "rows_failed", "rows_left")
            assert totals["rows"] == sum(totals[name] for name in parts)
            gone = [r for r in summary.receipts if r.status is Status.INPUT_GONE]
            there = [r for r in summary.receipts if r.status is not Status.INPUT_GONE]
            assert totals["rows"] == sum(receipt.num_rows for receipt in there)
            assert not {receipt.input for receipt in gone} & self.files_then.keys()
        self.check_readers()
        return ended

    @precondition(lambda self: self.files)
    @rule()
    def a_trigger(self) -> None:
        self.trigger()

    @precondition(lambda self: self.files)
    @rule()
    def a_doubled_trigger(self) -> None:
        first = self.trigger()
        before = self.commits.total()
        second = self.trigger()
        assert first.is_complete and second.record is None
        assert self.commits.total() == before

    @precondition(lambda self: self.files)
    @rule(most=st.none() | st.integers(1, 3))
    def a_trigger_to_try_marked_rows_again(self, most: int | None) -> None:
        ended = self.trigger(Night(max_shards=most), retries=True)
        if self.weakness is None and most is None and ended.summary is not None:
            assert not ended.summary.totals["marked"].keys() & set(RETRIED)

    @precondition(lambda self: self.files)
    @rule(day=DAYS)
    def a_trigger_for_the_days_until(self, day: date) -> None:
        """Late, or early, or by a clock that was moved back: the day is what the scheduler says."""
        self.trigger(Night(until=day))

    @precondition(lambda self: self.files)
    @rule(day=DAYS)
    def a_trigger_for_one_day(self, day: date) -> None:
        self.trigger(Night(since=day, until=day))

    @precondition(lambda self: self.files)
    @rule(most=st.integers(1, 3))
    def a_trigger_for_so_many_shards(self, most: int) -> None:
        self.trigger(Night(max_shards=most))

    @precondition(lambda self: self.files)
    @rule()
    def a_trigger_to_do_all_again(self) -> None:
        self.trigger(Night(rescore=True))

    @precondition(lambda self: self.files)
    @rule(shards=st.integers(1, 4), rescore=st.booleans(), retries=st.booleans())
    def a_trigger_that_is_killed(self, shards: int, rescore: bool, retries: bool) -> None:
        def kill() -> None:
            raise Killed

        self.after_shards(shards, kill)
        try:
            self.trigger(Night(rescore=rescore), retries=retries)
        except Killed:
            self.check_readers()
        self.after_shard = lambda: None

    @precondition(lambda self: self.files)
    @rule(lost=st.integers(1, MOST_PUTS), rescore=st.booleans(), retries=st.booleans())
    def a_trigger_that_loses_an_answer(self, lost: int, rescore: bool, retries: bool) -> None:
        """Of a PUT that was applied. On this disk nobody asks again: the run reports it."""
        self.trigger_that_fails(f"put.applied:lose:{lost}", rescore, retries)

    @precondition(lambda self: self.files)
    @rule(
        step=st.sampled_from(sorted(FAILPOINTS)),
        time=st.integers(1, 3),
        rescore=st.booleans(),
        retries=st.booleans(),
    )
    def a_trigger_that_breaks_off(self, step: str, time: int, rescore: bool, retries: bool) -> None:
        """At any step of the commit protocol."""
        self.trigger_that_fails(f"{step}:raise:{time}", rescore, retries)

    def trigger_that_fails(self, failpoint: str, rescore: bool, retries: bool) -> None:
        arm(failpoint)
        try:
            self.trigger(Night(rescore=rescore), retries=retries)
        except (BatchScorerError, FailpointReached):
            self.check_readers()
        finally:
            arm("")

    @precondition(lambda self: self.files)
    @rule(shards=st.integers(1, 3))
    def two_triggers_at_once(self, shards: int) -> None:
        others: list[Ended] = []
        self.after_shards(shards, lambda: others.append(self.run(Night())))
        self.trigger()
        self.after_shard = lambda: None
        assert all(other.held_by is not None and other.summary is None for other in others)

    @precondition(lambda self: self.files)
    @rule(data=st.data(), shards=st.integers(1, 3), count=COUNTS)
    def a_file_is_rewritten_during_a_night(
        self, data: st.DataObject, shards: int, count: int
    ) -> None:
        key = data.draw(st.sampled_from(sorted(self.files)))
        self.after_shards(shards, lambda: self.write(key, self.new_rows(count)))
        self.trigger()
        self.after_shard = lambda: None

    def after_shards(self, count: int, act: Callable[[], object]) -> None:
        left = [count]

        def after_shard() -> None:
            left[0] -= 1
            if left[0] == 0:
                act()

        self.after_shard = after_shard

    # What holds

    def latest(self) -> str | None:
        root = self.place / "out"
        if not [i for i in root.store.list() if i.key == "latest.json"]:
            return None
        path: str = root.read_json("latest.json")["path"]
        return path

    def stored(self, path: str) -> dict[str, dict[str, list[Row]]]:
        """The rows of a generation by input file and its version, where every row is of that
        version."""
        found: dict[str, dict[str, list[tuple[int, pa.Table]]]] = {}
        for shard in (self.place / "out" / path).shards().values():
            commit = shard.commit
            pieces = found.setdefault(commit.input, {}).setdefault(commit.input_etag, [])
            pieces.append((commit.first_row, shard.table))
        whole: dict[str, dict[str, list[Row]]] = {}
        for key, versions in found.items():
            for etag, pieces in versions.items():
                rows: list[Row] = []
                for first_row, table in sorted(pieces, key=lambda piece: piece[0]):
                    kept = table.select(["chosen", "rejected", "source"]).to_pylist()
                    assert kept == self.versions[key, etag][first_row : first_row + len(kept)]
                    rows += kept
                whole.setdefault(key, {})[etag] = rows
        return whole

    def check_readers(self) -> None:
        """Each try of a shard is committed once. When readers are pointed elsewhere, every file is
        there whole that was there before, and still is an input: as it was, or as the night found
        it."""
        assert max(self.commits.values(), default=0) <= 1
        now = self.latest()
        if now is None or now == self.readers:
            return
        there, here = self.stored(now), self.stored(self.readers) if self.readers else {}
        for key in here.keys() & self.files_then.keys():
            assert len(there[key]) == 1, key
            ((etag, rows),) = there[key].items()
            assert rows == self.versions[key, etag]
            assert rows == self.files_then[key] or etag in here[key]
        self.readers = now

    def all_is_well_in_the_end(self) -> None:
        """One more night, with nothing in its way, that tries marked rows again: and readers have
        what scoring afresh gives."""
        self.after_shard = lambda: None
        self.weakness = None
        if not self.files:
            return
        ended = self.trigger(retries=True)
        assert ended.is_complete
        assert self.trigger(retries=True).record is None
        path = self.latest()
        assert path is not None
        found = self.stored(path)
        assert {key: rows for key, rows in found.items() if key in self.files} == {
            key: {self.etag(key): rows} for key, rows in self.files.items()
        }
        score(self.config("fresh"))
        shards = (self.place / "out" / path).shards()
        for key, shard in (self.place / "fresh").shards().items():
            assert shard.table.equals(shards[key].table), key

    def etag(self, key: str) -> str:
        return (self.place / "in").store.head(key).version.etag
