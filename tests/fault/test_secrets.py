"""No secret of the environment comes out of a run: not in what it says, records, exports or logs.

Canaries stand for keys and tokens. The cluster's own keys for the store are wrong, so that the
store refuses a job there, and the workers of a driver elsewhere; a third run has the right ones.
"""

import io
import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.runs import telemetry
from cluster.local.local_cluster import Cluster, local_cluster
from cluster.local.seaweed import ACCESS_KEY, SECRET_KEY, S3Server
from tests.helpers.inputs import pairs, parquet
from tests.helpers.places import Place
from tests.helpers.program import Ended, Program, Running

pytestmark = pytest.mark.fault

WRONG = {
    "AWS_ACCESS_KEY_ID": "canary-access-key-id",
    "AWS_SECRET_ACCESS_KEY": "canary-secret-access-key",
    "AWS_SESSION_TOKEN": "canary-session-token",
}
RIGHT = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
ANYWAY = {"HF_TOKEN": "canary-hub-token"}
REFUSED = "no permission"


@pytest.fixture(scope="module")
def place(s3: S3Server) -> Place:
    place = Place(s3.url("secrets"), s3.options)
    (place / "in").write({"a.parquet": parquet(pairs(4)), "b.parquet": parquet(pairs(4, start=4))})
    return place


@pytest.fixture(scope="module")
def cluster(s3: S3Server) -> Iterator[Cluster]:
    with local_cluster(nodes=1, cpus=5, gpus=0, env={**WRONG, **ANYWAY}) as cluster:
        yield cluster


@dataclass(frozen=True)
class Runs:
    """How they ended: a job whose driver has the wrong keys, a driver with the right keys whose
    workers have the wrong ones, and one with the right keys that logs all it can in a Ray of its
    own."""

    refused_job: Ended
    refused_workers: Ended
    scored: Ended


@pytest.fixture(scope="module")
def runs(module_program: Program, cluster: Cluster, place: Place, tiny_model: Path) -> Runs:
    def start(output: str, *before: str, **environment: str) -> Running:
        arguments = [
            *before, "score", "--model", tiny_model, (place / "in").url,
            "--output", (place / output).url, *place.flags,
            "--backend", "fake", "--attempts", 1, "--json",
        ]  # fmt: skip
        return module_program.start(*arguments, **environment, **ANYWAY)

    started = (
        start("never", "submit", "--", **cluster.environment),
        start("refused", **cluster.environment, **RIGHT),
        start("scored", **RIGHT, RAY_LOGGING_CONFIG_ENCODING="JSON"),
    )
    return Runs(*(run.wait() for run in started))


@pytest.fixture(scope="module")
def told(module_program: Program, cluster: Cluster, place: Place, runs: Runs) -> dict[str, str]:
    """Text by the place where it is to be read, after all three runs."""
    told = {
        "what the refused job said": f"{runs.refused_job.out}\n{runs.refused_job.err}",
        "what the driver of refused workers said": (
            f"{runs.refused_workers.out}\n{runs.refused_workers.err}"
        ),
        "what the run that scored said": f"{runs.scored.out}\n{runs.scored.err}",
    }
    for name in ("refused", "scored"):
        store = (place / name).store
        told[f"the output {name}"] = "\n".join(
            text_of(info.key, store.read(info.key)) for info in store.list()
        )
    told["the Jobs API"] = get(cluster, "/api/jobs/")
    told["the metrics"] = "\n".join(scrapes(cluster))
    for name, folder in (("cluster", cluster.folder), ("private Ray", module_program.home)):
        told[f"the files of the {name}"] = "\n".join(
            f"{file}: {file.read_bytes().decode(errors='replace')}"
            for file in folder.rglob("*")
            if file.is_file() and file != cluster.token_file
        )
    return told


def text_of(key: str, data: bytes) -> str:
    """All that an object says; Parquet files, and manifests are such, are compressed, and so is
    what is known of input files, behind its digest."""
    if key.endswith((".parquet", ".manifest")):
        table = pq.read_table(io.BytesIO(data))
        return f"{key}: {table.schema.metadata} {table.to_pylist()}"
    if key.endswith(".files"):
        table = pa.ipc.open_file(data[sha256().digest_size :]).read_all()
        return f"{key}: {table.schema.metadata} {table.to_pylist()}"
    return f"{key}: {data.decode()}"


def get(cluster: Cluster, path: str) -> str:
    request = urllib.request.Request(
        cluster.dashboard + path, headers={"Authorization": f"Bearer {cluster.token}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


def scrapes(cluster: Cluster) -> Iterator[str]:
    """What Prometheus would read, from where the cluster says that it is."""
    (found,) = json.loads(get(cluster, "/api/prometheus/sd"))
    for target in found["targets"]:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
            yield answer.read().decode()


PLACES = [
    "what the refused job said", "what the driver of refused workers said",
    "what the run that scored said", "the output refused", "the output scored", "the Jobs API",
    "the metrics", "the files of the cluster", "the files of the private Ray",
]  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
def test_no_secret_is_told(where: str, told: dict[str, str], cluster: Cluster) -> None:
    assert told.keys() == set(PLACES)
    for secret in (*WRONG.values(), *RIGHT.values(), *ANYWAY.values(), cluster.token):
        assert secret not in told[where]


def test_the_store_s_refusal_is_told(told: dict[str, str], runs: Runs) -> None:
    ended = (runs.refused_job, runs.refused_workers, runs.scored)
    assert [run.exit_code for run in ended] == [2, 3, 0]
    failed = runs.refused_workers.json["failed"]
    assert {(each["reason"], REFUSED in each["detail"]) for each in failed} == {
        ("store_failed", True)
    }
    for where in ("what the refused job said", "what the driver of refused workers said"):
        assert REFUSED in told[where]
    assert REFUSED in told["the output refused"]
    # So the files that are searched are those that hold what was said.
    assert REFUSED in told["the files of the cluster"]
    assert '"run": "scored:1"' in told["the files of the private Ray"]


def test_the_last_figures_of_a_driver_outlive_it(told: dict[str, str]) -> None:
    """The driver ended long before the scrape; its agent still shows what it counted."""
    (line,) = (
        line
        for line in told["the metrics"].splitlines()
        if line.startswith(telemetry.SHARDS.exported) and 'outcome="failed"' in line
    )
    assert 'run="refused:1"' in line and float(line.split()[-1]) == 2
