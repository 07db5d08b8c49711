"""What a night leaves behind: a record of what it changed, and how that moved the scores.

    ROOT/nights/<number>.json          the record of each night that changed anything
    ROOT/nights/<number>-drift.json    its drift report

All of it is told from manifests: the one that the newest record names, and the one that stands
now. So what a night committed before it was killed is counted by the night that comes after it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from batch_scorer.errors import OutputError
from batch_scorer.nightly import drift
from batch_scorer.nightly.generations import Generation, Latest
from batch_scorer.outputs.manifest import current_manifest, read_manifest
from batch_scorer.outputs.puts import put
from batch_scorer.records import Receipt
from batch_scorer.runs.run import Summary
from batch_scorer.storage import ObjectMissing, Store

_FOLDER = "nights"
_RECORD = re.compile(rf"{_FOLDER}/(\d+)\.json")


@dataclass(frozen=True, slots=True)
class Step:
    """What a night did for one model: the generation it worked on, and how its scoring ended."""

    generation: Generation
    model: str
    summary: Summary
    store: Store


def numbers(root: Store) -> list[int]:
    """Of all nights that have left a record, the newest first."""
    found = (_RECORD.fullmatch(info.key) for info in root.list(_FOLDER))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def read_record(root: Store, number: int) -> dict[str, Any]:
    record: dict[str, Any] = root.read_json(f"{_FOLDER}/{number:05d}.json")
    return record


def newest_record(root: Store) -> dict[str, Any] | None:
    """What the last night that changed anything has left; None before there was one."""
    return next((read_record(root, number) for number in numbers(root)), None)


def newest_drift(root: Store) -> dict[str, Any]:
    """The drift report of the newest night. Raises OutputError where there is none."""
    for number in numbers(root):
        report: dict[str, Any] = root.read_json(f"{_FOLDER}/{number:05d}-drift.json")
        return report
    raise OutputError(f"{root.root}: no night has left a report here; name the output of `nightly`")


def write(root: Store, record: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Keep a night's record; its report is there first, so that no record is without one."""
    for name, body in (("-drift", report), ("", record)):
        key = f"{_FOLDER}/{record['night']:05d}{name}.json"
        put(root, key, json.dumps(body, indent=1).encode())


def describe(root: Store, step: Step) -> dict[str, Any]:
    """A generation after a night: its rows, and which of them the night has changed."""
    totals = step.summary.totals
    before = _newest_line(root, step.generation.line, step.generation.path)
    shards: dict[str, drift.Before] = {}
    if before is not None:
        with suppress(ObjectMissing):  # somebody has removed the generation, and it begins anew
            shards = drift.standing(read_manifest(step.store, before.line["manifest"]))
    sources = drift.figures_by_source(step.summary.receipts, shards)
    everything = drift.together(sources)
    return {
        "line": step.generation.line,
        "model": step.model,
        "path": step.generation.path,
        "manifest": totals["manifest"],
        "rows": {
            "total": totals["rows"],
            "new": everything.new,
            "reused": everything.reused,
            "kept": everything.kept,
            "gone": everything.gone,
            "marked": totals["rows_marked"],
            "failed": totals["rows_failed"],
            "left": totals["rows_left"],
        },
        "shards": {
            "total": totals["shards"],
            "failed": totals["shards_failed"],
            "left": totals["shards_left"],
        },
        "sources": {name: figures.to_json() for name, figures in sources.items()},
        "metrics": step.summary.metrics.to_json(step.summary.run),
    }


def has_changed(root: Store, line: Mapping[str, Any]) -> bool:
    """Whether a line's description says anything new against its generation's newest record."""
    before = _newest_line(root, line["line"], line["path"])
    if before is None:
        return True
    rows, then = line["rows"], before.line["rows"]
    if any(rows[name] for name in ("new", "reused", "gone")):
        return True
    same = all(rows[name] == then[name] for name in ("total", "failed", "left"))
    return not same or line["shards"] != before.line["shards"]


def drift_report(
    root: Store,
    number: int,
    steps: Sequence[Step],
    lines: Sequence[Mapping[str, Any]],
    latest: Latest | None,
) -> dict[str, Any]:
    """How the scores have moved: a night's lines against what readers had before it.

    That is the newest record of the generation which `latest` named then. Where the night worked
    on another one, the ranks of the rows that both hold are compared too.
    """
    report = []
    for place, (step, line) in enumerate(zip(steps, lines, strict=True)):
        named = latest.paths.get(line["line"]) if latest else None
        before = _newest_line(root, line["line"], named or line["path"])
        ranks = None
        if latest is not None and named not in (None, line["path"]):
            there = latest_chain(root, latest, line["line"])
            here = [s.summary.receipts for s in steps[: place + 1]]
            if there:
                before_chain = there[-1][0], [receipts for _, receipts in there]
                ranks = drift.compare(drift.read_both(before_chain, (step.store, here)))
        report.append(
            {
                "line": line["line"],
                "path": line["path"],
                "since": before.night if before else None,
                "before": before.line["path"] if before else None,
                "sources": line["sources"],
                "sources_before": before.line["sources"] if before else {},
                "ranks_of": named if ranks else None,
                "ranks": asdict(ranks) if ranks else None,
            }
        )
    return {"night": number, "lines": report}


def latest_chain(
    root: Store, latest: Latest, until: str | None = None
) -> list[tuple[Store, list[Receipt]]]:
    """Store and receipts of each generation that `latest` names; of those behind `until`, none.

    Empty if somebody has removed one of them.
    """
    found = []
    for line, path in latest.paths.items():
        try:
            store = root.below(path)
        except ObjectMissing:
            return []
        found.append((store, current_manifest(store)))
        if line == until:
            break
    return found


@dataclass(frozen=True, slots=True)
class _Past:
    """A line of the record of an earlier night."""

    night: int
    line: dict[str, Any]


def _newest_line(root: Store, name: str, path: str) -> _Past | None:
    """What the newest record says of a generation; None if none names it."""
    for number in numbers(root):
        for line in read_record(root, number)["lines"]:
            if (line["line"], line["path"]) == (name, path):
                return _Past(number, line)
    return None
