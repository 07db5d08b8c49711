"""What a judge is asked about the rows of a shard, and what it replied.

Legend: R rows, S responses, Q questions (a row has any number of them), K responses shown in all
questions together.
"""

from collections import Counter
from dataclasses import dataclass, field, fields
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
    reason. `characters` is int64[S], of a response's text as questions show it, 0 where none does.
    `shown` is int64[K], places among the S responses: question q shows those at
    [shown_offsets[q], shown_offsets[q + 1]), in this order. `criteria` is int64[Q], which criterion
    of its row a question is about, or -1. `votes` is int64[Q], from 0 for each question that is
    asked. `verdicts` is int64[Q], how many verdicts its reply holds. `weights` are the weights of a
    row's criteria, by row.
    """

    response_offsets: IntArray
    response_errors: "dict[int, RowError]"
    characters: IntArray
    shown: IntArray
    shown_offsets: IntArray
    criteria: IntArray
    votes: IntArray
    verdicts: IntArray
    weights: dict[int, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of the questions of a shard, or of all shards of a run; adds up.

    Of `questions`, `verdicts` have a verdict, and `lost` counts the others by reason.
    `prompt_tokens` are those of the questions, each counted once, `generated_tokens` those of all
    replies, and `tries` how often a judge that writes was asked for them. Of pairwise judges:
    `comparisons` of two answers have a verdict in both orders, which in `disagree` of them do not
    prefer the same answer; `decisive` verdicts are for one of two answers, in `first_preferred` of
    them for the one that was shown first. `unequal` of the decisive ones are about answers of
    different length in characters, in `longer_preferred` of them for the longer one.
    """

    questions: int = 0
    verdicts: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    tries: int = 0
    comparisons: int = 0
    disagree: int = 0
    decisive: int = 0
    first_preferred: int = 0
    unequal: int = 0
    longer_preferred: int = 0

    @property
    def flip_rate(self) -> float | None:
        """Share of the comparisons whose two orders disagree."""
        return self.disagree / self.comparisons if self.comparisons else None

    @property
    def first_share(self) -> float | None:
        """Share of the decisive verdicts that are for the answer that was shown first."""
        return self.first_preferred / self.decisive if self.decisive else None

    @property
    def longer_share(self) -> float | None:
        """Share of the decisive verdicts on answers of unequal length that are for the longer
        one."""
        return self.longer_preferred / self.unequal if self.unequal else None

    def __add__(self, other: "Judged") -> "Judged":
        counts = {
            each.name: getattr(self, each.name) + getattr(other, each.name)
            for each in fields(self)
            if each.name != "lost"
        }
        lost = Counter(self.lost) + Counter(other.lost)
        return Judged(**counts, lost=dict(sorted(lost.items())))


Ended = Literal["stop", "length", "error"]
"""How a reply ended: the judge was done; it was cut; the engine or the server failed."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge wrote.

    `text` is the answer alone, `reasoning` what stood in a think block before it, "" where there
    was none; where the block was not closed `text` is "". `begins` and `closing` of the page are
    part of the text. `prompt_tokens` are those that a server has counted. `tries` counts how often
    it was asked; `detail` is what failed, for `error`.
    """

    text: str
    ended: Ended
    reasoning: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    tries: int = 1
    detail: str = ""
