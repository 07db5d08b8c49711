"""Manifests against the schemas of what will read them: strict, and without a Kubernetes.

An API server drops a key that it does not know, unless the client asks it not to, so a misspelt
`maxReplica` is a default taken silently. Here it is refused. `crds/` holds the schemas of KubeRay
and of Kubernetes' own kinds (crds/README.md tells their source); what we use of Kueue's and the
Prometheus operator's stands below, written by hand.
"""

import copy
import functools
import json
import lzma
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import cel
import jsonschema

CRDS = Path(__file__).parent / "crds"

Schema = dict[str, Any]


def violations(document: dict[str, Any]) -> list[str]:
    """What an API server with strict field validation would say to this document; nothing if it is
    right. Sees schema and CEL rules, not admission webhooks nor what a controller checks later."""
    kind = (str(document.get("apiVersion")), str(document.get("kind")))
    found: dict[str, None] = {}  # in order, and once where several versions say the same
    for schema in _schemas(*kind):
        prepared = _as_read(document, schema)
        # CEL rules count on the right shape.
        wrong = _against(prepared, schema) or list(_cel_violations(prepared, schema))
        found |= dict.fromkeys(wrong)
    return list(found) if _schemas(*kind) else [f"no schema for {kind[1]} of {kind[0]}"]


