"""From what the questions of a row got to the scores of its answers. Pure functions.

A verdict that is missing is never replaced by a number: the answers that it was about have no score
then, and the reason is the question's.

Legend: R rows, S responses, Q questions.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np
import numpy.typing as npt

from batch_scorer.errors import RowReason
from batch_scorer.judges.page import Page
from batch_scorer.records import Questions, RowError

FloatArray = npt.NDArray[np.float32]

_LARGEST = float(np.finfo(np.float32).max)

Verdicts = list[float] | RowError
"""The worths of the verdicts of one question, or why there are none."""
_Worth = float | RowError


@dataclass(frozen=True, slots=True)
class Folded:
    """float32[S], the answers' scores, NaN for those in `errors`; float32[R], the share of a row's
    comparisons whose two orders prefer the same answer, NaN where there is none; and how many
    comparisons there are in all rows, and of how many the orders disagree."""

    scores: FloatArray
    errors: dict[int, RowError]
    consistency: FloatArray
    comparisons: int
    disagree: int


def fold(
    verdicts: Sequence[Verdicts],
    questions: Questions,
    row_offsets: npt.NDArray[np.int64],
    page: Page,
) -> Folded:
    """The scores of all answers. `verdicts` has one item for each question, `row_offsets` is
    int64[R+1], which questions are a row's."""
    num_responses = int(questions.response_offsets[-1])
    scores = np.full(num_responses, np.nan, np.float32)
    consistency = np.full(len(row_offsets) - 1, np.nan, np.float32)
    errors = dict(questions.response_errors)
    shown = [
        tuple(questions.shown[start:stop].tolist())
        for start, stop in pairwise(questions.shown_offsets.tolist())
    ]
    criteria = questions.criteria.tolist()
    agreed: list[bool] = []
    for row, (start, stop) in enumerate(pairwise(row_offsets.tolist())):
        asked: dict[tuple[tuple[int, ...], int], list[Verdicts]] = {}
        for question in range(start, stop):
            key = shown[question], criteria[question]
            asked.setdefault(key, []).append(verdicts[question])
        voted = {key: _voted(found, page) for key, found in asked.items()}
        worths: dict[int, _Worth]
        if page.mode == "pairwise":
            pairs = {key[0]: found for key, found in voted.items()}
            worths, in_row = _of_pairs(pairs, page)
            if in_row:
                consistency[row] = fmean(in_row)
            agreed += in_row
        elif page.mode == "rubric":
            worths = _of_rubric(voted, questions.weights.get(row, ()))
        else:
            worths = _of_answers(voted)
        for response, worth in worths.items():
            if isinstance(worth, RowError):
                errors[response] = worth
            elif abs(worth) > _LARGEST:
                detail = f"its criteria's weights make a score of {worth:g}"
                errors[response] = RowError(RowReason.BAD_RUBRIC, detail)
            else:
                scores[response] = worth
    return Folded(scores, errors, consistency, len(agreed), agreed.count(False))


def _voted(votes: list[Verdicts], page: Page) -> Verdicts:
    """The verdicts of several votes as one; more than half of the votes have to have some."""
    valid = [vote for vote in votes if not isinstance(vote, RowError)]
    if 2 * len(valid) <= len(votes):
        return next(vote for vote in votes if isinstance(vote, RowError))
    combine = _majority if page.combine == "majority" else fmean
    return [combine(each) for each in zip(*valid, strict=True)]


def _majority(worths: Iterable[float]) -> float:
    """The most frequent one; the mean of those that are equally frequent."""
    ranked = Counter(worths).most_common()
    return fmean(worth for worth, count in ranked if count == ranked[0][1])


def _of_answers(voted: Mapping[tuple[tuple[int, ...], int], Verdicts]) -> dict[int, _Worth]:
    """Of questions whose verdicts are about the answers that they show, one by one."""
    return {
        response: verdicts if isinstance(verdicts, RowError) else verdicts[place]
        for (shown, _), verdicts in voted.items()
        for place, response in enumerate(shown)
    }


def _of_pairs(
    voted: Mapping[tuple[int, ...], Verdicts], page: Page
) -> tuple[dict[int, _Worth], list[bool]]:
    """Of comparisons: the mean of an answer's worth in all of them. And for each that has a verdict
    in both orders, whether these prefer the same answer."""
    found: dict[int, list[_Worth]] = {}
    agreed: list[bool] = []
    for first, second in (pair for pair in voted if pair[0] < pair[1]):
        there = voted[first, second]
        back = voted.get((second, first))
        worth: _Worth
        if isinstance(there, RowError):
            worth = there
        elif back is None:
            worth = there[0]
        elif isinstance(back, RowError):
            worth = back
        else:
            worth, agrees = _of_orders(there[0], 1 - back[0], page)
            agreed.append(agrees)
        found.setdefault(first, []).append(worth)
        found.setdefault(second, []).append(worth if isinstance(worth, RowError) else 1 - worth)
    return {response: _mean(worths) for response, worths in found.items()}, agreed


def _of_orders(first: float, second: float, page: Page) -> tuple[_Worth, bool]:
    """One answer's worth where it stands first, and where it stands second; and whether both
    orders prefer the same."""
    agrees = (first > 0.5) == (second > 0.5) and (first < 0.5) == (second < 0.5)
    if agrees or page.inconsistent == "mean":
        return (first + second) / 2, agrees
    if page.inconsistent == "tie":
        return 0.5, agrees
    detail = f"worth {first:g} where it stands first, {second:g} where it stands second"
    return RowError(RowReason.INCONSISTENT_VERDICTS, detail), agrees


def _of_rubric(
    voted: Mapping[tuple[tuple[int, ...], int], Verdicts], weights: Sequence[float]
) -> dict[int, _Worth]:
    """An answer's share of what the criteria give together: the sum of worth times weight, by the
    sum of the weights above zero."""
    found: dict[int, dict[int, _Worth]] = {}
    for (shown, criterion), verdicts in voted.items():
        given = found.setdefault(shown[0], {})
        if isinstance(verdicts, RowError):
            given[criterion] = verdicts
        elif criterion >= 0:
            given[criterion] = verdicts[0]
        else:
            given |= dict(enumerate(verdicts))
    most = sum(weight for weight in weights if weight > 0)
    worths: dict[int, _Worth] = {}
    for response, given in found.items():
        failed = next((worth for worth in given.values() if isinstance(worth, RowError)), None)
        worths[response] = (
            failed
            or sum(
                worth * weights[criterion]
                for criterion, worth in sorted(given.items())
                if not isinstance(worth, RowError)
            )
            / most
        )
    return worths


def _mean(worths: Sequence[_Worth]) -> _Worth:
    failed = next((worth for worth in worths if isinstance(worth, RowError)), None)
    return failed or fmean(worth for worth in worths if not isinstance(worth, RowError))
