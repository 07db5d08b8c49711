"""Scored shards that the manifest does not name are found, and exactly they are removed."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.errors import OutputError, OutputHeldError
from batch_scorer.fingerprint import Fingerprint
from batch_scorer.outputs.claim import claim_output
from batch_scorer.outputs.lease import Lease, current_epoch
from batch_scorer.outputs.manifest import SUCCESS_KEY, conclude, publish, published
from batch_scorer.outputs.repair import Stray, find_strays, remove
from batch_scorer.records import Commit, Receipt, Status
from batch_scorer.storage import Store, Version
from tests.helpers.receipts import COMMIT, DONE, stored

OLD = "a.rows0-6.parquet"


def scored(commit: Commit) -> bytes:
    """A file with the commit in its footer."""
    schema = pa.schema({"score": pa.float32()}, metadata=commit.footer())
    sink = io.BytesIO()
    pq.write_table(schema.empty_table(), sink)
    return sink.getvalue()


def finish(store: Store, *keys: str) -> None:
    """Publish a manifest that names these shards, and `_SUCCESS`."""
    receipts = [
        replace(DONE, output_key=key, stored=stored(COMMIT, store.head(key).version.etag))
        for key in keys
    ]
    gone = Receipt("gone.parquet", "gone.parquet", "/data", 10, Status.INPUT_GONE, DONE.stored)
    found = published(store)
    conclude(store, publish(store, 1, "f", [*receipts, gone], found), found)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An output that a run has finished, and beside its shard an old piece of the same file."""
    made = Store(str(tmp_path / "out"), {}, create=True)
    claim_output(made, Fingerprint({}), {}, {})
    with Lease(made, "a plan", 60):
        made.create("a.parquet", scored(COMMIT))
        finish(made, "a.parquet")
    made.create(OLD, scored(replace(COMMIT, num_rows=6)))
    return made


def keys(store: Store) -> list[str]:
    return sorted(info.key for info in store.list() if info.key.endswith(".parquet"))


def test_what_the_manifest_does_not_name_is_found_and_removed(store: Store) -> None:
    version, size_bytes = store.head(OLD).version, store.head(OLD).size_bytes
    before = keys(store)
    strays = find_strays(store.root, {})
    assert strays == [Stray(OLD, version, size_bytes, "a.parquet", 0, 6)]
    assert keys(store) == before

    assert remove(store.root, {}, strays) == strays
    assert keys(store) == sorted({*before} - {OLD})
    assert find_strays(store.root, {}) == []


def test_nothing_is_a_stray_but_scored_shards_without_a_name(store: Store) -> None:
    """Not what is named, also where its input is gone, nor files of others, nor records."""
    store.create("gone.parquet", scored(COMMIT))
    store.create("theirs.parquet", b"no Parquet at all")
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), sink)
    store.create("also-theirs.parquet", sink.getvalue())
    store.create("_batch_scorer/earlier/a.parquet.earlier", scored(COMMIT))
    assert [stray.key for stray in find_strays(store.root, {})] == [OLD]


def test_what_was_stored_since_it_was_found_is_left_alone(store: Store) -> None:
    strays = find_strays(store.root, {})
    store.replace(OLD, scored(replace(COMMIT, num_rows=6, epoch=2)), strays[0].version)
    remove(store.root, {}, strays)
    assert OLD in keys(store)


def test_what_a_manifest_names_by_now_is_left_alone(store: Store) -> None:
    """The file came back as it was, and a run has counted on the old piece."""
    strays = find_strays(store.root, {})
    finish(store, OLD)
    assert remove(store.root, {}, strays) == []
    assert OLD in keys(store)


def test_an_output_that_is_not_complete_is_refused(store: Store) -> None:
    strays = find_strays(store.root, {})
    store.delete(SUCCESS_KEY)
    with pytest.raises(OutputError, match=r"no _SUCCESS.*Run the same command again"):
        find_strays(store.root, {})
    with pytest.raises(OutputError, match=r"no _SUCCESS.*Run the same command again"):
        remove(store.root, {}, strays)
    assert OLD in keys(store)


def test_an_output_with_a_run_at_work_is_refused(store: Store) -> None:
    strays = find_strays(store.root, {})
    with Lease(store, "another plan", 60):
        with pytest.raises(OutputHeldError, match="is working on this output"):
            find_strays(store.root, {})
        with pytest.raises(OutputHeldError, match="is working on this output"):
            remove(store.root, {}, strays)
    assert OLD in keys(store)


def test_a_removal_ends_the_epoch_of_runs_that_planned_before(store: Store) -> None:
    """One that sleeps brings no stray back."""
    before = current_epoch(store)
    remove(store.root, {}, find_strays(store.root, {}))
    assert current_epoch(store) == before + 1
    assert json.loads(store.read("_batch_scorer/lease.json"))["released"]


def test_there_has_to_be_an_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such folder"):
        find_strays(str(tmp_path / "nothing"), {})
    with pytest.raises(OutputError, match="no scored output here"):
        remove(str(tmp_path), {}, [Stray(OLD, Version("x"), 1, "a.parquet", 0, 6)])
