"""One shard after the other, in this process: the reference for the Ray pipeline."""

from collections.abc import Iterator

from batch_scorer import logs
from batch_scorer.backends.base import EngineDied
from batch_scorer.backends.registry import BackendFactory
from batch_scorer.errors import IncompleteError
from batch_scorer.job import Job
from batch_scorer.parity import Sample
from batch_scorer.pipeline.reward_pace import RewardPace, waiting
from batch_scorer.pipeline.worker import Scorer, commit_item, prepare_item
from batch_scorer.records import Receipt, Shard


def run_here(
    job: Job,
    epoch: int,
    todo: list[Shard],
    sample: Sample | None = None,
    attempt: int = 1,
    make: BackendFactory | None = None,
) -> Iterator[Receipt]:
    """Score the shards one after the other: the reference for `run_on_ray`.

    With a `sample` the engine has to agree with plain Hugging Face first (`parity`). `attempt` is
    the number of this try, from 1. `make` builds another engine in place of the job's.
    """
    if not todo:
        return
    scorer = Scorer(job, sample, make)
    pace = waiting(RewardPace().wait_s)
    try:
        for shard in todo:
            with logs.fields(attempt=attempt):
                item = scorer.score(prepare_item(job, shard))
                item.spent.retries = attempt - 1
                receipt = commit_item(job, epoch, item, pace)
            yield receipt  # outside: what its reader logs is not about this shard
    except EngineDied as error:
        raise IncompleteError(f"the engine died: {error}; run the same command again") from error
    finally:
        scorer.close()
