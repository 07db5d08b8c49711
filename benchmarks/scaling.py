"""What a row costs from a thousand rows to a million, and how much memory that takes.

The whole job without a model (`backend: fake`): real pairs from S3, rendered and tokenised with
the embedded model's tokenizer, through Ray Data, committed to S3. Every size is a job of its own
process, on a new server: it is stopped after half of its shards, resumed, and once more begun when
all is done. Memory is the largest resident set of any process of a kind; CPU seconds are of all
processes but the S3 server, which counts its requests itself.

    python -m benchmarks.scaling                     # 1,000 to 1,000,000 rows
    python -m benchmarks.scaling --nodes 2 --sizes 100000 1000000 2000000
"""

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.config import load_config
from batch_scorer.pipeline.session import ray_session
from batch_scorer.records import Receipt
from batch_scorer.runs.metrics import Metrics
from batch_scorer.runs.remaining import Work
from batch_scorer.runs.run import score
from batch_scorer.storage import in_threads, open_store
from benchmarks.common import (
    WORKLOADS,
    Child,
    Family,
    command_line,
    environment_set,
    model_of,
    print_table,
    report,
)
from cluster.local.local_cluster import local_cluster
from cluster.local.seaweed import S3Server, s3_server

FILE_ROWS = 2_000
"""About the million tokens of a shard."""
SIZES = (1_000, 10_000, 100_000, 1_000_000)
TINY_SIZES = (60,)
_WRITERS = 8
_CPUS = 2
"""Of each node of a local cluster, as far as its scheduler knows."""


def main() -> None:
    parser = command_line(__doc__, takes_data=True)
    parser.add_argument("--sizes", type=int, nargs="+", help="rows of each run")
    parser.add_argument("--nodes", type=int, default=0, help="of a local cluster to run it on")
    asked = parser.parse_args()
    sizes = asked.sizes or (TINY_SIZES if asked.tiny else SIZES)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = model_of(asked, Path(folder))
        runs = []
        for size in sizes:
            file_rows = 20 if asked.tiny else FILE_ROWS
            runs.append(run(size, file_rows, model_dir, asked.data, asked.nodes, tiny=asked.tiny))
            print(runs[-1], flush=True)
    figures = ("rows_per_s", "read_us", "tokenize_us", "write_us", "cpu_us", "requests_a_shard")
    times = ("plan_s", "resume_s", "again_s")
    print_table(
        ("rows", *figures, "driver MB", "worker MB", *times),
        (
            (
                one["rows"],
                *(one[name] for name in figures),
                one["peak_mb"]["driver"],
                max(one["peak_mb"].get(kind, 0) for kind in ("score", "read and write")),
                *(one[name] for name in times),
            )
            for one in runs
        ),
    )
    report("scaling", asked, {"nodes": asked.nodes, "runs": runs})


def run(
    rows: int, file_rows: int, model_dir: Path, data: Path | None, nodes: int, *, tiny: bool
) -> dict[str, Any]:
    """One size, on a new server and, unless it is tiny, in a new process."""
    with ExitStack() as stack:
        server = stack.enter_context(s3_server())
        with environment_set(server.environment):
            upload(rows, file_rows, server, data)
            if tiny and not nodes:
                return measure(server, model_dir)
        environment, roots = server.environment, []
        if nodes:
            cluster = stack.enter_context(
                local_cluster(nodes=nodes, cpus=_CPUS, gpus=0, env=server.environment)
            )
            environment = environment | cluster.environment
            roots = [node.pid for node in (cluster.head, *cluster.nodes)]
        child = Child(environment)
        stack.callback(child.close)
        return child.call(measure, server, model_dir, roots)


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


class Stopped(Exception):
    """Half of the shards are committed."""


class Watch:
    """Sums up all receipts that come (a shard that was under way at the stop gives none), and stops
    the first run after half of its shards."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.rows = 0
        self.planned_at = 0.0
        self._until_stop: int | None = None

    def planned(self, work: Work) -> None:
        self.planned_at = time.perf_counter()
        if self._until_stop is None:
            self._until_stop = len(work.todo) // 2

    def finished(self, receipt: Receipt) -> None:
        assert self._until_stop is not None
        self.metrics.add(receipt)
        self.rows += receipt.num_rows
        self._until_stop -= 1
        if self._until_stop == 0:
            raise Stopped


def measure(server: S3Server, model_dir: Path, roots: Sequence[int] = ()) -> dict[str, Any]:
    """The job in two halves, and the same command again, which finds that all is done.

    `roots` are the processes of a cluster that it runs on.
    """
    config = load_config(
        model=str(model_dir),
        inputs=(server.url("in"),),
        output=server.url("out"),
        store_options=server.options,
        backend="fake",
    )
    watch = Watch()
    before = server.requests()
    with Family(roots) as family, ray_session(config):
        started = time.perf_counter()
        with suppress(Stopped):
            score(config, watch)
        plan_s, first_s = watch.planned_at - started, time.perf_counter() - started
        started = time.perf_counter()
        resumed = score(config, watch)
        resume_s, second_s = watch.planned_at - started, time.perf_counter() - started
        requests = server.requests() - before
        started = time.perf_counter()
        again = score(config)
        again_s = time.perf_counter() - started
    assert resumed.is_complete and again.run.shards == 0
    rows, shards = resumed.totals["rows"], resumed.totals["shards"]
    return {
        "rows": rows,
        "shards": shards,
        "resumed_shards": resumed.run.shards,
        "tokens": resumed.totals["tokens"],
        "elapsed_s": round(first_s + second_s, 1),
        "rows_per_s": round(rows / (first_s + second_s), 1),
        "plan_s": round(plan_s, 2),
        "resume_s": round(resume_s, 2),
        "again_s": round(again_s, 2),
        "requests": dict(requests),
        "requests_a_shard": round(requests.total() / shards, 2),
        "read_us": round(1e6 * watch.metrics.read_s / watch.rows, 1),
        "tokenize_us": round(1e6 * watch.metrics.tokenize_s / watch.rows, 1),
        "write_us": round(1e6 * watch.metrics.write_s / watch.rows, 1),
        "cpu_us": round(1e6 * sum(family.cpu_s.values()) / rows, 1),
        "cpu_s": family.cpu_s,
        "peak_mb": family.peak_mb,
    }


if __name__ == "__main__":
    main()
