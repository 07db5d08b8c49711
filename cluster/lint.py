"""Rules for manifests beyond the schemas of Kubernetes, KubeRay and Kueue.

    python cluster/lint.py FILE...

A schema knows the shape of a manifest. It does not know that the dashboard port runs anybody's
code, that a spot node under the head ends the job, or that KubeRay's controller refuses some
documents that its own CRD accepts. Each rule below is one function: its name is the rule's id, its
docstring says why the rule is there, and `tests/manifests/fixtures/lint/<id>.yaml` breaks it and no
other.

Rules marked "KubeRay" restate what its controller checks after the CRD has accepted a document
(ray-operator/controllers/ray/utils/validation.go, v1.7.0).
"""

import difflib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

# Held to constraints.txt and to the images by tests/manifests/test_cluster.py.
RAY = "2.60.0"

# What `kubectl` and we call accelerators; KubeRay makes Ray's GPUs out of keys that end in "gpu".
ACCELERATORS = frozenset({"nvidia.com/gpu", "amd.com/gpu", "gpu.intel.com/xe", "google.com/tpu"})
RESOURCES = ACCELERATORS | {"cpu", "memory", "ephemeral-storage"}

# Flags of `ray start` that are ours to set under KubeRay, which sets the address, the ports and
# `head` itself; labels are refused there, a group has a field for them.
START_PARAMS = frozenset(
    {
        *("block", "dashboard-host", "disable-usage-stats", "memory", "metrics-export-port"),
        *("node-name", "num-cpus", "num-gpus", "object-spilling-directory"),
        *("object-store-memory", "resources"),
    }
)

RUNTIME_ENV = frozenset(
    {
        *("config", "env_vars", "excludes", "image_uri", "pip", "py_executable", "py_modules"),
        *("uv", "working_dir"),
    }
)

# Keys of labels, annotations, node selectors and taints, by their prefix. A prefix that stands here
# takes these names only; any other prefix, and none, is the owner's business.
WELL_KNOWN = {
    "": {"grafana_dashboard", "k8s-app"},
    "app.kubernetes.io": {"component", "instance", "managed-by", "name", "part-of", "version"},
    "cloud.google.com": {"gke-accelerator", "gke-nodepool", "gke-spot"},
    "cluster-autoscaler.kubernetes.io": {"safe-to-evict"},
    "eks.amazonaws.com": {"capacityType", "nodegroup", "role-arn"},
    "iam.gke.io": {"gcp-service-account"},
    "karpenter.k8s.aws": {"instance-family", "instance-gpu-name"},
    "karpenter.sh": {"capacity-type", "do-not-disrupt", "nodepool"},
    "kubernetes.azure.com": {"scalesetpriority"},
    "kubernetes.io": {"arch", "hostname", "metadata.name", "os"},
    "kueue.x-k8s.io": {"elastic-job", "priority-class", "queue-name"},
    "node.kubernetes.io": {"instance-type"},
    "nvidia.com": {"gpu", "gpu.product"},
    "pod-security.kubernetes.io": {"audit", "enforce", "enforce-version", "warn"},
    "ray.io": {
        *("cluster", "group", "is-ray-node", "market-type", "node-type"),
        *("originated-from-cr-name", "originated-from-crd"),
    },
    "topology.kubernetes.io": {"region", "zone"},
}

_WELL_KNOWN_KEYS = {
    f"{prefix}/{name}".lstrip("/") for prefix, names in WELL_KNOWN.items() for name in names
}

# Node labels and taints that mean "may be taken away at short notice".
SPOT = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}

# The longest name that leaves room for what is put behind it.
NAME_LENGTHS = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36, "CronJob": 52}

_CREDENTIAL = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\bhf_[A-Za-z0-9]{20,}|\bghp_\w{20,}"
)
_SECRET_WORDS = {"KEY", "SECRET", "TOKEN", "PASSWORD"}
_MOVING = re.compile(r"\$\((?![A-Z_][A-Z0-9_]*\))|`|\$\{?RANDOM|uuid|\{\{|%[YmdHMS]")


class Finding(NamedTuple):
    """One broken rule: `where` is kind, name and path inside the document."""

    rule: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}: {self.message}"


class Node(NamedTuple):
    """A mapping inside a document, and the path to it."""

    path: str
    value: dict[str, Any]

    def child(self, *keys: str) -> "Node":
        """The mapping below; empty where there is none."""
        value: Any = self.value
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        path = ".".join((self.path, *keys)).lstrip(".")
        return Node(path, value if isinstance(value, dict) else {})

    def children(self, key: str) -> list["Node"]:
        """The mappings of the list below; none where there is no list."""
        items = self.value.get(key)
        return [
            Node(f"{self.path}.{key}[{index}]".lstrip("."), item)
            for index, item in enumerate(items if isinstance(items, list) else [])
            if isinstance(item, dict)
        ]

    def number(self, key: str, default: int = 0) -> int:
        """The number below; the default where there is none."""
        value = self.value.get(key)
        return value if isinstance(value, int) else default


