"""A model cut into stages: on one machine, and over the nodes of a cluster. `make stages`.

vLLM's CPU build runs stages in processes of one machine. It does not run over Ray, because it names
no resource of Ray's for its device; where it is given the name of a GPU, the nodes' fake GPUs do.
What is proved here is the plan, the reservation, who loads which layers, and the scores; what GPUs
say to each other over a network is not.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from batch_scorer.backends.base import EngineSettings
from batch_scorer.backends.plain import plain_scores
from batch_scorer.backends.vllm import VLLMBackend
from batch_scorer.outputs.verify import verify
from cluster.local.local_cluster import Cluster, local_cluster
from tests.helpers.inputs import pairs
from tests.helpers.program import REPOSITORY
from tests.parity.tiny_models import tokenized

GIVES_CPUS_A_NAME = """
import importlib.abc, importlib.machinery, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "vllm.platforms.cpu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.CpuPlatform.ray_device_key = "GPU"

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


ROWS = tokenized([[5, 6, 7, 8], list(range(10, 80)), list(range(10, 78)), [9] * 40])


def exact(model: Path) -> Any:
    return plain_scores(EngineSettings(model, "float32", "cpu"), ROWS).values


@pytest.mark.parametrize(("tensor", "stages"), [(1, 2), (2, 2)])
def test_stages_on_one_machine_give_the_scores(tiny_model: Path, tensor: int, stages: int) -> None:
    settings = EngineSettings(
        tiny_model,
        "float32",
        "cpu",
        max_tokens=128,
        tensor_parallel=tensor,
        pipeline_parallel=stages,
    )
    with closing(VLLMBackend(settings)) as backend:
        assert backend.provenance["executor"] == "mp"
        np.testing.assert_allclose(backend.score(ROWS).values, exact(tiny_model), atol=1e-3)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes with a fake GPU each, and a head with none."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(GIVES_CPUS_A_NAME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{site}:{REPOSITORY}")
        with local_cluster(nodes=4, cpus=2, gpus=1) as cluster:
            yield cluster


def on_cluster(cluster: Cluster, program: str, *arguments: str) -> Any:
    """What the program prints last, as JSON."""
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **cluster.environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


VLLM_OVER_NODES = """
import json, sys
from pathlib import Path
import ray
from batch_scorer import Config
from batch_scorer.pipeline.placement import beside_gpus, reserve
from tests.e2e.stages import ROWS

class Worker:
    def score(self, model):
        from batch_scorer.backends.base import EngineSettings
        from batch_scorer.backends.vllm import VLLMBackend

        config = Config(
            model=model, inputs=["in"], output="out", backend="vllm", pipeline_parallel=2
        )
        self.group = reserve(config)
        settings = EngineSettings(
            Path(model), "float32", "cpu",
            max_tokens=128, pipeline_parallel=2, placement_group=self.group,
        )
        self.backend = VLLMBackend(settings)
        nodes = ray.util.placement_group_table(self.group)["bundles_to_node_id"]
        return {
            "scores": self.backend.score(ROWS).values.tolist(),
            "executor": self.backend.provenance["executor"],
            "nodes": len(set(nodes.values())),
        }

ray.init(log_to_driver=False)
worker = ray.remote(num_cpus=1, **beside_gpus())(Worker).remote()
found = ray.get(worker.score.remote(sys.argv[1]))
print(json.dumps(found))
"""


def test_stages_over_nodes_give_the_scores(nodes: Cluster, tiny_model: Path) -> None:
    found = on_cluster(nodes, VLLM_OVER_NODES, str(tiny_model))
    assert (found["executor"], found["nodes"]) == ("ray", 2)
    np.testing.assert_allclose(found["scores"], exact(tiny_model), atol=1e-3)


