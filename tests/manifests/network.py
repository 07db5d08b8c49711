"""Network policies, evaluated: may this pod open a connection to that one?

Ingress and egress as Kubernetes defines them: a pod that no policy selects for a direction is open
in it; otherwise one of the rules must let the other side and the port through.
"""

import ipaddress
from dataclasses import dataclass, field
from typing import Any

Policy = dict[str, Any]


@dataclass(frozen=True)
class End:
    """A pod, or with `address` a place outside the cluster."""

    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    address: str = ""


def may_connect(
    policies: list[Policy], source: End, target: End, port: int, protocol: str = "TCP"
) -> bool:
    return _allowed(policies, "Egress", source, target, port, protocol) and _allowed(
        policies, "Ingress", target, source, port, protocol
    )


def _allowed(
    policies: list[Policy], way: str, here: End, there: End, port: int, protocol: str
) -> bool:
    if here.address:
        return True
    selecting = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == here.namespace
        and way in policy["spec"]["policyTypes"]
        and _selects(policy["spec"]["podSelector"], here.labels)
    ]
    peers = "from" if way == "Ingress" else "to"
    known_port = {"port": port, "protocol": protocol}
    return not selecting or any(
        (peers not in rule or any(_is_peer(peer, there, here.namespace) for peer in rule[peers]))
        and ("ports" not in rule or known_port in rule["ports"])
        for spec in selecting
        for rule in spec.get(way.lower(), [])
    )


def _is_peer(peer: dict[str, Any], there: End, namespace: str) -> bool:
    if "ipBlock" in peer:
        # Whether an address block holds pods too is up to the network plugin; take it that it does.
        if not there.address:
            return True
        block = peer["ipBlock"]
        address = ipaddress.ip_address(there.address)
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(hole) for hole in block.get("except", [])
        )
    if there.address:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": there.namespace}
        if not _selects(peer["namespaceSelector"], labels):
            return False
    elif there.namespace != namespace:
        return False
    return _selects(peer.get("podSelector", {}), there.labels)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    if set(selector) - {"matchLabels"}:
        raise NotImplementedError(f"selector {selector}")
    wanted = selector.get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items())