@dataclass(frozen=True)
class Pod:
    """A pod template; `role` is head, worker, submitter or other."""

    role: str
    template: Node

    @property
    def spec(self) -> Node:
        return self.template.child("spec")

    @property
    def containers(self) -> list[Node]:
        return [*self.spec.children("initContainers"), *self.spec.children("containers")]

    @property
    def ray(self) -> list[Node]:
        """The container that runs Ray: KubeRay takes the first."""
        return self.spec.children("containers")[:1] if self.role in ("head", "worker") else []

    @property
    def on_spot(self) -> bool:
        """Whether it asks for spot nodes, or tolerates them."""
        selector = self.spec.child("nodeSelector").value
        tolerated = {item.value.get("key") for item in self.spec.children("tolerations")}
        return any(selector.get(key) == value for key, value in SPOT.items()) or bool(
            tolerated & set(SPOT)
        )


@dataclass(frozen=True)
class Manifest:
    """One document, and where in it the things lie that rules are about."""

    root: Node

    @property
    def kind(self) -> str:
        return str(self.root.value.get("kind", ""))

    @property
    def name(self) -> str:
        metadata = self.root.child("metadata").value
        return str(metadata.get("name") or metadata.get("generateName") or "")

    @property
    def labels(self) -> dict[str, Any]:
        return self.root.child("metadata", "labels").value

    @property
    def ray_jobs(self) -> list[Node]:
        if self.kind == "RayJob":
            return [self.root.child("spec")]
        if self.kind == "RayCronJob":
            return [self.root.child("spec", "jobTemplate")]
        return []

    @property
    def clusters(self) -> list[Node]:
        if self.kind == "RayCluster":
            return [self.root.child("spec")]
        return [
            job.child("rayClusterSpec") for job in self.ray_jobs if job.value.get("rayClusterSpec")
        ]

    @property
    def pods(self) -> list[Pod]:
        found = []
        for cluster in self.clusters:
            found.append(Pod("head", cluster.child("headGroupSpec", "template")))
            for group in cluster.children("workerGroupSpecs"):
                found.append(Pod("worker", group.child("template")))
        for job in self.ray_jobs:
            if job.value.get("submitterPodTemplate"):
                found.append(Pod("submitter", job.child("submitterPodTemplate")))
        if self.kind == "CronJob":
            found.append(Pod("other", self.root.child("spec", "jobTemplate", "spec", "template")))
        elif self.kind in ("Job", "Deployment", "StatefulSet", "DaemonSet"):
            found.append(Pod("other", self.root.child("spec", "template")))
        elif self.kind == "Pod":
            found.append(Pod("other", self.root))
        return found

    @property
    def containers(self) -> list[Node]:
        """Of all pods, and the autoscalers."""
        return [container for pod in self.pods for container in pod.containers] + self.autoscalers

    @property
    def autoscalers(self) -> list[Node]:
        """The container that KubeRay adds to a head."""
        return [
            cluster.child("autoscalerOptions")
            for cluster in self.clusters
            if cluster.value.get("enableInTreeAutoscaling")
        ]

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Path and text of every command line: entrypoints, and what containers run."""
        found = [
            (f"{job.path}.entrypoint", str(job.value["entrypoint"]))
            for job in self.ray_jobs
            if job.value.get("entrypoint")
        ]
        for container in self.containers:
            lists = [container.value.get(key) for key in ("command", "args")]
            words = [str(word) for words in lists if isinstance(words, list) for word in words]
            if words:
                found.append((container.path, " ".join(words)))
        return found


Problems = Iterator[tuple[str, str]]
Check = Callable[[Manifest], Problems]
RULES: dict[str, Check] = {}


def _rule(check: Check) -> Check:
    RULES[check.__name__.replace("_", "-")] = check
    return check


def findings(documents: list[dict[str, Any]]) -> list[Finding]:
    """Every broken rule of these documents, and of manifests that stand in their strings.

    A document without a kind (`ray up`, SkyPilot, Kustomize) meets the rules on images and text.
    """
    found = []
    for document in documents:
        manifest = Manifest(Node("", document))
        title = f"{manifest.kind}/{manifest.name}" if manifest.kind else "document"
        for rule, check in RULES.items():
            found += [
                Finding(rule, f"{title} {path}".rstrip(), message)
                for path, message in check(manifest)
            ]
        for path, text in _strings(document):
            found += [
                finding._replace(where=f"{title} {path} > {finding.where}")
                for finding in findings(_embedded(text))
            ]
    return found


def load(text: str) -> list[dict[str, Any]]:
    """The documents of a YAML text. Raises yaml.YAMLError, also for a key that stands twice."""
    return [document for document in yaml.load_all(text, _UniqueKeys) if isinstance(document, dict)]


class _UniqueKeys(yaml.SafeLoader):
    """YAML forbids a key that stands twice in a mapping; PyYAML takes the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1 and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _embedded(text: str) -> list[dict[str, Any]]:
    """Manifests inside a string: a ConfigMap's file, an Argo step's resource."""
    if "\n" not in text or not re.search(r"^kind:", text, re.M):
        return []
    try:
        return [document for document in load(text) if "apiVersion" in document]
    except yaml.YAMLError:
        return []


