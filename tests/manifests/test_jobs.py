"""The files in jobs/: what can be proved without Kubernetes, Airflow, Argo and Anyscale."""

import ast
import copy
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml
from jinja2 import Environment, StrictUndefined

from batch_scorer.cli import commands as cli
from batch_scorer.config import load_config
from batch_scorer.errors import ConfigError
from batch_scorer.version import __version__
from cluster.lint import RAY, findings, load
from cluster.local.local_cluster import Cluster, local_cluster
from tests.helpers.inputs import pairs, parquet
from tests.helpers.program import REPOSITORY, Program
from tests.manifests.api_server import ApiServer, certificate
from tests.manifests.job_files import (
    JOBS,
    KUBERAY,
    Document,
    anyscale,
    argo,
    containers,
    dag,
    dag_call,
    documents,
    ray_job,
)
from tests.manifests.schemas import keys, violations

MANIFESTS = sorted(file for file in KUBERAY.glob("*.yaml"))
RAY_JOBS = ("rayjob-score.yaml", "rayjob-nightly.yaml", "raycronjob-nightly.yaml")
SETTINGS = sorted(JOBS.glob("[!k]*.yaml"))
MOUNTED_AT = "/etc/batch-scorer"


def environment(container: Document) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


# What Kubernetes and KubeRay would say.


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_manifests_are_right(file: Path) -> None:
    found = documents(file)
    assert found
    for document in found:
        assert violations(document) == []
    assert findings(found) == []


def misspelt(document: Document, path: tuple[str | int, ...]) -> Document:
    """A copy in which the last letter of the key at `path` stands twice."""
    copied = copy.deepcopy(document)
    place: Any = copied
    for step in path[:-1]:
        place = place[step]
    key = str(path[-1])
    place[key + key[-1]] = place.pop(key)
    return copied


def shapes(document: Document) -> dict[str, tuple[tuple[str | int, ...], bool]]:
    """Each key once, however many items of a list have it: its path and whether a schema names
    it."""
    return {
        ".".join("*" if isinstance(step, int) else step for step in path): (path, is_named)
        for path, is_named in keys(document)
    }


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_every_misspelt_key_is_found(file: Path) -> None:
    for document in documents(file):
        for shape, (path, is_named) in shapes(document).items():
            if shape == "data.config.yaml":
                continue  # any name is right; test_the_entrypoint_finds_its_settings looks at it
            wrong = misspelt(document, path)
            assert violations(wrong) if is_named else findings([wrong]), shape


def test_the_three_ways_start_the_same_cluster() -> None:
    def cluster(name: str) -> Document:
        spec = copy.deepcopy(ray_job(name))
        volumes = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
        for volume in volumes:
            volume.pop("configMap", None)
        for key in ("entrypoint", "activeDeadlineSeconds"):
            del spec[key]
        return spec

    assert cluster("rayjob-score.yaml") == cluster("rayjob-nightly.yaml")
    assert ray_job("rayjob-nightly.yaml") == ray_job("raycronjob-nightly.yaml")


