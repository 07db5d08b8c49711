"""The command line with an engine that takes its time and has no model: something to be killed.

Run as a script, because what `__main__` defines travels to Ray's workers by value.
"""

import os
import time
from functools import partial

from batch_scorer import cli
from batch_scorer.backends.fake import FakeBackend
from batch_scorer.job import Job
from batch_scorer.records import Scores, TokenizedRows
from batch_scorer.runs import run

LOAD_S = float(os.environ["SLOW_LOAD_S"])
SCORE_S = float(os.environ["SLOW_SCORE_S"])
"""For each shard."""
GATE = os.environ["SLOW_GATE"]
"""No engine is loaded before a file of this name is there; empty for none."""


class SlowBackend(FakeBackend):
    def score(self, rows: TokenizedRows) -> Scores:
        time.sleep(SCORE_S)
        return super().score(rows)


def slow_engine(job: Job) -> SlowBackend:
    time.sleep(LOAD_S)
    while GATE and not os.path.exists(GATE):
        time.sleep(0.05)
    return SlowBackend()


if __name__ == "__main__":
    run.score = partial(run.score, make=slow_engine)
    cli.main()
