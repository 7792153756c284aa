"""The message mesh with clients on other libraries: sofa-bolt-node and SOFABolt, unmodified.

First each alone against a scripted mesh, in every version of Bolt: what fails there is no fault of
fastmesh's relaying. Then all of them, and fastmesh.client, through one `fastmesh run` with two
embedded brokers, while subscriptions change and consumers are killed; the ledger is made of lines
that the peers wrote before they answered.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from fastmesh._ext import push
from fastmesh._ext.push import Push
from tests.interop import setup
from tests.interop.harness import ROOT, START_S, Fleet, Peer, eventually, free_port
from tests.mesh.scripted import Conversation, until

pytestmark = pytest.mark.interop

WIRES = [(1, "off"), (2, "off"), (2, "on")]
DIALECTS = {"v1": (0, False), "v2": (1, False), "v2 crc": (2, True)}
NOTE = "grüße ✓"
PREFETCH = 8


def payload(caller: str, number: int, size: int) -> bytes:
    """What every peer sends as its message of that number."""
    pattern = f"{number}#{caller}#".encode()
    return (pattern * (size // len(pattern) + 1))[:size]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- each alone, against a scripted mesh ----------------------------------------------------------


class MeshEnd(Conversation):
    """The mesh's end of a client's connection, which asks in any version of Bolt."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer, self.take)
        self.beats: list[int] = []
        self.number = 1000

    @staticmethod
    def take(asked: Push) -> Mapping[str, str]:
        found = {"fm.result": "consumed", "fm.protocol": "1", "fm.broker": "b1"}
        return found | ({"fm.id": asked.headers["fm.id"]} if "fm.id" in asked.headers else {})

    def _take(self, frame: Push) -> None:
        if frame.kind == "heartbeat_ack":
            self.beats.append(frame.id)
        super()._take(frame)

    def beat(self, id: int, dialect: int) -> None:
        """A heartbeat, without a CRC; v1 for 0, v2 otherwise."""
        head = struct.pack(">B", 1) if dialect == 0 else struct.pack(">BB", 2, dialect)
        switch = b"" if dialect == 0 else b"\0"
        body = struct.pack(">BHBIB", 1, 0, 1, id, 1) + switch + struct.pack(">iHHI", 1000, 0, 0, 0)
        self._writer.write(head + body)

    async def call(
        self, dialect: int, crc: bool, headers: Mapping[str, str], content: bytes = b""
    ) -> Push:
        self.number += 1
        future: asyncio.Future[Push] = asyncio.get_running_loop().create_future()
        self._waiting[self.number] = future
        frame = push.request(
            self.number, headers, content, timeout_ms=5000, dialect=dialect, crc=crc
        )
        self._writer.write(frame)
        return await asyncio.wait_for(future, 5)

    def tell(self, headers: Mapping[str, str]) -> None:
        self._writer.write(push.request(0, headers, oneway=True))