def images(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (item for key, item in value.items() if key in ("image", "image_uri"))
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from images(item)


def test_one_image_everywhere_of_this_version() -> None:
    named = {
        image
        for file in JOBS.rglob("*.yaml")
        for document in documents(file)
        for image in images(document)
    }
    assert len(named) == 1
    assert named.pop().endswith(f"/batch-scorer:{__version__}-ray{RAY}")


# The settings.


@pytest.mark.parametrize("file", SETTINGS, ids=lambda file: file.name)
def test_job_files_hold_settings_and_name_their_schema(file: Path) -> None:
    first, *_ = file.read_text().splitlines()
    schema = (file.parent / first.partition("$schema=")[2]).resolve()
    assert first.startswith("# yaml-language-server: $schema=")
    jsonschema.validate(yaml.safe_load(file.read_text()), json.loads(schema.read_text()))
    load_config(file)


def config_map(name: str) -> Document:
    """The ConfigMap that a RayJob's head mounts, as it will be on the cluster."""
    if name == "rayjob-score.yaml":
        return documents(KUBERAY / name)[0]
    generated = yaml.safe_load((JOBS / "kustomization.yaml").read_text())["configMapGenerator"][0]
    files = (item.rpartition("=") for item in generated["files"])
    return {
        "metadata": {"name": generated["name"]},
        "data": {key or Path(path).name: (JOBS / path).read_text() for key, _, path in files},
    }


@pytest.mark.parametrize("name", RAY_JOBS)
def test_the_entrypoint_finds_its_settings(name: str, tmp_path: Path) -> None:
    spec = ray_job(name)
    submitter, head = containers(spec)
    variables = set(re.findall(r"\$\{(\w+)\}", spec["entrypoint"]))
    assert variables == {"BATCH_SCORER_CONFIG"}
    for variable in variables:
        # The submitter's shell puts the value in; it must be a file on the head.
        assert environment(submitter)[variable] == environment(head)[variable]
    file = Path(environment(head)["BATCH_SCORER_CONFIG"])
    mounts = {mount["mountPath"]: mount["name"] for mount in head["volumeMounts"]}
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = config_map(name)
    assert volumes[mounts[str(file.parent)]]["configMap"]["name"] == mounted["metadata"]["name"]
    settings = tmp_path / file.name
    settings.write_text(mounted["data"][file.name])
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert load_config(settings).workers == group["replicas"]
    settings.write_text(settings.read_text().replace("max_tokens", "max_token"))
    with pytest.raises(ConfigError, match="max_tokens"):
        load_config(settings)


# Command lines.


def parse(arguments: list[str]) -> None:
    """Let the command line take these arguments without running them. Raises what it would say."""
    name, *rest = arguments
    group: Any = typer.main.get_command(cli.app)
    group.commands[name].make_context(name, list(rest))
    if "--" in rest:
        parse(rest[rest.index("--") + 1 :])


@dataclass
class FakeRun:
    """What Airflow gives to a template as `dag_run`."""

    run_after: datetime = datetime(2026, 11, 22, 4, 17, tzinfo=UTC)


def rendered(template: str) -> str:
    """A template as Airflow fills it in, with what its documentation says is there."""
    jinja = Environment(undefined=StrictUndefined, autoescape=False)
    jinja.filters["ds_nodash"] = lambda moment: f"{moment:%Y%m%d}"
    connection = {"batch_scorer_ray": {"host": "http://head:8265", "password": "canary"}}
    return jinja.from_string(template).render(dag_run=FakeRun(), conn=connection)


def command_lines() -> dict[str, list[str]]:
    """Words of every command line in jobs/, variables filled in."""
    found = {
        name: shlex.split(re.sub(r"\$\{\w+\}", "/etc/config.yaml", ray_job(name)["entrypoint"]))
        for name in RAY_JOBS
    }
    step = argo()["spec"]["workflowSpec"]["templates"][0]["container"]
    words = [*step["command"], *step["args"]]
    found["argo"] = [
        re.sub(r"\{\{workflow\.creationTimestamp\.[Ymd]\}\}", "11", word) for word in words
    ]
    found["airflow"] = shlex.split(rendered(call("BashOperator")["bash_command"]))
    found["anyscale"] = shlex.split(anyscale()["entrypoint"])
    return found


@pytest.mark.parametrize("where", [*RAY_JOBS, "argo", "airflow", "anyscale"])
def test_command_lines_are_ours(where: str) -> None:
    program, *arguments = command_lines()[where]
    assert program == "batch-scorer"
    assert not any("{{" in word for word in arguments)
    parse(arguments)
    config = next(index for index, word in enumerate(arguments) if word.startswith("--config"))
    arguments[config] = arguments[config].replace("--config", "--confg")
    with pytest.raises(Exception, match="--confg"):
        parse(arguments)


# Kustomize.


def built(folder: str) -> list[Document]:
    program = Path(sys.executable).parent / "kubectl"
    done = subprocess.run(
        [program, "kustomize", "--load-restrictor=LoadRestrictionsNone", JOBS / folder],
        capture_output=True,
        text=True,
        check=True,
    )
    return load(done.stdout)


def test_the_night_is_installed_with_what_it_needs() -> None:
    by_kind = {document["kind"]: document for document in built(".")}
    assert set(by_kind) == {"ConfigMap", "CronJob"}
    for document in by_kind.values():
        assert violations(document) == []
    assert findings(list(by_kind.values())) == []
    assert by_kind["ConfigMap"]["data"] == config_map("rayjob-nightly.yaml")["data"]
    assert by_kind["CronJob"] == documents(KUBERAY / "cronjob-nightly.yaml")[0]
    pod = by_kind["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["volumes"][0]["configMap"]["name"] == by_kind["ConfigMap"]["metadata"]["name"]
    for word in pod["containers"][0]["command"]:
        if MOUNTED_AT in word:
            assert Path(word.rpartition("=")[2]).name in by_kind["ConfigMap"]["data"]


def test_the_kueue_variant_is_the_same_job_in_a_queue() -> None:
    settings, job = built("kuberay/kueue")
    plain_settings, plain = documents(KUBERAY / "rayjob-score.yaml")
    assert violations(job) == [] and findings([settings, job]) == []
    assert settings == plain_settings
    queue = load((REPOSITORY / "cluster/kuberay/kueue/queues.yaml").read_text())
    local = next(document for document in queue if document["kind"] == "LocalQueue")
    labels = job["metadata"].pop("labels")
    assert labels.pop("kueue.x-k8s.io/queue-name") == local["metadata"]["name"]
    assert labels == plain["metadata"].pop("labels")
    assert job["spec"].pop("shutdownAfterJobFinishes") is True
    assert job["spec"].pop("ttlSecondsAfterFinished") > 0
    del plain["spec"]["deletionStrategy"]
    assert job == plain


# The program that creates the night's RayJob, against a server that answers as the API server.

PROGRAM = KUBERAY / "create_rayjob.py"
TEMPLATE = KUBERAY / "rayjob-nightly.yaml"
# 2026-03-01 23:59 in minutes since 1970: a pod that starts late finds another day.
TICK = "batch-scorer-nightly-29540159"
NIGHT = "batch-scorer-nightly-20260301"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(tmp_path / "account") as server:
        yield server


def create(
    api: ApiServer, *flags: object, job: str = TICK, template: Path = TEMPLATE
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, PROGRAM, "--template", template, "--server", api.url,
        "--account", api.account, "--poll-s", 0.01, *flags,
    ]  # fmt: skip
    # A proxy that is set for the pod must not be asked for the API server.
    environment = {**os.environ, "JOB_NAME": job, "https_proxy": "http://127.0.0.1:1"}
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment
    )


def test_the_night_is_created_once(api: ApiServer) -> None:
    first, second = create(api), create(api)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert f"{NIGHT} created" in first.stdout
    assert f"{NIGHT} exists already" in second.stdout
    expected = documents(TEMPLATE)[0]
    expected["metadata"]["name"] = NIGHT
    assert api.created == {NIGHT: expected}
    assert findings([expected]) == []


def test_nights_have_names_of_their_own(api: ApiServer) -> None:
    create(api)
    create(api, job=f"batch-scorer-nightly-{29540159 + 24 * 60}")
    assert list(api.created) == [NIGHT, "batch-scorer-nightly-20260302"]


def test_a_trigger_by_hand_means_today(api: ApiServer) -> None:
    assert create(api, job="try-1").returncode == 0
    assert re.fullmatch(r"batch-scorer-nightly-20\d{6}", next(iter(api.created)))
    assert NIGHT not in api.created


def wrong_key(text: str) -> str:
    return text.replace("backoffLimit", "backofLimit")


def wrong_value(text: str) -> str:
    return text.replace("jobStatus: SUCCEEDED", "jobStatus: SUCCESS", 1)


def long_name(text: str) -> str:
    return text.replace("name: batch-scorer-nightly", f"name: {'x' * 39}", 1)


def no_name(text: str) -> str:
    return text.replace("  name: batch-scorer-nightly", "  generateName: batch-scorer-", 1)


def two_documents(text: str) -> str:
    return f"{text}---\n{text}"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (wrong_key, "backofLimit"),
        (wrong_value, "SUCCESS"),
        (long_name, "48 characters"),
        (no_name, "found 0"),
        (two_documents, "found 2"),
    ],
)
def test_a_wrong_template_is_refused(api: ApiServer, tmp_path: Path, spoil: Any, said: str) -> None:
    template = tmp_path / "rayjob.yaml"
    template.write_text(spoil(TEMPLATE.read_text()))
    ended = create(api, template=template)
    assert ended.returncode == 2
    assert said in ended.stderr and "Traceback" not in ended.stderr
    assert api.created == {}


