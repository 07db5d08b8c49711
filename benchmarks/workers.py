"""How the rate of a whole job grows with its workers on one machine: more models, fewer threads.

The embedded model on the CPU, S3 in, Ray Data, S3 out. Every contestant has all cores: one worker
computes with as many threads as there are cores, two with half of them each, and so on. A model
per worker takes memory; what it saves is the waiting of threads for each other.

    python -m benchmarks.workers                     # 1 and 2 workers, 3 rounds
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from batch_scorer.backends.device import cpu_has_bfloat16
from batch_scorer.config import load_config
from batch_scorer.pipeline.session import ray_session
from benchmarks.common import Contest, Family, command_line, environment_set, model_of, report
from benchmarks.end_to_end import cut, run_job, upload
from cluster.local.seaweed import s3_server

SHARD_ROWS = 40
SHARDS = 24
TINY_SHARDS = 4
ROUNDS = 3


def main() -> None:
    parser = command_line(__doc__, takes_data=True)
    parser.add_argument("--workers", type=int, nargs="+", help="of each contestant")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model_dir = model_of(asked, Path(folder))
        report("workers", asked, measure(asked, model_dir))


def measure(asked: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
    shards = cut(asked.data, 2 if asked.tiny else SHARD_ROWS, model_dir)
    parts = list(islice(shards, TINY_SHARDS if asked.tiny else SHARDS))
    contestants = asked.workers or ([1] if asked.tiny else [1, 2])
    rates = Contest()
    peak_mb: dict[str, int] = {}
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
            for number in range(1 if asked.tiny else ROUNDS):
                for workers in contestants:
                    name = f"workers_{workers}"
                    with Family() as family:
                        job = run_job(
                            config.model_copy(update={"workers": workers}), f"{name}-{number}"
                        )
                    rates.add(name, job.metrics.tokens_per_s or 0.0)
                    peak_mb[name] = family.peak_mb["score"]
                print(f"round {number + 1}: {rates.describe_round()} tokens/s", flush=True)
    first = f"workers_{contestants[0]}"
    return {
        "shards": len(parts),
        "tokens": sum(part.rows.num_tokens for part in parts),
        "dtype": dtype,
        "tokens_per_s": {name: round(rates.median(name)) for name in rates.rates},
        "ratios": {
            f"{name}_over_{first}": rates.ratio(name, first)
            for name in rates.rates
            if name != first
        },
        "peak_mb_of_a_worker": peak_mb,
    }


if __name__ == "__main__":
    main()
