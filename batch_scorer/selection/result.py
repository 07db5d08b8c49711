"""What `select` kept, as a value. Apart from what chooses, whose libraries take long to load: every
report imports this."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from batch_scorer.derived.output import Totals


@dataclass(frozen=True, slots=True)
class Selected:
    """What was selected. `output` is None where nothing was written (`preview`)."""

    output: str | None
    places: tuple[str, ...]
    recipe: Mapping[str, Any]
    totals: Totals

    def to_json(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "places": list(self.places),
            "recipe": dict(self.recipe),
            **asdict(self.totals),
        }
