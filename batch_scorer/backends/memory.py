"""How many tokens a forward pass may have: what the device's memory allows."""

from collections.abc import Callable
from typing import TypeVar

import torch

from batch_scorer.backends.watchdog import sign_of_life

T = TypeVar("T")

LEAST_TOKENS = 16
"""A batch of so many tokens that does not fit is not cut any smaller."""

GROW_AFTER = 64
"""Batches in a row that must fit before a budget that was halved is doubled again."""


class TokenBudget:
    """Tokens of a forward pass: what went through last, at most `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = self.tokens = limit
        self._fitted = 0

    def attempt(self, forward: Callable[[], T], tokens: int) -> T | None:
        """The result of a forward pass over so many tokens, or None where the memory does not
        suffice; the budget is half of them then."""
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
        # Only here is the traceback gone, and with it the batch's tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.tokens, self._fitted = max(1, tokens // 2), 0
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """torch's CPU allocator raises a bare RuntimeError: its text is all that tells it apart."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(error)
    )
