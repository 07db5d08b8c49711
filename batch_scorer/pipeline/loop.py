"""One shard after the other, in this process: the reference for the Ray pipeline."""

from collections.abc import Iterator
from dataclasses import replace

from batch_scorer import logs
from batch_scorer.backends.base import EngineDied
from batch_scorer.errors import IncompleteError
from batch_scorer.job import Job
from batch_scorer.parity import Sample
from batch_scorer.pipeline.worker import Scorer, commit_scored, prepare_shard
from batch_scorer.records import Receipt, Shard


def run_here(
    job: Job, epoch: int, todo: list[Shard], sample: Sample | None = None, attempt: int = 1
) -> Iterator[Receipt]:
    """Score the shards one after the other: the reference for the other road.

    With a `sample` the engine has to agree with plain Hugging Face first (`parity`). `attempt`
    says for the which time these shards are tried.
    """
    if not todo:
        return
    scorer = Scorer(job, sample)
    try:
        for shard in todo:
            with logs.fields(attempt=attempt):
                receipt = commit_scored(job, epoch, scorer.score(prepare_shard(job, shard)))
            yield replace(receipt, retries=attempt - 1)
    except EngineDied as error:
        raise IncompleteError(f"the engine died: {error}; run the same command again") from error
    finally:
        scorer.close()
