import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from batch_scorer.errors import IntegrityError, OutputError
from batch_scorer.fingerprint import Fingerprint
from batch_scorer.outputs.claim import claim_output, open_scored
from batch_scorer.outputs.ledger import Ledger
from batch_scorer.outputs.manifest import (
    conclude,
    current_manifest,
    publish,
    published,
    read_success,
    total,
)
from batch_scorer.outputs.state import OutputState
from batch_scorer.records import Commit, Format, Judged, Layout, Receipt, Shard, Status
from batch_scorer.records.reading import parsed
from batch_scorer.storage import Store, Version
from tests.helpers.receipts import COMMIT, DONE, FAILED, JUDGED, SHARD, stored


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"), {}, create=True)


def test_records_survive_being_written() -> None:
    assert parsed(DONE.to_line(), Receipt) == DONE
    assert parsed(FAILED.to_line(), Receipt) == FAILED
    assert Commit.from_footer(COMMIT.footer()) == COMMIT
    assert Commit.from_footer({b"pandas": b"{}"}) is None


@pytest.mark.parametrize(
    "other",
    [
        replace(SHARD, source=replace(SHARD.source, version=Version("e2"))),
        replace(SHARD, source=replace(SHARD.source, key="b.parquet")),
        replace(SHARD, num_rows=9),
        replace(SHARD, layout=Layout(Format.TEXT, {"text": "chosen"})),
    ],
)
def test_another_input_range_or_layout_is_another_identity(other: Shard) -> None:
    assert other.identity("f", "") != SHARD.identity("f", "")


def test_identity_takes_fingerprint_and_prefix_but_not_place_or_time() -> None:
    assert SHARD.identity("f", "") != SHARD.identity("g", "")
    assert SHARD.identity("f", "") != SHARD.identity("f", "rm_")
    others = (replace(SHARD, where="w"), replace(SHARD, rows_not_asked=1))
    assert len({shard.identity("f", "") for shard in (SHARD, *others)}) == 3
    moved = replace(SHARD, source=replace(SHARD.source, root="s3://b"), replaces=Version("x"))
    assert moved.identity("f", "") == SHARD.identity("f", "")


def _finish(store: Store, receipts: list[Receipt]) -> None:
    found = published(store)
    conclude(store, publish(store, 1, "f", receipts, found), found)


def test_totals_account_for_every_row() -> None:
    totals = total([DONE, FAILED])
    assert totals["rows"] == totals["rows_scored"] + totals["rows_marked"] + totals["rows_failed"]
    assert (totals["rows"], totals["rows_scored"], totals["rows_failed"]) == (14, 9, 4)
    assert totals["pairs"] == {"web": {"pairs": 9, "chosen_higher": 6, "ties": 1}}


def test_a_judge_s_questions_are_added_up_and_no_other_output_tells_of_any() -> None:
    assert b"judged" not in COMMIT.footer()[b"batch_scorer"]
    assert "judged" not in total([DONE, FAILED])
    judged = replace(COMMIT, judged=JUDGED)
    assert Commit.from_footer(judged.footer()) == judged
    more = replace(judged, judged=Judged(questions=5, verdicts=4, lost={"no_verdict": 1}))
    receipts = [replace(DONE, stored=stored(commit)) for commit in (judged, more)]
    assert parsed(receipts[0].to_line(), Receipt) == receipts[0]
    assert total([*receipts, FAILED])["judged"] == asdict(
        replace(JUDGED, questions=25, verdicts=21, lost={"cut_off": 1, "no_verdict": 3})
    )


def test_rows_that_are_not_asked_for_are_rows_of_the_inputs(store: Store) -> None:
    """Those of a committed shard, of one that failed, and of a file without a shard."""
    commit = replace(COMMIT, where="w", rows_not_asked=20)
    done = replace(DONE, stored=stored(commit), rows_not_asked=20)
    failed = replace(FAILED, rows_not_asked=3)
    unused = Receipt.of_file(SHARD.source, Status.NOT_ASKED, rows_not_asked=7)
    totals = total([done, failed, unused])
    parts = ("rows_scored", "rows_marked", "rows_not_asked", "rows_failed")
    assert [totals[name] for name in parts] == [9, 1, 30, 4]
    assert totals["rows"] == 44
    assert totals["shards"] == 2
    _finish(store, [replace(done, output_key="b.parquet"), unused])
    assert [receipt.rows_not_asked for receipt in current_manifest(store)] == [7, 20]
    assert read_success(store) is not None


def test_a_shard_without_input_is_named_but_not_counted(store: Store) -> None:
    gone = replace(DONE, output_key="old.parquet", status=Status.INPUT_GONE)
    assert total([DONE, gone]) == total([DONE])
    _finish(store, [DONE, gone])
    assert current_manifest(store) == [DONE, gone]


def test_rows_that_do_not_add_up_are_an_integrity_error() -> None:
    with pytest.raises(IntegrityError, match="10 rows went in, 8 scored"):
        total([replace(DONE, stored=stored(replace(COMMIT, rows_scored=8)))])
    with pytest.raises(IntegrityError, match=r"12 rows went in, 9 scored .* 1 not asked"):
        total([replace(DONE, stored=stored(replace(COMMIT, rows_not_asked=1)), rows_not_asked=2)])


def test_success_is_written_only_when_nothing_failed(store: Store) -> None:
    _finish(store, [DONE, FAILED])
    assert read_success(store) is None
    assert current_manifest(store) == [DONE, FAILED]
    _finish(store, [DONE])
    success = read_success(store)
    assert success is not None and success.rows_scored == 9
    assert current_manifest(store) == [DONE]


def test_the_ledger_remembers_what_no_manifest_names_yet(store: Store) -> None:
    ledger = Ledger(store, 1, "holder", every_s=0)
    ledger.add(DONE)
    assert OutputState(store).receipts == {"a.parquet": DONE}
    _finish(store, [DONE])
    assert list(store.list("_batch_scorer/ledger")) == []
    assert OutputState(store).receipts == {"a.parquet": DONE}


def test_an_output_belongs_to_one_fingerprint_and_layout(store: Store) -> None:
    mine = Fingerprint({"model": "m", "dtype": "bfloat16"})
    claim_output(store, mine, {"shard_rows": 10}, {"device": "cpu"})
    claim_output(store, mine, {"shard_rows": 10}, {"device": "cuda"})
    with pytest.raises(OutputError, match=r"belongs to another run.*\n.*dtype: bfloat16 there"):
        claim_output(store, Fingerprint({"model": "m", "dtype": "float32"}), {"shard_rows": 10}, {})
    with pytest.raises(OutputError, match="shard_rows: 10 there, 20 here"):
        claim_output(store, mine, {"shard_rows": 20}, {})
    assert open_scored(store.root, {})[1].provenance == {"device": "cpu"}


def test_an_output_of_another_version_is_refused(store: Store) -> None:
    """Its records and commits are written in another way."""
    claim_output(store, Fingerprint({}), {}, {})
    body = store.read_json("_batch_scorer/run.json")
    del body["format"]  # as before there was one
    store.delete("_batch_scorer/run.json")
    store.create("_batch_scorer/run.json", json.dumps(body).encode())
    with pytest.raises(OutputError, match="written by another version"):
        open_scored(store.root, {})
    with pytest.raises(OutputError, match="written by another version"):
        claim_output(store, Fingerprint({}), {}, {})


def test_a_folder_that_is_no_output_is_named(store: Store) -> None:
    with pytest.raises(OutputError, match="no scored output here"):
        open_scored(store.root, {})
