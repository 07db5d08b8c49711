"""A database in bounded memory: what is too much for it goes to the local disk."""

from pathlib import Path

import duckdb

_MEMORY = "1GB"
_THREADS = 2


def open_database(folder: Path) -> duckdb.DuckDBPyConnection:
    """An empty one, for the caller to close; what does not fit goes into `folder`, which is the
    caller's to remove."""
    # Not a database in a file: that takes longer to write, and this one spills too.
    database = duckdb.connect(
        config={
            "memory_limit": _MEMORY,
            "threads": _THREADS,
            "temp_directory": str(folder / "spilled"),
            "preserve_insertion_order": False,
        },
    )
    # Not among the settings above: it would forbid the temp folder.
    database.execute("set enable_external_access = false")
    return database
