"""Small jobs on each kind of store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local.azurite import AzureServer
from cluster.local.seaweed import S3Server
from tests.fault.forked import ForkedRuns, forked_runs
from tests.helpers.gcs import GcsServer
from tests.helpers.stores import AnyStore
from tests.stores.jobs import StoreJob


@pytest.fixture(scope="session")
def runs(
    s3: S3Server,
    azure: AzureServer,
    gcs: GcsServer,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
) -> Iterator[ForkedRuns]:
    """Forked processes that have the keys of all stores."""
    with forked_runs(tmp_path_factory.mktemp("runs"), tiny_model) as server:
        yield server


@pytest.fixture
def job(any_store: AnyStore, runs: ForkedRuns, tiny_model: Path, tmp_path: Path) -> StoreJob:
    """The small job on each kind of store in turn, its inputs written."""
    made = StoreJob(any_store.place, tiny_model, runs, tmp_path / "mirrors")
    made.write_inputs()
    return made
