"""Three readers that know nothing of this program, counting the rows of a scored output."""

from pathlib import Path

import duckdb
import polars
import pyarrow.dataset


def rows_by_reader(folder: Path) -> dict[str, int]:
    """How many rows each finds in a folder without folders in it, the program's records aside:
    pyarrow passes over names with `_` first, the others take what the glob names."""
    glob = f"{folder}/*.parquet"
    ((in_duckdb,),) = duckdb.sql(f"SELECT count(*) FROM read_parquet('{glob}')").fetchall()
    return {
        "pyarrow": pyarrow.dataset.dataset(folder, format="parquet").count_rows(),
        "polars": polars.scan_parquet(glob).select(polars.len()).collect().item(),
        "duckdb": in_duckdb,
    }
