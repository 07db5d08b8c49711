"""That the strict schemas refuse what they should, and take what Kubernetes would take."""

from typing import Any

import pytest

from tests.manifests.schemas import keys, kinds, ray_up_violations, skypilot_violations, violations


def pod_template(**container: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "c", "image": "i:1", **container}]}}


def cluster(**spec: Any) -> dict[str, Any]:
    head = {"rayStartParams": {"num-cpus": "0"}, "template": pod_template()}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "c"},
        "spec": {"headGroupSpec": head, **spec},
    }


def job(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "j"},
        "spec": {"entrypoint": "true", **spec},
    }


def test_all_kinds_that_we_ship_have_a_schema() -> None:
    here = {kind for _, kind in kinds()}
    assert here >= {"RayCluster", "RayJob", "RayCronJob", "CronJob", "NetworkPolicy", "Role"}
    assert here >= {"ClusterQueue", "LocalQueue", "ResourceFlavor", "PodMonitor", "PrometheusRule"}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (cluster(rayversion="2.60.0"), "'rayversion' was unexpected"),
        (cluster(workerGroupSpecs=[{"template": pod_template()}]), "'groupName' is a required"),
        (
            cluster(
                workerGroupSpecs=[
                    {"groupName": "g", "template": pod_template(resource={"limits": {}})}
                ]
            ),
            "'resource' was unexpected",
        ),
        (cluster(authOptions={"mode": "tokens"}), "'tokens' is not one of"),
        (cluster(autoscalerOptions={"version": 2}), "2 is not"),
        (cluster(headGroupSpec={"template": pod_template()}, suspend="no"), "'no' is not of type"),
        ({**cluster(), "spce": {}}, "'spce' was unexpected"),
        ({**cluster(), "metadata": {"name": "c", "label": {}}}, "'label' was unexpected"),
        ({**cluster(), "metadata": {"name": "C_1"}}, "does not match"),
        ({"apiVersion": "ray.io/v1", "kind": "RayCluster"}, "'metadata' is a required"),
        ({**cluster(), "apiVersion": "ray.io/v1alpha1"}, "no schema for RayCluster"),
        ({**cluster(), "kind": "RayClusters"}, "no schema for RayClusters"),
    ],
)
def test_refused(document: dict[str, Any], said: str) -> None:
    assert any(said in violation for violation in violations(document)), violations(document)


def test_as_the_api_server_reads_it() -> None:
    """Nulls count as not there, and minReplicas is needed but has a default."""
    group = {"groupName": "g", "replicas": None, "template": pod_template()}
    document = cluster(workerGroupSpecs=[group])
    document["metadata"]["creationTimestamp"] = None
    assert violations(document) == []


def test_maps_with_keys_of_ones_own() -> None:
    limits = {"limits": {"nvidia.com/gpu": 1, "memory": "1Gi"}}
    document = cluster()
    document["metadata"]["labels"] = {"team": "rewards"}
    document["spec"]["headGroupSpec"]["template"] = pod_template(resources=limits)
    assert violations(document) == []
    is_named = dict(keys(document))
    head = ("spec", "headGroupSpec")
    assert is_named[head] and is_named[*head, "rayStartParams"]
    assert not is_named[*head, "rayStartParams", "num-cpus"]
    assert not is_named["metadata", "labels", "team"]
    limits_at = (*head, "template", "spec", "containers", 0, "resources", "limits")
    assert is_named[limits_at] and not is_named[*limits_at, "nvidia.com/gpu"]


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({}, "requires either BOTH"),
        (
            {
                "onSuccess": {"policy": "DeleteSelf"},
                "onFailure": {"policy": "DeleteNone"},
                "deletionRules": [
                    {"policy": "DeleteSelf", "condition": {"jobStatus": "SUCCEEDED"}}
                ],
            },
            "cannot be used together",
        ),
        (
            {"deletionRules": [{"policy": "DeleteSelf", "condition": {"ttlSeconds": 1}}]},
            "requires either the JobStatus",
        ),
        (
            {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]},
            None,
        ),
    ],
)
def test_cel_rules(strategy: dict[str, Any], said: str | None) -> None:
    found = violations(job(deletionStrategy=strategy))
    assert (found == []) if said is None else any(said in violation for violation in found), found


def test_cel_rules_about_updates_are_left_out() -> None:
    """`managedBy` may not change (a rule with oldSelf), and may be one of two."""
    assert violations(job(managedBy="kueue.x-k8s.io/multikueue")) == []
    [found] = violations(job(managedBy="somebody"))
    assert "must be either" in found


@pytest.mark.parametrize(
    ("kind", "api_version", "body", "said"),
    [
        ("CronJob", "batch/v1", {"spec": {"scheduel": "* * * * *"}}, "'scheduel'"),
        ("CronJob", "batch/v1", {"spec": {"schedule": "* * * * *"}}, "'jobTemplate' is a required"),
        ("NetworkPolicy", "networking.k8s.io/v1", {"spec": {"ingres": []}}, "'ingres'"),
        (
            "Role",
            "rbac.authorization.k8s.io/v1",
            {"rules": [{"verb": ["get"], "verbs": ["get"]}]},
            "'verb'",
        ),
        ("ConfigMap", "v1", {"dat": {}}, "'dat'"),
        ("ServiceAccount", "v1", {"automount": False}, "'automount'"),
        (
            "PersistentVolumeClaim",
            "v1",
            {"spec": {"accessModes": "ReadOnlyMany"}},
            "is not of type",
        ),
        ("LocalQueue", "kueue.x-k8s.io/v1beta2", {"spec": {}}, "'clusterQueue' is a required"),
        (
            "PrometheusRule",
            "monitoring.coreos.com/v1",
            {"spec": {"groups": [{"name": "g", "rules": [{"expr": "up"}]}]}},
            "is not valid under any",
        ),
    ],
)
def test_kinds_beside_rays(kind: str, api_version: str, body: dict[str, Any], said: str) -> None:
    document = {"apiVersion": api_version, "kind": kind, "metadata": {"name": "n"}, **body}
    assert any(said in violation for violation in violations(document)), violations(document)


def test_quotas_name_every_covered_resource() -> None:
    resources = [{"name": "cpu", "nominalQuota": 8}]
    group = {
        "coveredResources": ["cpu", "memory"],
        "flavors": [{"name": "f", "resources": resources}],
    }
    queue = {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "ClusterQueue",
        "metadata": {"name": "q"},
        "spec": {"resourceGroups": [group]},
    }
    [found] = violations(queue)
    assert "as many resources" in found
    resources.append({"name": "memory", "nominalQuota": "64Gi"})
    assert violations(queue) == []


def test_files_of_other_programs() -> None:
    assert ray_up_violations({"cluster_name": "c", "provider": {"type": "aws"}}) == []
    [found] = ray_up_violations({"cluster_name": "c", "provider": {"type": "aws"}, "max_worker": 2})
    assert "'max_worker'" in found
    task: dict[str, Any] = {"name": "n", "resources": {"accelerators": "H100:8"}, "run": "true"}
    assert skypilot_violations(task) == []
    task["resources"]["use_spots"] = True
    [found] = skypilot_violations(task)
    assert "'use_spots'" in found