async def alone(start: Callable[[int], Peer], library: str) -> None:
    ends: list[MeshEnd] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(MeshEnd(reader, writer))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        peer = start(server.sockets[0].getsockname()[1])
        await asyncio.to_thread(peer.ready)
        (end,) = ends
        hello, subscribe = end.asked[:2]
        assert hello.class_name == push.CLASS
        assert hello.headers == {
            "fm.op": "hello",
            "fm.protocol": "1",
            "fm.app": "demo",
            "fm.client": peer.name,
        }
        assert subscribe.headers == {"fm.op": "subscribe", "fm.group": "billing,pay"}

        number = 0
        expected = []
        for dialect, crc in DIALECTS.values():
            for size in (0, 1, 300, 70_000):
                number += 1
                content = payload("mesh", number, size)
                headers = {
                    "fm.op": "deliver",
                    "fm.topic": "orders",
                    "fm.group": "billing",
                    "fm.id": f"mesh-{number}",
                    "fm.attempt": "1",
                    "fm.key": "k",
                    "h.note": f"{NOTE} {number}",
                    "h.empty": "",
                    "fm.of_a_later_version": "x",
                }
                answer = await end.call(dialect, crc, headers, content)
                later = number % 7 == 3
                said = {"fm.result": "later", "fm.retry_ms": "50"}
                assert answer.headers == (said if later else {"fm.result": "consumed"})
                assert (answer.status, answer.content) == (0, b"")
                expected.append((f"mesh-{number}", size, digest(content), f"{NOTE} {number}"))
            fates = {7: "commit", 6: "rollback", 8: "unknown"}
            for mine, fate in fates.items():
                headers = {"fm.op": "check", "fm.group": "pay", "fm.topic": "payments"}
                headers["fm.id"] = f"{dialect}x-{mine}"
                answer = await end.call(dialect, crc, headers, b"prepared")
                assert (answer.status, answer.headers) == (0, {"fm.result": fate})
            answer = await end.call(dialect, crc, {"fm.op": "of a later version"})
            assert answer.headers["fm.result"] == "reject"
        await until(lambda: len(peer.said("GOT")) == len(expected))
        got = [(row["id"], row["size"], row["digest"], row["note"]) for row in peer.said("GOT")]
        assert got == expected
        assert {row["empty"] for row in peer.said("GOT")} == {""}

        for dialect in (0, 1):
            end.beat(70 + dialect, dialect)
        # (a library may answer them on two threads)
        await until(lambda: sorted(end.beats) == [70, 71])
        if library == "java":
            # A handler that throws: a Bolt status and no result, so that the broker asks again.
            headers = {"fm.op": "deliver", "fm.group": "billing", "fm.id": "m-1", "h.fail": "yes"}
            answer = await end.call(0, False, headers)
            assert answer.status == 2
            assert "fm.result" not in answer.headers
        end.tell({"fm.op": "goaway", "fm.reason": "restart"})

        peer.tell("publish topic=orders count=20 first=1 sizes=0,300,70000 key=on colour=blue")
        await until(lambda: len(peer.said("PUT")) == 20, 10)
        published = {f.headers["fm.id"]: f for f in end.of("publish")}
        for mine in range(1, 21):
            frame = published[f"{peer.name}-{mine}"]
            assert frame.content == payload(peer.name, mine, (0, 300, 70_000)[mine % 3])
            assert frame.headers["h.note"] == f"{NOTE} {mine}"
            assert (frame.headers["h.empty"], frame.headers["fm.colour"]) == ("", "blue")
            assert frame.class_name == push.CLASS

        summary = await asyncio.to_thread(peer.stop)
        assert (summary["got"], summary["put"], summary["oneways"]) == (12, 20, 1)
        assert [f.headers["fm.op"] for f in end.asked[-2:]] == ["suspend", "goaway"]
        assert end.asked[-1].kind == "oneway"


@pytest.mark.timeout(90)
@pytest.mark.parametrize(("wire", "crc"), WIRES)
@pytest.mark.parametrize("library", ["node", "java"])
def test_alone(ships: Fleet, library: str, wire: int, crc: str) -> None:
    def start(port: int) -> Peer:
        options: dict[str, object] = {
            "mesh": f"127.0.0.1:{port}",
            "registration": "none",
            "app": "demo",
            "groups": "billing/orders/subscribe/8;pay/payments/publish",
            "wire": wire,
            "crc": crc,
        }
        name = f"push-{library}-1"
        starts = {"node": ships.node_push, "java": ships.java_push}
        return starts[library](name, **options)

    asyncio.run(alone(start, library))


# --- the programs of the specification ------------------------------------------------------------

IMPORTS = """
import com.alipay.remoting.*;
import com.alipay.remoting.rpc.*;
import com.alipay.remoting.rpc.protocol.*;
import java.io.ByteArrayOutputStream;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.*;
"""


def program(language: str, port: int) -> str:
    """The one in the specification, with a port that is free."""
    document = (ROOT / "docs/protocol/mesh-push.md").read_text()
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", document, re.M | re.S)
    assert found.count("12300") == 1
    return str(found.replace("12300", str(port)))


