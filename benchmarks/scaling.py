"""What a row costs from a thousand rows to a million, and how much memory that takes.

The whole job without a model (`backend: fake`): real pairs from S3, rendered and tokenised with
the embedded model's tokenizer, through Ray Data, committed to S3. Every size is a run of its own
process. Memory is the largest resident set of any process of a kind; CPU seconds are of all
processes but the S3 server.

    python benchmarks/scaling.py                     # 1,000 to 1,000,000 rows
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from common import WORKLOADS, Child, Family, environment_set, machine, print_table
from seaweed import S3Server, s3_server
from tiny import tiny_reward_model

from batch_scorer.config import load_config
from batch_scorer.models.embedded import build_embedded_model, default_embedded_directory
from batch_scorer.run import score
from batch_scorer.session import ray_session
from batch_scorer.storage import in_threads, open_store

FILE_ROWS = 2_000
"""About the million tokens of a shard."""
SIZES = (1_000, 10_000, 100_000, 1_000_000)
TINY_SIZES = (60,)
_WRITERS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="show that it runs; no real figures")
    parser.add_argument("--sizes", type=int, nargs="+", help="rows of each run")
    parser.add_argument("--data", type=Path, help="folder of larger data")
    asked = parser.parse_args()
    sizes = asked.sizes or (TINY_SIZES if asked.tiny else SIZES)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = (
            tiny_reward_model(Path(folder) / "model")
            if asked.tiny
            else build_embedded_model(default_embedded_directory(), print)
        )
        runs = []
        for size in sizes:
            file_rows = 20 if asked.tiny else FILE_ROWS
            runs.append(run(size, file_rows, model_dir, asked.data, tiny=asked.tiny))
            print(runs[-1], flush=True)
    figures = ("read_us", "tokenize_us", "write_us", "cpu_us")
    print_table(
        ("rows", *(f"{name} a row" for name in figures), "driver MB", "worker MB", "again s"),
        (
            (
                one["rows"],
                *(one[name] for name in figures),
                one["peak_mb"]["driver"],
                max(one["peak_mb"].get(kind, 0) for kind in ("score", "read and write")),
                one["again_s"],
            )
            for one in runs
        ),
    )
    result = {"benchmark": "scaling", "tiny": asked.tiny, "runs": runs, "machine": machine()}
    print(json.dumps(result))


def run(
    rows: int, file_rows: int, model_dir: Path, data: Path | None, *, tiny: bool
) -> dict[str, Any]:
    """One size, on a new server and, unless it is tiny, in a new process."""
    with s3_server() as server:
        with environment_set(server.environment):
            upload(rows, file_rows, server, data)
            if tiny:
                return measure(server, model_dir)
        child = Child(server.environment)
        try:
            return child.call(measure, server, model_dir)
        finally:
            child.close()


def upload(rows: int, file_rows: int, server: S3Server, data: Path | None) -> None:
    """The pairs there are, from the beginning again where they end, in files of one shard each."""
    pairs = pa.concat_tables([WORKLOADS[name].read(10**9, data) for name in ("hh", "mixed")])
    pairs = pa.concat_tables([pairs] * (2 + file_rows // pairs.num_rows))
    store = open_store(server.url("in"), server.options)

    def put(start: int) -> None:
        count = min(file_rows, rows - start)
        sink = pa.BufferOutputStream()
        pq.write_table(pairs.slice(start % (pairs.num_rows - count), count), sink)
        store.create(f"pairs-{start:09}.parquet", sink.getvalue().to_pybytes())

    list(in_threads(put, range(0, rows, file_rows), _WRITERS))


def measure(server: S3Server, model_dir: Path) -> dict[str, Any]:
    """The job, and the same command again, which finds that all is done."""
    config = load_config(
        model=str(model_dir),
        inputs=(server.url("in"),),
        output=server.url("out"),
        store_options=server.options,
        backend="fake",
    )
    with Family() as family, ray_session(config):
        started = time.perf_counter()
        summary = score(config)
        elapsed_s = time.perf_counter() - started
        started = time.perf_counter()
        again = score(config)
        again_s = time.perf_counter() - started
    assert summary.is_complete and again.run.shards == 0
    rows, metrics = summary.run.rows, summary.metrics
    return {
        "rows": rows,
        "shards": summary.run.shards,
        "tokens": metrics.scored_tokens,
        "elapsed_s": round(elapsed_s, 1),
        "span_s": round(metrics.span_s, 1),
        "again_s": round(again_s, 1),
        "read_us": round(1e6 * metrics.read_s / rows, 1),
        "tokenize_us": round(1e6 * metrics.tokenize_s / rows, 1),
        "write_us": round(1e6 * metrics.write_s / rows, 1),
        "cpu_us": round(1e6 * sum(family.cpu_s.values()) / rows, 1),
        "cpu_s": family.cpu_s,
        "peak_mb": family.peak_mb,
    }


if __name__ == "__main__":
    main()
