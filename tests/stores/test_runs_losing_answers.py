"""A conditional PUT whose answer is lost, at each of those that a run makes: the run gets through,
or the same command does; what is there in the end is what an undisturbed run gives."""

from collections.abc import Callable, Iterator

import pytest

from batch_scorer import Config, score
from batch_scorer.failpoints import arm, failpoint
from batch_scorer.nightly.night import Night, run_night
from batch_scorer.storage import store as store_module
from tests.fault.oracles import read_output
from tests.helpers.inputs import pairs, parquet
from tests.stores.jobs import StoreJob

pytestmark = pytest.mark.fault


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm("")


def puts_of(work: Callable[[], object]) -> int:
    """How many conditional PUTs it makes."""
    reached: list[str] = []

    def counting(name: str) -> None:
        reached.append(name)
        failpoint(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "failpoint", counting)
        work()
    return reached.count("put.applied")


def finished(job: StoreJob, config: Config, lost: int) -> None:
    """A run that loses an answer, and, unless it gets through, the same command again."""
    code = job.runs.start(config, f"put.applied:lose:{lost}").wait()
    if code != 0:
        assert job.place.store.kind == "local" and code in (2, 3), (code, job.runs.said())
        job.run(config)


@pytest.mark.parametrize("any_store", ["local", "azure"], indirect=True)
def test_any_answer_to_a_first_run_may_be_lost(job: StoreJob) -> None:
    expected = job.undisturbed()
    puts = puts_of(lambda: score(job.config("counted")))
    assert puts > 4 + 10, "the shards, and the records beside them"
    for lost in range(1, puts + 1):
        output = f"first-{lost}"
        finished(job, job.config(output), lost)
        job.assert_right(output, expected)


@pytest.mark.parametrize("any_store", ["local", "gcs"], indirect=True)
def test_any_answer_to_a_run_that_replaces_shards_may_be_lost(job: StoreJob) -> None:
    job.write_inputs("newer", newer=True)

    def config(output: str) -> Config:
        """Once it has been scored from the inputs as they were before."""
        job.run(job.config(output))
        return job.config(output, "newer")

    undisturbed = config("undisturbed")
    puts = puts_of(lambda: score(undisturbed))
    expected = read_output(job.at("undisturbed"), job.at("newer"))
    for lost in range(1, puts + 1):
        output = f"replaced-{lost}"
        finished(job, config(output), lost)
        job.assert_right(output, expected, "newer")


@pytest.mark.parametrize("any_store", ["s3-versioned"], indirect=True)
def test_any_answer_to_a_nightly_run_may_be_lost(job: StoreJob) -> None:
    """Its generations and the pointer to the newest are records of its own."""
    (job.place / "in").write({"b.parquet": parquet(pairs(3, start=100))})
    expected = job.undisturbed()

    def night(output: str, lost: int = 0) -> None:
        arm(f"put.applied:lose:{lost}" if lost else "")
        assert run_night(job.config(output), Night()).record is not None

    puts = puts_of(lambda: night("counted"))
    for lost in range(1, puts + 1):
        output = f"night-{lost}"
        night(output, lost)
        latest = (job.place / output).read_json("latest.json")["path"]
        job.assert_right(f"{output}/{latest}", expected)
