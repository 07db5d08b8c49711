"""Makes the schemas beside this file out of what KubeRay and Kubernetes publish; see README.md.

    python tests/manifests/crds/derive.py CRDS KUBERNETES-JSON-SCHEMA

CRDS is KubeRay's folder ray-operator/config/crd/bases, KUBERNETES-JSON-SCHEMA the folder of that
name inside PyPI's kubernetes-validate. Structure only: descriptions are left out, references are
put in place, of a CRD the served version v1.
"""

import json
import lzma
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
KUBERAY_VERSION = "1.7.0"
KUBERAY = ("rayclusters", "rayjobs", "raycronjobs")
# The oldest and the newest that the manifests are held to.
KUBERNETES_VERSIONS = ("1.31", "1.37")
KUBERNETES = {
    "batch/v1 CronJob": "cronjob-batch-v1",
    "networking.k8s.io/v1 NetworkPolicy": "networkpolicy-networking-v1",
    "rbac.authorization.k8s.io/v1 Role": "role-rbac-v1",
    "rbac.authorization.k8s.io/v1 RoleBinding": "rolebinding-rbac-v1",
    "v1 ConfigMap": "configmap-v1",
    "v1 Namespace": "namespace-v1",
    "v1 PersistentVolumeClaim": "persistentvolumeclaim-v1",
    "v1 ServiceAccount": "serviceaccount-v1",
}
_PROSE = {"description", "externalDocs", "example", "$schema", "$id"}


def kuberay(folder: Path) -> dict[str, Any]:
    found = {}
    for plural in KUBERAY:
        spec = yaml.safe_load((folder / f"ray.io_{plural}.yaml").read_text())["spec"]
        [version] = [version for version in spec["versions"] if version["name"] == "v1"]
        schema = version["schema"]["openAPIV3Schema"]
        found[f"{spec['group']}/v1 {spec['names']['kind']}"] = _structure(schema, {})
    return found


def kubernetes(folder: Path, version: str) -> dict[str, Any]:
    folder = folder / f"v{version}.0-local"
    definitions = json.loads((folder / "_definitions.json").read_text())["$defs"]
    return {
        name: _structure(json.loads((folder / f"{file}.json").read_text()), definitions)
        for name, file in KUBERNETES.items()
    }


def _structure(schema: Any, definitions: dict[str, Any], is_named: bool = False) -> Any:
    """The schema without prose and references. Within `properties`, keys are names, not words of
    the schema's language."""
    if isinstance(schema, list):
        return [_structure(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema and not is_named:
        return _structure(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    kept = {}
    for key, item in schema.items():
        if is_named:
            kept[key] = _structure(item, definitions)
        elif key == "type" and isinstance(item, list):
            # Kubernetes' schemas allow null everywhere; null is "not there".
            kept[key] = [one for one in item if one != "null"]
        elif key not in _PROSE and not key.startswith("x-kubernetes-group"):
            kept[key] = _structure(item, definitions, is_named=key == "properties")
    return kept


def _write(name: str, schemas: dict[str, Any]) -> None:
    text = json.dumps(schemas, sort_keys=True, separators=(",", ":"))
    packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
    (HERE / f"{name}.json.xz").write_bytes(packed)
    print(f"{name}: {len(text):,} bytes, packed {len(packed):,}")


def main(crds: str, json_schema: str) -> None:
    _write("kuberay", kuberay(Path(crds)))
    for version in KUBERNETES_VERSIONS:
        _write(f"kubernetes-{version}", kubernetes(Path(json_schema), version))
    sources = {"kuberay": KUBERAY_VERSION, "kubernetes": KUBERNETES_VERSIONS}
    (HERE / "sources.json").write_text(json.dumps(sources, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
