"""`retry_marked`: rows that were marked for what may pass are scored again, in place."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from batch_scorer.backends import fake
from batch_scorer.config import Config, load_config
from batch_scorer.errors import ConfigError, ExitCode, OutputError, RowReason
from batch_scorer.inputs.plan import make_plan
from batch_scorer.nightly.night import Ended, Night, run_night
from batch_scorer.outputs.lease import Lease
from batch_scorer.outputs.manifest import total
from batch_scorer.outputs.reuse import EARLIER
from batch_scorer.outputs.state import OutputState
from batch_scorer.outputs.verify import verify
from batch_scorer.records import Commit, Receipt, Status
from batch_scorer.runs.derive import derive, look_at_model
from batch_scorer.runs.marked import read_marked
from batch_scorer.runs.remaining import Work, remaining
from batch_scorer.runs.run import Summary, score
from batch_scorer.runs.status import read_status
from batch_scorer.selection.recipe import Selection
from batch_scorer.selection.select import select
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pair_rows, parquet, table_of
from tests.helpers.places import Place, digests
from tests.helpers.receipts import COMMIT
from tests.helpers.weak import WEAK_ABOVE, WeakBackend, making

SHARD_ROWS = 4
ROWS = {"a.parquet": 10, "b.parquet": 4}
NULL = 2
"""The row of `a` that no engine can score."""
ALL = tuple(reason for reason in RowReason if reason.may_pass)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(str(tmp_path))
    for number, (name, count) in enumerate(ROWS.items()):
        rows = pair_rows(count, 20 * number)
        if name == "a.parquet":
            rows[NULL]["chosen"] = None
        (place / "in").write({name: parquet(table_of(rows))})
    return place


def config_of(place: Place, model: Path, output: str = "out", **settings: Any) -> Config:
    return load_config(
        model=str(model), inputs=(place / "in").url, output=(place / output).url,
        backend="fake", use_ray=False, shard_rows=SHARD_ROWS, **settings,
    )  # fmt: skip


def rows_of(place: Place, output: str = "out") -> dict[str, list[dict[str, Any]]]:
    return {key: shard.table.to_pylist() for key, shard in (place / output).shards().items()}


def is_weak(row: dict[str, Any]) -> bool:
    """Whether one of the row's scores, as `fresh` rows have them, is above the bound."""
    return any((row[name] or 0) > WEAK_ABOVE for name in ("score_chosen", "score_rejected"))


def assert_finished(place: Place, summary: Summary, marked: dict[str, int]) -> None:
    """The records say what the data does."""
    out = place / "out"
    assert summary.is_complete
    assert summary.totals["marked"] == marked
    success = out.read_json("_SUCCESS")
    assert success["marked"] == marked
    assert success["rows"] == sum(ROWS.values()) == success["rows_scored"] + sum(marked.values())
    verdict = verify(out.url)
    assert (verdict.exit_code, verdict.rows_marked) == (ExitCode.DONE, sum(marked.values()))
    status = read_status(out.url)
    assert (status.state, status.marked) == ("complete", marked)
    assert total(OutputState(out.store).manifest)["marked"] == marked
    assert not list(out.store.list(EARLIER))