def _strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{path}[{index}]")


# Images and versions.


@_rule
def image_pinned(manifest: Manifest) -> Problems:
    """`latest`, or no tag at all, is another program tomorrow."""
    for path, image in _images(manifest):
        tag = image.rpartition("/")[2].partition("@")[0].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            yield path, f"{image!r} has no fixed tag; name a version or a digest"


@_rule
def ray_version(manifest: Manifest) -> Problems:
    """Ray refuses to join a cluster of another version, so all places must name the pinned one."""
    for cluster in manifest.clusters:
        stated = cluster.value.get("rayVersion")
        if stated != RAY:
            yield f"{cluster.path}.rayVersion", f"is {stated!r}; constraints.txt pins {RAY}"
    for pod in manifest.pods:
        for container in pod.ray:
            image = str(container.value.get("image", ""))
            named = re.search(r"ray[:-]?(\d+\.\d+\.\d+)", image)
            if named is None or named[1] != RAY:
                yield f"{container.path}.image", f"{image!r} does not say ray{RAY} in its tag"


def _images(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for container in manifest.containers:
        if "image" in container.value:
            yield f"{container.path}.image", str(container.value["image"])
    docker = manifest.root.child("docker")  # of `ray up`
    if "image" in docker.value:
        yield "docker.image", str(docker.value["image"])
    image_id = manifest.root.child("resources").value.get("image_id")  # of SkyPilot
    if image_id:
        yield "resources.image_id", str(image_id).removeprefix("docker:")


# Secrets, and who may do what.


@_rule
def no_secrets(manifest: Manifest) -> Problems:
    """Manifests are committed, and runtime_env and job metadata come back from the Jobs API."""
    for container in manifest.containers:
        for variable in container.children("env"):
            if _names_a_secret(variable.value.get("name")) and variable.value.get("value"):
                yield variable.path, f"{variable.value['name']} has a literal value; use valueFrom"
    for job in manifest.ray_jobs:
        variables = _runtime_env(job).get("env_vars")
        for name in variables if isinstance(variables, dict) else {}:
            if _names_a_secret(name):
                yield f"{job.path}.runtimeEnvYAML", f"{name}: the Jobs API shows it; set it in pods"
        for name in job.child("metadata").value:
            if _names_a_secret(name):
                yield f"{job.path}.metadata", f"{name}: the Jobs API shows it"
    if manifest.kind == "Secret":
        yield "", "a Secret does not belong in a repository; create it on the cluster"
    for path, text in _strings(manifest.root.value):
        if _CREDENTIAL.search(text):
            yield path, "looks like a credential"


def _names_a_secret(name: Any) -> bool:
    words = re.split(r"[^A-Z]+", str(name).upper())
    return bool(_SECRET_WORDS & set(words)) and words[-1] not in ("PATH", "FILE", "URI", "NAME")


@_rule
def token_auth(manifest: Manifest) -> Problems:
    """Whoever reaches port 8265 without a token runs code on every node (ShadowRay)."""
    for cluster in manifest.clusters:
        options = cluster.child("authOptions")
        if options.value.get("mode") != "token":
            yield options.path, "mode is not token: Ray is open to everybody who reaches it"
        if options.value.get("enableK8sTokenAuth") and manifest.ray_jobs:
            yield options.path, "KubeRay: enableK8sTokenAuth is refused for a RayJob"


@_rule
def cluster_ip_only(manifest: Manifest) -> Problems:
    """Ray's ports are for the cluster; from outside comes `kubectl port-forward` only."""
    if manifest.kind in ("Ingress", "HTTPRoute", "Gateway", "Route"):
        yield "", "opens a way in from outside"
    services = [manifest.root.child("spec")] if manifest.kind == "Service" else []
    for cluster in manifest.clusters:
        head = cluster.child("headGroupSpec")
        if head.value.get("serviceType", "ClusterIP") != "ClusterIP":
            yield f"{head.path}.serviceType", "is reachable from outside"
        if head.value.get("enableIngress"):
            yield f"{head.path}.enableIngress", "opens the dashboard to the outside"
        services.append(head.child("headService", "spec"))
    for service in services:
        if service.value.get("type", "ClusterIP") != "ClusterIP":
            yield f"{service.path}.type", "is reachable from outside"


@_rule
def non_root(manifest: Manifest) -> Problems:
    """What breaks out of a container should not be root on the node."""
    for pod in manifest.pods:
        context = pod.spec.child("securityContext")
        if context.value.get("runAsNonRoot") is not True:
            yield context.path, "runAsNonRoot is not true"
        if context.child("seccompProfile").value.get("type") != "RuntimeDefault":
            yield context.path, "seccompProfile is not RuntimeDefault"


@_rule
def no_privilege(manifest: Manifest) -> Problems:
    """Neither the host's namespaces and files, nor more rights than the image has."""
    for pod in manifest.pods:
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.value.get(key):
                yield f"{pod.spec.path}.{key}", "shares a namespace with the host"
        for volume in pod.spec.children("volumes"):
            if "hostPath" in volume.value:
                yield volume.path, "mounts the host's files"
    for container in manifest.containers:
        context = container.child("securityContext")
        if context.value.get("privileged"):
            yield f"{context.path}.privileged", "is root on the node"
        if context.child("capabilities").value != {"drop": ["ALL"]}:
            yield f"{context.path}.capabilities", "not just drop: [ALL]"
        if context.value.get("allowPrivilegeEscalation") is not False:
            yield context.path, "allowPrivilegeEscalation is not false"


@_rule
def own_submitter(manifest: Manifest) -> Problems:
    """Under cluster/kuberay/base only pods with this label reach the dashboard and the API server,
    and KubeRay's own submitter pod is refused for having no security context."""
    labels = [
        (pod.template.path, pod.template.child("metadata", "labels").value)
        for pod in manifest.pods
        if pod.role == "submitter" or manifest.kind == "CronJob"
    ]
    for path, found in labels:
        if found.get("app.kubernetes.io/component") != "submitter":
            yield path, "no label app.kubernetes.io/component: submitter"
    for job in manifest.ray_jobs:
        mode = job.value.get("submissionMode", "K8sJobMode")
        if mode == "K8sJobMode" and not job.value.get("submitterPodTemplate"):
            yield job.path, "no submitterPodTemplate"


@_rule
def workers_without_api(manifest: Manifest) -> Problems:
    """A worker runs the model, a submitter talks to Ray: they have nothing to ask of the Kubernetes
    API. A head has, where its autoscaler asks for workers."""
    scales = any(cluster.value.get("enableInTreeAutoscaling") for cluster in manifest.clusters)
    without = {"worker", "submitter"} if scales else {"worker", "submitter", "head"}
    for pod in manifest.pods:
        needed = pod.role not in without
        if not needed and pod.spec.value.get("automountServiceAccountToken") is not False:
            yield pod.spec.path, "automountServiceAccountToken is not false"


@_rule
def read_only_root(manifest: Manifest) -> Problems:
    """What took a process over cannot change the program; Ray writes to a folder of the pod's."""
    for container in manifest.containers:
        context = container.child("securityContext")
        if context.value.get("readOnlyRootFilesystem") is not True:
            yield context.path, "readOnlyRootFilesystem is not true"
    for pod in manifest.pods:
        empty = {
            volume.value.get("name")
            for volume in pod.spec.children("volumes")
            if "emptyDir" in volume.value
        }
        with_ray = pod.containers if pod.role != "other" else []
        if pod.role == "head":
            with_ray = [*with_ray, *manifest.autoscalers]
        for container in with_ray:
            mounted = {
                mount.value.get("name")
                for mount in container.children("volumeMounts")
                if mount.value.get("mountPath") == "/tmp" and not mount.value.get("readOnly")
            }
            if not mounted & empty:
                yield container.path, "no emptyDir to write to at /tmp"


@_rule
def narrow_rbac(manifest: Manifest) -> Problems:
    """One namespace, named resources, named verbs, and nobody's secrets."""
    if manifest.kind in ("ClusterRole", "ClusterRoleBinding"):
        yield "", "reaches into every namespace; a Role is enough"
    if manifest.kind in ("Role", "ClusterRole"):
        for rule in manifest.root.children("rules"):
            for key in ("apiGroups", "resources", "verbs"):
                wide = {"*", "secrets", "pods/exec", "escalate", "bind", "impersonate"}
                for word in sorted(wide & {str(item) for item in rule.value.get(key) or []}):
                    yield f"{rule.path}.{key}", f"{word!r} is more than is needed"


@_rule
def no_remote_code(manifest: Manifest) -> Problems:
    """Python that comes with a model runs with the cluster's credentials."""
    for path, text in _strings(manifest.root.value):
        if re.search(r"trust[-_]remote[-_]code", text, re.I):
            yield path, "runs code out of the model folder; type it by hand if you must"
    if "trust_remote_code" in manifest.root.value:
        yield "trust_remote_code", "runs code out of the model folder; type it by hand if you must"


# Resources.


@_rule
def memory_limit(manifest: Manifest) -> Problems:
    """Without one a greedy pod takes its neighbours down, and Ray takes the node's memory for its
    own."""
    for container in manifest.containers:
        if "memory" not in container.child("resources", "limits").value:
            yield f"{container.path}.resources.limits", "no memory limit"


@_rule
def limits_are_requests(manifest: Manifest) -> Problems:
    """Memory that was not requested is taken back by killing; GPUs cannot be overcommitted."""
    for container in manifest.containers:
        limits = container.child("resources", "limits").value
        requests = container.child("resources", "requests").value
        for name in ({"memory"} & set(limits)) | (ACCELERATORS & (set(limits) | set(requests))):
            if str(limits.get(name)) != str(requests.get(name)):
                yield (
                    f"{container.path}.resources",
                    f"{name}: limit {limits.get(name)}, request {requests.get(name)}",
                )


@_rule
def known_resources(manifest: Manifest) -> Problems:
    """`limits` is a free map: a misspelt `nvidia.com/gpu` is a pod that waits forever."""
    for container in manifest.containers:
        for kind in ("limits", "requests"):
            resources = container.child("resources", kind)
            for name in resources.value:
                if name not in RESOURCES:
                    yield resources.path, f"{name!r} is none of {', '.join(sorted(RESOURCES))}"
    if manifest.kind == "PersistentVolumeClaim":
        requests = manifest.root.child("spec", "resources", "requests")
        for name in set(requests.value) - {"storage"}:
            yield requests.path, f"{name!r} is not storage"


@_rule
def known_start_params(manifest: Manifest) -> Problems:
    """`rayStartParams` is a free map that becomes flags of `ray start`; labels have a field."""
    for cluster in manifest.clusters:
        groups = [cluster.child("headGroupSpec"), *cluster.children("workerGroupSpecs")]
        for params in [group.child("rayStartParams") for group in groups]:
            for name in params.value:
                if name not in START_PARAMS:
                    yield params.path, f"{name!r} is none of {', '.join(sorted(START_PARAMS))}"


@_rule
def known_keys(manifest: Manifest) -> Problems:
    """Labels, annotations and node selectors are free maps: a misspelt key is silently no key."""
    for path, key in _free_keys(manifest.root.value):
        prefix, _, name = key.rpartition("/")
        if key in _WELL_KNOWN_KEYS:
            continue
        if prefix in WELL_KNOWN and prefix:
            yield path, f"{key!r}: {prefix} has no {name!r} that we know of"
        elif near := difflib.get_close_matches(key, _WELL_KNOWN_KEYS, n=1, cutoff=0.85):
            yield path, f"{key!r}: did you mean {near[0]}?"


def _free_keys(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            here = f"{path}.{key}".lstrip(".")
            free = key in ("labels", "annotations", "nodeSelector", "matchLabels", "nodeLabels")
            if free and isinstance(item, dict):
                yield from ((here, str(name)) for name in item)
            elif key in ("tolerations", "nodeTaints", "matchExpressions"):
                for one in Node(path, value).children(key):
                    yield one.path, str(one.value.get("key"))
            yield from _free_keys(item, here)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _free_keys(item, f"{path}[{index}]")


@_rule
def shared_memory(manifest: Manifest) -> Problems:
    """Ray's object store lies in /dev/shm; a container gets 64 MB of it by default."""
    for pod in manifest.pods:
        memory = {
            volume.value.get("name")
            for volume in pod.spec.children("volumes")
            if volume.child("emptyDir").value.get("medium") == "Memory"
            and volume.child("emptyDir").value.get("sizeLimit")
        }
        for container in pod.ray:
            mounted = {
                mount.value.get("name")
                for mount in container.children("volumeMounts")
                if mount.value.get("mountPath") == "/dev/shm"
            }
            if not mounted & memory:
                yield container.path, "no emptyDir with medium Memory and a sizeLimit at /dev/shm"


# The cluster.


@_rule
def head_without_work(manifest: Manifest) -> Problems:
    """The head must live as long as the job: no task that eats its memory, no GPU that idles."""
    for cluster in manifest.clusters:
        head = cluster.child("headGroupSpec")
        if head.child("rayStartParams").value.get("num-cpus") != "0":
            yield f"{head.path}.rayStartParams", 'num-cpus is not "0": Ray puts tasks on the head'
        for container in Pod("head", head.child("template")).ray:
            for name in sorted(ACCELERATORS & set(container.child("resources", "limits").value)):
                yield container.path, f"{name} on the head stands idle"


@_rule
def head_on_demand(manifest: Manifest) -> Problems:
    """A lost worker costs a shard's time; a lost head or submitter costs the attempt."""
    for pod in manifest.pods:
        if pod.role in ("head", "submitter") and pod.on_spot:
            yield pod.spec.path, "runs on spot nodes, or tolerates them"


@_rule
def spot_has_fallback(manifest: Manifest) -> Problems:
    """Where the cloud has no spot nodes, a group of lower priority on demand carries the job on."""
    for cluster in manifest.clusters:
        groups = cluster.children("workerGroupSpecs")
        steady = [
            group.number("priority")
            for group in groups
            if not Pod("worker", group.child("template")).on_spot
        ]
        for group in groups:
            priority = group.number("priority")
            if Pod("worker", group.child("template")).on_spot and not any(
                other < priority for other in steady
            ):
                yield group.path, "no on-demand group of lower priority"


@_rule
def group_bounds(manifest: Manifest) -> Problems:
    """The default of maxReplicas is 2147483647."""
    for cluster in manifest.clusters:
        for group in cluster.children("workerGroupSpecs"):
            low, high = group.number("minReplicas", -1), group.number("maxReplicas", -1)
            if low < 0 or high < 0:
                yield group.path, "minReplicas and maxReplicas are not both set"
            elif not low <= group.number("replicas", low) <= high:
                yield group.path, "not minReplicas <= replicas <= maxReplicas"


@_rule
def one_source_of_resources(manifest: Manifest) -> Problems:
    """KubeRay: a group's resources stand in rayStartParams or in its field `resources`."""
    for cluster in manifest.clusters:
        for group in [cluster.child("headGroupSpec"), *cluster.children("workerGroupSpecs")]:
            params = {"num-cpus", "num-gpus", "memory", "resources"}
            if group.value.get("resources") and params & set(group.child("rayStartParams").value):
                yield group.path, "resources stand in rayStartParams too"


@_rule
def autoscaler_v2(manifest: Manifest) -> Problems:
    """Priorities and idle time-outs of groups need it, and it needs pods that never restart."""
    for cluster in manifest.clusters:
        if not cluster.value.get("enableInTreeAutoscaling"):
            for group in cluster.children("workerGroupSpecs"):
                for key in sorted({"priority", "idleTimeoutSeconds"} & set(group.value)):
                    yield f"{group.path}.{key}", "is for the autoscaler, which is off"
            continue
        options = cluster.child("autoscalerOptions")
        if options.value.get("version") != "v2":
            yield options.path, "version is not v2"
        for group in [cluster.child("headGroupSpec"), *cluster.children("workerGroupSpecs")]:
            spec = group.child("template", "spec")
            if spec.value.get("restartPolicy", "Never") != "Never":
                yield f"{spec.path}.restartPolicy", "KubeRay: Never or unset under autoscaler v2"


# The job.


@_rule
def cleans_up(manifest: Manifest) -> Problems:
    """A cluster that outlives its job costs GPUs until somebody looks."""
    for job in manifest.ray_jobs:
        finishes = job.value.get("shutdownAfterJobFinishes") or job.value.get("deletionStrategy")
        if job.value.get("rayClusterSpec") and not finishes:
            yield job.path, "neither shutdownAfterJobFinishes nor a deletionStrategy"


@_rule
def ttl_needs_shutdown(manifest: Manifest) -> Problems:
    """KubeRay: ttlSecondsAfterFinished counts from a shutdown."""
    for job in manifest.ray_jobs:
        ttl = job.number("ttlSecondsAfterFinished")
        if ttl and not job.value.get("shutdownAfterJobFinishes"):
            yield f"{job.path}.ttlSecondsAfterFinished", "needs shutdownAfterJobFinishes"


@_rule
def deletion_rules(manifest: Manifest) -> Problems:
    """KubeRay: deletion rules exclude shutdownAfterJobFinishes, name each policy once, and delete
    workers before the cluster before the job."""
    order = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
    for job in manifest.ray_jobs:
        rules = job.child("deletionStrategy").children("deletionRules")
        path = f"{job.path}.deletionStrategy"
        if rules and job.value.get("shutdownAfterJobFinishes"):
            yield path, "deletionRules and shutdownAfterJobFinishes exclude each other"
        after: dict[Any, dict[str, int]] = {}
        for rule in rules:
            condition, policy = rule.child("condition"), str(rule.value.get("policy"))
            if policy == "DeleteWorkers" and job.child("rayClusterSpec").value.get(
                "enableInTreeAutoscaling"
            ):
                yield rule.path, "DeleteWorkers is refused under the autoscaler"
            if policy in order[:2] and job.value.get("clusterSelector"):
                yield rule.path, f"{policy} is refused with a clusterSelector"
            status = condition.value.get("jobStatus") or condition.value.get("jobDeploymentStatus")
            delays = after.setdefault(status, {})
            if policy in delays:
                yield rule.path, f"a second {policy} for {status}"
            delays[policy] = condition.number("ttlSeconds")
        for status, delays in after.items():
            times = [delays[policy] for policy in order if policy in delays]
            if times != sorted(times):
                yield path, f"{status}: ttlSeconds must grow from workers to cluster to self"


@_rule
def suspend(manifest: Manifest) -> Problems:
    """KubeRay: to suspend a RayJob is to delete its cluster."""
    for job in manifest.ray_jobs:
        if job.value.get("suspend") and not job.value.get("shutdownAfterJobFinishes"):
            yield f"{job.path}.suspend", "needs shutdownAfterJobFinishes"
        if job.value.get("suspend") and job.value.get("clusterSelector"):
            yield f"{job.path}.suspend", "not with a clusterSelector"


@_rule
def cluster_selector(manifest: Manifest) -> Problems:
    """KubeRay: a job brings its cluster or selects one, and a selected one is not made anew."""
    for job in manifest.ray_jobs:
        selector = job.child("clusterSelector")
        if not selector.value:
            if not job.value.get("rayClusterSpec"):
                yield job.path, "neither rayClusterSpec nor clusterSelector"
            continue
        if not selector.value.get("ray.io/cluster"):
            yield selector.path, "names no ray.io/cluster"
        if job.value.get("rayClusterSpec"):
            yield selector.path, "not beside a rayClusterSpec"
        if job.number("backoffLimit") > 0:
            yield f"{job.path}.backoffLimit", "a retry makes a new cluster: not with a selector"
        if job.value.get("submissionMode") == "SidecarMode":
            yield f"{job.path}.submissionMode", "SidecarMode not with a clusterSelector"


@_rule
def sidecar_mode(manifest: Manifest) -> Problems:
    """KubeRay: in SidecarMode the submitter is a container of the head."""
    for job in manifest.ray_jobs:
        if job.value.get("submissionMode") != "SidecarMode":
            continue
        for key in ("submitterPodTemplate", "submitterConfig"):
            if key in job.value:
                yield f"{job.path}.{key}", "not in SidecarMode"
        spec = job.child("rayClusterSpec", "headGroupSpec", "template", "spec")
        if spec.value.get("restartPolicy", "Never") != "Never":
            yield f"{spec.path}.restartPolicy", "Never or unset in SidecarMode"


@_rule
def deadlines(manifest: Manifest) -> Problems:
    """Without them a job that waits for GPUs, or hangs, waits and hangs forever."""
    for job in manifest.ray_jobs:
        for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
            if job.number(key) <= 0:
                yield job.path, f"{key} is not set"


@_rule
def few_retries(manifest: Manifest) -> Problems:
    """Every retry is a new cluster, and what fails three times fails a fourth time."""
    for job in manifest.ray_jobs:
        if job.number("backoffLimit") > 3:
            yield f"{job.path}.backoffLimit", "more than 3"
    if manifest.kind in ("CronJob", "Job"):
        spec = manifest.root.child("spec")
        job = spec.child("jobTemplate", "spec") if manifest.kind == "CronJob" else spec
        if job.number("backoffLimit", 6) > 3:  # 6: Kubernetes' default
            yield f"{job.path}.backoffLimit", "more than 3, or not set"


@_rule
def runtime_env(manifest: Manifest) -> Problems:
    """KubeRay checks that it is YAML; Ray drops keys that it does not know with a warning."""
    for job in manifest.ray_jobs:
        if "runtimeEnvYAML" not in job.value:
            continue
        path = f"{job.path}.runtimeEnvYAML"
        try:
            parsed = yaml.safe_load(str(job.value["runtimeEnvYAML"]))
        except yaml.YAMLError as error:
            yield path, f"is not YAML: {error}"
            continue
        if not isinstance(parsed, dict):
            yield path, "is not a mapping"
            continue
        for key in sorted(set(parsed) - RUNTIME_ENV):
            yield path, f"{key!r} is none of {', '.join(sorted(RUNTIME_ENV))}"


def _runtime_env(job: Node) -> dict[str, Any]:
    try:
        parsed = yaml.safe_load(str(job.value.get("runtimeEnvYAML", "")))
    except yaml.YAMLError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


@_rule
def names(manifest: Manifest) -> Problems:
    """Pods and services are named after their owner; what gets too long is cut or refused."""
    limit = NAME_LENGTHS.get(manifest.kind)
    if limit is None:
        return
    metadata = manifest.root.child("metadata").value
    length = len(manifest.name) + (0 if metadata.get("name") else 5)  # generateName adds five
    if length > limit:
        yield "metadata", f"the name has {length} characters; {manifest.kind} allows {limit}"
    stem = manifest.name if metadata.get("name") else manifest.name.rstrip("-")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", stem):
        yield "metadata", f"{manifest.name!r} is not a DNS label that begins with a letter"


@_rule
def kueue_job(manifest: Manifest) -> Problems:
    """Kueue suspends a job by deleting its cluster, and counts the pods that it is told of."""
    if "kueue.x-k8s.io/queue-name" not in manifest.labels:
        return
    for job in manifest.ray_jobs:
        if not job.value.get("shutdownAfterJobFinishes"):
            yield job.path, "a queued RayJob needs shutdownAfterJobFinishes"
        if job.value.get("clusterSelector"):
            yield job.path, "a queued RayJob brings its own cluster"
    elastic = manifest.root.child("metadata", "annotations").value.get("kueue.x-k8s.io/elastic-job")
    for cluster in manifest.clusters:
        if len(cluster.children("workerGroupSpecs")) > 17:
            yield cluster.path, "more than 17 worker groups"
        if cluster.value.get("enableInTreeAutoscaling") and elastic != "true":
            yield cluster.path, "autoscaling needs the annotation kueue.x-k8s.io/elastic-job"


# What the job runs.


@_rule
def entrypoint_config(manifest: Manifest) -> Problems:
    """The settings of a run stand in one file that can be read, compared and kept."""
    for path, command in manifest.commands:
        runs = re.search(r"\bbatch-scorer\b.*\b(score|nightly)\b", command, re.S)
        if runs and "--config" not in command:
            yield path, "no --config"


@_rule
def stable_output(manifest: Manifest) -> Problems:
    """Resume is keyed by the output: one that moves with the clock is scored anew every time."""
    for path, command in manifest.commands:
        for value in re.findall(r"--output[= ]+(.*?)(?= --|$)", command, re.S):
            if _MOVING.search(value):
                yield path, f"--output {value.strip()} is another one at every attempt"


@_rule
def config_mounted(manifest: Manifest) -> Problems:
    """The entrypoint runs on the head: that pod must have the variable, and the file behind it."""
    heads = [pod for pod in manifest.pods if pod.role == "head"]
    for path, command in manifest.commands:
        if not path.endswith(".entrypoint") or "BATCH_SCORER_CONFIG" not in command:
            continue
        for head in heads:
            if not any(_has_config(head, container) for container in head.ray):
                yield head.spec.path, "BATCH_SCORER_CONFIG is not a file of a mounted ConfigMap"


def _has_config(pod: Pod, container: Node) -> bool:
    maps = {
        volume.value.get("name")
        for volume in pod.spec.children("volumes")
        if "configMap" in volume.value
    }
    folders = [
        str(mount.value.get("mountPath")).rstrip("/") + "/"
        for mount in container.children("volumeMounts")
        if mount.value.get("name") in maps
    ]
    return any(
        variable.value.get("name") == "BATCH_SCORER_CONFIG"
        and str(variable.value.get("value")).startswith(folder)
        for variable in container.children("env")
        for folder in folders
    )


# The schedule.


@_rule
def cron_overlap(manifest: Manifest) -> Problems:
    """Kubernetes' default lets two nights run at once; the lease would send one of them home."""
    if manifest.kind == "CronJob":
        policy = manifest.root.child("spec").value.get("concurrencyPolicy")
        if policy != "Forbid":
            yield "spec.concurrencyPolicy", f"is {policy!r}, not Forbid"


@_rule
def cron_time_zone(manifest: Manifest) -> Problems:
    """A zone with summer time skips a night and doubles another; without one it is the operator's
    own."""
    if manifest.kind in ("CronJob", "RayCronJob"):
        spec = manifest.root.child("spec").value
        if spec.get("timeZone") not in ("Etc/UTC", "UTC"):
            yield "spec.timeZone", f"is {spec.get('timeZone')!r}, not Etc/UTC"
        if "TZ=" in str(spec.get("schedule")):
            yield "spec.schedule", "TZ= is refused; use timeZone"


@_rule
def cron_late_start(manifest: Manifest) -> Problems:
    """Without a deadline 100 missed ticks stop the schedule for good, and a late one may run at
    noon. Under 10 seconds no tick may ever be seen."""
    seconds = manifest.root.child("spec").number("startingDeadlineSeconds")
    if manifest.kind == "CronJob" and seconds < 10:
        yield "spec.startingDeadlineSeconds", "is not set, or too short"


@_rule
def cron_history(manifest: Manifest) -> Problems:
    """What failed should still be there to be looked at in the morning, and not forever."""
    if manifest.kind == "CronJob":
        spec = manifest.root.child("spec")
        for key in ("successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
            if spec.number(key) < 1:
                yield f"spec.{key}", "is not set"


def main(files: list[str]) -> int:
    """Prints what is found in the files; 1 if there is anything, 2 if a file cannot be read."""
    found = False
    for file in files:
        try:
            documents = load(Path(file).read_text())
        except (OSError, yaml.YAMLError) as error:
            print(f"{file}: {error}", file=sys.stderr)
            return 2
        for finding in findings(documents):
            found = True
            print(f"{file}: {finding}")
    return int(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
