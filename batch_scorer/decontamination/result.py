"""What `decontaminate` found, as a value. Apart from what finds it, whose libraries take long to
load: every report imports this."""

from dataclasses import asdict, dataclass
from typing import Any

from batch_scorer.derived.output import Totals


@dataclass(frozen=True, slots=True)
class SourceCounts:
    rows: int
    removed: int


@dataclass(frozen=True, slots=True)
class Decontaminated:
    """What a run found. `entries` are the different texts that were looked for, `entries_without_
    text` those that left nothing to look for, `rows_without_text` rows that were kept unseen; with
    match `embedding`, a text stands for an embedding.
    `totals` is None of a dry run, which writes nothing."""

    output: str
    rows: int
    removed: int
    rows_without_text: int
    entries: int
    entries_without_text: int
    sources: dict[str, SourceCounts]
    totals: Totals | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
