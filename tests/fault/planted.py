"""Bugs put into the program on purpose, which the oracles must find.

    python -m tests.fault.planted --report docs/drills/planted.md

Each bug is a few words of the package, changed in a copy of it; a text that is no longer there, or
is there twice, fails. The oracle that is named tries rising seeds against the copy. Every oracle
first tries the unchanged program, as often as any bug needed, and must find nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_scorer.failpoints import TESTING
from tests.helpers.program import REPOSITORY
from tests.helpers.tiny import tiny_reward_model

COPIED = ("batch_scorer", "cluster", "tests", "pyproject.toml")
HANGS_S = 900


@dataclass(frozen=True)
class Bug:
    """`old` text of a file of the package, and the `new` one in its place. `bound`: within how many
    seeds the oracle must find it."""

    name: str
    file: str
    old: str
    new: str
    oracle: str
    bound: int


BUGS = (
    Bug(
        "a lost answer is taken for a failure",
        "storage/store.py",
        "                if there == data:\n",
        "                if not there:\n",
        "store faults",
        12,
    ),
    Bug(
        "an epoch is compared the wrong way: a late shard is not withdrawn",
        "outputs/commit.py",
        "if (hold := current_hold(store)).epoch > commit.epoch:",
        "if (hold := current_hold(store)).epoch < commit.epoch:",
        "sleepers",
        40,
    ),
    Bug(
        "a retry of a commit takes another name, and the rows are there twice",
        "outputs/commit.py",
        "            version = store.put(key, data, instead_of=expected)\n",
        "            version = store.put(key, data, instead_of=expected)\n"
        "            if _ > 0:\n"
        '                store.put(f"again/{key}", data, instead_of=None)\n',
        "kills",
        40,
    ),
    Bug(
        "a shard that another run counts on is withdrawn",
        "outputs/commit.py",
        "    if lease is not None and lease.is_over and not is_in_manifest(store, key):\n",
        "    if lease is not None:\n",
        "sleepers",
        80,
    ),
    Bug(
        "rows scored are counted from the plan and not from the data",
        "outputs/commit.py",
        "        rows_scored=shard.num_rows - len(errors),\n        rows_marked=len(errors),\n",
        "        rows_scored=shard.num_rows,\n        rows_marked=0,\n",
        "kills",
        5,
    ),
    Bug(
        "a lease is renewed after it was lost",
        "outputs/lease.py",
        "                    if not self._is_ours():\n                        self._lost.set()\n",
        "                    if not self._is_ours():\n"
        "                        self._version = self._store.head(_LEASE_KEY).version\n"
        "                        continue\n"
        "                        self._lost.set()\n",
        "sleepers",
        40,
    ),
    Bug(
        "a receipt is given although the PUT has failed",
        "outputs/commit.py",
        "        raise ShardError(ShardReason.STORE_FAILED, str(error)) from error\n"
        "    return Receipt(\n",
        '        stands = Stands(Stored(encoded.commit, Version("none"), 0, "none"), str(error))\n'
        "        hold = current_hold(store)\n"
        "    return Receipt(\n",
        "store faults",
        20,
    ),
    Bug(
        "a stale object is taken for ours",
        "outputs/commit.py",
        "    if there.identity != ours.identity or",
        "    if there.identity == ours or",
        "kills",
        40,
    ),
    Bug(
        "a score is reused for a sequence that only begins alike",
        "outputs/reuse.py",
        "    found = [ids[start:stop] for start, stop in pairwise(bounds)]\n",
        "    found = [ids[start:stop][: 12 * size] for start, stop in pairwise(bounds)]\n",
        "histories",
        10,
    ),
    Bug(
        "reused scores are put back in another order",
        "outputs/reuse.py",
        "        joined.values[here] = scores.values[there]\n",
        "        joined.values[here] = scores.values[there[::-1]]\n",
        "histories",
        10,
    ),
    Bug(
        "a late piece of a file that is cut in another way by now stays",
        "runs/remaining.py",
        "commit.input in inputs and commit.epoch < epoch:",
        "commit.input in inputs and commit.epoch > epoch:",
        "sleepers",
        80,
    ),
    Bug(
        "an output is called complete although shards have failed",
        "outputs/manifest.py",
        '    if totals["shards_failed"] == totals["shards_left"] == 0:\n',
        '    if totals["shards_left"] == 0:\n',
        "store faults",
        20,
    ),
    Bug(
        "a shard that was rewritten under the same name is taken for done",
        "runs/remaining.py",
        "            if commit.identity != index.identities[place]:\n",
        "            if not commit.fingerprint:\n",
        "histories",
        20,
    ),
    Bug(
        "a late first try takes the place of a retry",
        "outputs/commit.py",
        "or there.retries < ours.retries:",
        "or there.retries != ours.retries:",
        "races",
        10,
    ),
    Bug(
        "marked rows are not tried again",
        "runs/remaining.py",
        "            return Fate.DONE if retried.isdisjoint(commit.reasons) else Fate.RETRIED\n",
        "            return Fate.DONE\n",
        "histories",
        10,
    ),
    Bug(
        "tries of marked rows are not counted",
        "runs/remaining.py",
        "retries=_retries(old) + 1 if",
        "retries=_retries(old) if",
        "histories",
        10,
    ),
    Bug(
        "a conditional PUT replaces whatever is there",
        "storage/store.py",
        "                self._expect(key, version)\n                return obstore.put",
        "                return obstore.put",
        "races",
        10,
    ),
)


@dataclass(frozen=True)
class Caught:
    """The seed that found a bug, and the first line of what the oracle said."""

    seed: int
    said: str
    wall_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", type=Path, help="a page to write")
    parser.add_argument("--only", default="", help="with these words in ORACLE: NAME")
    options = parser.parse_args()
    bugs = [bug for bug in BUGS if options.only in f"{bug.oracle}: {bug.name}"]
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        tiny_reward_model(models / "one")
        tiny_reward_model(models / "other", bos=True)
        return run(bugs, models, options.report)


def run(bugs: list[Bug], models: Path, report: Path | None) -> int:
    """0 where all were caught, and no oracle has found fault with the unchanged program."""
    began = time.monotonic()
    lines, bad, tried = [], 0, dict.fromkeys((bug.oracle for bug in bugs), 0)
    for bug in bugs:
        found = run_oracle(bug.oracle, bug.bound, models, bug)
        tried[bug.oracle] = max(tried[bug.oracle], found.seed if found else bug.bound)
        bad += found is None
        how = f"{found.seed} | {found.wall_s:.0f} | {found.said}" if found else "NOT CAUGHT | |"
        lines.append(f"| {bug.name} | `{bug.file}` | {bug.oracle} | {bug.bound} | {how} |")
        print(lines[-1], flush=True)
    for oracle, seeds in tried.items():
        found = run_oracle(oracle, seeds, models)
        bad += found is not None
        how = "nothing" if found is None else f"seed {found.seed}: {found.said}"
        lines.append(f"| none | | {oracle} | {seeds} | {how} | | |")
        print(lines[-1], flush=True)
    if report:
        report.write_text(page(lines, time.monotonic() - began))
    return int(bad > 0)


def page(lines: list[str], wall_s: float) -> str:
    load, date = os.getloadavg()[2], time.strftime("%Y-%m-%d", time.gmtime())
    return "\n".join(
        [
            "# Bugs planted in the program, and what found them",
            "",
            f"`make planted`, {date}: {wall_s:.0f} s on {os.cpu_count()} cores; over the last",
            f"15 minutes {load:.0f} processes were ready to run on them, these among them.",
            "`tests/fault/planted.py` has the bugs, `tests/fault/tries.py` the oracles.",
            "",
            "Seeds rise from 1 to the one that finds the bug, and no further than the bound. The",
            "last rows are the unchanged program, tried with as many seeds as any bug took.",
            "",
            "| bug | file | oracle | bound | found by seed | s | what the oracle said |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


def run_oracle(oracle: str, bound: int, models: Path, bug: Bug | None = None) -> Caught | None:
    """In a process of its own, on a copy with the bug in it; raises RuntimeError for an oracle that
    does not run and ValueError for a bug that does not fit any more."""
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        copy = Path(name)
        for part in COPIED:
            source = REPOSITORY / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / part)
        if bug is not None:
            file = copy / "batch_scorer" / bug.file
            file.write_text(planted_in(file.read_text(), bug))
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "tests.fault.tries", oracle, str(bound), str(models)],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), TESTING: "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=HANGS_S,
        )
        wall_s = time.monotonic() - began
    if done.returncode != 0:
        raise RuntimeError(f"{oracle} did not run: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not found:
        return None
    said = found["said"].strip().splitlines()[0].replace("|", "/")[:160]
    return Caught(found["seed"], said, wall_s)


def planted_in(text: str, bug: Bug) -> str:
    """The text of the bug's file with the bug; raises ValueError where it does not fit any more."""
    if text.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: its text is there {text.count(bug.old)} times: {bug.file}")
    return text.replace(bug.old, bug.new)


if __name__ == "__main__":
    sys.exit(main())
