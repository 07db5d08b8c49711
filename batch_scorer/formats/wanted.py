"""What the settings say of the columns of a file, and what they would have to say."""

from collections.abc import Mapping
from dataclasses import dataclass

from batch_scorer.records import DEFAULT_BOUNDS, ReadBounds, TextStyle


class Undecided(Exception):
    """What is unclear, and what to pass; `detect` adds the columns."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}; {advice}")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the settings say of the files: columns by field, how text is read, and the columns that
    are as if they were not there. `beside` is the field that the model reads beside the
    conversation (`kinds.BESIDE_NAMES`), if any."""

    columns: Mapping[str, str]
    text_style: TextStyle | None
    ignored: frozenset[str]
    beside: str | None = None
    bounds: ReadBounds = DEFAULT_BOUNDS

    def is_free(self, name: str, used: Mapping[str, str]) -> bool:
        """Whether nobody has said yet what to do with a column."""
        return name not in used.values() and name not in self.ignored


def only(field: str, hits: list[str]) -> str:
    """The one column of a field; raises Undecided where it could be another one."""
    if len(hits) > 1:
        what = f"{' and '.join(hits)} could both be the {field}"
        raise Undecided(what, f"pass e.g. --column {field}={hits[0]}")
    return hits[0]