async def documented(start: Callable[[int], Peer], client: str) -> None:
    ends: list[MeshEnd] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(MeshEnd(reader, writer))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        peer = start(server.sockets[0].getsockname()[1])
        await until(lambda: bool(ends) and len(ends[0].asked) == 2, START_S)
        hello, subscribe = (frame.headers for frame in ends[0].asked)
        assert (hello["fm.op"], hello["fm.client"]) == ("hello", client)
        assert subscribe == {"fm.op": "subscribe", "fm.group": "billing"}
        for dialect, crc in DIALECTS.values():
            id = f"demo-1-{dialect}"
            headers = {"fm.op": "deliver", "fm.group": "billing", "fm.id": id, "fm.attempt": "1"}
            answer = await ends[0].call(dialect, crc, headers, b"content")
            assert (answer.status, answer.headers) == (0, {"fm.result": "consumed"})
        await until(lambda: peer.lines == [f"demo-1-{dialect} content" for dialect in range(3)])


@pytest.mark.timeout(60)
def test_the_javascript_program_of_the_specification(ships: Fleet) -> None:
    def start(port: int) -> Peer:
        (ships.folder / "consumer.js").write_text(program("js", port))
        return ships.node_script(ships.folder / "consumer.js")

    asyncio.run(documented(start, "demo-1"))


@pytest.mark.timeout(90)
def test_the_java_program_of_the_specification(ships: Fleet) -> None:
    def start(port: int) -> Peer:
        package, rest = program("java", port).split("\n", 1)
        (ships.folder / "v1.java").write_text(package + IMPORTS + rest)
        jars = f"{setup.JAVA_JARS}/*"
        classes = str(ships.folder / "classes")
        setup.run("javac", ["javac", "-cp", jars, "-d", classes, "v1.java"], ships.folder)
        return ships.java_program(f"{classes}:{jars}", "fastmesh.push.v1")

    asyncio.run(documented(start, "demo-2"))


# --- all together ---------------------------------------------------------------------------------

BILLING = f"billing/orders/subscribe/{PREFETCH}"
BLUE = f"blue/orders/subscribe/{PREFETCH}/colour=blue"
NODES = f"node-only/orders/subscribe/{PREFETCH}"
JAVAS = f"java-only/orders/subscribe/{PREFETCH}"
LEDGER = f"ledger/payments/subscribe/{PREFETCH}"

GROUPS = {
    "node-1": [BILLING, NODES, LEDGER, "pay-node/payments/publish"],
    "node-2": [BILLING, NODES, BLUE],
    "node-3": [BILLING],
    "java-1": [BILLING, JAVAS, LEDGER, "pay-java/payments/publish"],
    "java-2": [BILLING, JAVAS, BLUE],
    "java-3": [BILLING],
    "python-1": [BILLING, LEDGER],
}
WIRE = {
    "node-1": (1, "off"),
    "node-2": (2, "on"),
    "node-3": (2, "off"),
    "java-1": (1, "off"),
    "java-2": (2, "on"),
    "java-3": (2, "off"),
}
PUBLISHERS = {"node-1": "blue", "node-2": "red", "java-1": "blue", "java-2": "red", "python-1": ""}
SIZES = (0, 1, 256, 4096, 65536)
FIRST, MORE = 100, 600
"""Messages of each publisher before anything happens, and while it happens."""
PREPARED = 30
KILLED = ("node-3", "java-3")


@dataclass
class Line:
    """One offer of a message to a consumer, as it was written before the answer."""

    peer: str
    group: str
    id: str
    attempt: int
    said: str
    row: dict[str, Any]


@dataclass
class Book:
    """What should be, and what is."""

    expected: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    content: dict[str, tuple[str, int, str | None]] = field(default_factory=dict)
    """id -> topic, size and colour of what was published."""

    def publish(self, name: str, topic: str, numbers: range, colour: str | None) -> None:
        for number in numbers:
            id = f"{name}-{number}"
            self.content[id] = (topic, SIZES[number % len(SIZES)], colour)
            if topic == "payments":
                if number % 3 != 0:
                    self.expected["ledger"].add(id)
                continue
            for group in ("billing", "node-only", "java-only"):
                self.expected[group].add(id)
            if colour == "blue":
                self.expected["blue"].add(id)


def lines(peers: Mapping[str, Peer]) -> list[Line]:
    return [
        Line(name, row["group"], row["id"], row["attempt"], row["said"], row)
        for name, peer in peers.items()
        for row in peer.said("GOT")
    ]


