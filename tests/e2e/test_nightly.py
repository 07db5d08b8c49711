"""Nightly runs: what is new is scored, what is not is left alone, and `latest.json` names whole
generations."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from batch_scorer import Config
from batch_scorer.backends.fake import FakeBackend
from batch_scorer.nightly.night import Night, run_night
from batch_scorer.outputs.lease import Lease
from batch_scorer.pipeline import session
from batch_scorer.records import Receipt, Scores, TokenizedRows
from batch_scorer.runs.remaining import Work
from cluster.local.seaweed import S3Server
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import jsonl, pair_rows, pairs, parquet, table_of
from tests.helpers.places import Place, Stored
from tests.helpers.program import Ended, Models, Program, model_flags
from tests.helpers.tiny import tiny_reward_model

pytestmark = pytest.mark.e2e

SEQUENCES_PER_PAIR = 2


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sequences begin with BOS: even the fake backend gives them other scores."""
    return tiny_reward_model(tmp_path_factory.mktemp("other") / "model", bos=True)


@contextmanager
def asked_sequences() -> Iterator[list[int]]:
    """How many sequences the backend was asked for, call by call."""
    counts: list[int] = []
    score = FakeBackend.score

    def counting(self: FakeBackend, rows: TokenizedRows) -> Scores:
        counts.append(int((rows.lengths > 0).sum()))
        return score(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeBackend, "score", counting)
        yield counts


@pytest.fixture
def asked() -> Iterator[list[int]]:
    with asked_sequences() as counts:
        yield counts


@dataclass
class Nights:
    """A root of generations and its inputs; every call is one trigger, in this process."""

    place: Place
    model: Models
    flags: tuple[object, ...] = ("--no-ray", "--backend", "fake")
    asked: list[int] = field(default_factory=list)

    def write(self, **files: bytes) -> None:
        (self.place / "in").write({f"{name}.parquet": data for name, data in files.items()})

    def trigger(self, *flags: object, model: Models | None = None) -> Ended:
        return run_cli(
            "nightly", (self.place / "in").url, *model_flags(model or self.model), "--output",
            (self.place / "out").url, *self.place.flags, *self.flags, *flags,
        )  # fmt: skip

    def night(self, *flags: object, model: Models | None = None) -> dict[str, Any]:
        """What a run that ends well prints, and `asked`, the number of scored sequences."""
        before = sum(self.asked)
        ended = self.trigger(*flags, "--json", model=model)
        assert ended.exit_code == 0, ended.err
        return ended.json | {"asked": sum(self.asked) - before}

    @property
    def latest(self) -> Place:
        """The generation that `latest.json` names."""
        path: str = (self.place / "out").read_json("latest.json")["path"]
        return self.place / "out" / path

    def problems(self) -> list[str]:
        """What a verification of every generation finds wrong."""
        found: list[str] = []
        root = self.place / "out"
        for generation in root.read_json("_batch_scorer/generations.json")["generations"]:
            place = root / generation["path"]
            if not place.shard_keys():
                continue  # not begun, or removed
            verdict = run_cli("verify", place.url, *place.flags, "--json").json
            found += verdict["problems"]
        return found

    def verify(self) -> None:
        assert self.problems() == []


@pytest.fixture
def nights(tmp_path: Path, tiny_model: Path, asked: list[int]) -> Nights:
    return Nights(Place(str(tmp_path)), tiny_model, asked=asked)


def rows_of(night: dict[str, Any]) -> dict[str, int]:
    (line,) = night["night"]["lines"]
    found: dict[str, int] = line["rows"]
    return found


def scores_of(place: Place) -> dict[str, list[Any]]:
    return {key: s.table["score_chosen"].to_pylist() for key, s in place.shards().items()}


@dataclass(frozen=True)
class After:
    """A nightly run that ended well: what it printed, and what there was to read then."""

    printed: dict[str, Any]
    latest: Place
    shards: dict[str, Stored]
    success: dict[str, Any]
    problems: list[str]

    @property
    def scores(self) -> dict[str, list[Any]]:
        return {
            key: stored.table["score_chosen"].to_pylist() for key, stored in self.shards.items()
        }


