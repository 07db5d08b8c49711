"""What the dashboard of a local cluster says about it."""

import json
import urllib.request
from typing import Any

from cluster.local.local_cluster import Cluster


def asked(cluster: Cluster, path: str, token: str | None) -> Any:
    """The dashboard's JSON answer. Raises HTTPError."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{cluster.dashboard}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def nodes(cluster: Cluster) -> dict[str, list[dict[str, Any]]]:
    """What Ray knows of the nodes, by name: several of a name where one was started again."""
    found: dict[str, list[dict[str, Any]]] = {}
    for node in asked(cluster, "/api/v0/nodes", cluster.token)["data"]["result"]["result"]:
        found.setdefault(node["node_name"], []).append(node)
    return found
