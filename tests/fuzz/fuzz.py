"""Mutants of files and models, as many as asked for, from one seed.

    python -m tests.fuzz.fuzz --seed 7 --count 5000 --report docs/drills/fuzz-seed-7

Each mutant is made anew from the seed, its kind and its number, and none is kept. The trials of a
kind run in a process of their own, so that its death or its hanging is seen; neither may happen,
whatever becomes of the processes that it starts to read. The report has numbers only.
"""

import argparse
import json
import os
import platform
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.mutants import FILES, MODELS
from tests.helpers.memory import peak_bytes

KINDS = (*FILES, *MODELS)
_HANGS_S = 120.0
"""The bounds of a reading process are far below."""
_START_S = 300.0
_LOOK_EVERY = 100
"""Trials between two looks at the memory of the reading processes."""
_LIBRARIES = ("pyarrow", "transformers", "tokenizers", "safetensors", "jinja2")


@dataclass
class Tally:
    """What came of the mutants of a kind. `wrong` has, by what was wrong, the numbers of mutants.
    `peaks` are the most bytes that the trying process and a reading process held."""

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, list[int]] = field(default_factory=dict)
    seconds: float = 0.0
    slowest_s: float = 0.0
    peaks: tuple[int, int] = (0, 0)

    @property
    def count(self) -> int:
        return sum(self.outcomes.values()) + sum(map(len, self.wrong.values()))


def run(kind: str, seed: int, numbers: range) -> Tally:
    """Try these mutants of a kind."""
    tally = Tally(kind)
    left = numbers
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        if kind in MODELS:
            from tests.helpers.tiny import tiny_reward_model

            tiny_reward_model(model, max_tokens=512)
        while left:
            started_here = time.monotonic()
            done = _run_process(tally, seed, left, model)
            if not tally.count:
                started = started_here
            left = left[done:]
    tally.seconds = time.monotonic() - started
    return tally


def _run_process(tally: Tally, seed: int, numbers: range, model: Path) -> int:
    """How many of the mutants are done when the process that tries them has ended."""
    command = (
        sys.executable, "-m", "tests.fuzz.fuzz", "--try", tally.kind, "--seed", str(seed),
        "--first", str(numbers.start), "--count", str(len(numbers)), "--model", str(model),
    )  # fmt: skip
    done = 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in _lines(process.stdout.fileno()):
            found = json.loads(line)
            tally.peaks = (
                max(tally.peaks[0], found["peaks"][0]),
                max(tally.peaks[1], found["peaks"][1]),
            )
            tally.slowest_s = max(tally.slowest_s, found["seconds"])
            if wrong := found.get("wrong"):
                tally.wrong.setdefault(wrong, []).append(numbers[done])
            else:
                tally.outcomes[found["outcome"]] += 1
            done += 1
        hangs = process.poll() is None and done < len(numbers)
        try:
            process.wait(1 if hangs else _HANGS_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        if done < len(numbers):
            code = process.wait()
            how = "the process hangs" if code == -signal.SIGKILL else f"the process dies ({code})"
            tally.wrong.setdefault(how, []).append(numbers[done])
            done += 1
    return done


def _lines(handle: int) -> Iterator[bytes]:
    """Lines from a pipe until its end, or until none comes for too long."""
    rest, waits_s = b"", _START_S
    with selectors.DefaultSelector() as selector:
        selector.register(handle, selectors.EVENT_READ)
        while selector.select(waits_s):
            waits_s = _HANGS_S
            block = os.read(handle, 1 << 16)
            if not block:
                return
            *lines, rest = (rest + block).split(b"\n")
            yield from lines


def try_all(kind: str, seed: int, numbers: range, model: Path) -> Iterator[dict[str, Any]]:
    """In the process that tries: what came of each mutant."""
    from tests.fuzz.trials import Wrong, trial_of

    readers = 0
    with tempfile.TemporaryDirectory() as folder:
        trial = trial_of(kind, Path(folder), model)
        for number in numbers:
            started = time.monotonic()
            found: dict[str, Any] = {}
            try:
                found["outcome"] = trial(Random(f"{seed} {kind} {number}"))
            except Wrong as wrong:
                found["wrong"] = str(wrong)
            found["seconds"] = time.monotonic() - started
            if number % _LOOK_EVERY == 0 or found["seconds"] > 1:
                readers = max([readers, *peak_bytes()[1:]])
            own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            yield found | {"peaks": [own, readers]}


def report_of(tallies: Sequence[Tally], seed: int, count: int) -> str:
    """Numbers and kinds, in Markdown."""
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    total = sum(map(len, (n for tally in tallies for n in tally.wrong.values())))
    parts = [
        f"# Fuzzing, seed {seed}",
        f"`make fuzz SEED={seed} COUNT={count}`, {date.today()}: {count} mutants of each kind, "
        f"{total} of them wrong. {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"batch-scorer {version('batch-scorer')}, {libraries}.",
        "A file's mutant is planned and read beside a healthy file, a model's is looked at and its "
        "texts are rendered. Wrong is: the program's own process dies or hangs, an exception that "
        "is not one of the program's, a message of several lines, rows lost or invented, the "
        "healthy file read in another way. A reading process may die; the file then fails as "
        "`reader_died`.",
        "| kind | mutants | a second | slowest, s | peak MiB, own | of a reader | wrong |\n"
        "|---|---|---|---|---|---|---|\n"
        + "\n".join(
            f"| {t.kind} | {t.count} | {t.count / t.seconds:.0f} | {t.slowest_s:.2f} "
            f"| {t.peaks[0] >> 20} | {t.peaks[1] >> 20} | {sum(map(len, t.wrong.values()))} |"
            for t in tallies
        ),
    ]
    for tally in tallies:
        rows = [f"| {what} | {n} |" for what, n in tally.outcomes.most_common()]
        rows += [
            f"| **{what}** | {len(numbers)} |" for what, numbers in sorted(tally.wrong.items())
        ]
        parts.append(f"## {tally.kind}\n\n| outcome | mutants |\n|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Exit code 1 where anything was wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--try", dest="kind", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    numbers = range(given.first, given.first + given.count)
    if given.kind:
        for found in try_all(given.kind, given.seed, numbers, given.model):
            print(json.dumps(found), flush=True)
        return 0
    tallies = []
    for kind in given.kinds:
        tally = run(kind, given.seed, numbers)
        tallies.append(tally)
        print(
            f"{kind}: {tally.count} mutants in {tally.seconds:.0f} s, "
            f"{dict(tally.outcomes.most_common())}; wrong: "
            f"{ {what: found[:5] for what, found in tally.wrong.items()} }",
            flush=True,
        )
    if given.report:
        given.report.with_suffix(".md").write_text(report_of(tallies, given.seed, given.count))
    return int(any(tally.wrong for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
