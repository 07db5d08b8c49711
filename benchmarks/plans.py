"""What many shards cost before any is scored: to plan them, once more, to resume, to see how far.

Each tree, this one and that of the commit to compare with, does each step in a process of its own,
and they take turns. The listing is synthetic: one small file of pairs under many names on a local
disk, one shard each, so that nothing but the number of files and shards weighs; half of the shards
are committed, as copies of one that was scored with `backend: fake`.

- plan: nothing is known of the files.
- second plan: a run has begun the output, and has stored what it found out.
- resume: `score`, until it knows what is left to do.
- status: of the output that is half done.

Seconds are of wall clocks, without the imports; CPU seconds are of all processes, memory is the
largest resident set of the one that plans (the driver), imports included.

    python -m benchmarks.plans --against c13ec54
    python -m benchmarks.plans --shards 1000000 --known

With `--known` it begins at the second plan: what looking into the files would show is written down
for all of them by what it shows of one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.common import ROOT, command_line, print_table, report, worktree_of
from benchmarks.trees.planning import linked
from tests.helpers.inputs import pairs
from tests.helpers.tiny import tiny_reward_model

SHARDS, TINY_SHARDS = 100_000, 60
ROWS = 4
_FILES_A_FOLDER = 1_000
_STEP_OF_A_TREE = str(ROOT / "benchmarks" / "trees" / "planning.py")
STEPS = ("plan", "commit half", "second plan", "resume", "status")
STEPS_OF_KNOWN = ("know", *STEPS[1:])
NOT_TIMED = ("know", "commit half")
FIGURES = ("seconds", "cpu_s", "peak_mb")


@dataclass(frozen=True)
class Tree:
    """One version of the program, and its folder for inputs and output."""

    name: str
    code: Path
    home: Path

    def do(self, step: str, model_dir: Path) -> dict[str, float]:
        """What a step gave and took. Raises CalledProcessError where it fails."""
        done = subprocess.run(
            [sys.executable, _STEP_OF_A_TREE, step, str(self.home), str(model_dir)],
            cwd=self.code,
            env={**os.environ, "PYTHONPATH": str(self.code)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--against", metavar="COMMIT", help="an older commit of this repository")
    parser.add_argument("--shards", type=int, help=f"of the plan ({SHARDS:,})")
    parser.add_argument("--known", action="store_true", help="no file is looked into; one tree")
    parser.add_argument("--rounds", type=int, default=1, help="of all steps but the untimed one")
    asked = parser.parse_args()
    if asked.known and asked.against:
        parser.error("--known: the other tree knows no files")
    shards = asked.shards or (TINY_SHARDS if asked.tiny else SHARDS)
    with tempfile.TemporaryDirectory(prefix="bs", dir="/tmp") as name, ExitStack() as stack:
        home = Path(name)
        model_dir = tiny_reward_model(home / "model")
        trees = [Tree("now", ROOT, home / "now")]
        if asked.against:
            code = stack.enter_context(worktree_of(asked.against))
            trees.append(Tree("before", code, home / "before"))
        for tree in trees:
            write_inputs(tree.home / "in", shards)
        result = measure(trees, model_dir, asked)
    show(result, [tree.name for tree in trees])
    figures = {"against": asked.against, "shards": shards, **result}
    report("plans", asked, figures)


def write_inputs(folder: Path, files: int) -> None:
    """One small file under many names."""
    folder.mkdir(parents=True)
    pq.write_table(pairs(ROWS), folder.parent / "pairs.parquet")
    link = linked(folder.parent, "pairs.parquet")
    for number in range(files):
        link(f"in/{number // _FILES_A_FOLDER:04}/pairs-{number:07}.parquet")


def measure(
    trees: list[Tree], model_dir: Path, asked: argparse.Namespace
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """What each step took in each tree, in every round."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for step in STEPS_OF_KNOWN if asked.known else STEPS:
        for number in range(1 if step in NOT_TIMED else asked.rounds):
            for tree in trees[:: -1 if number % 2 else 1]:
                took = tree.do(step, model_dir)
                print(f"{step}, {tree.name}: {took}", flush=True)
                if step not in NOT_TIMED:
                    found.setdefault(step, {}).setdefault(tree.name, []).append(took)
    return found


def show(result: dict[str, dict[str, list[dict[str, float]]]], names: list[str]) -> None:
    """The best of each figure: other work on the machine only adds."""

    def best(step: str, tree: str, figure: str) -> float:
        return min(round_[figure] for round_ in result[step][tree])

    lines: list[tuple[Any, ...]] = []
    for step in result:
        for figure in FIGURES:
            values = [best(step, name, figure) for name in names]
            ratio = [f"{values[0] / max(values[1], 1e-9):.3f}"] if len(values) > 1 else []
            lines.append((f"{step}, {figure}", *(f"{value:,.2f}" for value in values), *ratio))
    print_table(("", *names, *(["ratio"] if len(names) > 1 else [])), lines)


if __name__ == "__main__":
    main()
