"""How far a nightly output is: its newest generations, and the last night."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from batch_scorer.errors import OutputError
from batch_scorer.nightly.generations import read_generations, read_latest
from batch_scorer.outputs.lease import lease_of
from batch_scorer.runs.status import OutputStatus, read_status, silent_s
from batch_scorer.storage import AccessDenied, ObjectMissing, Store, open_store


@dataclass(frozen=True, slots=True)
class NightlyStatus:
    """Where `nightly` stands. `holder` and `renewed_s` are of the night at work, if one is.

    `latest` are the paths that `latest.json` names, by line; `generations` has the newest of each
    line by path, None for one that is only just being begun; `night` is the record of the last
    night that changed anything.
    """

    root: str
    holder: str | None
    renewed_s: float | None
    latest: dict[str, str] | None
    generations: dict[str, OutputStatus | None]
    night: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def nightly_root(output: str, store_options: Mapping[str, str] | None = None) -> Store | None:
    """The store at `output` if `nightly` keeps its generations there."""
    try:
        root = open_store(output, store_options or {})
        return root if read_generations(root) else None
    except (ObjectMissing, AccessDenied):
        return None


def read_nightly_status(
    root: Store, store_options: Mapping[str, str] | None, night: dict[str, Any] | None
) -> NightlyStatus:
    """The state of a `nightly_root`; `night` is the record of its last night."""
    standing = lease_of(root)
    holder = standing if standing and standing.is_held else None
    latest = read_latest(root)
    newest = {generation.line: generation.path for generation in read_generations(root)}
    return NightlyStatus(
        root=root.root,
        holder=holder.holder if holder else None,
        renewed_s=silent_s(holder) if holder else None,
        latest=dict(latest.paths) if latest else None,
        generations={path: _begun(root.url(path), store_options) for path in newest.values()},
        night=night,
    )


def _begun(output: str, store_options: Mapping[str, str] | None) -> OutputStatus | None:
    try:
        return read_status(output, store_options)
    except OutputError:
        return None
