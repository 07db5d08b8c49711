"""Plans, resumes and looks at an output, in whichever tree of this project comes first on the path.

    python benchmarks/trees/planning.py STEP FOLDER MODEL_DIR

`benchmarks/plans.py` starts it, each step in a process of its own. The last line of its output is
JSON: wall seconds, CPU seconds of the process and those that it started, and its largest resident
set. It imports nothing of the project that one of the trees lacks.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from batch_scorer import shard as steps
from batch_scorer.config import load_config
from batch_scorer.storage import open_store

IS_NEW = (Path(steps.__file__).parent / "inputs").is_dir()
"""By a file: another tree may be installed, and would be found for what this one lacks."""
MODULES = (
    ("runs.preview", "run"),
    ("runs.run", "run"),
    ("runs.status", "reports.status"),
    ("reports.results", "reports.summary"),
)
"""What a command imports before it begins."""
LINKS = 10_000
"""Names of one file; file systems allow some ten thousands."""
RECEIPTS = 1_000
"""Of a segment of the ledger."""


class Enough(Exception):
    """It is known what is to do, or a shard is committed."""


class Until:
    """Stops a run when it is planned, or at its first shard; keeps what it was told."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self.work: Any = None
        self.receipt: Any = None

    def planned(self, work: Any) -> None:
        self.work = work
        if self._stage == "planned":
            raise Enough

    def finished(self, receipt: Any) -> None:
        self.receipt = receipt
        raise Enough


def main(step: str, folder: Path, model_dir: str) -> None:
    config = load_config(
        model=model_dir,
        inputs=(str(folder / "in"),),
        output=str(folder / "out"),
        backend="fake",
        use_ray=False,
    )
    if IS_NEW:
        import_module("batch_scorer.arrow").without_pandas()  # as the command line does
    for now, before in MODULES:
        of_tree(now, before)
    started, before_s = time.perf_counter(), cpu_s()
    counts = STEPS[step](config)
    spent = {"seconds": time.perf_counter() - started, "cpu_s": cpu_s() - before_s}
    print(json.dumps({**counts, **spent, "peak_mb": peak_mb()}))


def plan(config: Any) -> dict[str, int]:
    """As `plan` does."""
    ahead = of_tree("runs.preview", "run").look_ahead(config, with_model=False)
    return {"shards": len(ahead.plan.shards), "rows": ahead.plan.num_rows}


def resume(config: Any) -> dict[str, int]:
    """As `score` does, until it begins to score."""
    until = Until("planned")
    with suppress(Enough):
        of_tree("runs.run", "run").score(config, until)
    return {"shards": len(until.work.plan.shards), "done": len(until.work.done)}


def status(config: Any) -> dict[str, int]:
    found = of_tree("runs.status", "reports.status").read_status(config.output)
    return {"shards": found.planned_shards, "done": found.shards_committed}


def know(config: Any) -> dict[str, int]:
    """Store what looking into all files would show; they are one file. In this tree alone."""
    planning, tables = of_tree("inputs.plan", ""), of_tree("inputs.tables", "")
    sources = [source for source, _ in of_tree("inputs.sources", "").list_inputs(config).found]
    first = planning.make_plan(config.model_copy(update={"inputs": (sources[0].url,)}))
    everything = first.files.facts.take(np.zeros(len(sources), np.int64))
    known = of_tree("runs.derive", "").known_files(config)
    open_store(config.output, config.store_options, create=True)
    known.recall(planning._question(config, planning.SCALAR, None, ()), sources)
    known.keep(tables.FileTable(sources, everything), ())
    return {"shards": len(sources)}


def commit_half(config: Any) -> dict[str, int]:
    """Begin the output, and put the shard that was scored first in place of half of them all."""
    until = Until("finished")
    with suppress(Enough):
        of_tree("runs.run", "run").score(config, until)
    store = open_store(config.output, config.store_options)
    ledger = of_tree("outputs.ledger", "manifest").Ledger(store, 1, "0" * 8, every_s=1e9)
    half = len(until.work.todo) // 2
    shards = [shard for shard in until.work.todo if shard.output_key != until.receipt.output_key]
    links = linked(Path(config.output), until.receipt.output_key)
    for number, shard in enumerate(shards[: half - 1]):
        links(shard.output_key)
        version = store.head(shard.output_key).version
        ledger.add(receipt_of(until.receipt, shard, version, config.column_prefix))
        if number % RECEIPTS == RECEIPTS - 1:
            ledger.flush()
    ledger.flush()
    return {"done": half}


STEPS: dict[str, Callable[[Any], dict[str, int]]] = {
    "plan": plan,
    "second plan": plan,
    "resume": resume,
    "status": status,
    "know": know,
    "commit half": commit_half,
}


def linked(folder: Path, name: str) -> Callable[[str], None]:
    """Gives a stored file more names, and a copy of it every so many."""
    copies: Iterator[Path] = (folder.parent / f"{folder.name}-copy-{n}" for n in range(10**6))
    current, used = folder / name, 0

    def link(other: str) -> None:
        nonlocal current, used
        if used % LINKS == 0:
            current = Path(shutil.copy(folder / name, next(copies)))
        used += 1
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        os.link(current, folder / other)

    return link


def receipt_of(receipt: Any, shard: Any, version: Any, prefix: str) -> Any:
    """That of another shard, stored in this version."""
    stored = receipt.stored if IS_NEW else receipt
    identity = shard.identity(stored.commit.fingerprint, prefix)
    named = {"input": shard.source.key}
    commit = replace(stored.commit, identity=identity, **named)
    if IS_NEW:
        named["stored"] = replace(stored, commit=commit, version=version)
    else:
        named |= {"commit": commit, "version": version}
    return replace(receipt, output_key=shard.output_key, **named)


def of_tree(now: str, before: str) -> Any:
    """What the trees have in different places."""
    return import_module(f"batch_scorer.{now if IS_NEW else before}")


def cpu_s() -> float:
    """CPU seconds of this process and of all that come from it (Linux)."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid, _, rest = file.read_text().partition(" (")
            fields = rest.rpartition(")")[2].split()
            parents[int(pid)] = int(fields[1])
            ticks[int(pid)] = sum(map(int, fields[11:15]))  # with children that have ended
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks[pid] for pid in family) / os.sysconf("SC_CLK_TCK")


def peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
