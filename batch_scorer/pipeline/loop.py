"""One shard after the other, in this process: the reference for the Ray pipeline."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from batch_scorer import logs
from batch_scorer.backends.base import EngineDied
from batch_scorer.backends.registry import BackendFactory
from batch_scorer.errors import IncompleteError
from batch_scorer.job import AnyJob
from batch_scorer.parity import Samples
from batch_scorer.pipeline.reward_pace import RewardPace, waiting
from batch_scorer.pipeline.worker import commit_items, prepare_items, scorers_of
from batch_scorer.records import Receipt, Shard


def run_here(
    job: AnyJob,
    epoch: int,
    todo: Sequence[Shard],
    samples: Future[Samples],
    attempt: int = 1,
    make: BackendFactory | None = None,
) -> Iterator[Receipt]:
    """Score the shards one after the other: the reference for `run_on_ray`.

    A model with one of the `samples` has to agree with plain Hugging Face first (`parity`); what
    kept them from being chosen is raised. `attempt` is the number of this try, from 1. `make`
    builds another engine in place of the job's.
    """
    if not todo:
        return
    scorers = scorers_of(job.members, samples.result, make)
    pace = waiting(RewardPace().wait_s)
    try:
        for shard in todo:
            with logs.fields(attempt=attempt):
                items = prepare_items(job, shard)
                scored = {name: scorer.score(items[name]) for name, scorer in scorers.items()}
                receipt = commit_items(job, epoch, scored, pace)
                receipt.spent.retries = attempt - 1
            yield receipt  # outside: what its reader logs is not about this shard
    except EngineDied as error:
        raise IncompleteError(f"the engine died: {error}; run the same command again") from error
    finally:
        for scorer in scorers.values():
            scorer.close()