@dataclass(frozen=True)
class History:
    """Four nightly runs: `first` scores three files; `second` finds one rewritten and one new;
    `third` has another model, and leaves shards; `fourth` does the rest."""

    nights: Nights
    rewritten: list[dict[str, Any]]
    first: After
    second: After
    third: After
    fourth: After


@pytest.fixture(scope="module")
def history(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, other_model: Path
) -> History:
    with asked_sequences() as asked:
        place = Place(str(tmp_path_factory.mktemp("nights")))
        nights = Nights(place, tiny_model, asked=asked)

        def after(printed: dict[str, Any]) -> After:
            latest = nights.latest
            success = latest.read_json("_SUCCESS")
            return After(printed, latest, latest.shards(), success, nights.problems())

        nights.write(a=parquet(pairs(20)), b=parquet(pairs(30, 100)), c=parquet(pairs(10, 200)))
        first = after(nights.night())
        # A tenth of its rows is new, three are gone, the others have moved.
        kept = pair_rows(27, 100)
        rewritten = [*pair_rows(2, 300), *kept[9:], *pair_rows(1, 302), *kept[:9]]
        nights.write(b=parquet(table_of(rewritten)), d=parquet(pairs(5, 400)))
        second = after(nights.night())
        third = after(nights.night("--max-shards", 2, model=other_model))
        fourth = after(nights.night(model=other_model))
    return History(nights, rewritten, first, second, third, fourth)


def test_the_first_run_scores_every_row(history: History) -> None:
    first = history.first.printed
    assert first["asked"] == 60 * SEQUENCES_PER_PAIR
    assert rows_of(first) == {
        "total": 60, "new": 60, "reused": 0, "kept": 0, "gone": 0,
        "marked": 0, "failed": 0, "left": 0, "not_asked": 0,
    }  # fmt: skip
    assert first["night"]["has_moved"]


def test_the_next_run_scores_new_rows_only(history: History) -> None:
    second = history.second.printed
    assert second["asked"] == (3 + 5) * SEQUENCES_PER_PAIR
    rows = rows_of(second)
    assert {name: rows[name] for name in ("total", "new", "reused", "kept", "gone")} == {
        "total": 65, "new": 8, "reused": 27, "kept": 30, "gone": 3,
    }  # fmt: skip
    metrics = second["models"][0]["metrics"]
    assert (metrics["reused_rows"], metrics["reused_sequences"]) == (27, 54)


def test_a_rewritten_file_is_replaced_and_the_others_are_untouched(history: History) -> None:
    before, after = history.first.shards, history.second.shards
    assert (after["a.parquet"], after["c.parquet"]) == (before["a.parquet"], before["c.parquet"])
    columns = ["chosen", "rejected", "source"]
    assert after["b.parquet"].table.select(columns).to_pylist() == history.rewritten


