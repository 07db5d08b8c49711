"""CPU time of turning stored pairs into token ids, against an older tree of the project.

    python -m benchmarks.tokenising --data DIR --against c13ec54
    python -m benchmarks.tokenising --tiny

Real pairs in Parquet files of their own, one for each round, so that no text comes twice; a model's
whole vocabulary and its own template. Each contestant is a process that works one thread at a time:
this tree, this tree with Hugging Face's tokenizer alone, and, with `--against`, a commit, in a git
worktree for the time. They take turns in every round. Two files go before: in them this tree reads
as much as it takes to load fastokens, loads it and compares all ids; they are told apart. The last
line is the result as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import (
    ROOT,
    WORKLOADS,
    command_line,
    model_of,
    print_table,
    report,
    worktree_of,
)

NOW, PLAIN = "this tree", "this tree, Hugging Face's tokenizer alone"
FIRST_ROWS, ROUND_ROWS, ROUNDS = (1800, 600), 700, 5
TINY_ROWS = 8
MODEL = "llama-3.1"
STAGES = ("read and parse", "render and tokenise", "tokenise alone")
TOGETHER = "all, reading to ids"
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


class Contestant:
    """A process that turns files into ids (`benchmarks/trees/reading.py`), with one tree."""

    def __init__(self, tree: Path, model_dir: Path, *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks/trees/reading.py"), str(model_dir), *options],
            cwd=tree,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def turn(self, file: Path, *, alone: bool) -> dict[str, Any]:
        """What a file took; with `alone`, its texts are tokenised once more by themselves. Raises
        RuntimeError where the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"file": str(file), "alone": alone}), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a contestant ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(answer)
        stages = found.pop("cpu_s")
        stages[TOGETHER] = sum(stages[stage] for stage in STAGES[:2])
        found["us_a_pair"] = {name: 1e6 * s / found["pairs"] for name, s in stages.items()}
        return found


def main() -> None:
    parser = command_line(__doc__, takes_data=True)
    parser.add_argument("--against", metavar="COMMIT", help="an older commit of this repository")
    parser.add_argument("--model", default=MODEL, help=f"of tests/helpers/templates.py ({MODEL})")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model_dir = model_of_vocabulary(asked, folder)
        files = write(asked, folder)
        contestants = {
            NOW: stack.enter_context(Contestant(ROOT, model_dir)),
            PLAIN: stack.enter_context(Contestant(ROOT, model_dir, "--plain")),
        }
        if asked.against:
            tree = stack.enter_context(worktree_of(asked.against))
            contestants[asked.against] = stack.enter_context(Contestant(tree, model_dir))
        rounds = [take_turns(contestants, file, number) for number, file in enumerate(files)]
    result = compared(rounds, list(contestants))
    show(result)
    report("tokenising", asked, {"model": asked.model, **result})


def model_of_vocabulary(asked: argparse.Namespace, folder: Path) -> Path:
    """A folder of a model's tokenizer; of a tiny one where only a smoke test is asked for."""
    if asked.tiny:
        return model_of(asked, folder)
    from tests.helpers.templates import model_folder  # of the tests

    return model_folder(asked.model, folder / asked.model, whole=True)


def write(asked: argparse.Namespace, folder: Path) -> list[Path]:
    """The pairs, two files and one for each round. Raises ValueError for too few."""
    sizes = [TINY_ROWS] * 3 if asked.tiny else [*FIRST_ROWS, *[ROUND_ROWS] * ROUNDS]
    table = WORKLOADS["hh"].read(sum(sizes), asked.data)
    if table.num_rows < sum(sizes):
        raise ValueError(f"{table.num_rows} pairs, {sum(sizes)} are needed; name larger --data")
    files: list[Path] = []
    start = 0
    for size in sizes:
        files.append(folder / f"{len(files)}" / "pairs.parquet")
        files[-1].parent.mkdir()
        pq.write_table(pa.table(table.slice(start, size)), files[-1])
        start += size
    return files


def take_turns(
    contestants: Mapping[str, Contestant], file: Path, number: int
) -> dict[str, dict[str, Any]]:
    names = list(contestants)
    names = names[number % len(names) :] + names[: number % len(names)]
    return {name: contestants[name].turn(file, alone=number >= len(FIRST_ROWS)) for name in names}


def compared(rounds: Sequence[Mapping[str, Mapping[str, Any]]], names: list[str]) -> dict[str, Any]:
    """Microseconds of CPU a pair, medians over the rounds, and what this tree takes of each other
    contestant's: the median of the ratios within a round."""
    first, measured = rounds[: len(FIRST_ROWS)], rounds[len(FIRST_ROWS) :]
    stages = (*STAGES, TOGETHER)

    def spent(turns: Mapping[str, Mapping[str, Any]], name: str, stage: str) -> float:
        return float(turns[name]["us_a_pair"][stage])

    def part(turns: Mapping[str, Mapping[str, Any]], other: str, stage: str) -> float:
        return spent(turns, NOW, stage) / max(spent(turns, other, stage), 1e-9)

    def whole(name: str) -> float:
        return sum(float(turns[name]["pairs"]) * spent(turns, name, TOGETHER) for turns in first)

    medians = {
        name: {s: round(statistics.median(spent(r, name, s) for r in measured), 1) for s in stages}
        for name in names
    }
    others = [name for name in names if name != NOW]
    shares = {
        name: {s: round(statistics.median(part(r, name, s) for r in measured), 4) for s in stages}
        for name in others
    }
    return {
        "rounds": len(measured),
        "pairs": sum(turns[NOW]["pairs"] for turns in measured),
        "tokens": sum(turns[NOW]["tokens"] for turns in measured),
        "us_a_pair": medians,
        "share": shares,
        "share_of_first_files": {name: round(whole(NOW) / whole(name), 3) for name in others},
        "sound": all(len({turns[name]["digest"] for name in names}) == 1 for turns in rounds),
    }


def show(result: Mapping[str, Any]) -> None:
    stages = (*STAGES, TOGETHER)
    print_table(
        ["CPU µs a pair", *stages],
        [
            [name, *(spent[stage] for stage in stages)]
            for name, spent in result["us_a_pair"].items()
        ],
    )
    print_table(
        ["this tree's share of", *stages, "the first files"],
        [
            [name, *(share[s] for s in stages), result["share_of_first_files"][name]]
            for name, share in result["share"].items()
        ],
    )


if __name__ == "__main__":
    main()