def refusals(policy: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """The messages with which a ValidatingAdmissionPolicy refuses this document."""
    known: dict[str, Any] = {"object": document, "variables": {}}
    for variable in policy["spec"].get("variables", []):
        known["variables"][variable["name"]] = cel.evaluate(variable["expression"], known)
    return [
        validation["message"]
        for validation in policy["spec"]["validations"]
        if not cel.evaluate(validation["expression"], known)
    ]


def ray_up_violations(document: dict[str, Any]) -> list[str]:
    """The same for a file of `ray up`, against the schema inside the installed Ray."""
    text = resources.files("ray.autoscaler").joinpath("ray-schema.json").read_text()
    return _against(document, json.loads(text))


def skypilot_violations(document: dict[str, Any]) -> list[str]:
    """The same for a SkyPilot task, as far as we use one; SkyPilot itself is not asked."""
    return _against(document, _SKYPILOT)


def kinds() -> list[tuple[str, str]]:
    """Every (apiVersion, kind) that has a schema here."""
    return sorted([*_vendored(), *_BY_HAND])


def keys(document: dict[str, Any]) -> list[tuple[tuple[str | int, ...], bool]]:
    """Path of every key in the document, and whether its schema names it; in the others, such as
    labels and resource limits, any key is right for a schema. Raises KeyError for an unknown kind.
    """
    schemas = _schemas(document["apiVersion"], document["kind"])
    if not schemas:
        raise KeyError(document["kind"])
    return list(_keys(document, schemas[-1], ()))


def _keys(
    value: Any, schema: Schema, path: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], bool]]:
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for key, item in value.items():
            yield (*path, key), key in properties
            yield from _keys(item, properties.get(key, {}), (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _keys(item, schema.get("items", {}), (*path, index))


def _against(document: Any, schema: Schema) -> list[str]:
    validator = jsonschema.Draft7Validator(schema)
    return [
        f"{error.json_path.removeprefix('$').lstrip('.') or 'document'}: {error.message}"
        for error in sorted(validator.iter_errors(document), key=lambda error: error.json_path)
    ]


@functools.cache
def _schemas(api_version: str, kind: str) -> list[Schema]:
    """Of each version that is supported, oldest first."""
    by_hand = _BY_HAND.get((api_version, kind))
    found = [_closed(schema) for schema in _vendored().get((api_version, kind), [])]
    found += [_closed(by_hand)] if by_hand else []
    for schema in found:
        schema["properties"] |= {
            "apiVersion": {"const": api_version},
            "kind": {"const": kind},
            "metadata": _METADATA,
        }
        schema["required"] = sorted({*schema.get("required", []), "apiVersion", "kind", "metadata"})
    return found


@functools.cache
def _vendored() -> dict[tuple[str, str], list[Schema]]:
    found: dict[tuple[str, str], list[Schema]] = {}
    for file in sorted(CRDS.glob("*.json.xz")):
        for name, schema in json.loads(lzma.decompress(file.read_bytes())).items():
            api_version, _, kind = name.rpartition(" ")
            found.setdefault((api_version, kind), []).append(schema)
    return found


def _closed(schema: Any) -> Any:
    """The schema with every mapping closed whose keys it names."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(item) for key, item in schema.items() if key != "properties"}
    if isinstance(schema.get("properties"), dict):
        closed["properties"] = {name: _closed(item) for name, item in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    return closed


def _as_read(value: Any, schema: Schema) -> Any:
    """What the API server makes of a document before it looks: no nulls, defaults filled in."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        other = schema.get("additionalProperties")
        other = other if isinstance(other, dict) else {}
        read = {
            key: _as_read(item, properties.get(key, other))
            for key, item in value.items()
            if item is not None
        }
        for key, item in properties.items():
            if "default" in item:
                read.setdefault(key, copy.deepcopy(item["default"]))
        return read
    if isinstance(value, list):
        return [_as_read(item, schema.get("items", {})) for item in value]
    return value


def _cel_violations(value: Any, schema: Schema, path: str = "") -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        # Rules with oldSelf are about updates.
        if "oldSelf" not in rule["rule"] and not cel.evaluate(rule["rule"], {"self": value}):
            yield f"{path or 'document'}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        other = schema.get("additionalProperties")
        for key, item in value.items():
            below = properties.get(key, other if isinstance(other, dict) else {})
            yield from _cel_violations(item, below, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _cel_violations(item, schema.get("items", {}), f"{path}[{index}]")


# What is not at hand as a schema. Keys that we do not use are left out, and so refused.

_STRING: Schema = {"type": "string", "minLength": 1}
_STRINGS: Schema = {"type": "array", "items": _STRING}
_STRING_MAP: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_QUANTITY: Schema = {
    "anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^[0-9]+[A-Za-z]*$"}]
}
_DURATION: Schema = {"type": "string", "pattern": r"^([0-9]+(ms|[smhdwy]))+$"}


def _object(needed: str = "", /, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": needed.split()}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, **more}


def _enum(*values: str) -> Schema:
    return {"enum": list(values)}


_LABEL = r"^(([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)$"
_LABELS: Schema = {
    "type": "object",
    "propertyNames": {"pattern": _LABEL},
    "additionalProperties": {"type": "string", "maxLength": 63},
}
_SELECTOR = _object(
    matchLabels=_LABELS,
    matchExpressions=_list(
        _object(
            "key operator",
            key=_STRING,
            operator=_enum("In", "NotIn", "Exists", "DoesNotExist"),
            values=_STRINGS,
        )
    ),
)

# KubeRay's schemas say of `metadata` only that it is an object.
_METADATA: Schema = _closed(
    _object(
        name={"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253},
        generateName=_STRING,
        namespace=_STRING,
        labels=_LABELS,
        annotations={
            "type": "object",
            "propertyNames": {"pattern": _LABEL},
            "additionalProperties": {"type": "string"},
        },
        finalizers=_STRINGS,
    )
)

_ADMISSION = "admissionregistration.k8s.io/v1"
_KUEUE = "kueue.x-k8s.io/v1beta2"
_MONITORING = "monitoring.coreos.com/v1"

_BY_HAND: dict[tuple[str, str], Schema] = {
    # kueue v0.19, config/components/crd/bases/kueue.x-k8s.io_*.yaml
    (_KUEUE, "ResourceFlavor"): _object(
        spec=_object(
            nodeLabels=_LABELS,
            tolerations=_list(
                _object(
                    key=_STRING,
                    operator=_enum("Exists", "Equal"),
                    value=_STRING,
                    effect=_enum("NoSchedule", "PreferNoSchedule", "NoExecute"),
                )
            ),
        )
    ),
    (_KUEUE, "ClusterQueue"): _object(
        "spec",
        spec=_object(
            namespaceSelector=_SELECTOR,
            queueingStrategy=_enum("StrictFIFO", "BestEffortFIFO"),
            cohortName=_STRING,
            preemption=_object(
                withinClusterQueue=_enum("Never", "LowerPriority", "LowerOrNewerEqualPriority"),
                reclaimWithinCohort=_enum("Never", "LowerPriority", "Any"),
            ),
            resourceGroups=_list(
                {
                    **_object(
                        "coveredResources flavors",
                        coveredResources=_list(_STRING),
                        flavors=_list(
                            _object(
                                "name resources",
                                name=_STRING,
                                resources=_list(
                                    _object(
                                        "name nominalQuota",
                                        name=_STRING,
                                        nominalQuota=_QUANTITY,
                                        borrowingLimit=_QUANTITY,
                                        lendingLimit=_QUANTITY,
                                    )
                                ),
                            )
                        ),
                    ),
                    "x-kubernetes-validations": [
                        {
                            "rule": "self.flavors.all(x, size(x.resources) == "
                            "size(self.coveredResources))",
                            "message": "flavors must have as many resources as coveredResources",
                        }
                    ],
                }
            ),
        ),
    ),
    (_KUEUE, "LocalQueue"): _object(
        "spec",
        spec=_object(
            "clusterQueue", clusterQueue=_STRING, stopPolicy=_enum("None", "Hold", "HoldAndDrain")
        ),
    ),
    # Kubernetes 1.30 and newer; what its documentation of the two kinds names and we use.
    (_ADMISSION, "ValidatingAdmissionPolicy"): _object(
        "spec",
        spec=_object(
            "matchConstraints validations",
            failurePolicy=_enum("Fail", "Ignore"),
            matchConstraints=_object(
                "resourceRules",
                resourceRules=_list(
                    _object(
                        "apiGroups apiVersions operations resources",
                        apiGroups=_STRINGS,
                        apiVersions=_STRINGS,
                        operations=_list(_enum("CREATE", "UPDATE", "DELETE", "CONNECT", "*")),
                        resources=_STRINGS,
                    )
                ),
            ),
            variables=_list(_object("name expression", name=_STRING, expression=_STRING)),
            validations=_list(_object("expression", expression=_STRING, message=_STRING)),
        ),
    ),
    (_ADMISSION, "ValidatingAdmissionPolicyBinding"): _object(
        "spec",
        spec=_object(
            "policyName validationActions",
            policyName=_STRING,
            validationActions=_list(_enum("Deny", "Warn", "Audit")),
            matchResources=_object(namespaceSelector=_SELECTOR),
        ),
    ),
    # prometheus-operator, example/prometheus-operator-crd/monitoring.coreos.com_*.yaml
    (_MONITORING, "PodMonitor"): _object(
        "spec",
        spec=_object(
            "selector podMetricsEndpoints",
            selector=_SELECTOR,
            namespaceSelector=_object(any={"type": "boolean"}, matchNames=_STRINGS),
            podMetricsEndpoints=_list(
                _object(
                    port=_STRING,
                    path=_STRING,
                    interval=_DURATION,
                    scrapeTimeout=_DURATION,
                    honorLabels={"type": "boolean"},
                )
            ),
            podTargetLabels=_STRINGS,
        ),
    ),
    (_MONITORING, "PrometheusRule"): _object(
        "spec",
        spec=_object(
            "groups",
            groups=_list(
                _object(
                    "name rules",
                    name=_STRING,
                    interval=_DURATION,
                    rules=_list(
                        {
                            **_object(
                                "expr",
                                alert=_STRING,
                                record={"type": "string", "pattern": r"^[a-z_:][a-z0-9_:]*$"},
                                expr=_STRING,
                                labels=_STRING_MAP,
                                annotations=_STRING_MAP,
                                **{"for": _DURATION},
                            ),
                            "oneOf": [{"required": ["alert"]}, {"required": ["record"]}],
                        }
                    ),
                )
            ),
        ),
    ),
}

# SkyPilot 0.14, its documentation of the task file.
_SKYPILOT: Schema = _closed(
    _object(
        "name resources run",
        name=_STRING,
        workdir=_STRING,
        num_nodes={"type": "integer", "minimum": 1},
        resources=_object(
            infra=_STRING,
            accelerators=_STRING,
            cpus={"type": ["string", "integer"]},
            memory={"type": ["string", "integer"]},
            disk_size={"type": "integer"},
            image_id={"type": "string", "pattern": "^docker:"},
            use_spot={"type": "boolean"},
            job_recovery=_object(
                strategy=_enum("FAILOVER", "EAGER_NEXT_REGION"),
                max_restarts_on_errors={"type": "integer"},
            ),
            any_of=_list(_object(infra=_STRING, use_spot={"type": "boolean"})),
        ),
        envs={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        secrets={"type": "object", "additionalProperties": {"type": "null"}},
        file_mounts={"type": "object"},
        setup=_STRING,
        run=_STRING,
    )
)
