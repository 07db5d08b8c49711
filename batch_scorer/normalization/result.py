"""What `normalize` did, as a value. Apart from what does it, whose libraries take long to load:
every report imports this."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from batch_scorer.derived.output import Totals


@dataclass(frozen=True, slots=True)
class FamilyCounts:
    """The scores with one prefix, and those of them that have a normalised value; their groups, and
    those of them without a spread: of one score, or of equal ones."""

    scores: int
    normalized: int
    groups: int
    groups_without_spread: int


@dataclass(frozen=True, slots=True)
class Normalized:
    """What was normalised: `families` by column prefix."""

    output: str
    places: tuple[str, ...]
    recipe: Mapping[str, Any]
    families: Mapping[str, FamilyCounts]
    totals: Totals

    def to_json(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "places": list(self.places),
            "recipe": dict(self.recipe),
            "families": {prefix: asdict(counts) for prefix, counts in self.families.items()},
            **asdict(self.totals),
        }