DEATHS = """
import json, os, time
import ray
from batch_scorer import Config
from batch_scorer.pipeline.placement import _free_gpus, beside_gpus, give_up_all, reserve

class Worker:
    def __init__(self):
        config = Config(model="m", inputs=["in"], output="o", backend="vllm", pipeline_parallel=2)
        self.group = reserve(config)

    def name(self):
        return self.group.id.hex()

    def die(self):
        os._exit(1)

def free(wanted):
    until = time.monotonic() + 60
    while sum(_free_gpus().values()) != wanted and time.monotonic() < until:
        time.sleep(0.2)
    return sum(_free_gpus().values())

ray.init(log_to_driver=False)
kind = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1, **beside_gpus())(Worker)
workers = [kind.remote() for _ in range(2)]
before = ray.get([worker.name.remote() for worker in workers])
found = [free(0)]
workers[0].die.options(max_task_retries=0).remote()
after = ray.get(workers[0].name.remote())
found += [after in before, free(0)]
for worker in workers:
    ray.kill(worker)
give_up_all()
print(json.dumps([*found, free(4)]))
"""


def test_a_worker_that_is_started_again_gets_devices_again(nodes: Cluster) -> None:
    """Ray 2.60 still holds the placement group of a dead actor after a minute."""
    assert on_cluster(nodes, DEATHS) == [0, False, 0, 4]


WHOLE_RUN = """
import json, sys, ray
from batch_scorer import Config, score
from batch_scorer.backends.fake import FakeBackend

class Engine(FakeBackend):
    def __init__(self, job):
        super().__init__()
        nodes = ray.util.placement_group_table(job.placement_group)["bundles_to_node_id"]
        self.provenance["nodes"] = sorted(nodes.values())

model, inputs, output = sys.argv[1:]
config = Config(
    model=model, inputs=[inputs], output=output, backend="vllm", device="cuda", shard_rows=4,
    pipeline_parallel=2, parity_check="off",
)
summary = score(config, make=Engine)
print(json.dumps([summary.run.workers, summary.run.devices, summary.totals["rows_scored"]]))
"""


def test_a_run_lays_its_workers_over_the_nodes(
    nodes: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    pq.write_table(pairs(40), tmp_path / "in.parquet")
    arguments = [str(tiny_model), str(tmp_path / "in.parquet"), str(tmp_path / "out")]
    assert on_cluster(nodes, WHOLE_RUN, *arguments) == [2, 4, 40]
    assert verify(str(tmp_path / "out")).exit_code == 0
    engines = [json.loads(f.read_text()) for f in (tmp_path / "out").rglob("engines/*.json")]
    used = [tuple(engine["nodes"]) for engine in engines]
    assert len(used) == len(set(used)) <= 2 and all(len(set(each)) == 2 for each in used)


GONE = """
import json, shutil, sys
from pathlib import Path
from batch_scorer import Config, score
from batch_scorer.errors import ModelError

class Listener:
    def planned(self, work):
        shutil.rmtree(sys.argv[1])

    def finished(self, receipt):
        pass

model, inputs, output = sys.argv[1:]
try:
    config = Config(model=model, inputs=[inputs], output=output, backend="fake", device="cpu")
    score(config, Listener())
except ModelError as error:
    print(json.dumps(str(error)))
"""


def test_a_node_that_lacks_the_model_is_named(
    nodes: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    pq.write_table(pairs(2), tmp_path / "in.parquet")
    arguments = [str(model), str(tmp_path / "in.parquet"), str(tmp_path / "out")]
    said = on_cluster(nodes, GONE, *arguments)
    assert said.startswith(f"{model}: not on ") and "\n" not in said


TOO_MANY = """
import json, sys
from batch_scorer import Config, score
from batch_scorer.errors import ConfigError

model, inputs, output = sys.argv[1:]
try:
    score(Config(
        model=model, inputs=[inputs], output=output, backend="vllm", device="cuda",
        tensor_parallel=2, parity_check="off",
    ))
except ConfigError as error:
    print(json.dumps(str(error)))
"""


def test_what_no_nodes_can_hold_leaves_the_output_untouched(
    nodes: Cluster, tiny_model: Path, tmp_path: Path
) -> None:
    pq.write_table(pairs(2), tmp_path / "in.parquet")
    arguments = [str(tiny_model), str(tmp_path / "in.parquet"), str(tmp_path / "out")]
    said = on_cluster(nodes, TOO_MANY, *arguments)
    assert said.startswith("tensor_parallel: 2 GPUs of one node are asked for") and "\n" not in said
    assert not [*(tmp_path / "out").rglob("*.json")]