def consumed(peers: Mapping[str, Peer]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for line in lines(peers):
        if line.said == "consumed":
            found[line.group].add(line.id)
    return found


def start(ships: Fleet, mesh: int, registration: int) -> dict[str, Peer]:
    peers = {}
    for name, groups in GROUPS.items():
        options: dict[str, object] = {
            "mesh": f"127.0.0.1:{mesh}",
            "registration": f"127.0.0.1:{registration}",
            "app": "demo",
            "groups": ";".join(groups),
            "topics": "orders",
        }
        if name in WIRE:
            options["wire"], options["crc"] = WIRE[name]
        library = name.partition("-")[0]
        if name == "node-2":
            options["start"] = "billing,node-only"  # blue comes later
        starts = {"node": ships.node_push, "java": ships.java_push, "python": ships.python_push}
        peers[name] = starts[library](name, **options)
    for peer in peers.values():
        peer.ready()
    return peers


@pytest.mark.timeout(180)
def test_together(ships: Fleet) -> None:
    mesh_port, registration, one, two = (free_port() for _ in range(4))
    brokers = {"b1": ships.broker("b1", one), "b2": ships.broker("b2", two)}
    mesh = ships.mesh(
        {
            "node": {"name": "n1", "app": "demo"},
            "listeners": [
                {"name": "msg", "listen": f"127.0.0.1:{mesh_port}", "protocol": "push"},
            ],
            "push": {
                "brokers": [
                    {"name": name, "address": f"127.0.0.1:{port}", "topics": ["*"]}
                    for name, port in (("b1", one), ("b2", two))
                ]
            },
            "registration": {"listen": f"127.0.0.1:{registration}"},
        }
    )
    peers = start(ships, mesh_port, registration)
    began = time.monotonic()
    book = Book()
    sizes = ",".join(map(str, SIZES))

    def publish(first: int, count: int) -> None:
        for name, colour in PUBLISHERS.items():
            more = f" colour={colour}" if colour else ""
            peers[name].tell(
                f"publish topic=orders count={count} first={first} sizes={sizes} key=on{more}"
            )
            book.publish(name, "orders", range(first, first + count), colour or None)

    def published(at_least: int) -> None:
        eventually(
            f"{at_least} messages are published",
            lambda: sum(len(peers[name].said("PUT")) for name in PUBLISHERS) >= at_least,
            30,
        )

    # As they are, and transactions that nobody finishes: the brokers have to ask.
    publish(1, FIRST)
    for name in ("node-1", "java-1"):
        group = f"pay-{name.partition('-')[0]}"
        peers[name].tell(
            f"prepare topic=payments group={group} count={PREPARED} first=5001 sizes={sizes}"
        )
        book.publish(name, "payments", range(5001, 5001 + PREPARED), None)
    published(len(PUBLISHERS) * FIRST + 2 * PREPARED)

    # While everybody publishes: subscriptions change, consumers are killed.
    publish(1001, MORE)
    base = len(PUBLISHERS) * FIRST + 2 * PREPARED
    published(base + MORE // 2)
    peers["node-1"].tell("subscribe billing,ledger,pay-node")
    peers["java-1"].tell("subscribe billing,ledger,pay-java")
    peers["node-2"].tell("subscribe billing,node-only,blue")
    published(base + MORE)
    for name in KILLED:
        eventually(f"{name} works", lambda name=name: peers[name].said("GOT"))
        peers[name].kill()
    published(base + len(PUBLISHERS) * MORE)

    def done() -> bool:
        found = consumed(peers)
        return all(book.expected[group] <= found[group] for group in book.expected)

    eventually("every message is consumed", done, 40)
    took_s = time.monotonic() - began

    # Nothing is left: the brokers hold no delivery, no transaction, and nobody is asked again.
    def settled() -> bool:
        samples = mesh.metrics()
        names = ("fastmesh_group_in_flight",)
        return not any(value for name in names for _, value in samples[name])

    eventually("nothing is in flight", settled)
    summaries = {name: peer.stop() for name, peer in peers.items() if name not in KILLED}
    mesh.terminate()
    audit(book, peers, summaries)
    for broker in brokers.values():
        broker.process.terminate()
        assert broker.process.wait(START_S) == 0, broker.told()
    shares = Counter(line.peer for line in lines(peers) if line.group == "billing")
    print(f"{sum(shares.values())} offers to billing in {took_s:.1f} s: {dict(shares)}")


def audit(book: Book, peers: Mapping[str, Peer], summaries: Mapping[str, dict[str, Any]]) -> None:
    assert all(said["errors"] == 0 for said in summaries.values()), summaries

    put = Counter(row["id"] for name in PUBLISHERS for row in peers[name].said("PUT"))
    assert put == Counter(dict.fromkeys(book.content, 1))
    by_broker = Counter(row["broker"] for name in PUBLISHERS for row in peers[name].said("PUT"))
    assert set(by_broker) == {"b1", "b2"}

    offers: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines(peers):
        offers[line.group, line.id].append(line)
        check_content(book, line)
    wanted = {(group, id) for group, ids in book.expected.items() for id in ids}
    assert offers.keys() == wanted

    doubled: Counter[str] = Counter()
    for (group, id), found in offers.items():
        attempts = sorted(line.attempt for line in found)
        assert len(set(attempts)) == len(attempts), found
        killed = {line.peer for line in found} & set(KILLED)
        said = Counter(line.said for line in found)
        if not killed:
            put_off = int(id.rpartition("-")[2]) % 7 == 3
            # An attempt that a killed consumer never saw may come first.
            assert said == ({"later": 1, "consumed": 1} if put_off else {"consumed": 1}) or (
                group == "billing" and attempts[0] > 1 and said == {"consumed": 1}
            ), (group, id, found)
            continue
        assert said["later"] <= 1
        assert said["consumed"] in (1, 2), (group, id, found)
        if said["consumed"] == 2:
            # Its answer was under way when it was killed, as of no more than its prefetch.
            (who,) = killed
            doubled[who] += 1
    assert all(number <= PREFETCH for number in doubled.values()), doubled

    for name, peer in peers.items():
        mine = {group.partition("/")[0] for group in GROUPS[name]}
        assert {row["group"] for row in peer.said("GOT")} <= mine
        share = Counter(row["group"] for row in peer.said("GOT"))
        everyone = len(book.expected["billing"])
        assert share["billing"] > (0 if name in KILLED else everyone / 50), (name, share)
    for name, ended in (("node-1", "node-only"), ("java-1", "java-only")):
        at = next(i for i, x in enumerate(peers[name].lines) if x.startswith("SUBSCRIBED "))
        after = [json.loads(x[4:]) for x in peers[name].lines[at:] if x.startswith("GOT ")]
        # SOFABolt's handlers run in a pool: one may write its line after the answer was read.
        most = 0 if name == "node-1" else PREFETCH
        assert sum(row["group"] == ended for row in after) <= most
    assert any(row["group"] == "blue" for row in peers["node-2"].said("GOT"))

    asked: dict[str, list[str]] = defaultdict(list)
    for name in ("node-1", "java-1"):
        for row in peers[name].said("CHECKED"):
            assert row["group"] == f"pay-{name.partition('-')[0]}"
            asked[row["id"]].append(row["said"])
            _, size, _ = book.content[row["id"]]
            caller, _, number = row["id"].rpartition("-")
            assert row["digest"] == digest(payload(caller, int(number), size))
    for id, (topic, _, _) in book.content.items():
        fates = (["rollback"], ["commit"], ["unknown", "commit"])
        wanted_fate = fates[int(id.rpartition("-")[2]) % 3] if topic == "payments" else []
        assert asked[id] == wanted_fate, (id, asked[id])


def check_content(book: Book, line: Line) -> None:
    topic, size, colour = book.content[line.id]
    caller, _, number = line.id.rpartition("-")
    row = line.row
    assert (row["topic"], row["size"], row["colour"]) == (topic, size, colour)
    assert row["digest"] == digest(payload(caller, int(number), size)), row
    assert (row["note"], row["empty"]) == (f"{NOTE} {number}", "")
    assert row["key"] == (f"key-{int(number) % 5}" if topic == "orders" else None)
