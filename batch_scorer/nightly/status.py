"""The progress of a nightly output: its newest generations, and the last nightly run."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from batch_scorer.errors import IncompleteError, OutputError
from batch_scorer.nightly.generations import read_generations, read_latest
from batch_scorer.nightly.record import NightlyRecord
from batch_scorer.outputs.lease import lease_of
from batch_scorer.runs.status import OutputStatus, read_status, silent_s
from batch_scorer.storage import AccessDenied, ObjectMissing, Store, open_store


@dataclass(frozen=True, slots=True)
class NightlyStatus:
    """The state of an output of `nightly`. `holder` runs now, and renewed its lease `renewed_s`
    ago; None if no nightly run is running.

    `latest` are the paths that `latest.json` names, by series; `generations` has the newest of each
    series by path, None for one without any score yet; `night` is the record of the last nightly
    run that changed anything.
    """

    root: str
    holder: str | None
    renewed_s: float | None
    latest: dict[str, str] | None
    generations: dict[str, OutputStatus | None]
    night: NightlyRecord | None

    def to_json(self) -> dict[str, Any]:
        return {
            "root": self.root,
            "holder": self.holder,
            "renewed_s": self.renewed_s,
            "latest": self.latest,
            "generations": {
                path: status.to_json() if status else None
                for path, status in self.generations.items()
            },
            "night": self.night.to_json() if self.night else None,
        }


def nightly_root(output: str, store_options: Mapping[str, str] | None = None) -> Store | None:
    """The store at `output` if `nightly` keeps its generations there."""
    try:
        root = open_store(output, store_options or {})
        return root if read_generations(root) else None
    except (ObjectMissing, AccessDenied):
        return None


def latest_output(root: Store) -> str:
    """The output that `latest.json` points to. Raises IncompleteError before any generation is
    complete."""
    if (latest := read_latest(root)) is None:
        raise IncompleteError(f"{root.root}: no generation is complete yet")
    return root.url([*latest.paths.values()][-1])


def read_nightly_status(
    root: Store, store_options: Mapping[str, str] | None, night: NightlyRecord | None
) -> NightlyStatus:
    """The state of a `nightly_root`; `night` is the newest record there."""
    lease = lease_of(root)
    holder = lease if lease and lease.is_held else None
    latest = read_latest(root)
    newest = {generation.series: generation.path for generation in read_generations(root)}
    return NightlyStatus(
        root=root.root,
        holder=holder.holder if holder else None,
        renewed_s=silent_s(holder, datetime.now(UTC)) if holder else None,
        latest=dict(latest.paths) if latest else None,
        generations={path: _begun(root.url(path), store_options) for path in newest.values()},
        night=night,
    )


def _begun(output: str, store_options: Mapping[str, str] | None) -> OutputStatus | None:
    try:
        return read_status(output, store_options)
    except OutputError:
        return None
