"""What reward functions gave for the rows of a shard, beside the model's scores.

Legend: R rows, S responses (a row has one or more).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from batch_scorer.records.rows import RowError


@dataclass(frozen=True, slots=True)
class Rewarded:
    """What one function gave for the rows of a shard, or of all shards of a run; adds up.

    Of `responses`, `values` have a value. Of the rows, `rows_valued` have one for every response,
    and `marked` counts the others by the reason of their first response without one.
    """

    responses: int = 0
    values: int = 0
    rows_valued: int = 0
    marked: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "Rewarded") -> "Rewarded":
        return Rewarded(
            self.responses + other.responses,
            self.values + other.values,
            self.rows_valued + other.rows_valued,
            dict(sorted((Counter(self.marked) + Counter(other.marked)).items())),
        )


def added_up(a: Mapping[str, Rewarded], b: Mapping[str, Rewarded]) -> dict[str, Rewarded]:
    """The counts of both, by function."""
    return {name: a.get(name, Rewarded()) + b.get(name, Rewarded()) for name in {**a, **b}}


@dataclass(slots=True)
class RewardedRows:
    """R rows and what each function gave for their S responses.

    `row_offsets` is int64[R+1]; `row_errors` names the rows that hold no response that can be read.
    By function, `values` are float32[S], NaN where its `errors` name the response.
    """

    row_offsets: npt.NDArray[np.int64]
    row_errors: "dict[int, RowError]"
    values: dict[str, npt.NDArray[np.float32]]
    errors: "dict[str, dict[int, RowError]]"
