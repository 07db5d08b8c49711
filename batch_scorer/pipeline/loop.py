"""One shard after the other, in this process: the reference for the Ray pipeline."""

from collections.abc import Iterator
from concurrent.futures import Future

from batch_scorer import logs
from batch_scorer.backends.base import EngineDied
from batch_scorer.backends.registry import BackendFactory
from batch_scorer.errors import IncompleteError
from batch_scorer.job import Job
from batch_scorer.parity import Sample
from batch_scorer.pipeline.worker import Scorer, commit_item, prepare_item
from batch_scorer.records import Receipt, Shard


def run_here(
    job: Job,
    epoch: int,
    todo: list[Shard],
    sample: Future[Sample | None],
    attempt: int = 1,
    make: BackendFactory | None = None,
) -> Iterator[Receipt]:
    """Score the shards one after the other: the reference for `run_on_ray`.

    With a `sample` the engine has to agree with plain Hugging Face first (`parity`); what kept it
    from being chosen is raised. `attempt` is the number of this try, from 1. `make` builds another
    engine in place of the job's.
    """
    if not todo:
        return
    scorer = Scorer(job, sample.result, make)
    try:
        for shard in todo:
            with logs.fields(attempt=attempt):
                item = scorer.score(prepare_item(job, shard))
                item.spent.retries = attempt - 1
                receipt = commit_item(job, epoch, item)
            yield receipt  # outside: what its reader logs is not about this shard
    except EngineDied as error:
        raise IncompleteError(f"the engine died: {error}; run the same command again") from error
    finally:
        scorer.close()
