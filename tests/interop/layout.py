"""The one fastmesh of these tests: which service goes to which of the peers, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.interop.harness import (
    JAVA_SERVICE,
    JAVA_TWO_SERVICE,
    MOSN_SERVICE,
    NODE_SERVICE,
    PYTHON_SERVICE,
    Fleet,
    Mesh,
    Peer,
    free_port,
)


@dataclass
class Ports:
    rpc: int = field(default_factory=free_port)
    plain: int = field(default_factory=free_port)
    bound: int = field(default_factory=free_port)
    java: int = field(default_factory=free_port)
    node: int = field(default_factory=free_port)
    python: int = field(default_factory=free_port)
    mosn_back: int = field(default_factory=free_port)
    mosn_front: int = field(default_factory=free_port)


def cluster(name: str, port: int, **more: Any) -> dict[str, Any]:
    endpoint = {"address": f"127.0.0.1:{port}"}
    return {"name": name, "protocol": "bolt", "endpoints": [endpoint]} | more


def configuration(ports: Ports, threads: int = 1) -> dict[str, Any]:
    """Services by their header on `rpc`; on `plain` and `bound` what has no header section at all.

    v1 and v2 callers of the Java server have a cluster each: it writes every answer in the version
    of the first frame that it saw on the connection.
    """
    services = {
        PYTHON_SERVICE: "python",
        NODE_SERVICE: "node",
        JAVA_SERVICE: "java-v1",
        JAVA_TWO_SERVICE: "java-v2",
        MOSN_SERVICE: "mosn",
    }
    routes = [{"match": {"service": name}, "cluster": to} for name, to in services.items()]

    def listener(name: str, port: int, routes: list[dict[str, Any]]) -> dict[str, Any]:
        address = f"127.0.0.1:{port}"
        return {"name": name, "listen": address, "protocol": "bolt", "routes": routes}

    return {
        "engine": {"threads": threads},
        "listeners": [
            listener("rpc", ports.rpc, routes),
            listener("plain", ports.plain, [{"cluster": "plain"}]),
            listener("bound", ports.bound, [{"cluster": "bound"}]),
        ],
        "clusters": [
            # Any request towards this client library puts its connection out of step for good.
            cluster("python", ports.python, server_requests="refuse"),
            cluster("node", ports.node),
            cluster("java-v1", ports.java),
            cluster("java-v2", ports.java),
            cluster("mosn", ports.mosn_back),
            cluster("plain", ports.java, server_requests="any"),
            cluster("bound", ports.java, binding="per_client", server_requests="any"),
        ],
        # The load of thirteen clients on two cores is no test of deadlines.
        "limits": {"request_timeout_ms": 20000},
    }


@dataclass
class Town:
    """A mesh with every server behind it."""

    ports: Ports
    mesh: Mesh
    java: Peer
    node: Peer
    python: Peer


def build(ships: Fleet, threads: int = 1, mosn: bool = False) -> Town:
    ports = Ports()
    java = ships.java_server(ports.java, JAVA_SERVICE, JAVA_TWO_SERVICE, MOSN_SERVICE)
    node = ships.node_server(ports.node)
    python = ships.python_server(ports.python)
    if mosn:
        ships.mosn((ports.mosn_back, ports.java), (ports.mosn_front, ports.rpc))
    mesh = ships.mesh(configuration(ports, threads))
    return Town(ports, mesh, java, node, python)
