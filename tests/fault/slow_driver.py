"""The command line with an engine that takes its time and has no model: something to be killed.

Run as a script, because what `__main__` defines travels to Ray's workers by value.
"""

import os
import time
from typing import Any

from batch_scorer import cli
from batch_scorer.backends.fake import FakeBackend
from batch_scorer.pipeline import ray_data as pipeline
from batch_scorer.records import Scores, TokenizedRows

LOAD_S = float(os.environ["SLOW_LOAD_S"])
SCORE_S = float(os.environ["SLOW_SCORE_S"])
"""For each shard."""


class SlowBackend(FakeBackend):
    def score(self, rows: TokenizedRows) -> Scores:
        time.sleep(SCORE_S)
        return super().score(rows)


class SlowStage(pipeline._ScoreStage):
    def __init__(self, **arguments: Any) -> None:
        time.sleep(LOAD_S)
        super().__init__(**arguments)
        self._scorer._backend = SlowBackend()


if __name__ == "__main__":
    pipeline._ScoreStage = SlowStage  # type: ignore[misc]
    cli.main()
