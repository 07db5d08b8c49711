"""A record or an object of any other shape is one line that names it: no traceback, and verify
goes on."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.errors import BatchScorerError, ExitCode, OutputError
from batch_scorer.fingerprint import Fingerprint
from batch_scorer.nightly.generations import (
    Generation,
    move_latest,
    read_generations,
    read_latest,
    record_generations,
)
from batch_scorer.outputs import verify as checks
from batch_scorer.outputs.claim import claim_output, claimed
from batch_scorer.outputs.columns import digest_columns
from batch_scorer.outputs.lease import Lease, current_epoch, lease_of
from batch_scorer.outputs.ledger import Ledger
from batch_scorer.outputs.manifest import (
    SUCCESS_KEY,
    conclude,
    publish,
    published,
    read_commit,
    record_plan,
)
from batch_scorer.outputs.repair import find_strays
from batch_scorer.outputs.state import OutputState
from batch_scorer.outputs.verify import verify
from batch_scorer.quarantine import Bounds
from batch_scorer.records import Commit, Receipt, Status, Stored
from batch_scorer.runs.metrics import newest_run, record_run
from batch_scorer.runs.status import read_status
from batch_scorer.storage import Store
from tests.helpers.receipts import COMMIT, RUN

RECORDS = "_batch_scorer"
LAYOUT = {"shard_rows": 10, "shard_tokens": 100, "where": None}
COLUMNS = {
    "score": pa.array([0.5, 1.5], pa.float32()),
    "score_error": pa.array([None, None], pa.string()),
}


def _shard(kept: pa.Table, input_etag: str) -> tuple[bytes, Commit]:
    """A scored shard with these columns of an input."""
    commit = replace(
        COMMIT,
        input="a.parquet",
        input_etag=input_etag,
        num_rows=2,
        rows_scored=2,
        rows_marked=0,
        marked={},
        added_columns=list(COLUMNS),
        scores_digest=digest_columns(COLUMNS),
    )
    for name, column in COLUMNS.items():
        kept = kept.append_column(name, column)
    sink = io.BytesIO()
    pq.write_table(kept.replace_schema_metadata(commit.footer()), sink)
    return sink.getvalue(), commit


def _finish(store: Store, source: Path | None, kept: pa.Table, *, is_over: bool = True) -> None:
    """An output of one shard; of an input at `source`, if there is one."""
    claim_output(store, Fingerprint({}), LAYOUT, {})
    etag = Store(str(source.parent), {}).head(source.name).version.etag if source else "e"
    data, commit = _shard(kept, etag)
    version = store.create("a.parquet", data)
    commit_read, sha256 = read_commit(store, store.head("a.parquet"))
    assert commit_read == commit
    receipt = Receipt(
        output_key="a.parquet",
        input="a.parquet",
        input_root=str(source.parent) if source is not None else "/nowhere",
        num_rows=2,
        status=Status.COMMITTED,
        stored=Stored(commit, version, len(data), sha256),
    )
    with Lease(store, "a plan", 60) as lease:
        record_plan(store, 1, 2, 10)
        record_run(store, RUN, None)
        ledger = Ledger(store, lease.epoch, lease.holder_id, every_s=0)
        ledger.add(receipt)
        if is_over:
            found = published(store)
            totals = publish(store, 1, "f", [receipt], found)
            conclude(store, totals, found)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(str(tmp_path / "out"), {}, create=True)
    _finish(made, None, pa.table({"text": ["a", "b"]}))
    return made


def _overwrite(store: Store, key: str, data: bytes) -> None:
    Path(store.root, key).write_bytes(data)


def _damages(record: bytes) -> Iterator[bytes]:
    """The record torn, of another type, and with a part missing or of another type."""
    yield from (
        b"",
        record[: len(record) // 2],
        b"[]",
        b"null",
        b'"x"',
        b"7",
        b"{}",
        b"\xff\xfe\x00",
    )
    yield b"[" * 500 + b"]" * 500
    try:
        whole: Any = json.loads(record)
    except ValueError:  # a table, or lines
        return
    for name in whole:
        yield json.dumps({key: value for key, value in whole.items() if key != name}).encode()
        for other in (None, [], {}, "x", -1.5, True, 10**30, float("nan"), float("inf")):
            yield json.dumps({**whole, name: other}).encode()


READERS: list[Callable[[Store], Any]] = [
    claimed,
    lease_of,
    newest_run,
    lambda store: current_epoch(store),
    lambda store: read_status(store.root),
    lambda store: find_strays(store.root, {}),
    lambda store: list(OutputState(store).shards()),
]


@pytest.mark.parametrize(
    "key", ["run.json", "lease.json", "plan.json", "CURRENT", "runs/000002.json", SUCCESS_KEY]
)
def test_a_damaged_record_is_named_by_whoever_reads_it(store: Store, key: str) -> None:
    key = key if key == SUCCESS_KEY else f"{RECORDS}/{key}"
    record = store.read(key)
    refused = 0
    for damaged in _damages(record):
        _overwrite(store, key, damaged)
        for read in READERS:
            try:
                read(store)
            except BatchScorerError as error:
                refused += 1
                assert "\n" not in str(error)
                if isinstance(error, OutputError):
                    assert key in str(error) or "another version" in str(error)
    assert refused >= 9


@pytest.mark.parametrize("folder", ["ledger", "manifests"])
def test_a_damaged_ledger_or_manifest_is_named(tmp_path: Path, folder: str) -> None:
    store = Store(str(tmp_path / "out"), {}, create=True)
    _finish(store, None, pa.table({"text": ["a", "b"]}), is_over=folder == "manifests")
    (info,) = store.list(f"{RECORDS}/{folder}")
    record = store.read(info.key)
    receipt = json.dumps({"output_key": "a.parquet"}).encode()
    for damaged in (record[: len(record) // 2], receipt, b"[]", b"\xff"):
        _overwrite(store, info.key, damaged)
        with pytest.raises(OutputError, match=info.key):
            read_status(store.root)
        verdict = verify(store.root)
        assert verdict.exit_code is ExitCode.INTEGRITY
        assert any(info.key in problem for problem in verdict.problems)
        assert (verdict.rows, verdict.rows_scored) == (2, 2)  # counted from the shards all the same


@pytest.mark.parametrize("key", [f"{RECORDS}/run.json", SUCCESS_KEY, f"{RECORDS}/CURRENT"])
def test_verify_reports_a_damaged_record_and_goes_on(store: Store, key: str) -> None:
    assert verify(store.root).exit_code is ExitCode.DONE
    _overwrite(store, key, b"[1]")
    verdict = verify(store.root)
    assert verdict.exit_code is ExitCode.INTEGRITY
    assert any(key in problem for problem in verdict.problems)
    assert (verdict.rows, verdict.rows_scored) == (2, 2)


def _as_text(data: bytes) -> bytes:
    """The shard with its scores as text."""
    table = pq.read_table(io.BytesIO(data))
    sink = io.BytesIO()
    pq.write_table(table.set_column(1, "score", [["x", "y"]]), sink)
    return sink.getvalue()


def _with_footer(data: bytes, footer: bytes) -> bytes:
    table = pq.read_table(io.BytesIO(data))
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"batch_scorer": footer}), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no table",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        _as_text,
        lambda data: _with_footer(data, b"[]"),
        lambda data: _with_footer(data, b"{}"),
        lambda data: _with_footer(data, b"\xff"),
        lambda data: _with_footer(data, b'{"num_rows": NaN}'),
    ],
)
def test_a_damaged_shard_is_a_line_of_the_report(
    store: Store, damage: Callable[[bytes], bytes]
) -> None:
    damaged = damage(store.read("a.parquet"))
    _overwrite(store, "a.parquet", damaged)
    _overwrite(store, "stranger.parquet", damaged)
    verdict = verify(store.root)
    assert verdict.exit_code is ExitCode.INTEGRITY
    for name in ("a.parquet", "stranger.parquet"):
        assert any(problem.startswith(f"{name}: ") for problem in verdict.problems), verdict
    assert find_strays(store.root, {}) == [] or damage is _as_text
    read_status(store.root)


def test_a_process_that_dies_over_a_shard_is_a_line_of_the_report(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_bounds", lambda group: Bounds(0.0, 1 << 31))
    verdict = verify(store.root)
    assert verdict.exit_code is ExitCode.INTEGRITY
    assert verdict.problems[0] == "a.parquet: cannot be checked: reading it takes longer than 0 s"


def test_input_columns_are_compared_by_place_where_names_repeat(tmp_path: Path) -> None:
    """Two columns of one name, NaN, and text that is not UTF-8: as in the input, byte for byte."""
    bytes_ = pa.array([b"\xff", b"ok"]).view(pa.string())
    kept = pa.table(
        [pa.array([1, 2]), pa.array([float("nan"), 2.0]), bytes_], names=["x", "x", "text"]
    )
    source = tmp_path / "in" / "a.parquet"
    source.parent.mkdir()
    pq.write_table(kept, source)
    store = Store(str(tmp_path / "out"), {}, create=True)
    _finish(store, source, kept)
    verdict = verify(store.root)
    assert (verdict.problems, verdict.inputs_compared) == ([], 1)

    shutil.rmtree(store.root)
    store = Store(str(tmp_path / "out"), {}, create=True)
    _finish(store, source, kept.set_column(1, "x", [[float("nan"), 3.0]]))
    (problem,) = verify(store.root).problems
    assert problem == "a.parquet: column x is not as it was in the input"


def test_a_damaged_list_of_generations_is_named(tmp_path: Path) -> None:
    root = Store(str(tmp_path / "root"), {}, create=True)
    generation = Generation("main", 1, "f" * 64, dict(LAYOUT))
    record_generations(root, [generation])
    move_latest(root, generation, 1, None)
    assert read_generations(root) == [generation]
    latest = read_latest(root)
    assert latest is not None and latest.paths == {"main": generation.path}
    readers = {f"{RECORDS}/generations.json": read_generations, "latest.json": read_latest}
    for key, read in readers.items():
        for damaged in (b"", b"[]", b"{}", b'{"generations": [1]}', b'{"lines": {"line": 1}}'):
            _overwrite(root, key, damaged)
            with pytest.raises(OutputError, match=key):
                read(root)
