"""What each peer does, alone, through fastmesh: the same as without it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.interop.harness import (
    JAVA_SERVICE,
    JAVA_TWO_SERVICE,
    MOSN_SERVICE,
    NOBODY,
    NODE_SERVICE,
    PYTHON_SERVICE,
    Fleet,
    Mesh,
    eventually,
    free_port,
    ledger,
    settled,
    total,
)
from tests.interop.layout import build, cluster

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

SIZES = "0,1,256,70000,3145728"
STYLES = "sync,future,callback,note"


def clean(mesh: Mesh, calls: int) -> None:
    """The ledger says: so many two-way requests, all of them answered, nothing dropped."""
    samples = settled(mesh)
    book = ledger(samples, "request")
    assert book == {
        "accepted": calls,
        "answered": calls,
        "failed": 0,
        "expired": 0,
        "in_flight": 0,
    }
    assert total(samples, "fastmesh_frames_dropped_total") == 0


@pytest.mark.parametrize(
    ("service", "options"),
    [
        (JAVA_SERVICE, {"wire": 1}),
        (JAVA_TWO_SERVICE, {"wire": 2}),
        (JAVA_TWO_SERVICE, {"wire": 2, "crc": "off"}),
    ],
    ids=["v1", "v2-crc", "v2"],
)
def test_java(ships: Fleet, service: str, options: dict[str, object]) -> None:
    town = build(ships)
    client = ships.java_client(
        town.ports.rpc,
        "java",
        service=service,
        calls=80,
        workers=2,
        connections=2,
        sizes=SIZES,
        styles=STYLES,
        **options,
    )
    said = client.end(60)
    clean(town.mesh, said["calls"])
    served = town.java.stop()
    assert said["calls"] == served["answered"] == 60
    assert said["notes"] == served["notes"] == 20
    # Two client connections were one at the server.
    assert served["connections"] == 1


def test_java_mixes_versions_on_one_cluster(ships: Fleet) -> None:
    """v1 and v2 callers share a connection; the server answers both in the version it saw first.

    The Java and JavaScript clients look at each frame's own version, so they do not mind.
    """
    town = build(ships)
    given = {"service": JAVA_SERVICE, "calls": 60, "workers": 2, "sizes": SIZES}
    running = [
        ships.java_client(town.ports.rpc, "one", styles="sync,future,callback", **given),
        ships.java_client(town.ports.rpc, "two", wire=2, styles="sync,future,callback", **given),
        ships.node_client(town.ports.rpc, "node", wire=2, crc="on", **given),
    ]
    assert [client.end(60)["calls"] for client in running] == [60, 60, 60]
    clean(town.mesh, 180)


@pytest.mark.parametrize("binding", ["plain", "bound"])
def test_the_server_calls_its_clients(ships: Fleet, binding: str) -> None:
    """On a shared connection one of the clients is asked, on a bound one exactly the caller."""
    town = build(ships)
    running = [
        ships.java_client(
            getattr(town.ports, binding),
            name,
            mode="plain",
            callback="on",
            wire=wire,
            calls=60,
            workers=2,
            sizes="0,256,70000",
            styles="sync,future,callback",
        )
        for name, wire in (("first", 1), ("second", 1), ("third", 1))
    ]
    said = [client.end(60) for client in running]
    clean(town.mesh, 180)
    pushes = ledger(settled(town.mesh), "push")
    assert pushes["accepted"] == pushes["answered"] == 180
    assert sum(found["served"] for found in said) == 180
    served = town.java.stop()
    assert served["calls"] == 180
    if binding == "bound":
        assert [found["called_other"] for found in said] == [0, 0, 0]
        assert served["connections"] == 3
    else:
        assert served["connections"] == 1


def test_java_heartbeats_stay_here(ships: Fleet) -> None:
    """A quiet connection lives on acknowledgements that no server ever made."""
    town = build(ships)
    client = ships.java_client(
        town.ports.rpc, "quiet", service=JAVA_SERVICE, calls=4, pause_ms=1500, styles="sync"
    )
    said = client.end(60)
    # Four pauses of five intervals each; the client closes after three misses and would fail.
    assert total(settled(town.mesh), "fastmesh_heartbeats_received_total") >= 8
    clean(town.mesh, said["calls"])


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "protobuf", "wire": 1},
        {"codec": "protobuf", "wire": 2},
        {"codec": "protobuf", "wire": 2, "crc": "on"},
        {"codec": "hessian2", "wire": 1},
        {"codec": "hessian2", "wire": 2, "crc": "on"},
    ],
    ids=["protobuf-v1", "protobuf-v2", "protobuf-v2-crc", "hessian-v1", "hessian-v2-crc"],
)
def test_node(ships: Fleet, options: dict[str, object]) -> None:
    town = build(ships)
    client = ships.node_client(
        town.ports.rpc,
        "node",
        service=NODE_SERVICE,
        calls=40,
        workers=2,
        sizes=SIZES,
        idle_ms=200,
        quiet_ms=1000,
        **options,
    )
    said = client.end(60)
    assert said["log"] == []
    assert said["heartbeats"] >= 2
    clean(town.mesh, 40)
    served = town.node.stop()
    assert served["answered"] == 40
    assert served["log"] == []


def test_a_oneway_that_the_node_server_answers(ships: Fleet) -> None:
    """That server answers a oneway; nobody waits for it, so it is dropped under its own name."""
    town = build(ships)
    client = ships.node_client(
        town.ports.rpc,
        "node",
        service=NODE_SERVICE,
        calls=30,
        sizes="100",
        styles="call,note",
    )
    said = client.end(60)
    assert said["calls"] == said["notes"] == 15
    assert said["log"] == []

    def dropped() -> bool:
        samples = town.mesh.metrics()
        everything = total(samples, "fastmesh_frames_dropped_total")
        unknown = total(samples, "fastmesh_frames_dropped_total", cause="unknown")
        return everything == unknown == 15

    eventually("fifteen answers to oneways are dropped as unknown", dropped)
    book = ledger(settled(town.mesh), "request")
    assert book["accepted"] == book["answered"] == 15
    served = town.node.stop()
    assert served["notes"] == served["notes_distinct"] == 15


def test_python(ships: Fleet) -> None:
    town = build(ships)
    client = ships.python_client(
        town.ports.rpc,
        "python",
        service=PYTHON_SERVICE,
        calls=60,
        workers=2,
        sizes="20,256,70000,3145728",
        styles="sync,future,callback,blocking,note,heartbeat",
    )
    said = client.end(60)
    assert said["heartbeats"] > 0
    clean(town.mesh, said["calls"])
    served = town.python.stop()
    assert said["calls"] == served["answered"]
    assert said["notes"] == served["notes"] == served["notes_distinct"] > 0
    assert served["log"] == []


def test_nobody_serves_it_java(ships: Fleet) -> None:
    town = build(ships)
    client = ships.java_client(
        town.ports.rpc,
        "java",
        service=NOBODY,
        afterwards=JAVA_SERVICE,
        expect="error",
        calls=3,
    )
    assert client.end(60)["expected"] == 9
    assert all("NO_PROCESSOR" in error for error in client.errors), client.errors
    refused(town.mesh, answered=3, no_route=9)


def test_nobody_serves_it_node(ships: Fleet) -> None:
    town = build(ships)
    client = ships.node_client(
        town.ports.rpc,
        "node",
        service=NOBODY,
        afterwards=NODE_SERVICE,
        expect="error",
        calls=3,
    )
    assert client.end(60)["expected"] == 3
    # The library has no text for an error without content.
    assert all("Server exception" in error for error in client.errors), client.errors
    refused(town.mesh, answered=3, no_route=3)


def test_nobody_serves_it_python(ships: Fleet) -> None:
    """The blocking client raises; the asynchronous one logs the status and raises KeyError."""
    town = build(ships)
    client = ships.python_client(
        town.ports.rpc, "python", service=NOBODY, afterwards=PYTHON_SERVICE, expect="error"
    )
    assert client.end(60)["expected"] == 3
    blocking, *asynchronous = client.errors
    assert "RESPSTATUS=6, NO_PROCESSOR" in blocking
    assert all("KeyError" in error for error in asynchronous)
    refused(town.mesh, answered=6, no_route=3)


def refused(mesh: Mesh, answered: int, no_route: int) -> None:
    samples = settled(mesh)
    assert total(samples, "fastmesh_requests_failed_total", cause="no_route") == no_route
    book = ledger(samples, "request")
    assert (book["answered"], book["failed"]) == (answered, no_route)
    # Nobody was cut off for asking.
    assert total(samples, "fastmesh_frames_dropped_total") == 0


def test_a_deadline_that_the_server_misses(ships: Fleet) -> None:
    """The library's own timeout, the late answer dropped, and the connection as good as before."""
    town = build(ships)
    client = ships.java_client(
        town.ports.rpc,
        "java",
        service=JAVA_SERVICE,
        afterwards=JAVA_SERVICE,
        expect="error",
        method="slow",
        calls=2,
        timeout_ms=400,
    )
    assert client.end(60)["expected"] == 6
    assert all("InvokeTimeoutException" in error for error in client.errors), client.errors

    def late() -> bool:
        return total(town.mesh.metrics(), "fastmesh_frames_dropped_total", cause="late") == 6

    eventually("six answers came too late", late)
    book = ledger(settled(town.mesh), "request")
    assert (book["answered"], book["expired"], book["failed"]) == (2, 6, 0)
    assert town.java.stop()["answered"] == 8


