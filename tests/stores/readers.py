"""Three readers that know nothing of this program, counting the rows of a scored output."""

import glob
from pathlib import Path

import duckdb
import polars
import pyarrow.dataset

PATTERNS = ("*.parquet", "[!_]*/**/*.parquet")
"""For readers that do not pass over names with `_` first (docs/commit-protocol.md)."""


def rows_by_reader(folder: Path) -> dict[str, int]:
    """How many rows each finds."""
    patterns = [f"{folder}/{pattern}" for pattern in PATTERNS]
    patterns = [pattern for pattern in patterns if glob.glob(pattern, recursive=True)]
    ((in_duckdb,),) = duckdb.sql(f"SELECT count(*) FROM read_parquet({patterns})").fetchall()
    return {
        "pyarrow": pyarrow.dataset.dataset(folder, format="parquet").count_rows(),
        "polars": polars.scan_parquet(patterns).select(polars.len()).collect().item(),
        "duckdb": in_duckdb,
    }
