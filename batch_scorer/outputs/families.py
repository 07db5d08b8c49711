"""The score columns of a scored output by their names: one family for each prefix. Pure functions.

A model's columns, and those of each member of an ensemble and of each function beside it, have one
prefix: `helpful_score_chosen`, `helpful_score_error`. What is made of several members (`mean_`,
`std_`) has scores and no errors of its own, and is no family.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from batch_scorer.records import AGGREGATES

_ERROR = "score_error"
_AGGREGATES = tuple(f"{name}_" for name in AGGREGATES)
MEAN, _, SPREAD, _ = _AGGREGATES
"""Before the names of mean and standard deviation over members."""
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
    for prefix in _error_prefixes(names):
        if columns := tuple(prefix + value for value in values if prefix + value in names):
            yield Family(prefix, columns)


def prefixes_of(names: Collection[str]) -> list[str]:
    """All prefixes that score columns can have, also those of what is made of several members."""
    own = list(_error_prefixes(names))
    return [*own, *(prefix + aggregate for prefix in own for aggregate in _AGGREGATES)]


def headline_prefix(added: Sequence[str], values: Collection[str]) -> str:
    """The prefix of the scores that stand for a row, of the columns that scoring `added`: the first
    error column's; of several members, whose common one has no scores, that of their mean."""
    prefix = next(_error_prefixes(added), "")
    is_common = not {prefix + value for value in values} <= set(added)
    return prefix + MEAN if is_common else prefix


def _error_prefixes(names: Collection[str]) -> Iterator[str]:
    return (name.removesuffix(_ERROR) for name in names if name.endswith(_ERROR))
