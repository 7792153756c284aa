"""The peers among themselves, without fastmesh: what they can do, and that they see what is wrong.

When one of these fails, the fault is not in the mesh.
"""

from __future__ import annotations

import pytest

from tests.interop.harness import (
    JAVA_SERVICE,
    NOBODY,
    NODE_SERVICE,
    PYTHON_SERVICE,
    Fleet,
    free_port,
)

pytestmark = pytest.mark.interop

SIZES = "0,1,256,70000,3145728"
STYLES = "sync,future,callback,note"


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "sofa", "wire": 1},
        {"mode": "sofa", "wire": 2},
        {"mode": "plain", "wire": 1, "callback": "on"},
        {"mode": "plain", "wire": 2, "callback": "on"},
        {"mode": "plain", "wire": 2, "crc": "off"},
    ],
    ids=["sofa-v1", "sofa-v2-crc", "plain-v1-callback", "plain-v2-crc-callback", "plain-v2"],
)
def test_java_to_java(ships: Fleet, options: dict[str, object]) -> None:
    port = free_port()
    server = ships.java_server(port, JAVA_SERVICE)
    client = ships.java_client(
        port,
        "java",
        service=JAVA_SERVICE,
        calls=80,
        workers=2,
        sizes=SIZES,
        styles=STYLES,
        **options,
    )
    said = client.end(60)
    served = server.stop()
    assert said["calls"] == served["answered"] == 60
    assert said["notes"] == served["notes"] == 20
    if options.get("callback"):
        assert said["called_back"] == said["served"] == served["calls"] == 60
        assert said["called_other"] == 0


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
def test_node_to_node(ships: Fleet, options: dict[str, object]) -> None:
    port = free_port()
    server = ships.node_server(port)
    client = ships.node_client(
        port,
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
    assert said["calls"] == server.stop()["answered"] == 40
    assert said["heartbeats"] >= 2


def test_python_to_python(ships: Fleet) -> None:
    port = free_port()
    server = ships.python_server(port)
    client = ships.python_client(
        port,
        "python",
        service=PYTHON_SERVICE,
        calls=60,
        workers=2,
        # An empty answer is never sent by this server.
        sizes="20,256,70000,3145728",
        styles="sync,future,callback,blocking,note,heartbeat",
    )
    said = client.end(60)
    served = server.stop()
    assert said["calls"] == served["answered"] >= 30
    assert said["notes"] == served["notes"] == served["notes_distinct"] > 0
    assert said["calls"] + said["notes"] + said["heartbeats"] == 60
    assert said["heartbeats"] > 0
    assert served["log"] == []


@pytest.mark.parametrize("wire", [1, 2])
def test_each_to_java(ships: Fleet, wire: int) -> None:
    port = free_port()
    server = ships.java_server(port, JAVA_SERVICE)
    given = {"service": JAVA_SERVICE, "calls": 40, "workers": 2}
    node = ships.node_client(
        port, "node", wire=wire, crc="on", styles="call,call,note", sizes=SIZES, **given
    )
    if wire == 1:
        python = ships.python_client(
            port, "python", styles="sync,blocking,note", sizes="1,256,70000", **given
        ).end(60)
    else:
        python = {"calls": 0, "notes": 0}
    said = node.end(60)
    served = server.stop()
    assert served["answered"] == said["calls"] + python["calls"]
    assert served["notes"] == said["notes"] + python["notes"] > 0


def test_each_from_java(ships: Fleet) -> None:
    node_port, python_port = free_port(), free_port()
    node, python = ships.node_server(node_port), ships.python_server(python_port)
    given = {"calls": 40, "workers": 2, "styles": "sync,future,callback"}
    clients = [
        ships.java_client(node_port, "v1", service=NODE_SERVICE, sizes=SIZES, **given),
        ships.java_client(node_port, "v2", service=NODE_SERVICE, sizes=SIZES, wire=2, **given),
        ships.java_client(python_port, "py", service=PYTHON_SERVICE, sizes="1,70000", **given),
    ]
    assert [client.end(60)["calls"] for client in clients] == [40, 40, 40]
    assert (node.stop()["answered"], python.stop()["answered"]) == (80, 40)


def test_through_mosn(ships: Fleet) -> None:
    """MOSN alone between client and server, so that its own limits are known: v1 only, no CRC."""
    port, upstream = free_port(), free_port()
    server = ships.java_server(upstream, JAVA_SERVICE)
    ships.mosn((port, upstream))
    given = {"service": JAVA_SERVICE, "calls": 40, "workers": 2, "sizes": SIZES}
    java = ships.java_client(port, "java", styles=STYLES, **given)
    node = ships.node_client(port, "node", **given)
    said = java.end(60)
    assert node.end(60)["calls"] == 40
    served = server.stop()
    assert served["answered"] == said["calls"] + 40
    assert served["notes"] == said["notes"] > 0


def test_a_wrong_service_is_seen(ships: Fleet) -> None:
    """The verdicts are not blind: a server that is asked for somebody else's service says so."""
    port = free_port()
    server = ships.java_server(port, JAVA_SERVICE)
    client = ships.java_client(port, "lost", service=NOBODY, calls=3)
    with pytest.raises(AssertionError, match="exited with 1"):
        client.end(30)
    with pytest.raises(AssertionError, match='"wrong":3'):
        server.stop()
