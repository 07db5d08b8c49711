"""A run of several models and functions that is killed is finished by the same command, to the same
bytes."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_scorer import Config
from batch_scorer.errors import ExitCode
from batch_scorer.outputs.verify import verify
from tests.fault.small_job import SmallJob, small_job
from tests.helpers.places import Place, digests
from tests.helpers.reward_file import reward_file
from tests.helpers.tiny import tiny_reward_model

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[SmallJob]:
    folder = tmp_path_factory.mktemp("ensembles")
    tiny_reward_model(folder / "other", bos=True)
    reward_file(folder)
    with small_job(Place(str(folder)), folder, tiny_model) as made:
        yield made


def config_of(job: SmallJob, output: str) -> Config:
    alone = job.config(output)
    models = {"a": str(job.model), "b": f"{job.place.url}/other"}
    rewards = {name: f"{job.place.url}/own_rewards.py:{name}" for name in ("length", "turns")}
    more = {"model": models, "rewards": rewards}
    return Config.model_validate({**alone.model_dump(exclude_unset=True), **more})


@pytest.mark.parametrize("name", ["commit.before_put", "commit.after_put:kill:2",
                                  "manifest.before_put"])  # fmt: skip
def test_a_killed_run_of_several_models_is_finished_to_the_same_bytes(
    name: str, job: SmallJob
) -> None:
    undisturbed, killed = f"undisturbed-{name}", f"killed-{name}"
    assert job.runs.run(config_of(job, undisturbed)) == 0, job.runs.said()
    failpoint = name if ":" in name else f"{name}:kill"
    code = job.runs.start(config_of(job, killed), failpoint).wait()
    assert code == -signal.SIGKILL, (code, job.runs.said())
    assert job.runs.run(config_of(job, killed)) == 0, job.runs.said()
    found = digests((job.place / killed).shards())
    assert len(found) == 4 and found == digests((job.place / undisturbed).shards())
    assert verify((job.place / killed).url).exit_code == ExitCode.DONE