def test_a_reused_row_has_the_score_that_it_gets_without_reuse(
    history: History, tmp_path: Path
) -> None:
    nights, fresh = history.nights, Place(str(tmp_path))
    ended = run_cli(
        "score", (nights.place / "in").url, "--model", nights.model, "--output", fresh.url,
        *nights.flags,
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    assert scores_of(fresh) == history.second.scores


def test_a_drift_report_counts_what_is_new_by_source(history: History) -> None:
    line = history.second.printed["drift"]["lines"][0]
    assert (line["since"], line["ranks"]) == (1, None)
    assert sum(source["new"] for source in line["sources"].values()) == 8
    assert sum(source["reused"] for source in line["sources"].values()) == 27


def test_a_drift_report_compares_the_ranks_of_two_models(history: History) -> None:
    found = history.fourth.printed["drift"]["lines"][0]
    assert found["before"] == found["ranks_of"]
    assert found["before"] == history.second.printed["night"]["lines"][0]["path"]
    assert (found["ranks"]["rows"], found["ranks"]["pairs"]) == (65, 65)
    assert -0.5 < found["ranks"]["spearman"] < 0.5  # two hashes have nothing in common
    assert len(found["ranks"]["movers"]) == 20


def test_drift_shows_the_newest_report(history: History) -> None:
    root = (history.nights.place / "out").url
    assert json.loads(run_cli("drift", root, "--json").out) == history.fourth.printed["drift"]
    assert "nightly run 4 against run 2" in run_cli("drift", root).out


def test_latest_stays_while_a_new_generation_is_incomplete(history: History) -> None:
    second, third = history.second, history.third
    assert rows_of(third.printed)["left"] > 0
    assert not third.printed["night"]["has_moved"]
    assert third.printed["night"]["lacking"]
    assert (third.latest, third.scores) == (second.latest, second.scores)
    assert third.success["rows"] == 65


def test_the_next_run_resumes_a_generation_and_moves_latest(history: History) -> None:
    third, fourth = history.third, history.fourth
    asked = third.printed["asked"] + fourth.printed["asked"]
    assert asked == 65 * SEQUENCES_PER_PAIR
    assert fourth.printed["night"]["has_moved"]
    assert fourth.scores.keys() == third.scores.keys()
    assert fourth.scores != third.scores


def test_every_generation_is_right_after_every_run(history: History) -> None:
    runs = (history.first, history.second, history.third, history.fourth)
    assert [run.problems for run in runs] == [[], [], [], []]


def test_a_second_trigger_does_nothing_and_starts_nothing(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights.write(a=parquet(pairs(5)))
    nights.night()
    stored = {info.key: info.version for info in (nights.place / "out").store.list()}
    monkeypatch.setattr(session, "ray_session", lambda config: pytest.fail("Ray was started"))
    nights.flags = ("--backend", "fake")  # with Ray, if it were needed
    for _ in range(2):
        again = nights.night()
        assert (again["asked"], again["night"], again["drift"]) == (0, None, None)
    after = {info.key: info.version for info in (nights.place / "out").store.list()}
    left_alone = ("nights/", "latest.json")
    assert {key: etag for key, etag in after.items() if key.startswith(left_alone)} == {
        key: etag for key, etag in stored.items() if key.startswith(left_alone)
    }
    assert "nothing to do" in nights.trigger().out


class Interrupt:
    """A listener in whose presence something happens after so many shards."""

    def __init__(self, shards: int, what: Any) -> None:
        self._left, self._what = shards, what

    def __enter__(self) -> "Interrupt":
        return self

    def __exit__(self, *_: object) -> None: ...

    def planned(self, work: Work) -> None: ...

    def finished(self, receipt: Receipt) -> None:
        self._left -= 1
        if self._left == 0:
            self._what()


def config_of(nights: Nights, **settings: Any) -> Config:
    return Config(
        model=str(nights.model),
        inputs=((nights.place / "in").url,),
        output=(nights.place / "out").url,
        store_options=dict(nights.place.options),
        backend="fake",
        use_ray=False,
        **settings,
    )


def test_a_trigger_during_a_run_shows_who_holds_the_output_and_ends_well(nights: Nights) -> None:
    nights.write(a=parquet(pairs(5)), b=parquet(pairs(5, 10)))
    seen: list[Ended] = []
    meanwhile = Interrupt(1, lambda: seen.append(nights.trigger()))
    ended = run_night(config_of(nights), Night(), lambda path: meanwhile)
    assert ended.is_complete and ended.record is not None
    assert [(trigger.exit_code, trigger.err) for trigger in seen] == [(0, "")]
    assert "Nothing done: another nightly run holds this output" in seen[0].out
    assert "process" in seen[0].out
    assert sum(nights.asked) == 10 * SEQUENCES_PER_PAIR


def test_a_run_elsewhere_that_does_not_renew_its_lease_is_dead(nights: Nights) -> None:
    nights.write(a=parquet(pairs(5)))
    root = (nights.place / "out").store
    with Lease(root, "nights", 1.0):
        pass
    body = root.read_json("_batch_scorer/lease.json")
    body |= {"released": False, "ttl_s": 1.0}
    body["holder"] = {"host": "elsewhere", "pid": 1, "id": "another"}
    version = root.head("_batch_scorer/lease.json").version
    root.replace("_batch_scorer/lease.json", json.dumps(body).encode(), version)
    ended = run_night(config_of(nights, lease_s=1.0), Night())
    assert ended.held_by is None
    assert ended.record is not None


def test_what_an_interrupted_run_did_is_counted_by_the_next(nights: Nights) -> None:
    nights.write(a=parquet(pairs(5)), b=parquet(pairs(6, 10)), c=parquet(pairs(7, 20)))

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_night(config_of(nights), Night(), lambda path: Interrupt(2, stop))
    assert not [info for info in (nights.place / "out").store.list("nights")]
    again = nights.night()
    assert sum(nights.asked) == 18 * SEQUENCES_PER_PAIR
    assert rows_of(again)["new"] == 18
    assert again["night"]["night"] == 1
    nights.verify()


def test_days_outside_the_window_are_not_looked_at_and_not_lost(nights: Nights) -> None:
    for day, start in (("2026-11-20", 0), ("2026-11-21", 10), ("2026-11-22", 20)):
        (nights.place / "in").write({f"dt={day}/x.parquet": parquet(pairs(4, start))})
    first = nights.night("--since", "2026-11-21", "--until", "2026-11-21")
    assert sorted(nights.latest.shards()) == ["dt=2026-11-21/x.parquet"]
    assert (rows_of(first)["total"], first["night"]["files_aside"]) == (4, 2)
    second = nights.night("--since", "2026-11-22")
    assert second["asked"] == 4 * SEQUENCES_PER_PAIR
    assert (rows_of(second)["total"], rows_of(second)["gone"]) == (8, 0)
    assert nights.latest.read_json("_SUCCESS")["rows"] == 8
    third = nights.night()
    assert third["asked"] == 4 * SEQUENCES_PER_PAIR
    assert rows_of(third)["total"] == 12
    nothing = nights.night("--until", "2026-11-01")
    assert nothing["night"] is None
    nights.verify()

    for flags, message in (
        (("--since", "2026-11-22", "--until", "2026-11-21"), "since 2026-11-22 is after until"),
        (("--since", "yesterday"), "expected a date like 2026-11-21, got 'yesterday'"),
        (("--max-shards", 0), "max_shards: at least one"),
    ):
        refused = nights.trigger(*flags)
        assert (refused.exit_code, message in refused.error) == (2, True), refused.err


def test_a_window_does_not_move_latest_to_fewer_files(nights: Nights, other_model: Path) -> None:
    for day, start in (("2026-11-20", 0), ("2026-11-21", 10)):
        (nights.place / "in").write({f"dt={day}/x.parquet": parquet(pairs(4, start))})
    nights.night()
    before = nights.latest
    part = nights.night("--since", "2026-11-21", model=other_model)
    assert nights.latest == before
    assert "dt=2026-11-20/x.parquet: not scored" in part["night"]["lacking"][0]
    nights.night(model=other_model)
    assert nights.latest != before
    assert len(nights.latest.shards()) == 2


def test_a_window_does_not_move_latest_to_older_files(nights: Nights, other_model: Path) -> None:
    """The other generation holds every file, but one of them as it was a version ago."""
    days = ("2026-11-20", "2026-11-21")
    for day, start in zip(days, (0, 10), strict=True):
        (nights.place / "in").write({f"dt={day}/x.parquet": parquet(pairs(4, start))})
    nights.night()
    nights.night("--until", days[0], model=other_model)
    (nights.place / "in").write({f"dt={days[0]}/x.parquet": parquet(pairs(4, 50))})
    nights.night()
    before = nights.latest
    part = nights.night("--since", days[1], model=other_model)
    assert nights.latest == before
    assert f"dt={days[0]}/x.parquet: not scored" in part["night"]["lacking"][0]
    nights.night(model=other_model)
    assert nights.latest != before


def test_max_shards_are_scored_and_then_the_rest(nights: Nights) -> None:
    nights.flags = (*nights.flags, "--shard-rows", 5)
    nights.write(a=parquet(pairs(12), 5), b=parquet(pairs(3, 50)))
    first = nights.night("--max-shards", 2)
    assert (rows_of(first)["new"], rows_of(first)["left"], rows_of(first)["total"]) == (10, 5, 15)
    generation = nights.place / "out" / first["night"]["lines"][0]["path"]
    assert not first["night"]["has_moved"]
    assert "2 shards are left" in first["night"]["lacking"][0]
    verdict = run_cli("verify", generation.url)
    assert verdict.exit_code == 3
    assert "b.parquet: left for a later run" in verdict.out
    assert "2 left for another run" in run_cli("status", generation.url).out

    second = nights.night("--max-shards", 2)
    assert (rows_of(second)["new"], rows_of(second)["left"]) == (5, 0)
    assert second["night"]["has_moved"]
    assert run_cli("verify", nights.latest.url).exit_code == 0
    assert sum(nights.asked) == 15 * SEQUENCES_PER_PAIR


def test_a_file_that_is_left_keeps_its_scored_shards(nights: Nights) -> None:
    nights.flags = (*nights.flags, "--shard-rows", 5)
    nights.write(a=parquet(pairs(10), 5), b=parquet(pairs(10, 50), 5))
    nights.night()
    whole = set(nights.latest.shard_keys())
    # Both are cut differently now; this run scores only the first.
    nights.write(a=parquet(pairs(9), 3), b=parquet(pairs(9, 50), 3))
    first = nights.night("--max-shards", 3)
    assert (rows_of(first)["new"], rows_of(first)["reused"], rows_of(first)["left"]) == (0, 9, 9)
    keys = set(nights.latest.shard_keys())
    assert {key for key in keys if key.startswith("b.")} == {k for k in whole if k.startswith("b.")}
    assert not {key for key in keys if key.startswith("a.")} & whole
    second = nights.night()
    assert (second["asked"], rows_of(second)["reused"], rows_of(second)["left"]) == (0, 9, 0)
    assert sum(s.table.num_rows for s in nights.latest.shards().values()) == 18
    assert not list(nights.latest.store.list("_batch_scorer/earlier"))
    nights.verify()


def test_copies_of_a_killed_run_serve_the_next(nights: Nights) -> None:
    config = config_of(nights, shard_rows=5)
    nights.write(a=parquet(pairs(10), 5))
    run_night(config, Night())
    # One row is new, and all are cut differently: the old pieces are gone at the first commit.
    nights.write(a=parquet(table_of([*pair_rows(4), *pair_rows(1, 90), *pair_rows(6, 4)]), 3))

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_night(config, Night(), lambda path: Interrupt(1, stop))
    copies = [info.key for info in nights.latest.store.list("_batch_scorer/earlier")]
    assert len(copies) == 2
    ended = run_night(config, Night())
    assert sum(nights.asked) == (10 + 1) * SEQUENCES_PER_PAIR
    assert ended.record is not None
    rows = ended.record.series[0].rows
    assert (rows.new, rows.reused, rows.gone) == (1, 10, 0)
    assert not list(nights.latest.store.list("_batch_scorer/earlier"))
    nights.verify()


def test_a_rescore_computes_everything_again(nights: Nights) -> None:
    nights.write(a=parquet(pairs(5)), b=parquet(pairs(5, 10)))
    nights.night()
    before = nights.latest
    began = nights.night("--rescore", "--max-shards", 1)
    assert began["asked"] == 5 * SEQUENCES_PER_PAIR
    assert nights.latest == before
    # A run without the flag resumes it.
    rest = nights.night()
    assert rest["asked"] == 5 * SEQUENCES_PER_PAIR
    assert nights.latest != before
    ranks = rest["drift"]["lines"][0]["ranks"]
    assert (ranks["spearman"], ranks["won"], ranks["lost"]) == (pytest.approx(1), 0, 0)
    assert nights.night("--rescore")["asked"] == 10 * SEQUENCES_PER_PAIR
    assert (
        len((nights.place / "out").read_json("_batch_scorer/generations.json")["generations"]) == 3
    )
    nights.verify()


def test_a_dry_run_shows_the_work_and_writes_nothing(nights: Nights, other_model: Path) -> None:
    def all_files() -> dict[str, str]:
        return {i.key: i.version.etag for i in nights.place.store.list()}

    nights.flags = (*nights.flags, "--shard-rows", 5)
    nights.write(a=parquet(pairs(12), 5), b=parquet(pairs(3, 50)))

    def told(*flags: object, model: Path | None = None) -> dict[str, Any]:
        before = all_files()
        ended = nights.trigger("--dry-run", "--json", *flags, model=model)
        assert ended.exit_code == 0, ended.err
        assert all_files() == before
        found: dict[str, Any] = json.loads(ended.out)[0]
        return found

    first = told()
    assert (first["path"], first["rows_to_do"], first["shards_to_do"]) == (None, 15, 4)
    assert not Path(nights.place.url, "out").exists()
    nights.night("--max-shards", 3)
    second = told("--max-shards", 1)
    assert (second["rows_committed"], second["rows_to_do"], second["rows_left"]) == (12, 3, 0)
    assert second["path"].startswith("generations/main/")
    assert told(model=other_model)["path"] is None
    nights.night()
    assert (told()["rows_to_do"], told()["rows_committed"]) == (0, 15)
    assert told("--rescore")["rows_to_do"] == 15
    assert "a new generation" in nights.trigger("--dry-run", "--rescore").out


def test_two_models_in_one_generation(
    nights: Nights, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    both = {"help": tiny_model, "safety": other_model}
    nights.write(a=parquet(pairs(10)), b=parquet(pairs(5, 50)))
    (nights.place / "in").write({"j.jsonl": jsonl(pair_rows(3, 200))})
    first = nights.night(model=both)
    assert first["asked"] == 2 * 18 * SEQUENCES_PER_PAIR
    shards = nights.latest.shards()
    assert sorted(shards) == ["a.parquet", "b.parquet", "j.jsonl.parquet"]
    table = shards["a.parquet"].table
    assert table.num_rows == 10
    for name in ("help_score_chosen", "safety_margin", "mean_score_rejected", "rank_disagreement"):
        assert table[name].null_count == 0
    assert table["help_score_chosen"].to_pylist() != table["safety_score_chosen"].to_pylist()

    # A rewritten file: each model scores the new row only.
    nights.write(a=parquet(table_of([*pair_rows(1, 90), *pair_rows(10)])))
    second = nights.night(model=both)
    assert second["asked"] == 2 * SEQUENCES_PER_PAIR
    assert rows_of(second)["reused"] == 10

    (nights.place / "in").store.delete("b.parquet")
    third = nights.night(model=both)
    assert third["asked"] == 0
    assert (rows_of(third)["total"], rows_of(third)["gone"]) == (14, 5)

    # Another model of the two: a new generation, in which the other one's scores are reused. Until
    # all is there, `latest.json` stays as it is.
    changed = tiny_reward_model(tmp_path / "changed", bos=True, max_tokens=2048)
    new = both | {"help": changed}
    before = nights.latest
    nights.write(c=parquet(pairs(4, 70)))
    part = nights.night("--max-shards", 1, model=new)
    assert nights.latest == before and not part["night"]["has_moved"]
    fourth = nights.night(model=new)
    assert part["asked"] + fourth["asked"] == (14 + 2 * 4) * SEQUENCES_PER_PAIR
    then, now = before.shards(), nights.latest.shards()
    for key in ("a.parquet", "j.jsonl.parquet"):
        for name, is_same in (("safety", True), ("help", False)):
            columns = [each[key].table[f"{name}_score_chosen"] for each in (then, now)]
            assert columns[0].equals(columns[1]) == is_same
    (drift,) = fourth["drift"]["lines"]
    assert drift["ranks"]["spearman"] < 1
    ranks = {name: own["ranks"]["spearman"] for name, own in drift["models"].items()}
    assert ranks["safety"] == pytest.approx(1) and ranks["help"] < 0.9
    figures = fourth["night"]["lines"][0]["models"]["safety"]
    scores = [s for each in now.values() for s in each.table["safety_score_chosen"].to_pylist()]
    scores += [s for each in now.values() for s in each.table["safety_score_rejected"].to_pylist()]
    count = sum(each["scores"] for each in figures.values())
    mean = sum(each["mean"] * each["scores"] for each in figures.values()) / count
    assert (count, mean) == (len(scores), pytest.approx(sum(scores) / len(scores), rel=1e-4))
    shown = run_cli("drift", (nights.place / "out").url).out
    assert "Scores of help" in shown and "Scores of safety" in shown
    assert nights.night(model=new)["night"] is None
    nights.verify()


def test_a_generation_that_somebody_removed_is_no_hindrance(
    nights: Nights, other_model: Path
) -> None:
    nights.write(a=parquet(pairs(3)))
    nights.night()
    first = Path(nights.latest.url)
    nights.night(model=other_model)
    shutil.rmtree(first)
    assert nights.night(model=other_model)["night"] is None
    shutil.rmtree(nights.latest.url)
    again = nights.night()  # in the first folder, which has to be made again
    assert (again["asked"], nights.latest.url) == (3 * SEQUENCES_PER_PAIR, str(first))
    nights.verify()


def test_other_cuts_reuse_all_scores(nights: Nights) -> None:
    nights.write(a=parquet(pairs(12), 4))
    nights.night()
    before = nights.latest
    again = nights.night("--shard-rows", 5)
    assert (again["asked"], rows_of(again)["reused"]) == (0, 12)
    assert nights.latest != before
    assert len(nights.latest.shard_keys()) == 3
    nights.verify()


def test_outputs_of_score_and_of_nightly_are_kept_apart(nights: Nights) -> None:
    nights.write(a=parquet(pairs(3)))
    place, flags = nights.place, nights.flags
    arguments = ("score", (place / "in").url, "--model", nights.model, *flags, "--output")
    nights.night()
    refused = run_cli(*arguments, (place / "out").url)
    assert (refused.exit_code, "belongs to `nightly`" in refused.error) == (2, True)
    verdict = run_cli("verify", (place / "out").url)
    assert (verdict.exit_code, "generations/main/" in verdict.error) == (2, True)

    assert run_cli(*arguments, (place / "plain").url).exit_code == 0
    refused = run_cli(
        "nightly", (place / "in").url, "--model", nights.model, *flags,
        "--output", (place / "plain").url,
    )  # fmt: skip
    assert (refused.exit_code, "an output of `score`" in refused.error) == (2, True)
    assert run_cli("drift", (place / "plain").url).exit_code == 2
    assert run_cli("drift", (place / "nowhere").url).exit_code == 2


def test_a_bad_file_fails_alone_and_is_tried_again(nights: Nights) -> None:
    nights.write(a=parquet(pairs(3)), b=b"not Parquet")
    first = nights.trigger("--json")
    assert first.exit_code == 3
    assert rows_of(first.json)["new"] == 3
    assert first.json["night"]["has_moved"]  # latest.json named nothing yet
    again = nights.trigger("--json")
    assert (again.exit_code, again.json["night"]) == (3, None)
    nights.write(b=parquet(pairs(2, 10)))
    mended = nights.night()
    assert (mended["asked"], rows_of(mended)["total"]) == (2 * SEQUENCES_PER_PAIR, 5)


def test_nightly_runs_on_ray_and_s3(
    s3: S3Server, tiny_model: Path, other_model: Path, program: Program
) -> None:
    """Two models on one worker; what is known already travels to it."""
    place = Place(s3.url("nightly"), s3.options)
    both = {"help": tiny_model, "safety": other_model}
    nights = Nights(place, both, ("--no-ray", "--backend", "fake"))
    nights.write(a=parquet(pairs(10)), b=parquet(pairs(20, 50)))
    nights.night()
    nights.write(b=parquet(table_of([*pair_rows(2, 90), *pair_rows(18, 50)])))
    ended = program.run(
        "nightly", (place / "in").url, *model_flags(both), "--output", (place / "out").url,
        *place.flags, "--backend", "fake", "--json",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    rows = rows_of(ended.json)
    assert (rows["new"], rows["reused"], rows["kept"]) == (2, 18, 10)
    metrics = ended.json["models"][0]["metrics"]
    assert (metrics["reused_sequences"], metrics["workers"]) == (2 * 36, 1)
    program.wait_until_gone()
    assert nights.night()["night"] is None
    nights.verify()
