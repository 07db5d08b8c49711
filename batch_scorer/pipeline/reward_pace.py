"""When reward functions with a rate limit may be asked: one clock for all workers of a job."""

import time
from collections.abc import Callable

from batch_scorer.backends.pacing import Pace
from batch_scorer.rewards.functions import Reward


class RewardPace:
    """Hands out times; on a cluster it is an actor that all workers ask."""

    def __init__(self) -> None:
        self._paces: dict[str, Pace] = {}

    def wait_s(self, reward: str, per_minute: float, responses: int) -> float:
        """Seconds until a function may be asked about so many responses; their place is taken."""
        pace = self._paces.setdefault(reward, Pace(None, per_minute))
        now = time.monotonic()
        return pace.start(now, responses) - now


def waiting(wait_s: Callable[[str, float, int], float]) -> Callable[[Reward, int], None]:
    """What waits as long as `RewardPace.wait_s` says, wherever that is."""

    def wait(reward: Reward, responses: int) -> None:
        if reward.per_minute is not None:
            time.sleep(wait_s(reward.name, reward.per_minute, responses))

    return wait
