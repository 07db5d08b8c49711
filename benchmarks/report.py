"""The page of `report` is made of millions of rows in the memory of a few shards.

A scored output of synthetic pairs is written (no model: scores are random numbers, texts are cut
from the sample's answers), in shards as `score` cuts them, on the local disk. `report` then makes
the page of it, in a process of its own. Taken are the time, and the largest resident set of that
process and of the processes in which it reads shards, of which there are a few at a time.

    python -m benchmarks.report                     # 50,000, 500,000 and 5 million rows
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_scorer.records import Format, Layout, TextStyle
from batch_scorer.storage import open_store
from benchmarks.common import ROOT, Child, command_line, print_table, report
from tests.helpers.memory import peak_bytes
from tests.helpers.written import write_scored

SIZES = (50_000, 500_000, 5_000_000)
TINY_SIZES = (2_000,)
SHARD_ROWS = 8_192
TEXT_CHARS = 200
SOURCES = 30
SEED = 7
EVERY_S = 0.1
PAIRS = Layout(
    Format.PREFERENCE_PAIR,
    {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    TextStyle.PLAIN,
)
SIDES = ("chosen", "rejected")
ADDED = (
    *(f"score_{side}" for side in SIDES),
    *("margin", "score_error"),
    *(f"num_tokens_{side}" for side in SIDES),
    "score_notes",
)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", help="rows of each output")
    asked = parser.parse_args()
    results = [measured(rows) for rows in asked.sizes or (TINY_SIZES if asked.tiny else SIZES)]
    names = ("rows", "shards", "seconds", "rows_per_s", "page_kb", "report_mb", "reader_mb")
    print_table(names, [[each[name] for name in names] for each in results])
    report("report", asked, {"shard_rows": SHARD_ROWS, "results": results})


def measured(rows: int) -> dict[str, Any]:
    """The time and the memory of the page about so many rows."""
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/scored"
        writer = Child({})
        writer.call(write, output, rows)
        writer.close()
        found = watched(output, Path(folder) / "page.html")
    shards, rate = -(-rows // SHARD_ROWS), round(rows / found["seconds"])
    return {"rows": rows, "shards": shards, **found, "rows_per_s": rate}


def watched(output: str, page: Path) -> dict[str, Any]:
    """Time and memory of the command, from its start to its end."""
    started = time.perf_counter()
    words = ("report", output, "--html", str(page), "--json")
    command = subprocess.Popen(
        [sys.executable, "-m", "batch_scorer", *words], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    peaks: dict[str, int] = {"report": 0, "reader": 0}
    while command.poll() is None:
        own, *readers = peak_bytes(command.pid) or [0]
        peaks["report"] = max(peaks["report"], own)
        peaks["reader"] = max(peaks["reader"], *readers, 0)
        time.sleep(EVERY_S)
    if command.returncode:
        raise RuntimeError(f"report ended with {command.returncode}")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "page_kb": page.stat().st_size // 1000,
        **{f"{name}_mb": peak >> 20 for name, peak in peaks.items()},
    }


def write(output: str, rows: int) -> None:
    """A scored output of so many pairs."""
    write_scored(open_store(output, {}, create=True), shards(rows), PAIRS, ADDED)


def shards(rows: int) -> Iterator[tuple[str, pa.Table]]:
    random = np.random.default_rng(SEED)
    sample = pq.read_table(ROOT / "batch_scorer/data/rollouts/mixed.parquet", columns=["responses"])
    answers = [answer for each in sample["responses"].to_pylist() for answer in each]
    texts = pa.array([answer[:TEXT_CHARS] for answer in answers])
    sources = pa.array([f"source {number:02}" for number in range(SOURCES)])
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - start)
        tokens = random.integers(20, 2_000, (2, count)).astype(np.int32)
        scores = (random.normal(size=(2, count)) + tokens / 2_000).astype(np.float32)
        marked = random.random(count) < 0.01
        columns = {
            name: texts.take(pa.array(random.integers(0, len(texts), count)))
            for name in ("prompt", *SIDES)
        }
        columns["source"] = sources.take(pa.array(random.integers(0, SOURCES, count)))
        for side, each in zip(SIDES, scores, strict=True):
            columns[f"score_{side}"] = pa.array(each, mask=marked)
        columns["margin"] = pa.array(scores[0] - scores[1], mask=marked)
        reasons = ["too_long" if each else None for each in marked.tolist()]
        columns["score_error"] = pa.array(reasons, pa.string())
        for side, each in zip(SIDES, tokens, strict=True):
            columns[f"num_tokens_{side}"] = pa.array(each)
        columns["score_notes"] = pa.nulls(count, pa.list_(pa.string()))
        yield f"{number:05}.parquet", pa.table(columns)


if __name__ == "__main__":
    main()
