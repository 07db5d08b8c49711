"""What all tests share: servers of each kind of store, one tiny model, a Ray cluster of several
nodes, and a temporary folder for each other Ray."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from batch_scorer.models import kept
from cluster.local.azurite import AzureServer, azure_server
from cluster.local.local_cluster import Cluster, local_cluster
from cluster.local.seaweed import S3Server, s3_server
from tests.helpers.gcs import GcsServer, gcs_server
from tests.helpers.places import Place
from tests.helpers.program import Program, temporary_ray_home
from tests.helpers.stores import STORES, AnyStore, local_store, remote_store

# A test that a busy machine slows down has not failed.
settings.register_profile("without a clock", deadline=None)
settings.load_profile("without a clock")

# Before torch is loaded: OpenMP threads that spin make two busy cores several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Failpoints may be armed.
os.environ["BATCH_SCORER_TESTING"] = "1"
# GiB of vLLM's cache on a CPU, which every engine takes and clears at its start.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that an earlier test looked at, perhaps with other code in place of ours."""
    folder = tmp_path_factory.mktemp("kept")
    monkeypatch.setattr(kept, "user_cache", lambda: folder)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server, its keys in this process's environment."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def s3_versioned(s3: S3Server) -> S3Server:
    """A bucket of the same server that keeps old versions."""
    return s3.versioned("kept")


@pytest.fixture(scope="session")
def azure() -> Iterator[AzureServer]:
    """A real server of Azure's blobs, its key in this process's environment."""
    with azure_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def gcs() -> Iterator[GcsServer]:
    """A stand-in for Google's store, its token in this process's environment."""
    with gcs_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(params=STORES)
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> AnyStore:
    """Each kind of store in turn, with a folder of the test's own."""
    if request.param == "local":
        return local_store(tmp_path / "store")
    server = request.getfixturevalue(request.param.replace("-", "_"))
    return remote_store(request.param, server, f"{tmp_path.parent.name}/{tmp_path.name}")


@pytest.fixture
def store_place(any_store: AnyStore) -> Place:
    """A folder in each kind of store in turn."""
    return any_store.place


@pytest.fixture(scope="session")
def cluster(s3: S3Server) -> Iterator[Cluster]:
    """A head and four nodes of two CPUs and a fake GPU, which can reach the S3 server.

    A test that kills a node starts it again.
    """
    # A node that is gone is noticed after seconds, as its ports refuse; one that is only slow has
    # ten seconds for each answer.
    noticed = {"RAY_health_check_period_ms": "500", "RAY_health_check_initial_delay_ms": "0"}
    with local_cluster(nodes=4, cpus=2, gpus=1, env={**s3.environment, **noticed}) as running:
        yield running


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model that scores up to 4096 tokens."""
    from tests.helpers.tiny import tiny_reward_model

    return tiny_reward_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Short operations wait for each other's threads: on a busy machine two are ten times slower
    than one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ray_home() -> Iterator[Path]:
    """RAY_TMPDIR of one Ray; whatever still runs from it is ended with the test."""
    with temporary_ray_home() as home:
        yield home


@pytest.fixture
def program(ray_home: Path) -> Program:
    """The command line, run as a process of its own."""
    return Program(ray_home)


@pytest.fixture(scope="module")
def module_program() -> Iterator[Program]:
    """The same for what a module's tests build on."""
    with temporary_ray_home() as home:
        yield Program(home)