def test_a_pod_without_the_right_is_told(api: ApiServer) -> None:
    api.allowed.remove("create")
    ended = create(api)
    assert (ended.returncode, api.created) == (2, {})
    assert "403 Forbidden" in ended.stderr and "cannot create" in ended.stderr
    (api.account / "token").write_text("another")
    ended = create(api)
    assert ended.returncode == 2 and "401 Unauthorized" in ended.stderr


def test_a_server_that_is_down_or_busy_is_worth_another_try(api: ApiServer) -> None:
    api.busy = 1
    ended = create(api)
    assert ended.returncode == 1 and "503" in ended.stderr
    api.close()
    ended = create(api)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert api.created == {}


def test_a_server_with_another_certificate_gets_no_token(api: ApiServer) -> None:
    certificate(api.account / "ca.crt")
    ended = create(api)
    assert ended.returncode == 1 and "CERTIFICATE_VERIFY_FAILED" in ended.stderr
    assert api.created == {}


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, 0),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "exit 3"}, 3),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "Deadline"}, 3),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 3),
        ({"jobDeploymentStatus": "ValidationFailed"}, 3),
    ],
)
def test_the_end_of_the_job_is_passed_on(api: ApiServer, last: Document, code: int) -> None:
    running = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
    retrying = {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}
    api.statuses = [{}, running, retrying, running, last]
    ended = create(api, "--wait")
    assert ended.returncode == code, ended.stderr
    assert last.get("message", "") in ended.stdout.splitlines()[-1]
    assert api.statuses == []


