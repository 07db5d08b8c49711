"""What it costs to parse foreign bytes in a process apart, against doing it in place.

Real pairs, repeated, in healthy local files, without Ray. Three things are timed: to plan the
files; to turn all their shards into token ids, with the embedded model's tokenizer; and the whole
run without a model (`backend: fake`). Both ways take turns, and all processes are warm. A model
that computes makes the share smaller.

    python -m benchmarks.quarantine                  # 200,000 rows as Parquet, and as JSON lines
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer import quarantine
from batch_scorer.config import Config, load_config
from batch_scorer.inputs.plan import make_plan
from batch_scorer.job import Member
from batch_scorer.runs.derive import look_at_model
from batch_scorer.runs.run import score
from batch_scorer.shard import read_shard
from benchmarks.common import WORKLOADS, Contest, command_line, model_of, print_table, report

ROWS = 200_000
TINY_ROWS = 40
FILE_ROWS = 20_000
ROUNDS = 5


def main() -> None:
    parser = command_line(__doc__, takes_data=True)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    rows = asked.rows or (TINY_ROWS if asked.tiny else ROWS)
    rounds = 1 if asked.tiny else asked.rounds
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model_dir = model_of(asked, Path(folder))
        table = WORKLOADS["mixed"].read(None, asked.data)
        for kind in ("parquet", "jsonl"):
            inputs = Path(folder) / kind
            write(table, rows, inputs, kind)
            config = load_config(
                model=str(model_dir),
                inputs=(str(inputs),),
                output=str(Path(folder) / "out"),
                backend="fake",
                use_ray=False,
            )
            for name, work in works(config).items():
                results.append({"work": name, "kind": kind, **measure(work, rounds)})
                print(results[-1], flush=True)
    names = ("rows", "apart_rows_per_s", "in_place_rows_per_s", "time_ratio")
    print_table(
        ("work", "kind", *names),
        ((one["work"], one["kind"], *(one[name] for name in names)) for one in results),
    )
    report("quarantine", asked, {"rounds": rounds, "results": results})


def write(table: pa.Table, rows: int, folder: Path, kind: str) -> None:
    """The table's rows again and again, in files of at most FILE_ROWS."""
    folder.mkdir()
    for start in range(0, rows, FILE_ROWS):
        count = min(FILE_ROWS, rows - start)
        part = table.take(pa.array([i % table.num_rows for i in range(start, start + count)]))
        file = folder / f"{start:07}.{kind}"
        if kind == "parquet":
            pq.write_table(part, file, row_group_size=1000)
        else:
            file.write_text("".join(f"{json.dumps(row)}\n" for row in part.to_pylist()))


def works(config: Config) -> dict[str, Callable[[], int]]:
    """What is timed, by name; each gives the number of rows that it went through."""
    member = Member(config, look_at_model(config))
    shards = make_plan(config).shards

    def plan() -> int:
        return make_plan(config).num_rows

    def read() -> int:
        return sum(read_shard(shard, [member]).rows[0].num_rows for shard in shards)

    def whole_run() -> int:
        with tempfile.TemporaryDirectory() as output:
            totals = score(config.model_copy(update={"output": output})).totals
        assert totals["shards_failed"] == 0
        return int(totals["rows"])

    return {"plan": plan, "read": read, "whole_run": whole_run}


def measure(work: Callable[[], int], rounds: int) -> dict[str, Any]:
    contest = Contest()
    rows = work()  # what it needs is loaded then
    for number in range(rounds):
        for name in ("apart", "in place") if number % 2 else ("in place", "apart"):
            # In a child everything is called in place.
            with patch.object(quarantine, "_is_child", name == "in place"):
                started = time.perf_counter()
                assert work() == rows
                contest.add(name, rows / (time.perf_counter() - started))
    return {
        "rows": rows,
        "apart_rows_per_s": round(contest.median("apart")),
        "in_place_rows_per_s": round(contest.median("in place")),
        "time_ratio": contest.ratio("in place", "apart"),
    }


if __name__ == "__main__":
    main()
