"""Calls of a reward function, in a process that may die of them, hang or take all memory.

A call is about a batch of responses. Where it gives nothing, the batch is tried as often as the
settings say, and then halved until only the responses at fault are without a value. What a function
does wrong costs those responses, whatever it does.
"""

import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from batch_scorer.config import Config
from batch_scorer.errors import ConfigError, RowReason, ShardError, ShardReason
from batch_scorer.logs import mask
from batch_scorer.quarantine import Bounds, Died, TimedOut, apart, is_child
from batch_scorer.records import Conversation, RowError
from batch_scorer.rewards.functions import Reward, load

log = logging.getLogger("batch_scorer")

FloatArray = npt.NDArray[np.float32]

BATCH = 64
"""Responses in a call. One at fault is found after seven calls."""
_MOST_TIMED_OUT = 64
_MOST_DIED = 512
"""Calls about the responses of a shard that may take too long, or end their process. After them the
function is not asked about the rest: one that always hangs would keep the run from its end."""
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
_MOST_CHARACTERS = 500
"""Of what a function says."""
_LARGEST = float(np.finfo(np.float32).max)

Pace: TypeAlias = Callable[[Reward, int], None]
"""Waits until the function may be asked about so many responses (`Reward.per_minute`)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some responses as a function gets them, packed: the process that asks does not look into
    them."""

    size: int
    data: bytes

    @classmethod
    def of(
        cls,
        prompts: Sequence[Conversation],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> "Batch":
        """`prompts` are the messages before each response, `columns` the values of its row."""
        given = {"prompts": list(prompts), "responses": list(responses)}
        return cls(len(responses), pickle.dumps((given, dict(columns)), protocol=5))


def ask(
    reward: Reward, batches: Sequence[Batch], config: Config, pace: Pace
) -> tuple[FloatArray, dict[int, RowError]]:
    """What the function gives for the responses of a shard: float32[A], NaN for those that the
    errors name.

    Raises ShardError where the function cannot be loaded here.
    """
    asked = _Asked(reward, config, pace)
    found = [value for batch in batches for value in asked.about(batch)]
    errors = {place: value for place, value in enumerate(found) if isinstance(value, RowError)}
    numbers = [math.nan if isinstance(value, RowError) else value for value in found]
    return np.array(numbers, np.float32), errors


_Value: TypeAlias = float | RowError


class _Asked:
    """A function while it is asked about the responses of one shard."""

    def __init__(self, reward: Reward, config: Config, pace: Pace) -> None:
        self._reward, self._pace = reward, pace
        self._memory_gib = config.read_memory_gib
        self._load_s = config.read_timeout_s
        self._left = {
            RowReason.REWARD_TIMED_OUT: _MOST_TIMED_OUT,
            RowReason.REWARD_DIED: _MOST_DIED,
        }
        self._is_loaded = False

    def about(self, batch: Batch) -> list[_Value]:
        """A value, or why there is none, for each response."""
        step = batch.size
        if self._reward.per_minute is not None:
            step = min(step, max(1, int(self._reward.per_minute)))
        found: list[_Value] = []
        for start in range(0, batch.size, step):
            stop = min(start + step, batch.size)
            found += self._part(batch.data, start, stop, self._reward.attempts)
        return found

    def _part(self, data: bytes, start: int, stop: int, tries: int) -> list[_Value]:
        if used_up := next((reason for reason, left in self._left.items() if not left), None):
            error = RowError(used_up, "not asked: too many calls before it were lost")
            return [error] * (stop - start)
        found = self._call(data, start, stop)
        for tried in range(1, tries):
            if not isinstance(found, RowError):
                break
            time.sleep(min(_FIRST_WAIT_S * 2.0 ** (tried - 1), _LONGEST_WAIT_S))
            found = self._call(data, start, stop)
        if not isinstance(found, RowError):
            return found
        log.debug("%s: responses %d to %d: %s", self._reward.name, start, stop, found.detail)
        if stop - start == 1:
            return [found]
        middle = (start + stop) // 2
        return self._part(data, start, middle, 1) + self._part(data, middle, stop, 1)

    def _call(self, data: bytes, start: int, stop: int) -> list[_Value] | RowError:
        reward = self._reward
        if reward.per_minute is not None:
            self._pace(reward, stop - start)
        if not self._is_loaded:
            self._load()
        reason = RowReason.REWARD_DIED
        try:
            return apart(self._bounds(reward.timeout_s), _answers, reward, data, start, stop)
        except TimedOut as late:
            reason, how = RowReason.REWARD_TIMED_OUT, late.how
        except Died as died:
            how = f"its process {died.how}"
        except MemoryError:
            how = f"takes more than {self._memory_gib:g} GiB (read_memory_gib)"
        self._is_loaded = False
        self._left[reason] -= 1
        return RowError(reason, _short(how))

    def _load(self) -> None:
        """Have the process load the function, which is not part of the time of a call."""
        try:
            apart(self._bounds(self._load_s), _loaded, self._reward)
        except (ConfigError, Died, MemoryError) as error:
            raise ShardError(
                ShardReason.REWARD_UNUSABLE, f"{self._reward.name}: {_short(str(error))}"
            ) from None
        self._is_loaded = True

    def _bounds(self, seconds: float) -> Bounds:
        return Bounds(seconds, int(self._memory_gib * 2**30), self._reward.kind, tries=1)


def _short(text: str) -> str:
    return mask(" ".join(text.split()))[:_MOST_CHARACTERS]


# In the process that calls it


def _loaded(reward: Reward) -> None:
    load(reward)


def _answers(reward: Reward, data: bytes, start: int, stop: int) -> list[_Value] | RowError:
    """The function's answer about responses [start, stop) of a batch; the error is about all of
    them."""
    if is_child():  # what is printed goes to a file that is only read when the process dies
        os.ftruncate(1, 0)
        os.lseek(1, 0, os.SEEK_SET)
    function = load(reward)
    given, columns = pickle.loads(data)
    count = stop - start
    arguments = {name: given[name][start:stop] for name in reward.asks_for}
    for name, column in reward.columns.items():
        values = columns.get(column)
        arguments[name] = [None] * count if values is None else values[start:stop]
    try:
        answer = function(**arguments, **reward.arguments)
        values = list(answer)
    except MemoryError:
        raise
    except BaseException as error:  # the user's own code, sys.exit() too
        return RowError(RowReason.REWARD_RAISED, _short(f"{type(error).__name__}: {error}"))
    if len(values) != count:
        detail = f"{len(values)} values for {count} responses"
        return RowError(RowReason.REWARD_INVALID, detail)
    return [_value(each) for each in values]


def _value(given: Any) -> _Value:
    if given is None:
        return RowError(RowReason.REWARD_NONE, "")
    if isinstance(given, tuple) and len(given) == 2 and given[0] is None:
        return RowError(RowReason.REWARD_NONE, _short(str(given[1])))
    if not isinstance(given, Real):
        return RowError(RowReason.REWARD_INVALID, f"{type(given).__name__}, not a number")
    number = float(given)
    if not abs(number) <= _LARGEST:  # NaN too
        return RowError(RowReason.REWARD_INVALID, f"{number}, not a finite float32")
    return number