@pytest.mark.parametrize("reason", ALL)
def test_marked_rows_get_scores_and_all_others_keep_theirs(
    reason: RowReason, place: Place, tiny_model: Path
) -> None:
    score(config_of(place, tiny_model, "fresh"))
    fresh = rows_of(place, "fresh")
    weak = {key: [i for i, row in enumerate(rows) if is_weak(row)] for key, rows in fresh.items()}
    tried = {key for key, rows in weak.items() if rows}
    assert tried
    assert tried != fresh.keys()

    config = config_of(place, tiny_model)
    first = score(config, make=making(WeakBackend(reason)))
    count = sum(map(len, weak.values()))
    assert_finished(place, first, {"null_value": 1, reason.value: count})
    before = (place / "out").shards()

    # Another time these rows are no more asked for than others.
    idle = WeakBackend()
    assert score(config, make=making(idle)).run.shards == 0
    others = [each for each in ALL if each is not reason]
    assert score(config_of(place, tiny_model, retry_marked=others)).run.shards == 0
    assert digests((place / "out").shards()) == digests(before)

    # The engine's scores are others now, so that those of the first try can be told.
    engine = WeakBackend(add=0.25)
    retrying = config_of(place, tiny_model, retry_marked=(reason,))
    second = score(retrying, make=making(engine))
    assert second.run.shards == len(tried)
    assert_finished(place, second, {"null_value": 1})
    after = (place / "out").shards()
    for key, rows in rows_of(place).items():
        assert after[key].commit.retries == (key in tried)
        assert after[key].commit.identity == before[key].commit.identity
        assert key in tried or after[key].sha256 == before[key].sha256
        for number, (row, was, would_be) in enumerate(
            zip(rows, before[key].table.to_pylist(), fresh[key], strict=True)
        ):
            if number not in weak[key]:
                assert row == was == would_be
                continue
            assert (was["score_error"], row["score_error"]) == (reason, None)
            for name in ("score_chosen", "score_rejected"):
                # Of a pair, the side that could be scored has kept its score.
                assert row[name] - (0.25 if was[name] is None else 0.0) == would_be[name]
    assert len(engine.asked) == sum(
        row[name] is None and row["score_error"] == reason
        for shard in before.values()
        for row in shard.table.to_pylist()
        for name in ("score_chosen", "score_rejected")
    )

    # Nothing is left to try.
    assert score(retrying, make=making(idle)).run.shards == 0
    assert digests((place / "out").shards()) == digests(after)
    assert idle.asked == []


def test_rows_that_fail_again_are_marked_again_and_tried_by_the_next_run(
    place: Place, tiny_model: Path
) -> None:
    reason = RowReason.ENGINE_ERROR
    first = score(config_of(place, tiny_model), make=making(WeakBackend(reason)))
    config = config_of(place, tiny_model, retry_marked=(reason,))
    marked = rows_of(place)
    asked = set()
    for number in (1, 2):
        engine = WeakBackend(reason)
        again = score(config, make=making(engine))
        assert_finished(place, again, first.totals["marked"])
        assert rows_of(place) == marked
        tries = {shard.commit.retries for shard in (place / "out").shards().values()}
        assert tries == {0, number}
        asked |= set(engine.asked)
    # Not to find the rows that fail, either, is the engine asked for what it has scored before.
    assert 0 < len(asked) <= 2 * first.totals["marked"][reason]

    assert_finished(place, score(config), {"null_value": 1})
    score(config_of(place, tiny_model, "fresh"))
    assert rows_of(place) == rows_of(place, "fresh")


def test_where_the_scored_columns_were_not_kept_the_whole_shard_is_scored_again(
    place: Place, tiny_model: Path
) -> None:
    settings: dict[str, Any] = {"keep_columns": ("source",)}
    reason = RowReason.OUT_OF_MEMORY
    score(config_of(place, tiny_model, **settings), make=making(WeakBackend(reason)))
    tried = [s for s in (place / "out").shards().values() if reason in s.commit.marked]
    engine = WeakBackend()
    config = config_of(place, tiny_model, retry_marked=(reason,), **settings)
    assert_finished(place, score(config, make=making(engine)), {"null_value": 1})
    with_null = any("null_value" in shard.commit.marked for shard in tried)
    assert len(engine.asked) == 2 * sum(s.commit.num_rows for s in tried) - with_null
    score(config_of(place, tiny_model, "fresh", **settings))
    assert rows_of(place) == rows_of(place, "fresh")


def test_a_rewritten_file_is_no_retry(place: Place, tiny_model: Path) -> None:
    """Its shards have another identity, whose marked rows nobody has tried again."""
    reason = RowReason.ENGINE_ERROR
    config = config_of(place, tiny_model, retry_marked=(reason,))
    score(config, make=making(WeakBackend(reason)))
    score(config, make=making(WeakBackend(reason)))
    assert any(shard.commit.retries for shard in (place / "out").shards().values())
    (place / "in").write({"a.parquet": parquet(table_of(pair_rows(10, 1)))})
    score(config, make=making(WeakBackend(reason)))
    by_input = [(s.commit.input, s.commit.retries) for s in (place / "out").shards().values()]
    assert {retries for key, retries in by_input if key == "a.parquet"} == {0}


