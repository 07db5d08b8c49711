"""The score columns of a scored output by their names: one family for each prefix. Pure functions.

A model's columns, and those of each member of an ensemble and of each function beside it, have one
prefix: `helpful_score_chosen`, `helpful_score_error`. What is made of several members (`mean_`,
`std_`) has scores and no errors of its own, and is no family.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

ERROR = "score_error"
DISAGREEMENT = "rank_disagreement"
"""The column of a row's share of pairs of answers that two members order differently."""
SPREAD = "std_"
"""The prefix of the standard deviation over members."""
AGGREGATES = ("mean_", "min_", SPREAD, "z_")
"""The prefixes of what is made of several members."""
_VALUES = tuple(f"score{many}{side}" for many in ("", "s") for side in ("", "_chosen", "_rejected"))


@dataclass(frozen=True, slots=True)
class Family:
    """Score columns of one model or function. `columns` are there, one for each side of a row."""

    prefix: str
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        """What people call it; that without a prefix is `score`."""
        return self.prefix.removesuffix("_") or "score"


def families_of(names: Collection[str], values: Collection[str] = _VALUES) -> Iterator[Family]:
    """In the order of their error columns among the `names` of an output's columns. `values` are
    the score columns that a row can have, without prefix."""
    for name in names:
        if name.endswith(ERROR):
            prefix = name.removesuffix(ERROR)
            if columns := tuple(prefix + value for value in values if prefix + value in names):
                yield Family(prefix, columns)
