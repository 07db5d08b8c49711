"""One long job for all tests that disturb it."""

from pathlib import Path

import pytest

from cluster.local.seaweed import S3Server
from tests.fault.long_job import SHARDS, LongJob
from tests.helpers.places import Place, Stored
from tests.helpers.program import Program, temporary_ray_home


@pytest.fixture(scope="session")
def long_job(s3: S3Server, tiny_model: Path) -> LongJob:
    job = LongJob(Place(s3.url("fault"), s3.options), tiny_model)
    job.write_inputs()
    return job


@pytest.fixture(scope="session")
def undisturbed(long_job: LongJob) -> dict[str, Stored]:
    """The shards of a run that nothing happened to."""
    with temporary_ray_home() as home:
        ended = Program(home).run(*long_job.arguments("undisturbed", "--no-ray"))
    assert ended.exit_code == 0, ended.err
    shards = long_job.output("undisturbed").shards()
    assert len(shards) == SHARDS
    return shards
