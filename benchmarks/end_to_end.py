"""The whole job against the bare backend, and both against what people run today.

(a) padded    transformers, batches of 16 in file order, padded to the longest
(b) sorted    the same, sorted by length under a token budget
(c) backend   this project's hf backend alone: token ids in, scores out, shard after shard
(d) job       the whole job: S3 in, Ray Data, S3 out, committed

All in the model's default dtype, on the same rows, in turn, several rounds. (d) is counted from
the first shard's scoring to the last commit, so without start-up; that is reported beside it, with
the seconds of every stage as the shards' receipts have them.

    python -m benchmarks.end_to_end                  # 3 rounds of 120 pairs
    python -m benchmarks.end_to_end --minutes 10     # (c) and (d) alone, so long each: goodput
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.device import cpu_has_bfloat16
from batch_scorer.backends.hf import HFBackend
from batch_scorer.config import Config, load_config
from batch_scorer.pipeline.session import ray_session
from batch_scorer.records import TokenizedRows
from batch_scorer.runs.run import Summary, score
from batch_scorer.storage import open_store
from benchmarks.common import (
    PAIR,
    WORKLOADS,
    Contest,
    Padded,
    by_length,
    command_line,
    environment_set,
    in_file_order,
    model_of,
    report,
    tokenize,
)
from cluster.local.seaweed import s3_server

SHARD_ROWS = 12
LONG_SHARD_ROWS = 240
"""About 20 seconds of the embedded model on two cores, as shards of a real run are."""
EVERYTHING = 10**9


@dataclass(frozen=True)
class Part:
    """One file, and so one shard."""

    table: pa.Table
    rows: TokenizedRows


def main() -> None:
    parser = command_line(__doc__, takes_data=True)
    parser.add_argument("--minutes", type=float, help="length of (c) and of (d), in one round")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model_dir = model_of(asked, Path(folder))
        report("end_to_end", asked, measure(asked, model_dir))


def measure(asked: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
    backend = HFBackend(EngineSettings(model_dir, dtype=dtype, device="cpu"))
    padded = None if asked.minutes else Padded.load(model_dir, dtype)
    rounds = 1 if asked.tiny or asked.minutes else 3
    if asked.minutes:
        shards = cut(asked.data, LONG_SHARD_ROWS, model_dir)
        first = next(shards)
        backend.score(first.rows)
        wanted = 60 * asked.minutes * first.rows.num_tokens / timed(backend, [first])
        parts = [first]
        while sum(part.rows.num_tokens for part in parts) < wanted:
            parts.append(next(shards))
    elif asked.tiny:
        parts = list(islice(cut(asked.data, 3, model_dir), 4))
    else:
        parts = list(islice(cut(asked.data, SHARD_ROWS, model_dir), 10))
    with s3_server() as server, environment_set(server.environment):
        for number, part in enumerate(parts):
            upload(part.table, server.url("in"), f"pairs-{number:04}.parquet", server.options)
        config = load_config(
            model=str(model_dir),
            inputs=(server.url("in"),),
            output=server.url("out"),
            store_options=server.options,
            dtype=dtype,
        )
        with ray_session(config):
            figures = contest(config, backend, padded, parts, rounds)
    return {
        "pairs": sum(part.table.num_rows for part in parts),
        "shards": len(parts),
        "tokens": sum(part.rows.num_tokens for part in parts),
        "dtype": dtype,
        "rounds": rounds,
        **figures,
    }


def contest(
    config: Config, backend: HFBackend, padded: Padded | None, parts: list[Part], rounds: int
) -> dict[str, Any]:
    """(c) has one half of the shards before (d) and the other after it, so that a machine that
    slows down slows both."""
    everything = pa.concat_tables([part.table for part in parts])
    rows = tokenize(everything, PAIR, Path(config.one_model))
    timed(backend, parts[:2])
    rates = Contest()
    jobs: list[Summary] = []
    for number in range(rounds):
        if padded is not None:
            with rates.timed("a_padded", rows.num_tokens):
                padded.score(rows, in_file_order(rows))
            with rates.timed("b_sorted", rows.num_tokens):
                padded.score(rows, by_length(rows))
        seconds = timed(backend, parts[::2])
        jobs.append(run_job(config, f"round-{number}"))
        seconds += timed(backend, parts[1::2])
        rates.add("c_backend", rows.num_tokens / seconds)
        rates.add("d_job", jobs[-1].metrics.tokens_per_s or 0.0)
        print(f"round {number + 1}: {rates.describe_round()} tokens/s", flush=True)
    compared = [("d_job", "c_backend")]
    if padded is not None:
        compared += [("c_backend", "a_padded"), ("c_backend", "b_sorted"), ("d_job", "a_padded")]
    ratios = {f"{one[0]}_over_{other[0]}": rates.ratio(one, other) for one, other in compared}
    print(", ".join(f"{name} {ratio}" for name, ratio in ratios.items()))
    return {
        "tokens_per_s": {name: round(rates.median(name)) for name in rates.rates},
        "ratios": ratios,
        "jobs": [describe(job) for job in jobs],
    }


def cut(data: Path | None, shard_rows: int, model_dir: Path) -> Iterator[Part]:
    """Real pairs in file order, from the beginning again where they end; never the same pair
    twice in a shard."""
    tables = [WORKLOADS[name].read(EVERYTHING, data) for name in ("hh", "mixed")]
    pairs = pa.concat_tables(tables)
    for start in count(0, shard_rows):
        table = pa.concat_tables([pairs, pairs]).slice(start % pairs.num_rows, shard_rows)
        yield Part(table, tokenize(table, PAIR, model_dir))


def timed(backend: HFBackend, parts: list[Part]) -> float:
    """Seconds for these shards."""
    started = time.perf_counter()
    for part in parts:
        backend.score(part.rows)
    return time.perf_counter() - started


def upload(table: pa.Table, url: str, name: str, options: dict[str, str]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    open_store(url, options).create(name, sink.getvalue().to_pybytes())


def run_job(config: Config, name: str) -> Summary:
    summary = score(config.model_copy(update={"output": f"{config.output}-{name}"}))
    assert summary.is_complete
    return summary


def describe(job: Summary) -> dict[str, Any]:
    """Start-up, and the seconds of each stage summed over shards."""
    metrics = job.metrics.to_json(job.run)
    return {
        "start_up_s": round(job.elapsed_s - job.metrics.span_s, 1),
        **{name: value and round(value, 4) for name, value in metrics.items()},
    }


if __name__ == "__main__":
    main()
