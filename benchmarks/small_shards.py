"""What small shards cost: the same rows in many files and in few, each file a shard.

Pairs of a few dozen tokens on local disk, a tiny model on two CPU workers, Ray Data, local disk
again. The rate is from the first shard's scoring to the last commit, so without start-up. Both
contestants score the same sequences; the tokens that are computed differ a little, because common
beginnings are shared within a shard.

    python -m benchmarks.small_shards                # 10,000 shards of 50 rows against 20 shards
    python -m benchmarks.small_shards --many 1000    # the same with a tenth of the rows
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.config import Config, load_config
from batch_scorer.pipeline.session import ray_session
from batch_scorer.runs.run import Summary, score
from benchmarks.common import Contest, Family, command_line, print_table, report
from tests.helpers.inputs import pairs
from tests.helpers.tiny import tiny_reward_model

MANY, FEW, ROWS, ROUNDS = 10_000, 20, 50, 3
TINY_MANY, TINY_ROWS = 8, 4
WORKERS = 2
_DISTINCT_ROWS = 5_000
_FILES_A_FOLDER = 1_000
_EVERYTHING = 10**9


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--many", type=int, help=f"small shards; default: {MANY:,}")
    parser.add_argument("--rows", type=int, help=f"of a small shard; default: {ROWS}")
    parser.add_argument("--few", type=int, help=f"large shards of the same rows; default: {FEW}")
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--rounds", type=int)
    asked = parser.parse_args()
    asked.many = asked.many or (TINY_MANY if asked.tiny else MANY)
    asked.rows = asked.rows or (TINY_ROWS if asked.tiny else ROWS)
    asked.few = asked.few or (2 if asked.tiny else FEW)
    asked.rounds = asked.rounds or (1 if asked.tiny else ROUNDS)
    with tempfile.TemporaryDirectory(prefix="bs", dir="/tmp") as folder:
        report("small_shards", asked, measure(asked, Path(folder)))


def measure(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = tiny_reward_model(folder / "model")
    total = asked.many * asked.rows
    shards = {"many": asked.many, "few": asked.few}
    for name, count in shards.items():
        write(folder / name, total, -(-total // count))
    rates = Contest()
    cpu_s: dict[str, dict[str, float]] = {}
    runs: dict[str, Summary] = {}
    for number in range(asked.rounds):
        for name in list(shards)[:: -1 if number % 2 else 1]:
            config = load_config(
                model=str(model),
                inputs=(str(folder / name),),
                output=str(folder / f"{name}-{number}"),
                workers=asked.workers,
                shard_rows=_EVERYTHING,
                shard_tokens=_EVERYTHING,
            )
            runs[name], cpu_s[name] = run(config)
            rates.add(name, total / runs[name].metrics.span_s)
        print(f"round {number + 1}: {rates.describe_round()} rows/s", flush=True)
    print_table(
        ("shards", "number", "rows/s", "idle share of a worker", "CPU seconds of the last round"),
        (
            (
                name,
                runs[name].totals["shards"],
                round(rates.median(name)),
                runs[name].metrics.idle_share,
                cpu_s[name],
            )
            for name in shards
        ),
    )
    return {
        "shards": shards,
        "rows": total,
        "tokens": runs["few"].totals["tokens"],
        "workers": asked.workers,
        "rows_per_s": {
            name: [round(rate) for rate in found] for name, found in rates.rates.items()
        },
        "ratio": rates.ratio("many", "few"),
        "cpu_s": cpu_s,
    }


def write(folder: Path, total: int, rows: int) -> None:
    """Files of so many rows each, out of few distinct ones in turn."""
    distinct = pairs(min(total, _DISTINCT_ROWS))
    endless = pa.concat_tables([distinct] * (-(-(rows) // distinct.num_rows) + 1))
    for number, first in enumerate(range(0, total, rows)):
        start = first % distinct.num_rows
        file = folder / f"{number // _FILES_A_FOLDER:03}" / f"pairs-{number:06}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(endless.slice(start, min(rows, total - first)), file)


def run(config: Config) -> tuple[Summary, dict[str, float]]:
    """A run on a Ray of its own, and the CPU seconds of each kind of process."""
    with ray_session(config), Family() as family:
        summary = score(config)
    assert summary.is_complete
    return summary, family.cpu_s


if __name__ == "__main__":
    main()
