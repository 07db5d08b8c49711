"""What a judge is asked about the rows of a shard, and what it replied.

Legend: R rows, S responses, Q questions (a row has any number of them), K responses shown in all
questions together.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from batch_scorer.records.rows import RowError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Questions:
    """Q questions about S responses, the questions of all rows end to end.

    `response_offsets` is int64[R+1]: row r has the responses [response_offsets[r],
    response_offsets[r + 1]); `response_errors` names those that no question is about, with the
    reason. `shown` is int64[K], places among the S responses: question q shows those at
    [shown_offsets[q], shown_offsets[q + 1]), in this order. `criteria` is int64[Q], which criterion
    of its row a question is about, or -1. `votes` is int64[Q], from 0 for each question that is
    asked. `verdicts` is int64[Q], how many verdicts its reply holds. `weights` are the weights of a
    row's criteria, by row.
    """

    response_offsets: IntArray
    response_errors: "dict[int, RowError]"
    shown: IntArray
    shown_offsets: IntArray
    criteria: IntArray
    votes: IntArray
    verdicts: IntArray
    weights: dict[int, tuple[float, ...]]


Ended = Literal["stop", "length", "error"]
"""How a reply ended: the judge was done; it was cut; the engine or the server failed."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge wrote.

    `text` is the answer alone, `reasoning` what stood in a think block before it, "" where there
    was none; where the block was not closed `text` is "". `begins` and `closing` of the page are
    part of the text. `tries` counts how often it was asked; `detail` is what failed, for `error`.
    """

    text: str
    ended: Ended
    reasoning: str = ""
    generated_tokens: int = 0
    tries: int = 1
    detail: str = ""