def test_waiting_outlives_a_busy_server_and_a_new_token(api: ApiServer) -> None:
    done = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    api.statuses = [{}, "busy", "new token", {}, done]
    ended = create(api, "--wait")
    assert ended.returncode == 0, ended.stderr
    assert "does not answer" in ended.stdout


def test_a_second_trigger_waits_for_the_first_ones_job(api: ApiServer) -> None:
    create(api)
    api.statuses = [{"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}]
    ended = create(api, "--wait")
    assert ended.returncode == 3
    assert "exists already" in ended.stdout


def test_a_job_that_was_deleted_is_not_waited_for(api: ApiServer) -> None:
    api.statuses = [{}, "gone"]
    ended = create(api, "--wait")
    assert ended.returncode == 2 and "404 NotFound" in ended.stderr


def test_exit_codes_that_are_final_end_the_job_of_the_night() -> None:
    job = documents(KUBERAY / "cronjob-nightly.yaml")[0]["spec"]["jobTemplate"]["spec"]
    rule = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert rule["values"] == [2, 3]
    assert rule["containerName"] == job["template"]["spec"]["containers"][0]["name"]


# Airflow: too large to install, so the DAG is read, and its calls are held to the parameters that
# are there to be called (apache/airflow 3.1: task-sdk/src/airflow/sdk/definitions/dag.py, and
# bash.py of the standard provider).

_DAG = (
    "dag_id description default_args start_date end_date schedule max_active_tasks max_active_runs"
    " max_consecutive_failed_dag_runs dagrun_timeout catchup doc_md params is_paused_upon_creation"
    " tags fail_fast dag_display_name"
)
_BASH_OPERATOR = (
    "task_id bash_command env append_env output_encoding skip_on_exit_code cwd output_processor"
    " retries retry_delay retry_exponential_backoff max_retry_delay execution_timeout pool queue"
    " trigger_rule depends_on_past"
)
_SIGNATURES = {
    "DAG": ("airflow.sdk", _DAG),
    "BashOperator": ("airflow.providers.standard.operators.bash", _BASH_OPERATOR),
    "pendulum.datetime": ("pendulum", "year month day hour minute second microsecond tz"),
    "timedelta": ("datetime", "days seconds microseconds milliseconds minutes hours weeks"),
}


def call(name: str) -> dict[str, Any]:
    """Arguments of the DAG file's call of `name`, bound to the parameters that it has. Raises
    TypeError for another one."""
    kind = Parameter.POSITIONAL_OR_KEYWORD
    parameters = [Parameter(word, kind, default=None) for word in _SIGNATURES[name][1].split()]
    positional, named = dag_call(name)
    return dict(Signature(parameters).bind(*positional, **named).arguments)


def test_the_dag_calls_what_airflow_has() -> None:
    imported = {
        alias.name: node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(dag())
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    called = {ast.unparse(node.func) for node in ast.walk(dag()) if isinstance(node, ast.Call)}
    assert called == set(_SIGNATURES)
    for name in called:
        assert imported[name.partition(".")[0]] == _SIGNATURES[name][0]
    once_a_night = {"catchup": False, "max_active_runs": 1}
    assert call("DAG").items() >= once_a_night.items()
    assert call("pendulum.datetime")["tz"] == "UTC"


def test_airflow_keeps_the_token_out_of_the_command_line() -> None:
    task = call("BashOperator")
    assert "canary" not in rendered(task["bash_command"])
    assert rendered(task["env"]["RAY_AUTH_TOKEN"]) == "canary"
    assert task["append_env"] is True  # without it, PATH and the store's keys are gone


# Argo and Anyscale: the keys that we use, written down by hand from their references
# (argo-workflows 3.6, docs/fields.md; docs.anyscale.com/reference/job-api). That proves spelling
# and types, not that either takes the file.


def _object(needed: str, **properties: Any) -> Document:
    return {
        "type": "object",
        "properties": properties,
        "required": needed.split(),
        "additionalProperties": False,
    }


_TEXT: Document = {"type": "string", "minLength": 1}
_WHOLE: Document = {"type": "integer", "minimum": 0}
_TEXTS: Document = {"type": "array", "items": _TEXT, "minItems": 1}
_FLAG: Document = {"type": "boolean"}
_MAP: Document = {"type": "object", "additionalProperties": _TEXT}


def _items(schema: Document) -> Document:
    return {"type": "array", "items": schema, "minItems": 1}


_ARGO = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "argoproj.io/v1alpha1"},
    kind={"const": "CronWorkflow"},
    metadata=_object("name", name=_TEXT, labels=_MAP),
    spec=_object(
        "schedules timezone concurrencyPolicy startingDeadlineSeconds workflowSpec",
        schedules=_TEXTS,
        timezone={"const": "Etc/UTC"},
        concurrencyPolicy={"const": "Forbid"},
        startingDeadlineSeconds=_WHOLE,
        successfulJobsHistoryLimit=_WHOLE,
        failedJobsHistoryLimit=_WHOLE,
        workflowSpec=_object(
            "entrypoint templates activeDeadlineSeconds",
            entrypoint=_TEXT,
            serviceAccountName=_TEXT,
            activeDeadlineSeconds=_WHOLE,
            securityContext=_object(
                "runAsNonRoot",
                runAsNonRoot=_FLAG,
                runAsUser=_WHOLE,
                runAsGroup=_WHOLE,
                seccompProfile=_object("type", type=_TEXT),
            ),
            podMetadata=_object("labels", labels=_MAP),
            volumes=_items(
                _object(
                    "name",
                    name=_TEXT,
                    configMap=_object("name", name=_TEXT),
                    emptyDir=_object("sizeLimit", sizeLimit=_TEXT),
                )
            ),
            templates=_items(
                _object(
                    "name container",
                    name=_TEXT,
                    retryStrategy=_object(
                        "limit", limit=_WHOLE, retryPolicy={"const": "Always"}, expression=_TEXT
                    ),
                    container=_object(
                        "image command args resources",
                        image=_TEXT,
                        command=_TEXTS,
                        args=_TEXTS,
                        envFrom=_items(
                            _object("configMapRef", configMapRef=_object("name", name=_TEXT))
                        ),
                        env=_items(
                            _object(
                                "name valueFrom",
                                name=_TEXT,
                                valueFrom=_object(
                                    "secretKeyRef",
                                    secretKeyRef=_object("name key", name=_TEXT, key=_TEXT),
                                ),
                            )
                        ),
                        resources=_object(
                            "requests limits",
                            requests=_object("cpu memory", cpu=_TEXT, memory=_TEXT),
                            limits=_object("cpu memory", cpu=_TEXT, memory=_TEXT),
                        ),
                        securityContext=_object(
                            "allowPrivilegeEscalation readOnlyRootFilesystem",
                            allowPrivilegeEscalation={"const": False},
                            readOnlyRootFilesystem={"const": True},
                            capabilities=_object("drop", drop={"const": ["ALL"]}),
                        ),
                        volumeMounts=_items(
                            _object("name mountPath", name=_TEXT, mountPath=_TEXT, readOnly=_FLAG)
                        ),
                    ),
                )
            ),
        ),
    ),
)
_ANYSCALE = _object(
    "name image_uri compute_config entrypoint max_retries",
    name=_TEXT,
    image_uri=_TEXT,
    compute_config=_object(
        "head_node worker_nodes",
        head_node=_object("instance_type", instance_type=_TEXT),
        worker_nodes=_items(
            _object(
                "instance_type min_nodes max_nodes",
                instance_type=_TEXT,
                min_nodes=_WHOLE,
                max_nodes=_WHOLE,
                market_type={"enum": ["ON_DEMAND", "SPOT", "PREFER_SPOT"]},
            )
        ),
    ),
    working_dir=_TEXT,
    entrypoint=_TEXT,
    max_retries=_WHOLE,
    timeout_s=_WHOLE,
)


def every_path(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Path of every key."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from every_path(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from every_path(item, (*path, index))


@pytest.mark.parametrize(
    ("document", "schema"),
    [(argo(), _ARGO), (anyscale(), _ANYSCALE)],
    ids=["argo", "anyscale"],
)
def test_keys_of_argo_and_anyscale(document: Document, schema: Document) -> None:
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(document)
    assert findings([document]) == []
    for path in every_path(document):
        wrong = misspelt(document, path)
        assert not validator.is_valid(wrong) or findings([wrong]), path


def test_argo_reads_the_configmap_and_the_token_of_its_cluster() -> None:
    spec = argo()["spec"]["workflowSpec"]
    step = spec["templates"][0]["container"]
    assert spec["entrypoint"] == spec["templates"][0]["name"]
    assert spec["volumes"][0]["configMap"]["name"] == config_map(TEMPLATE.name)["metadata"]["name"]
    assert f"--config={MOUNTED_AT}/config.yaml" in step["args"]
    assert step["volumeMounts"][0]["mountPath"] == MOUNTED_AT
    base = documents(REPOSITORY / "cluster/kuberay/base/raycluster.yaml")[0]
    cluster = base["metadata"]["name"]
    # KubeRay names the head's service and the token's Secret after the cluster.
    assert f"--address=http://{cluster}-head-svc:8265" in step["args"]
    secret = step["env"][0]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": cluster, "key": "auth_token"}


# The RayJob, replayed.


@dataclass
class Submitter:
    """The pod in which KubeRay runs its line, for one RayJob: same shell, same environment."""

    spec: Document
    mounted: Path
    cluster: Cluster
    home: Path

    def environment(self) -> dict[str, str]:
        """What the manifest gives to this pod and KubeRay adds, and nothing of ours."""
        own = {
            name: value.replace(MOUNTED_AT, str(self.mounted))
            for name, value in environment(containers(self.spec)[0]).items()
        }
        auth = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR")
        added = {name: self.cluster.environment[name] for name in auth}
        return {"PATH": os.environ["PATH"], "HOME": str(self.home), **own, **added}

    def line(self, job_id: str) -> str:
        """What K8sJobMode runs (kuberay v1.7.0, ray-operator/controllers/ray/common/job.go),
        without the loop that waits for the dashboard: the entrypoint is not quoted, and the
        runtime environment stands between double quotes."""
        ray = f"{Path(sys.executable).parent}/ray job"
        address = f"--address {self.cluster.dashboard}"
        runtime_env = json.dumps(json.dumps(yaml.safe_load(self.spec["runtimeEnvYAML"])))
        return (
            f"if ! {ray} status {address} {job_id} >/dev/null 2>&1 ; then "
            f"{ray} submit {address} --no-wait --runtime-env-json {runtime_env} "
            f"--submission-id {job_id} -- {self.spec['entrypoint'].strip()} ; fi ; "
            f"{ray} logs {address} --follow {job_id}"
        )

    def run(self, job_id: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/bash", "-ce", "--", self.line(job_id)],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )

    def jobs(self) -> list[Document]:
        """All jobs that the cluster knows, from its own API."""
        import urllib.request

        request = urllib.request.Request(
            f"{self.cluster.dashboard}/api/jobs/",
            headers={"Authorization": f"Bearer {self.cluster.token}"},
        )
        with urllib.request.urlopen(request) as answer:
            found: list[Document] = json.load(answer)
        return found


@pytest.mark.e2e
def test_the_rayjob_runs_once_when_kuberay_submits_it_twice(
    tmp_path: Path, tiny_model: Path, program: Program
) -> None:
    spec = ray_job("rayjob-score.yaml")
    rows = 30
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "pairs.parquet").write_bytes(parquet(pairs(rows), row_group_rows=10))
    mounted = tmp_path / "config-map"
    mounted.mkdir()
    settings = {
        "model": str(tiny_model),
        "inputs": [str(tmp_path / "in")],
        "output": str(tmp_path / "out"),
        "backend": "fake",
        "shard_rows": 10,
    }
    (mounted / "config.yaml").write_text(yaml.safe_dump(settings))
    # The image has the program on its path.
    (tmp_path / "bin").mkdir()
    entry = tmp_path / "bin" / "batch-scorer"
    entry.write_text(f'#!/bin/sh\nexec {sys.executable} -m batch_scorer.cli "$@"\n')
    entry.chmod(0o755)
    head = environment(containers(spec)[1])
    image = {
        "PATH": f"{entry.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        **{name: value.replace(MOUNTED_AT, str(mounted)) for name, value in head.items()},
    }
    with local_cluster(nodes=1, env=image) as cluster:
        submitter = Submitter(spec, mounted, cluster, tmp_path)
        first = submitter.run("batch-scorer-score-x7k2p")
        (job,) = submitter.jobs()
        assert job["status"] == "SUCCEEDED", first.stdout + first.stderr
        assert first.returncode == 0
        assert str(tmp_path / "out") in first.stdout
        assert job["runtime_env"] == yaml.safe_load(spec["runtimeEnvYAML"])
        # KubeRay makes the submitter's pod anew when it is lost.
        second = submitter.run("batch-scorer-score-x7k2p")
        assert second.returncode == 0
        assert submitter.jobs() == [job]
    verdict = program.run("verify", tmp_path / "out", "--json")
    assert verdict.exit_code == 0, verdict.err
    assert verdict.json["rows"] == rows
