"""What `normalize` is asked for: one recipe for flags, YAML and Python."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Normalization(BaseModel):
    """How scores are normalised: each less the mean of its group, over the standard deviation of
    the group. Without a spread there is no value: in a group of one score, or of equal ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    by: tuple[str, ...] = ()
    """The columns whose values name a group: `source`, or any other; `prompt`: rows with one
    prompt, in whichever shard or file they are. Default: all rows are one group."""

    prefix: tuple[str, ...] = ()
    """Only the scores with these column prefixes. Default: all scores, each prefix by itself."""

    def to_json(self) -> dict[str, Any]:
        """What the record of the output keeps: the fields that are not left at their defaults."""
        found: dict[str, Any] = json.loads(self.model_dump_json(exclude_defaults=True))
        return found
