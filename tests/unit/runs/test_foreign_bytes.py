"""A run hands foreign bytes to other processes, and what ends those costs one file."""

import ast
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import pytest

from batch_scorer import Config, score
from batch_scorer.errors import ShardReason
from batch_scorer.inputs.plan import make_plan
from batch_scorer.parity import choose_sample
from batch_scorer.records import Status
from batch_scorer.runs.derive import derive, look_at_model
from batch_scorer.runs.preview import look_ahead
from tests.helpers.inputs import jsonl, pair_rows, pairs, parquet, table_of

MARK = "foreign bytes"
"""Stands in every row."""

_ARROW = {
    pq: ("ParquetFile", "read_schema", "read_metadata", "read_table"),
    pa.ipc: ("open_file", "open_stream"),
    pyarrow.json: ("read_json", "open_json"),
    pyarrow.csv: ("read_csv", "open_csv"),
    pa: ("CompressedInputStream",),
    gzip: ("GzipFile", "decompress"),
    csv: ("reader",),
}
"""They are called for input files only, as long as an output has no manifest."""
_TEXTS = {json: ("loads",), ast: ("literal_eval",)}
"""They are called for other things too."""


@contextmanager
def nothing_foreign_is_parsed() -> Iterator[list[str]]:
    """Names what this process parses."""
    found: list[str] = []

    def noting(name: str, function: Callable[..., Any], of_text: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not of_text or MARK in str(args[0]):
                found.append(name)
            return function(*args, **kwargs)

        return call

    with ExitStack() as patched:
        for table, of_text in ((_ARROW, False), (_TEXTS, True)):
            for module, names in table.items():
                for name in names:
                    noted = noting(f"{module.__name__}.{name}", getattr(module, name), of_text)
                    patched.enter_context(patch.object(module, name, noted))
        yield found


def write_inputs(folder: Path) -> None:
    rows = pair_rows(6)
    for row in rows:
        row["chosen"][-1]["content"] += f" {MARK}"
        row["prompt_text"] = json.dumps(MARK)
    folder.mkdir()
    (folder / "a.parquet").write_bytes(parquet(table_of(rows)))
    (folder / "b.jsonl").write_bytes(jsonl(rows))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(rows), mtime=0))
    (folder / "d.json").write_text(json.dumps(rows))
    texts = [[row["chosen"], row["rejected"]] for row in rows]
    with (folder / "e.csv").open("w", newline="") as file:
        written = csv.writer(file)
        written.writerow(["chosen", "rejected"])
        written.writerows([[json.dumps(side) for side in sides] for sides in texts])
    table = table_of(rows)
    with pa.ipc.new_file(str(folder / "f.arrow"), table.schema) as arrow:
        arrow.write_table(table)


def config(folder: Path, model: Path, **settings: Any) -> Config:
    return Config(
        model=str(model),
        inputs=(str(folder / "in"),),
        output=str(folder / "out"),
        backend="fake",
        use_ray=False,
        **{"shard_rows": 4, **settings},
    )


@pytest.mark.parametrize("where", [None, 'field("chosen").is_valid()'])
def test_the_driver_parses_nothing_foreign(
    tmp_path: Path, tiny_model: Path, where: str | None
) -> None:
    write_inputs(tmp_path / "in")
    asked = config(tmp_path, tiny_model, where=where)
    with nothing_foreign_is_parsed() as parsed:
        summary = score(asked)
        assert (summary.totals["rows"], summary.totals["shards_failed"]) == (36, 0)
        assert parsed == []
        assert look_ahead(asked, with_model=True).estimate
        model = look_at_model(asked)
        assert choose_sample(derive(asked, model), make_plan(asked).shards)
        assert parsed == []


def test_the_oracle_of_the_test_above_sees_what_is_parsed(tmp_path: Path) -> None:
    write_inputs(tmp_path / "in")
    with nothing_foreign_is_parsed() as parsed:
        pq.read_table(tmp_path / "in" / "a.parquet")
        json.loads((tmp_path / "in" / "d.json").read_text())
        list(csv.reader(io.StringIO("a,b")))
    assert {"pyarrow.parquet.read_table", "json.loads", "csv.reader"} <= set(parsed)


def test_a_file_that_ends_its_readers_costs_that_file(tmp_path: Path, tiny_model: Path) -> None:
    """One that takes more memory than is allowed, while it is planned."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jsonl").write_bytes(jsonl(pair_rows(6)))
    rows = pair_rows(2)
    rows[0]["chosen"][-1]["content"] = "x" * (48 << 20)
    (tmp_path / "in" / "large.jsonl").write_bytes(jsonl(rows))
    summary = score(config(tmp_path, tiny_model, read_memory_gib=0.4, max_expansion=1e6))
    found = {receipt.input: receipt for receipt in summary.receipts}
    assert found["good.jsonl"].status is Status.COMMITTED
    failed = found["large.jsonl"]
    assert (failed.status, failed.reason) == (Status.FAILED, ShardReason.READER_DIED)


def test_a_shard_that_ends_its_readers_costs_that_shard(tmp_path: Path, tiny_model: Path) -> None:
    """Its rows take more memory than is allowed; the plan has seen the first 32 rows only."""
    (tmp_path / "in").mkdir()
    texts = [str(n) * (80 << 20) if n >= 40 else "" for n in range(44)]
    table = pairs(44).append_column("unread", pa.array(texts))
    (tmp_path / "in" / "a.parquet").write_bytes(parquet(table, row_group_rows=40))
    summary = score(
        config(tmp_path, tiny_model, read_memory_gib=0.4, max_expansion=1e6, shard_rows=40)
    )
    found = {receipt.output_key: receipt for receipt in summary.receipts}
    assert found["a.rows0-40.parquet"].status is Status.COMMITTED
    failed = found["a.rows40-44.parquet"]
    assert (failed.status, failed.reason) == (Status.FAILED, ShardReason.READER_DIED)
    assert (summary.totals["rows"], summary.totals["rows_failed"]) == (44, 4)
