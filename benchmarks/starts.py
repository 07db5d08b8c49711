"""How long people wait beside the scoring: for the first committed shard, and for "nothing to do".

Each tree, this one and that of the commit to compare with, is the whole program in a process of its
own, with a cache folder of its own; they take turns. The rows are the demo's, on local disk:

- cold: from `score` to the first committed shard, with an empty cache.
- warm: the same into a new output, with what the cold start left in the cache.
- done: `score` on a finished output.
- night: `nightly` where nothing is new.

Cold and warm starts are stopped at their first shard; `--starts N` makes more of them, which take
longest. Times are of wall clocks, from the process's start.

    python -m benchmarks.starts --against c13ec54
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.common import (
    ROOT,
    Contest,
    command_line,
    model_of,
    print_table,
    report,
    worktree_of,
)

ROUNDS, STARTS = 5, 3
ROWS = 4
"""Of each file of the finished output and the night; the starts have all."""
SHARD_ROWS = 50
_POLL_S = 0.01
_MOST_S = 600.0
_DATA = ROOT / "batch_scorer" / "data"


@dataclass(frozen=True)
class Tree:
    """One version of the program, and its folder for outputs and cache."""

    name: str
    code: Path
    home: Path
    model: Path

    def run(self, command: str, output: str, inputs: Path) -> float:
        """Seconds of a whole command, which has to succeed."""
        started = time.perf_counter()
        process = self._start(command, output, inputs)
        if process.wait(_MOST_S):
            raise RuntimeError(f"{self.name}: {command}: {(self.home / 'log').read_text()}")
        return time.perf_counter() - started

    def first_shard(self, output: str) -> float:
        """Seconds from `score` to its first committed shard; the run is stopped there."""
        folder = self.home / output
        started = time.perf_counter()
        process = self._start("score", output, _DATA, "--shard-rows", SHARD_ROWS)
        try:
            while not any(folder.glob("**/*.parquet")):
                if process.poll() is not None or time.perf_counter() - started > _MOST_S:
                    raise RuntimeError(f"{self.name}: {(self.home / 'log').read_text()}")
                time.sleep(_POLL_S)
            return time.perf_counter() - started
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(_MOST_S)
            shutil.rmtree(folder)

    def forget(self) -> None:
        """Empty the cache."""
        shutil.rmtree(self.home / "cache", ignore_errors=True)

    def _start(
        self, command: str, output: str, inputs: Path, *arguments: object
    ) -> "subprocess.Popen[bytes]":
        words = [command, inputs / "pairs", inputs / "rollouts", "--model", self.model]
        words += ["--output", self.home / output, *arguments]
        # As for everybody, Python keeps what it has compiled of the program.
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        with (self.home / "log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "batch_scorer.cli", *map(str, words)],
                cwd=self.code,
                env={**kept, "XDG_CACHE_HOME": str(self.home / "cache")},
                stdout=log,
                stderr=log,
            )


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--against", metavar="COMMIT", help="the other tree; default: HEAD")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of done and night")
    parser.add_argument("--starts", type=int, default=STARTS, help="rounds of cold and warm starts")
    asked = parser.parse_args()
    if asked.tiny:
        asked.rounds = asked.starts = 1
    contest = {name: Contest() for name in ("cold", "warm", "done", "night")}
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bs", dir="/tmp")))
        trees = list(_trees(asked, home, stack))
        few = _few_rows(home / "few")
        for tree in trees:
            tree.run("score", "done", few)
            tree.run("nightly", "nights", few)
        for number in range(asked.rounds):
            for tree in trees[:: -1 if number % 2 else 1]:
                for name, command, output in (
                    ("done", "score", "done"),
                    ("night", "nightly", "nights"),
                ):
                    seconds = tree.run(command, output, few)
                    contest[name].add(tree.name, 1 / seconds)
            _say(number, contest, "done", "night")
        for number in range(asked.starts):
            for tree in trees[:: -1 if number % 2 else 1]:
                tree.forget()
                for name in ("cold", "warm"):
                    contest[name].add(tree.name, 1 / tree.first_shard(name))
            _say(number, contest, "cold", "warm")
    ours, theirs = (tree.name for tree in trees)
    print_table(
        ("seconds", ours, theirs, "ratio"),
        (
            (
                name,
                *(f"{1 / one.median(tree):.2f}" for tree in (ours, theirs)),
                one.ratio(theirs, ours),
            )
            for name, one in contest.items()
        ),
    )
    figures = {
        name: {
            "seconds": {
                tree: [round(1 / r, 2) for r in rates] for tree, rates in one.rates.items()
            },
            "ratio": one.ratio(theirs, ours),
        }
        for name, one in contest.items()
    }
    report("starts", asked, {"against": asked.against, **figures})


def _few_rows(folder: Path) -> Path:
    """The first rows of each of the demo's files."""
    for file in _DATA.glob("*/*.parquet"):
        copy = folder / file.relative_to(_DATA)
        copy.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(file).slice(0, ROWS), copy)
    return folder


def _trees(asked: argparse.Namespace, home: Path, stack: ExitStack) -> Iterator[Tree]:
    model = model_of(asked, home)
    before = stack.enter_context(worktree_of(asked.against or "HEAD"))
    for name, code in (("now", ROOT), ("before", before)):
        (home / name).mkdir()
        yield Tree(name, code, home / name, model)


def _say(number: int, contest: dict[str, Contest], *names: str) -> None:
    seconds = (
        f"{name}: "
        + ", ".join(f"{tree} {1 / r[-1]:.2f} s" for tree, r in contest[name].rates.items())
        for name in names
    )
    print(f"round {number + 1}: {'; '.join(seconds)}", flush=True)


if __name__ == "__main__":
    main()
