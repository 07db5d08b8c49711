"""Values to token ids: what is padding is not scored."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from operator import eq
from typing import Any

import numpy as np

from batch_scorer.errors import RowReason
from batch_scorer.formats.messages import bad
from batch_scorer.records import RowError

_MAX_TOKEN_ID = np.iinfo(np.int32).max
_MASK_VALUES = frozenset({0, 1})  # also False, True, 0.0 and 1.0


def ids_of(values: list[Any], label: str) -> list[int] | RowError:
    """The token ids in a list that is not empty."""
    # min and max hold for all: a bool or a double is none, even where it equals an integer.
    if set(map(type, values)) != {int} or min(values) < 0 or max(values) > _MAX_TOKEN_ID:
        return RowError(RowReason.BAD_TOKEN_ID, f"{label} holds a null or impossible token id")
    return values


def without_padding(values: Any, mask: Any, label: str) -> Any:
    """The ids where the mask is 1, or of a list of such lists all of them; as it is what is no
    list, and an error where ids and mask do not belong together."""
    if not isinstance(values, list) or not values:
        return values
    if not isinstance(mask, list):
        return RowError(RowReason.NULL_VALUE, f"the attention mask of {label} is null")
    if len(mask) != len(values):
        return bad(f"{label} has {len(values)} values, its attention mask {len(mask)}")
    if isinstance(values[0], list):
        return [without_padding(*pair, label) for pair in zip(values, mask, strict=True)]
    if not _MASK_VALUES.issuperset(mask):
        return bad(f"the attention mask of {label} holds something else than 0 and 1")
    if 1 not in mask:
        return RowError(RowReason.EMPTY, f"the attention mask of {label} is 0 everywhere")
    first = mask.index(1)
    stop = first + mask.count(1)
    if 0 in mask[first:stop]:
        return bad(f"the attention mask of {label} has zeros between ones")
    return values[first:stop]


def look_padded(rows: Sequence[Sequence[Any]]) -> bool:
    """Whether most of these rows of ids, none of them empty, seem to be filled up: they have other
    rows of their length, as batches have, and some of these begin or end in a run of one id, a long
    one or as other rows do. Rows that are all of other lengths are no padded batch, whatever they
    end in."""
    batches: dict[int, list[Sequence[Any]]] = {}
    for row in rows:
        batches.setdefault(len(row), []).append(row)
    padded = sum(len(batch) for batch in batches.values() if _is_padded(batch))
    return 2 * padded > len(rows)


def _is_padded(batch: Sequence[Sequence[Any]]) -> bool:
    """Of rows of one length."""
    if len(batch) < 2:
        return False
    for side in (batch, [row[::-1] for row in batch]):
        ends = [(row[0], sum(1 for _ in takewhile(partial(eq, row[0]), row))) for row in side]
        often = Counter(end for end, _ in ends)
        if any(run > 2 or (run == 2 and often[end] > 1) for end, run in ends):
            return True
    return False
