"""Two runs at one output: one works; what it commits is never mixed with another's."""

import json

import pytest

from batch_scorer import Config
from batch_scorer.errors import ExitCode, LeaseLostError
from batch_scorer.records import Receipt
from batch_scorer.runs.remaining import Work
from batch_scorer.runs.run import score as run_score
from batch_scorer.storage import ObjectChanged
from tests.fault.long_job import SHARDS, LongJob
from tests.helpers.places import Place, Stored, digests
from tests.helpers.program import Program, Running, wait_until

pytestmark = pytest.mark.fault

LEASE = "_batch_scorer/lease.json"
SHORT_TERM_S = 1.0


def test_of_two_drivers_started_at_once_one_works_and_one_is_told(
    long_job: LongJob, program: Program, undisturbed: dict[str, Stored]
) -> None:
    runs = [program.start(*long_job.arguments("shared", "--no-ray")) for _ in range(2)]
    ended = sorted((run.wait() for run in runs), key=lambda run: run.exit_code)
    assert [run.exit_code for run in ended] == [0, 2], [run.err for run in ended]
    told = ended[1].error
    assert "is working on this output" in told or "took this output at the same moment" in told
    assert ended[0].json["metrics"]["scored_tokens"] == ended[0].json["tokens"]
    assert digests(long_job.output("shared").shards()) == digests(undisturbed)
    assert long_job.verify("shared").exit_code == 0


class TakenOver:
    """A listener in whose presence another holder takes the output, after the first shard."""

    def __init__(self, output: Place, epochs: int) -> None:
        self._output = output
        self._epochs = epochs
        self.committed = 0

    def planned(self, work: Work) -> None: ...

    def finished(self, receipt: Receipt) -> None:
        self.committed += 1
        if self.committed == 1:
            take_over(self._output, self._epochs)


def take_over(output: Place, epochs: int) -> None:
    """Write the lease as a living run on another machine would, `epochs` later."""
    store = output.store
    data, info = store.read_with_info(LEASE)
    body = json.loads(data)
    body["holder"] = {"host": "elsewhere", "pid": 1, "id": "another"}
    body["epoch"] += epochs
    store.replace(LEASE, json.dumps(body).encode(), info.version)


def test_a_run_of_an_older_epoch_commits_nothing_more(long_job: LongJob) -> None:
    output = long_job.output("newer-epoch")
    config = Config(
        model=str(long_job.model),
        inputs=((long_job.place / "in").url,),
        output=output.url,
        store_options=dict(long_job.place.options),
        backend="fake",
        shard_rows=2,
        use_ray=False,
    )
    listener = TakenOver(output, epochs=1)
    with pytest.raises(LeaseLostError) as raised:
        run_score(config, listener)
    assert raised.value.exit_code is ExitCode.INCOMPLETE
    assert listener.committed == len(output.shard_keys()) == 1
    assert output.read_json(LEASE)["holder"]["host"] == "elsewhere"


def test_a_driver_that_lost_its_output_says_so_and_publishes_nothing(
    long_job: LongJob, program: Program
) -> None:
    output = long_job.output("taken")
    running: Running = program.start(
        *long_job.arguments("taken", "--no-ray", "--lease-s", SHORT_TERM_S)
    )
    long_job.wait_for_shards("taken", 1, running)

    def taken() -> bool:
        try:
            take_over(output, epochs=0)
        except ObjectChanged:  # the holder renewed it between our read and our write
            return False
        return True

    wait_until(taken, "the output is taken over")
    ended = running.wait()
    assert ended.exit_code == 3
    assert "another run has taken this output over" in ended.error
    assert len(output.shard_keys()) < SHARDS
    assert not [info for info in output.store.list("_batch_scorer") if "manifests" in info.key]
    assert output.read_json(LEASE)["holder"]["host"] == "elsewhere"