def test_mosn_on_both_sides(ships: Fleet) -> None:
    """client -> MOSN -> fastmesh -> MOSN -> server: v1, since MOSN knows no CRC."""
    town = build(ships, mosn=True)
    given = {"calls": 80, "workers": 2, "sizes": SIZES}
    behind = ships.java_client(
        town.ports.rpc, "behind", service=MOSN_SERVICE, styles=STYLES, **given
    )
    before = ships.java_client(
        town.ports.mosn_front, "before", service=MOSN_SERVICE, styles=STYLES, **given
    )
    said = [behind.end(60), before.end(60)]
    clean(town.mesh, sum(found["calls"] for found in said))
    served = town.java.stop()
    assert served["answered"] == sum(found["calls"] for found in said) == 120
    assert served["notes"] == sum(found["notes"] for found in said) == 40


def test_mosn_goes_away(ships: Fleet) -> None:
    """One of two MOSNs says GOAWAY and leaves: no call fails and no client hears of it."""
    java = free_port()
    server = ships.java_server(java, JAVA_SERVICE)
    backs, rpc = [free_port(), free_port()], free_port()
    leaving, _ = [ships.mosn((port, java), goaway=True) for port in backs]
    endpoints = [{"address": f"127.0.0.1:{port}"} for port in backs]
    routes: list[dict[str, Any]] = [{"cluster": "mosn"}]
    mesh = ships.mesh(
        {
            "listeners": [
                {
                    "name": "rpc",
                    "listen": f"127.0.0.1:{rpc}",
                    "protocol": "bolt",
                    "routes": routes,
                }
            ],
            "clusters": [cluster("mosn", backs[0], endpoints=endpoints)],
        }
    )
    given = {"service": JAVA_SERVICE, "seconds": 12, "workers": 2, "pause_ms": 10}
    running = [
        ships.java_client(rpc, "java", styles="sync,future,callback", **given),
        ships.node_client(rpc, "node", **given),
        ships.python_client(rpc, "python", styles="sync,blocking", **given),
    ]

    def answered() -> float:
        return ledger(mesh.metrics(), "request")["answered"]

    eventually("the load is running", lambda: answered() > 200, 20)
    leaving.process.terminate()
    calls = sum(client.end(60)["calls"] for client in running)
    eventually("the one that left has ended", lambda: leaving.process.poll() is not None, 30)
    clean(mesh, calls)
    assert total(mesh.metrics(), "fastmesh_goaways_total") >= 1
    assert server.stop()["answered"] == calls
