"""Readers that know nothing of this program, counting the rows of a scored output."""

from pathlib import Path

import duckdb
import pandas
import polars
import pyarrow.dataset


def rows_by_reader(folder: Path) -> dict[str, int]:
    """How many rows each finds by a plain read of all that is there (docs/readers.md)."""
    pattern = f"{folder}/**/*.parquet"
    return {
        "pyarrow": pyarrow.dataset.dataset(folder, format="parquet").count_rows(),
        "pandas": len(pandas.read_parquet(folder, columns=["score_error"])),
        "polars": polars.scan_parquet(pattern).select(polars.len()).collect().item(),
        "duckdb": _count(pattern),
        "duckdb, the folder": _count(str(folder)),
    }


def _count(place: str) -> int:
    ((rows,),) = duckdb.sql("SELECT count(*) FROM read_parquet(?)", params=[place]).fetchall()
    return int(rows)