def test_a_shard_whose_retry_fails_stays_as_it_was(
    place: Place, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = RowReason.ENGINE_ERROR
    score(config_of(place, tiny_model), make=making(WeakBackend(reason)))
    before = digests((place / "out").shards())

    class Broken(WeakBackend):
        def score(self, rows: Any) -> Any:
            raise ValueError("broken")

    monkeypatch.setattr("batch_scorer.pipeline.isolation.MOST_POISON", 0)
    config = config_of(place, tiny_model, retry_marked=(reason,))
    failed = score(config, make=making(Broken()))
    assert not failed.is_complete
    assert digests((place / "out").shards()) == before
    # With or without the flag, the next run comes to its end.
    assert score(config_of(place, tiny_model)).is_complete
    assert digests((place / "out").shards()) == before
    assert_finished(place, score(config), {"null_value": 1})


# Who reads the shards that were replaced


def test_whoever_reads_scores_sees_the_rows_of_the_retry(place: Place, tiny_model: Path) -> None:
    reason = RowReason.OUT_OF_MEMORY
    first = score(config_of(place, tiny_model), make=making(WeakBackend(reason)))
    out, count = (place / "out").url, first.totals["marked"][reason]
    reasons = read_marked(out).rows["reason"].to_pylist()
    assert sorted(reasons) == sorted(["null_value", *[reason] * count])
    before = select([out], (place / "before").url, Selection())
    assert before.totals.rows_kept == 14 - 1 - count

    score(config_of(place, tiny_model, retry_marked=(reason,)))
    assert read_marked(out).rows["reason"].to_pylist() == ["null_value"]
    assert select([out], (place / "after").url, Selection()).totals.rows_kept == 13
    # A selection stays what it was made of, and is not continued with other scores.
    with pytest.raises(OutputError, match="before"):
        select([out], (place / "before").url, Selection())
    for name in ("before", "after"):
        ended = run_cli("verify", (place / name).url)
        assert ended.exit_code == ExitCode.DONE, ended.out


# Every night


def test_a_night_tries_marked_rows_again(
    place: Place, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(place, tiny_model, "nights")
    reason = RowReason.ENGINE_ERROR

    def night(weakness: RowReason | None, **settings: Any) -> Ended:
        monkeypatch.setattr(fake, "BACKEND", lambda engine: WeakBackend(weakness))
        return run_night(config.model_copy(update=settings), Night())

    first = night(reason).summary
    assert first is not None and first.totals["marked"][reason] > 0
    assert night(None).record is None
    retried = night(None, retry_marked=(reason,))
    assert retried.summary is not None and retried.record is not None
    assert retried.summary.totals["marked"] == {"null_value": 1}
    (rows,) = (series.rows for series in retried.record.series)
    assert (rows.total, rows.failed, rows.left) == (14, 0, 0)
    assert (rows.kept + rows.reused + rows.new, rows.gone) == (14, 0)
    assert rows.new >= first.totals["marked"][reason]
    latest = place / "nights" / (place / "nights").read_json("latest.json")["path"]
    afresh = config_of(place, tiny_model, "afresh")
    run_night(afresh, Night())
    fresh = place / "afresh" / (place / "afresh").read_json("latest.json")["path"]
    assert {k: s.table.to_pylist() for k, s in latest.shards().items()} == {
        k: s.table.to_pylist() for k, s in fresh.shards().items()
    }
    assert night(None, retry_marked=(reason,)).record is None


# What is left to do


def work_of(place: Place, config: Config, most: int | None) -> Work:
    job = derive(config, look_at_model(config))
    return remaining(make_plan(config), job, (place / "out").store, max_shards=most)


def keys_of(receipts: list[Receipt]) -> set[str]:
    return {receipt.output_key for receipt in receipts}


def test_retries_come_last_and_what_there_is_no_room_for_stays_committed(
    place: Place, tiny_model: Path
) -> None:
    score(config_of(place, tiny_model), make=making(WeakBackend(RowReason.ENGINE_ERROR)))
    config = config_of(place, tiny_model, retry_marked=(RowReason.ENGINE_ERROR,))
    (place / "in").write({"c.parquet": parquet(table_of(pair_rows(2, 70)))})
    everything = work_of(place, config, None)
    tried = [shard for shard in everything.todo if shard.retries]
    assert len(tried) > 1
    assert [shard.output_key for shard in everything.todo[: -len(tried)]] == ["c.parquet"]
    assert keys_of(everything.replaced) == {shard.output_key for shard in tried}
    for most in range(len(tried) + 2):
        work = work_of(place, config, most)
        assert [*work.todo] == [*everything.todo[:most]]
        assert keys_of(work.left) == ({"c.parquet"} if most == 0 else set())
        there = {shard.output_key for shard in everything.todo[max(1, most) :]}
        assert keys_of(work.done) == keys_of(everything.done) | there
        assert {receipt.status for receipt in work.done} <= {Status.COMMITTED}

    # One shard a run: none is tried a second time before each was tried once.
    (place / "in").store.delete("c.parquet")
    for _ in range(2):
        turns = []
        for _ in tried:
            (shard,) = work_of(place, config, 1).todo
            turns.append(shard.output_key)
            stored = (place / "out").shards()[shard.output_key]
            retried = replace(stored.commit, retries=shard.retries)
            table = stored.table.replace_schema_metadata(retried.footer())
            (place / "out").write({shard.output_key: parquet(table)})
        assert sorted(turns) == sorted(shard.output_key for shard in tried)


def test_other_reasons_to_try_again_are_another_plan(place: Place, tiny_model: Path) -> None:
    """So that a run without them, which counts on the shards that it finds, supersedes one that was
    about to replace them."""
    epochs = []
    reasons: list[tuple[str, ...]] = [
        (), (), ("engine_error",), ("engine_error",), ("worker_crash", "engine_error"),
        ("engine_error", "worker_crash", "engine_error"), (),
    ]  # fmt: skip
    for each in reasons:
        score(config_of(place, tiny_model, retry_marked=each))
        epochs.append((place / "out").read_json("_SUCCESS")["epoch"])
    assert epochs == [1, 1, 2, 2, 3, 3, 4]
    with Lease((place / "out").store, "another plan", 60) as lease:
        assert lease.epoch == 5


def test_a_footer_without_a_count_of_retries_is_of_a_first_try() -> None:
    fields = asdict(COMMIT)
    del fields["retries"]
    assert Commit.from_footer({b"batch_scorer": json.dumps(fields).encode()}) == COMMIT
    assert COMMIT.retries == 0
    tried = replace(COMMIT, retries=3)
    assert Commit.from_footer(tried.footer()) == tried


# The setting


def test_the_setting_is_a_comma_list_and_a_list_in_yaml(place: Place, tiny_model: Path) -> None:
    score(config_of(place, tiny_model), make=making(WeakBackend(RowReason.OUT_OF_MEMORY)))
    flags = (
        "score", (place / "in").url, "--model", tiny_model, "--output", (place / "out").url,
        "--backend", "fake", "--no-ray", "--shard-rows", SHARD_ROWS, "--retry-marked",
    )  # fmt: skip
    for wrong in ("out_of_memory,too_long", "memory"):
        refused = run_cli(*flags, wrong)
        assert refused.exit_code == ExitCode.CONFIG
        assert refused.err.count("\n") == 1
        assert ", ".join(ALL) in refused.err
    ended = run_cli(*flags, "engine_error,out_of_memory")
    assert ended.exit_code == ExitCode.DONE
    assert "are tried again" in ended.out
    assert (place / "out").read_json("_SUCCESS")["marked"] == {"null_value": 1}

    file = Path(place.url) / "job.yaml"
    file.write_text("model: m\ninputs: i\noutput: o\nretry_marked: [worker_crash, engine_error]\n")
    assert load_config(file).retry_marked == (RowReason.WORKER_CRASH, RowReason.ENGINE_ERROR)
    file.write_text("model: m\ninputs: i\noutput: o\nretry_marked: [null_value]\n")
    with pytest.raises(ConfigError, match=r"\Aretry_marked: only what may pass .*'null_value'"):
        load_config(file)
