"""`select` against DuckDB and polars that choose the same rows without committing them.

Scored rollouts lie as Parquet shards in S3 (SeaweedFS); the best of each prompt is chosen and
written back. DuckDB reads through Arrow's S3 client, polars through its own; each writes one file.
Each works in a process of its own, whose peak memory is taken, its server's aside.

    python -m benchmarks.select                     # 1 and 5 million rows
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_scorer.storage import open_store
from benchmarks.common import (
    WORKLOADS,
    Child,
    Contest,
    Family,
    command_line,
    print_table,
    report,
)
from cluster.local.seaweed import S3Server, s3_server

SIZES = (1_000_000, 5_000_000)
TINY_SIZES = (4_000,)
SHARD_ROWS = 100_000
ANSWERS = 8
ROUNDS = 3
SEED = 7
BUFFER_BYTES = 1 << 20


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", help="rows of each run")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    sizes = asked.sizes or (TINY_SIZES if asked.tiny else SIZES)
    rounds = 1 if asked.tiny else asked.rounds
    results = [measured(rows, rounds) for rows in sizes]
    lines = [
        (each["rows"], name, round(rate), each["peak_mb"][name], each["ratios"].get(name, ""))
        for each in results
        for name, rate in each["rows_per_s"].items()
    ]
    print_table(("rows", "who", "rows/s", "peak MB", "ours by theirs"), lines)
    report("select", asked, {"rounds": rounds, "answers": ANSWERS, "results": results})


def measured(rows: int, rounds: int) -> dict[str, Any]:
    """Rates and peaks of all three on so many rows."""
    contest = Contest()
    peaks: dict[str, int] = {}
    chosen: dict[str, int] = {}
    with s3_server() as server:
        uploader = Child(server.environment)
        uploader.call(upload, server, rows)
        uploader.close()
        for number in range(rounds):
            for name, choose in CONTESTANTS.items():
                child = Child(server.environment)
                try:
                    with contest.timed(name, rows):
                        kept, peak_mb = child.call(watched, choose, server, number)
                finally:
                    child.close()
                peaks[name] = max(peaks.get(name, 0), peak_mb)
                assert chosen.setdefault("rows", kept) == kept, (name, kept, chosen)
            print(f"{rows:,} rows: {contest.describe_round()}", flush=True)
    return {
        "rows": rows,
        "kept": chosen["rows"],
        "rows_per_s": {name: contest.median(name) for name in CONTESTANTS},
        "ratios": {name: contest.ratio("select", name) for name in CONTESTANTS if name != "select"},
        "peak_mb": peaks,
    }


def watched(
    choose: Callable[[S3Server, int], int], server: S3Server, number: int
) -> tuple[int, int]:
    """The rows that were kept, and the most memory of this process and all of its own."""
    with Family() as family:
        kept = choose(server, number)
    return kept, sum(family.peak_mb.values())


def upload(server: S3Server, rows: int) -> None:
    """Rollouts with answers of real text and scores of which some are null and some are equal."""
    groups = WORKLOADS["rollouts-4"].read(None, None)
    texts = pc.unique(pc.list_flatten(groups["responses"]))
    random = np.random.default_rng(SEED)
    store = open_store(server.url("in"), server.options)
    for start in range(0, rows, SHARD_ROWS):
        count = min(SHARD_ROWS, rows - start)
        numbers = np.arange(start, start + count)
        scores = np.round(random.normal(0, 3, count), 2).astype(np.float32)
        marked = random.random(count) < 0.01
        prompts = pc.binary_join_element_wise(
            "What is special about the number ",
            pa.array(numbers // ANSWERS).cast(pa.string()),
            "?",
            "",
        )
        table = pa.table(
            {
                "prompt": prompts,
                "response": pc.binary_join_element_wise(
                    texts.take(pa.array(random.integers(0, len(texts), count))),
                    pa.array(numbers).cast(pa.string()),
                    " ",
                ),
                "source": pa.array(np.array(["math", "code", "chat"])[numbers % 3]),
                "score": pa.array(scores, mask=marked),
                "score_error": pa.array(["too_long" if each else None for each in marked]),
                "num_tokens": pa.array(random.integers(50, 900, count).astype(np.int32)),
            }
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=25_000)
        store.create(f"{start // SHARD_ROWS:05}.parquet", sink.getvalue().to_pybytes())


def by_select(server: S3Server, number: int) -> int:
    from batch_scorer.selection.recipe import Selection
    from batch_scorer.selection.select import select

    done = select(
        [server.url("in")],
        server.url(f"out/select-{number}"),
        Selection(best=1, group_by=("prompt",), by="score"),
        server.options,
    )
    return done.totals.rows_kept


def by_duckdb(server: S3Server, number: int) -> int:
    import duckdb
    import pyarrow.dataset as ds
    from pyarrow.fs import S3FileSystem

    files = S3FileSystem(endpoint_override=server.endpoint, region="us-east-1")
    rows = ds.dataset(f"{server.bucket}/in", filesystem=files, format="parquet")
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as connection:
        connection.register("rows", rows)
        target = Path(folder) / "best.parquet"
        connection.execute(
            f"""
            COPY (
                SELECT * FROM rows
                WHERE score IS NOT NULL
                QUALIFY row_number() OVER (PARTITION BY prompt ORDER BY score DESC, response) = 1
            ) TO '{target}' (FORMAT parquet, COMPRESSION zstd)
            """
        )
        return _put(server, f"duckdb-{number}", target)


def by_polars(server: S3Server, number: int) -> int:
    import polars as pl

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "best.parquet"
        rows = pl.scan_parquet(
            server.url("in/*.parquet"),
            storage_options={**_config(server), "aws_allow_http": "true"},
        )
        rows = rows.filter(pl.col("score").is_not_null())
        best = rows.sort("score", "response", descending=[True, False]).group_by("prompt").first()
        best.sink_parquet(target, compression="zstd")
        return _put(server, f"polars-{number}", target)


def _config(server: S3Server) -> dict[str, str]:
    keys = {name.lower(): value for name, value in server.environment.items()}
    return {**keys, "aws_endpoint": server.endpoint, "aws_region": "us-east-1"}


def _put(server: S3Server, name: str, file: Path) -> int:
    """Write a file of rows into the store; returns how many it has."""
    open_store(server.url("out"), server.options, create=True).create(
        f"{name}.parquet", file.read_bytes()
    )
    rows: int = pq.read_metadata(file).num_rows
    return rows


CONTESTANTS: dict[str, Callable[[S3Server, int], int]] = {
    "select": by_select,
    "duckdb": by_duckdb,
    "polars": by_polars,
}


if __name__ == "__main__":
    main()
