"""All peers at once through one fastmesh, without an error, each answer its caller's own.

FASTMESH_INTEROP_SECONDS says for how long (40 by default).
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from tests.interop.harness import (
    JAVA_SERVICE,
    JAVA_TWO_SERVICE,
    MOSN_SERVICE,
    NODE_SERVICE,
    PYTHON_SERVICE,
    START_S,
    Fleet,
    Peer,
    eventually,
    ledger,
    settled,
    total,
)
from tests.interop.layout import Ports, Town, build

pytestmark = pytest.mark.interop

SECONDS = float(os.environ.get("FASTMESH_INTEROP_SECONDS", "40"))
SMALL = "0,1,30,256,4096,65536"
NONEMPTY = "20,256,4096,65536"
"""Never empty: anthunder's server sends no answer that is."""
UPGRADES, UPGRADES_MIN = 20, 8
"""As many as the time allows: each starts an interpreter beside thirteen busy clients."""
LARGE = "300000,3145728"
ALL = "sync,future,callback"


def clients(ships: Fleet, ports: Ports) -> list[Peer]:
    def paced(**options: object) -> dict[str, Any]:
        return {"seconds": SECONDS, "workers": 2, "pause_ms": 10, "timeout_ms": 15000} | options

    rpc = ports.rpc
    java, node, python = ships.java_client, ships.node_client, ships.python_client
    every = f"{ALL},note"
    own = "sync,future,callback,blocking,note,heartbeat"
    return [
        python(rpc, "py-py", **paced(service=PYTHON_SERVICE, sizes=NONEMPTY, styles=own)),
        python(rpc, "py-java", **paced(service=JAVA_SERVICE, sizes=SMALL, styles=own)),
        node(rpc, "node-node", **paced(service=NODE_SERVICE, sizes=SMALL)),
        node(rpc, "node-crc", **paced(service=JAVA_TWO_SERVICE, sizes=SMALL, wire=2, crc="on")),
        node(
            rpc,
            "node-hessian",
            **paced(service=NODE_SERVICE, sizes=NONEMPTY, wire=2, crc="on", codec="hessian2"),
        ),
        node(rpc, "node-py", **paced(service=PYTHON_SERVICE, sizes=NONEMPTY)),
        node(rpc, "node-notes", **paced(service=JAVA_SERVICE, sizes=SMALL, styles="call,note")),
        java(rpc, "java-one", **paced(service=JAVA_SERVICE, sizes=SMALL, styles=every)),
        java(
            rpc,
            "java-two",
            **paced(service=JAVA_TWO_SERVICE, sizes=SMALL, styles=every, wire=2, connections=3),
        ),
        java(
            rpc,
            "java-large",
            **paced(service=JAVA_TWO_SERVICE, sizes=LARGE, styles=ALL, wire=2, pause_ms=200),
        ),
        java(rpc, "java-node", **paced(service=NODE_SERVICE, sizes=SMALL, styles=ALL)),
        java(
            ports.plain,
            "java-called",
            **paced(mode="plain", callback="on", sizes=SMALL, styles=every, wire=2),
        ),
        java(rpc, "java-mosn", **paced(service=MOSN_SERVICE, sizes=SMALL, styles=ALL)),
        java(ports.mosn_front, "mosn-java", **paced(service=NODE_SERVICE, sizes=SMALL, styles=ALL)),
        # Quiet for longer than its heartbeat interval between two calls.
        java(
            rpc,
            "java-quiet",
            **paced(service=JAVA_SERVICE, styles=ALL, wire=1, workers=1, pause_ms=1500),
        ),
    ]


@pytest.mark.timeout(SECONDS + 180)
@pytest.mark.parametrize("threads", [1, 2])
def test_all_at_once(ships: Fleet, threads: int) -> None:
    town = build(ships, threads, mosn=True)
    running = clients(ships, town.ports)
    said = {found["name"]: found for found in (peer.end(SECONDS + 90) for peer in running)}
    judge(town, said)


@pytest.mark.timeout(SECONDS + 180)
def test_all_at_once_through_upgrades(ships: Fleet) -> None:
    """The process is replaced again and again under them: the same books, without an error."""
    town = build(ships, threads=2, mosn=True)
    began = time.monotonic()
    running = clients(ships, town.ports)
    eventually(
        "all of them are answered",
        lambda: total(town.mesh.metrics(), "fastmesh_connections") >= len(running),
        START_S,
    )
    downstream, requests = 0, 0
    upgrades = 0
    while upgrades < UPGRADES and time.monotonic() - began < SECONDS - 5:
        upgrades += 1
        moved = town.mesh.upgrade()["moved"]
        downstream = max(downstream, moved["downstream"])
        requests += moved["requests"]
    ended = [peer.told() for peer in running if peer.process.poll() is not None]
    assert not ended, "\n".join(ended)
    assert upgrades >= UPGRADES_MIN, f"void: {upgrades} upgrades"
    assert downstream >= len(running)
    assert requests > 0, "void: nothing was in flight at any of them"
    said = {found["name"]: found for found in (peer.end(SECONDS + 90) for peer in running)}
    judge(town, said)


def judge(town: Town, said: dict[str, dict[str, Any]]) -> None:
    """When all clients are gone: the books of clients, mesh and servers agree, without an error."""
    samples = settled(town.mesh)
    book = ledger(samples, "request")
    assert town.mesh.status()["state"] == "serving"
    calls = sum(found["calls"] for found in said.values())
    assert calls > 0
    assert book["accepted"] == book["answered"] == calls
    assert book["failed"] == book["expired"] == 0

    pushes = ledger(samples, "push")
    served = said["java-called"]
    assert pushes["accepted"] == pushes["answered"] == served["served"] == served["calls"] > 0
    assert pushes["failed"] == pushes["expired"] == 0
    # One client has no other that its server could be sent to.
    assert served["called_back"] == served["calls"]

    notes = sum(found.get("notes", 0) for found in said.values())
    for name in ("accepted", "forwarded"):
        assert total(samples, f"fastmesh_oneway_{name}_total", direction="request") == notes
    assert total(samples, "fastmesh_oneway_dropped_total") == 0
    assert total(samples, "fastmesh_frames_dropped_total") == 0

    heartbeats = total(samples, "fastmesh_heartbeats_received_total")
    assert heartbeats >= said["py-py"]["heartbeats"] + said["py-java"]["heartbeats"] + SECONDS

    java, node, python = town.java.stop(), town.node.stop(), town.python.stop()
    assert java["answered"] + node["answered"] + python["answered"] == calls
    assert java["notes"] + node["notes"] + python["notes"] == notes
    assert java["wrong"] == node["wrong"] == 0
    assert node["log"] == python["log"] == []
    town.mesh.terminate()
