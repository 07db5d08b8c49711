"""Marked scores are null in every added column, whoever reads them: never NaN, which pandas takes
for missing, DuckDB and polars order above all numbers, and `argmax` picks."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.config import OverLength
from batch_scorer.errors import RowReason
from batch_scorer.formats.shape import shape_of
from batch_scorer.outputs.columns import score_columns
from batch_scorer.records import (
    SCALAR,
    Format,
    Layout,
    Outputs,
    RowError,
    ScoredRows,
    Scores,
)

NAN = float("nan")
KINDS = {
    "scores": SCALAR,
    "attributes": Outputs(("a", "b")),
    "attributes alone": Outputs(("a", "b"), only_attributes=True),
    "steps": Outputs(steps=True),
    "tokens": Outputs(("a",), tokens=True),
    "embedding": Outputs(embedding_size=3),
}


def width_of(outputs: Outputs) -> int:
    if outputs.embedding_size is not None:
        return outputs.embedding_size
    return len(outputs.attributes) + outputs.has_score


def table_of(format: Format, outputs: Outputs) -> pa.Table:
    shape = shape_of(format)
    per_row = max(2, len(shape.fields)) if shape.is_group else len(shape.fields)
    count = 3 * per_row
    values = np.arange(count * width_of(outputs), dtype=np.float32).reshape(count, -1)
    marked = [2 * per_row - 1, *range(2 * per_row, count)]
    values[marked] = np.nan
    scores = Scores(values, {s: RowError(RowReason.TOO_LONG, "") for s in marked})
    if outputs.list_column:
        scores.step_values = np.tile(np.float32([1.0, NAN]), count)  # a step without a number
        scores.step_offsets = np.arange(count + 1) * 2
    rows = ScoredRows(
        scores, np.ones(count, np.int32), np.zeros(count, np.int32),
        np.arange(4) * per_row, {}, "", {}, 0.0,
    )  # fmt: skip
    given = pa.table({name: pa.array([["x"]] * 3) for name in shape.fields})
    layout = Layout(format, {name: name for name in shape.fields})
    return pa.table(score_columns(rows, outputs, given, layout, "", OverLength.TRUNCATE_LEFT))


def leaves(value: Any) -> list[str]:
    """What a value consists of, at any depth: null, NaN or a number."""
    if value is None or value is pd.NA:
        return ["null"]
    if isinstance(value, list | tuple | np.ndarray):
        return [leaf for inner in value for leaf in leaves(inner)]
    is_nan = isinstance(value, float | np.floating) and math.isnan(value)
    return ["NaN" if is_nan else "value"]


def in_pandas(file: Path) -> dict[str, list[Any]]:
    frame = pd.read_parquet(file, dtype_backend="pyarrow")
    return {name: pa.array(frame[name]).to_pylist() for name in frame.columns}


def in_duckdb(file: Path) -> dict[str, list[Any]]:
    found = duckdb.sql(f"SELECT * FROM '{file}'")
    return dict(zip(found.columns, map(list, zip(*found.fetchall(), strict=True)), strict=True))


READERS: dict[str, Callable[[Path], dict[str, list[Any]]]] = {
    "pyarrow": lambda file: pq.read_table(file).to_pydict(),
    "pandas": in_pandas,
    "polars": lambda file: polars.read_parquet(file).to_dict(as_series=False),
    "duckdb": in_duckdb,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", list(Format))
def test_marked_scores_are_null_to_every_reader(format: Format, kind: str, tmp_path: Path) -> None:
    table = table_of(format, KINDS[kind])
    file = tmp_path / "scored.parquet"
    pq.write_table(table, file)
    found = {
        reader: {name: Counter(leaves(values)) for name, values in read(file).items()}
        for reader, read in READERS.items()
    }
    for name in table.column_names:
        counts = {reader: columns[name] for reader, columns in found.items()}
        assert all(each == counts["pyarrow"] for each in counts.values()), (name, counts)
        assert not counts["pyarrow"]["NaN"], name
    (names, *_) = shape_of(format).value_columns(KINDS[kind])
    assert all(found["duckdb"][name]["null"] for name in names)


def test_a_maximum_is_a_score_to_every_reader(tmp_path: Path) -> None:
    table = table_of(Format.ROLLOUT, SCALAR)
    file = tmp_path / "scored.parquet"
    pq.write_table(table, file)
    best = max(score for score in table["score"].to_pylist() if score is not None)
    assert duckdb.sql(f"SELECT max(score) FROM '{file}'").fetchall() == [(best,)]
    assert duckdb.sql(f"SELECT count(*) FROM '{file}' WHERE score > {best}").fetchall() == [(0,)]
    assert polars.read_parquet(file)["score"].max() == best
    assert pd.read_parquet(file)["score"].max() == best
