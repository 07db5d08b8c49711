"""What stands in the files of jobs/."""

import ast
from pathlib import Path
from typing import Any

from cluster.lint import load
from tests.helpers.program import REPOSITORY

JOBS = REPOSITORY / "jobs"
KUBERAY = JOBS / "kuberay"

Document = dict[str, Any]


def documents(file: Path) -> list[Document]:
    """All of a YAML file."""
    return load(file.read_text())


def ray_job(name: str) -> Document:
    """The spec of the RayJob in a manifest, or of those that a RayCronJob makes."""
    document = documents(KUBERAY / name)[-1]
    spec: Document = document["spec"]
    return spec["jobTemplate"] if document["kind"] == "RayCronJob" else spec


def containers(spec: Document) -> tuple[Document, Document]:
    """Of a RayJob's submitter and of its head."""
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    return spec["submitterPodTemplate"]["spec"]["containers"][0], head


def argo() -> Document:
    return documents(JOBS / "argo" / "cronworkflow.yaml")[0]


def anyscale() -> Document:
    return documents(JOBS / "anyscale" / "job.yaml")[0]


def dag() -> ast.Module:
    """The Airflow DAG, read rather than imported: Airflow is too large to install."""
    return ast.parse((JOBS / "airflow" / "nightly_dag.py").read_text())


def dag_call(name: str) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments of its one call of `name`; None for what is no literal."""
    found = [node for node in ast.walk(dag()) if isinstance(node, ast.Call)]
    (node,) = [node for node in found if ast.unparse(node.func) == name]
    named = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
    return [_literal(argument) for argument in node.args], named


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
