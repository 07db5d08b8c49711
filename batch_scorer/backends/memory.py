"""How many tokens a forward pass may have, by the device's memory."""

from collections.abc import Callable
from typing import TypeVar

import torch

from batch_scorer.backends.watchdog import sign_of_life

T = TypeVar("T")

LEAST_TOKENS = 16
"""A batch of this size that does not fit is not cut any smaller."""

GROW_AFTER = 64
"""Consecutive batches that must fit before a halved budget is doubled."""


class TokenBudget:
    """Most tokens of the next forward pass: halved when memory runs out, never above `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = self.tokens = limit
        self._fitted = 0

    def attempt(self, forward: Callable[[], T], tokens: int) -> T | None:
        """The result of a forward pass over `tokens` tokens. None where memory runs out; the
        budget is then half of `tokens`."""
        try:
            result = forward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            sign_of_life()
            self._fitted += 1
            if self._fitted >= GROW_AFTER and self.tokens < self.limit:
                self.tokens, self._fitted = min(self.limit, 2 * self.tokens), 0
            return result
        # Only here has the traceback gone, which kept the batch's tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.tokens, self._fitted = max(1, tokens // 2), 0
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """torch's CPU allocator raises a bare RuntimeError, which only its text identifies."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(error)
    )
