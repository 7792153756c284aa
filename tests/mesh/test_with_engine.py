"""The message mesh over the real engine: scripted clients and brokers, real sockets, whole
processes' worth of wiring."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
import uvloop

from fastmesh import config as configuration
from fastmesh._ext import push
from fastmesh.app import Mesh
from fastmesh.config import Address
from tests.admin.http import Reply, ask
from tests.conftest import LogLines
from tests.mesh.scripted import Broker, Conversation, client, until

CONFIG = """\
node: {{name: {node}, app: shop}}
state_dir: {state}
admin: {{listen: "127.0.0.1:0"}}
engine: {{threads: {threads}}}
listeners: [{{name: msg, listen: "127.0.0.1:0", protocol: push}}]
push:
  brokers: {brokers}
  forward: {{listen: "{forward}"}}
  {more}
registration: {{listen: "127.0.0.1:0"}}
limits: {{connections_max: 100, stop_timeout_ms: 1000, heartbeat_ms: 500, backoff_ms: 10,
  backoff_ms_max: 50}}
"""


class Node:
    """One fastmesh of a message mesh."""

    def __init__(self, folder: Path, log: LogLines, name: str = "n1") -> None:
        self.path = folder / f"{name}.yaml"
        self.log = log
        self.name = name
        self.mesh: Any = None

    def write(self, *brokers: Broker, text: str | None = None, **values: str) -> None:
        listed = ", ".join(f'{{name: {b.name}, address: "127.0.0.1:{b.port}"}}' for b in brokers)
        found = {
            "node": self.name,
            "state": f"run-{self.name}",
            "brokers": f"[{listed}]",
            "forward": "127.0.0.1:0",
            "more": "",
            "threads": "1",
        } | values
        self.path.write_text((text or CONFIG).format(**found))

    async def start(self) -> None:
        self.mesh = Mesh(configuration.load(self.path), self.log.log)
        await self.mesh.start()

    async def stop(self) -> None:
        if self.mesh is not None and self.mesh.state != "stopping":
            await self.mesh.stop()

    async def __aenter__(self) -> Node:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def address(self) -> str:
        return str(self.mesh.addresses()["msg"])

    @property
    def forward(self) -> str:
        return str(self.mesh.addresses()["__forward__"])

    async def register(self, name: str, *groups: dict[str, Any], app: str = "shop") -> Reply:
        body = {"app": app, "client": name, "topics": [{"name": "orders"}], "groups": list(groups)}
        at: Address = self.mesh.registration_address
        return await ask(at, "/v1/registrations", "POST", json.dumps(body).encode())

    async def client(self, name: str, groups: str = "", **more: Any) -> Conversation:
        return await client(self.address, name, groups, **more)

    async def get(self, path: str) -> Any:
        return (await ask(self.mesh.admin_address, path)).json()


def group(name: str, role: str = "subscribe", **more: Any) -> dict[str, Any]:
    return {"name": name, "topic": "orders", "role": role, **more}


@pytest.fixture
def node(tmp_path: Path, log_lines: LogLines) -> Node:
    return Node(tmp_path, log_lines)


def run(main: Any) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await main()

    uvloop.run(bounded())


@pytest.mark.parametrize("threads", ["1", "3"])
def test_publish_and_deliver(node: Node, threads: str) -> None:
    async def main() -> None:
        async with Broker() as broker:
            node.write(broker, threads=threads)
            async with node:
                assert (await node.register("c1", group("g1", prefetch=4))).status == 201
                consumer = await node.client("c1", "g1")
                await until(lambda: broker.groups() == {"g1": 4})
                hello = broker.link.of("hello")[0].headers
                assert (hello["fm.app"], hello["fm.client"]) == ("shop", "n1")
                answer = await broker.deliver("g1")
                assert answer.headers["fm.result"] == "consumed"
                (got,) = consumer.of("deliver")
                assert (got.headers["fm.id"], got.content) == ("m1", b"body")
                sent = await consumer.ask(b"x", op="publish", topic="orders", id="p1")
                assert sent.headers["fm.broker"] == "b1"
                (published,) = broker.link.of("publish")
                assert published.content == b"x"
                refused = await consumer.ask(op="publish", topic="nobody", id="p2")
                assert refused.headers["fm.result"] == "reject"
                assert (await broker.deliver("g9")).headers["fm.result"] == "no_consumer"
                await consumer.close()
                await until(lambda: broker.groups() == {})
                assert (await broker.deliver("g1")).headers["fm.result"] == "no_consumer"

    run(main)


def test_a_client_finds_its_groups_after_a_crash_without_registering(node: Node) -> None:
    async def main() -> None:
        async with Broker() as broker:
            node.write(broker)
            async with node:
                await node.register("c1", group("g1", filter="colour=blue"))
            async with node:
                consumer = await node.client("c1", "g1")
                await until(lambda: broker.groups() == {"g1": 32})
                assert broker.told()["fm.filter.g1"] == "colour=blue"
                await broker.deliver("g1")
                assert len(consumer.of("deliver")) == 1

    run(main)


def schedule(**nodes: tuple[str, int]) -> bytes:
    """A schedule of one application: node -> (address, weight)."""
    found = [{"name": n, "address": at, "weight": w} for n, (at, w) in nodes.items()]
    return json.dumps({"apps": {"shop": {"nodes": found}}}).encode()


async def put_schedule(node: Node, body: bytes) -> Reply:
    return await ask(node.mesh.admin_address, "/v1/schedule", "PUT", body)


def test_a_weight_moves_deliveries_to_the_other_node_and_back(tmp_path: Path) -> None:
    async def main() -> None:
        one, two = (Node(tmp_path, LogLines(), name) for name in ("n1", "n2"))
        async with Broker() as broker, Broker("other") as other:
            one.write(broker)
            two.write(other)
            async with one, two:
                consumers = []
                for node in (one, two):
                    await node.register("c1", group("g1"))
                    consumers.append(await node.client("c1", "g1"))
                await until(lambda: broker.groups() == {"g1": 32})

                async def shares(count: int = 40) -> tuple[int, int]:
                    before = [len(c.of("deliver")) for c in consumers]
                    for number in range(count):
                        assert (await broker.deliver("g1", number)).headers["fm.result"] == (
                            "consumed"
                        )
                    return tuple(  # type: ignore[return-value]
                        len(c.of("deliver")) - was for c, was in zip(consumers, before, strict=True)
                    )

                assert await shares() == (40, 0), "no schedule: everything stays"
                body = schedule(n1=(one.forward, 25), n2=(two.forward, 100))
                for node in (one, two):
                    assert (await put_schedule(node, body)).status == 200

                async def moved() -> bool:
                    return (await shares(4))[1] > 0

                began = time.monotonic()
                await until(moved, 2.0)
                assert time.monotonic() - began < 1.0
                stayed, gone = await shares(100)
                assert abs(stayed - 25) <= 1
                assert stayed + gone == 100
                forwarded = consumers[1].of("deliver")[-1].headers
                assert (forwarded["fm.hop"], forwarded["fm.origin"]) == ("1", "n1")

                # The consumer there leaves: that node counts as down for the group, at once.
                await consumers[1].ask(op="subscribe", group="")
                await until(lambda: one.mesh.plane.control.peers.serving("g1") == [])
                assert await shares(20) == (20, 0)
                await consumers[1].ask(op="subscribe", group="g1")
                await until(lambda: one.mesh.plane.control.peers.serving("g1") == ["n2"])

                # And a change by PUT again, which the restart keeps.
                body = schedule(n1=(one.forward, 100), n2=(two.forward, 100))
                assert (await put_schedule(one, body)).status == 200
                await until(lambda: one.mesh.compiled.version > 1)

                async def back() -> bool:
                    return await shares(4) == (4, 0)

                await until(back, 2.0)
                await one.get("/v1/topology")  # from here on rates are taken
                consumed: dict[str, Any] = {}

                async def rated() -> bool:
                    await shares(4)
                    look = await one.get("/v1/topology")
                    (topic,) = look["topics"]
                    consumed.update(topic["consumed_by"][0])
                    return bool(consumed["rate_per_s"])

                await until(rated)
                assert consumed["peers"] == ["n2"]
                look = await one.get("/v1/topology")
                assert [p["name"] for p in look["peers"]] == ["n2"]
                for consumer in consumers:
                    await consumer.close()

    run(main)


def test_hostile_rules_on_three_nodes_make_no_loop(tmp_path: Path) -> None:
    """Each node's own schedule sends everything on to the next one, round and round: a delivery
    still makes one hop, and is consumed where that ends."""

    async def main() -> None:
        names = ("n1", "n2", "n3")
        nodes = [Node(tmp_path, LogLines(), name) for name in names]
        async with Broker("b1") as one, Broker("b2") as two, Broker("b3") as three:
            brokers = (one, two, three)
            for node, broker in zip(nodes, brokers, strict=True):
                node.write(broker)
            async with nodes[0], nodes[1], nodes[2]:
                consumers = []
                for node in nodes:
                    await node.register("c1", group("g1"))
                    consumers.append(await node.client("c1", "g1"))
                for number, node in enumerate(nodes):
                    onward = names[(number + 1) % 3]
                    listed = [
                        {"name": other.name, "address": other.forward, "weight": 100}
                        for other in nodes
                    ]
                    rules = [{"match": {"colour": "blue"}, "nodes": [onward]}]
                    body = json.dumps(
                        {"apps": {"shop": {"nodes": listed, "rules": rules}}}
                    ).encode()
                    assert (await put_schedule(node, body)).status == 200

                def everybody_serves() -> bool:
                    return all(
                        len(node.mesh.plane.control.peers.serving("g1")) == 2 for node in nodes
                    )

                await until(everybody_serves)
                for broker in brokers:
                    await until(lambda b=broker: b.groups() == {"g1": 32})  # type: ignore[misc]
                for number in range(30):
                    for broker in brokers:
                        answer = await broker.deliver("g1", number, colour="blue")
                        assert answer.headers["fm.result"] == "consumed"
                for number, consumer in enumerate(consumers):
                    came = [frame.headers for frame in consumer.of("deliver")]
                    before = names[(number - 1) % 3]
                    assert len(came) == 30
                    assert {(h["fm.hop"], h["fm.origin"]) for h in came} == {("1", before)}
                for consumer in consumers:
                    await consumer.close()

    run(main)


def test_stopping_asks_brokers_first_and_lets_deliveries_end(node: Node) -> None:
    async def main() -> None:
        async with Broker() as broker:
            node.write(broker)
            async with node:
                await node.register("c1", group("g1"))
                held: list[Any] = []

                def hold(asked: Any) -> None:
                    held.append(asked)

                consumer = await node.client("c1", "g1", answer=hold)
                await until(lambda: broker.groups() == {"g1": 32})
                under_way = asyncio.ensure_future(broker.deliver("g1"))
                await until(lambda: len(held) == 1)
                stopping = asyncio.ensure_future(node.mesh.stop())
                await until(lambda: len(broker.link.of("suspend")) == 1)
                assert not stopping.done()
                assert not consumer.closed
                assert not consumer.of("goaway")
                consumer.say(held[0], result="consumed")
                assert (await under_way).headers["fm.result"] == "consumed"
                await stopping
                assert len(consumer.of("goaway")) == 1
                assert consumer.closed

    run(main)


def test_a_stuck_consumer_bounds_the_stop(node: Node) -> None:
    async def main() -> None:
        async with Broker() as broker:
            node.write(broker)
            async with node:
                await node.register("c1", group("g1"))
                consumer = await node.client("c1", "g1", answer=lambda asked: None)
                await until(lambda: broker.groups() == {"g1": 32})
                under_way = asyncio.ensure_future(broker.deliver("g1"))
                await until(lambda: len(consumer.of("deliver")) == 1)
                began = time.monotonic()
                await node.mesh.stop()
                assert time.monotonic() - began < 3
                answer = await under_way
                assert answer.headers.get("fm.result") != "consumed"

    run(main)


def test_brokers_in_a_file_come_and_go_without_a_reload(node: Node, tmp_path: Path) -> None:
    async def main() -> None:
        file = tmp_path / "brokers.yaml"

        def write(*brokers: Broker) -> None:
            listed = [{"name": b.name, "address": f"127.0.0.1:{b.port}"} for b in brokers]
            file.write_text(json.dumps({"brokers": listed}))

        async with Broker("b1") as one, Broker("b2") as two:
            write(one)
            node.write(brokers="{file: brokers.yaml}")
            async with node:
                await node.register("c1", group("g1"))
                consumer = await node.client("c1", "g1")
                await until(lambda: one.groups() == {"g1": 32})
                write(one, two)
                began = time.monotonic()
                await until(lambda: two.groups() == {"g1": 32})
                assert time.monotonic() - began < 1.0
                file.write_text("brokers: [{name: b1}]")
                await until(lambda: bool(node.mesh.plane.brokers.failure))
                assert len(node.mesh.plane.brokers.now) == 2
                write(two)
                await until(lambda: one.links[-1].closed)
                status = (await node.get("/v1/status"))["mesh"]
                assert [b["broker"] for b in status["brokers"]] == ["b2"]
                assert status["brokers_failure"] == ""
                await consumer.close()

    run(main)


def test_a_broker_that_comes_back_is_told_everything_again(node: Node) -> None:
    async def main() -> None:
        async with Broker() as broker:
            node.write(broker)
            async with node:
                await node.register("c1", group("g1"))
                consumer = await node.client("c1", "g1")
                await until(lambda: broker.groups() == {"g1": 32})
                await broker.stop()
                await node.register("c2", group("g2"))
                second = await node.client("c2", "g2")
                await broker.start()
                await until(lambda: broker.groups() == {"g1": 32, "g2": 32})
                assert (await broker.deliver("g2")).headers["fm.result"] == "consumed"
                await consumer.close()
                await second.close()

    run(main)


def test_registrations_that_change_all_the_time_keep_their_deliveries(node: Node) -> None:
    async def main() -> None:
        async with Broker() as broker:
            node.write(broker)
            async with node:
                await node.register("c1", group("g1", prefetch=64))
                consumer = await node.client("c1", "g1")
                await until(lambda: broker.groups() == {"g1": 64})
                done = asyncio.Event()

                async def churn() -> None:
                    for number in range(60):
                        reply = await node.register(f"x{number % 7}", group(f"t{number}"))
                        assert reply.status in (200, 201)
                    done.set()

                changing = asyncio.ensure_future(churn())
                count = 0
                while not done.is_set():
                    count += 1
                    answer = await broker.deliver("g1", count)
                    assert answer.headers["fm.result"] == "consumed"
                await changing
                assert len(consumer.of("deliver")) == count > 50
                assert node.mesh.compiled.version < 60, "folded"
                await until(lambda: "t59" in node.mesh.compiled.group_ids)
                await consumer.close()

    run(main)


def test_a_reload_moves_the_mesh_and_a_faulty_one_changes_nothing(node: Node) -> None:
    async def main() -> None:
        async with Broker("b1") as one, Broker("b2") as two:
            node.write(one)
            async with node:
                await node.register("c1", group("g1"))
                consumer = await node.client("c1", "g1")
                await until(lambda: one.groups() == {"g1": 32})
                before = (node.mesh.compiled.version, node.mesh.plane.brokers.now)
                node.write(two, more="schedule: {{file: missing.yaml}}".format())
                reply = await ask(node.mesh.admin_address, "/v1/reload", "POST")
                assert reply.status == 422
                assert reply.json()["errors"][0]["path"] == "push.schedule.file"
                assert (node.mesh.compiled.version, node.mesh.plane.brokers.now) == before
                node.write(one, two)
                assert (await ask(node.mesh.admin_address, "/v1/reload", "POST")).status == 200
                await until(lambda: two.groups() == {"g1": 32})
                assert not consumer.closed
                node.write(one, two, node="renamed")
                reply = await ask(node.mesh.admin_address, "/v1/reload", "POST")
                assert (reply.status, reply.json()["keys"]) == (409, ["node.name"])
                await consumer.close()

    run(main)


def test_a_broker_that_says_goaway_gets_nothing_new(node: Node) -> None:
    async def main() -> None:
        async with Broker("b1") as one, Broker("b2") as two:
            node.write(one, two)
            async with node:
                await node.register("c1", group("g1"), group("p1", "publish"))
                producer = await node.client("c1", "g1")
                await until(lambda: one.groups() == two.groups() == {"g1": 32})

                async def publish(count: int) -> tuple[int, int]:
                    before = [len(b.link.of("publish")) for b in (one, two)]
                    for number in range(count):
                        answer = await producer.ask(op="publish", topic="orders", id=f"m{number}")
                        assert answer.headers["fm.result"] == "consumed"
                    after = [len(b.link.of("publish")) for b in (one, two)]
                    return after[0] - before[0], after[1] - before[1]

                shares = await publish(100)
                assert min(shares) > 10, "both get some, though nothing is ever in flight"
                version = node.mesh.compiled.version
                answer = await one.link.ask(op="goaway")
                assert answer.headers["fm.result"] == "consumed"
                await until(lambda: node.mesh.engine.in_force() > version)
                assert await publish(20) == (0, 20)
                assert (await one.deliver("g1")).headers["fm.result"] == "consumed"
                second = await producer.ask(
                    op="publish", topic="orders", id="m1", tx="commit", broker="b2"
                )
                assert second.headers["fm.broker"] == "b2"
                version = node.mesh.compiled.version
                links = len(one.links)
                await one.link.close()
                await until(lambda: node.mesh.engine.in_force() > version)
                await until(lambda: len(one.links) > links)
                await until(lambda: one.groups() == {"g1": 32})
                assert min(await publish(100)) > 0
                await producer.close()

    run(main)


def test_transactions_go_to_the_broker_that_they_name(node: Node) -> None:
    async def main() -> None:
        async with Broker("b1") as one, Broker("b2") as two:
            node.write(one, two)
            async with node:
                await node.register("c1", group("p1", "publish"))

                def fate(asked: Any) -> dict[str, str]:
                    word = "commit" if asked.headers["fm.op"] == "check" else "consumed"
                    return {"fm.result": word}

                producer = await node.client("c1", "p1", answer=fate)
                await until(lambda: one.groups() == two.groups() == {"p1": 32})
                for _ in range(10):
                    for name in ("b1", "b2"):
                        answer = await producer.ask(
                            op="publish", topic="orders", id="m", tx="commit", broker=name
                        )
                        assert answer.headers["fm.broker"] == name
                refused = await producer.ask(op="publish", topic="x", id="m", broker="b3")
                assert refused.headers["fm.result"] == "reject"
                headers = {"fm.op": "check", "fm.group": "p1", "fm.id": "m", "fm.topic": "orders"}
                answer = await asyncio.wait_for(one.link.ask_soon(headers, b"body"), 5)
                assert answer.headers["fm.result"] == "commit"
                await producer.close()

    run(main)


def test_the_ledger_of_a_group_adds_up(node: Node) -> None:
    async def main() -> None:
        async with Broker() as broker:
            node.write(broker)
            async with node:
                await node.register("c1", group("g1", prefetch=2))
                held: list[Any] = []
                consumer = await node.client("c1", "g1", answer=held.append)
                await until(lambda: broker.groups() == {"g1": 2})
                asked = [
                    broker.link.ask_soon(
                        {
                            "fm.op": "deliver",
                            "fm.topic": "orders",
                            "fm.group": "g1",
                            "fm.id": f"m{number}",
                        }
                    )
                    for number in range(6)
                ]
                await until(lambda: len(held) == 2)
                await until(lambda: sum(f.done() for f in asked) == 4)
                overload = [f.result().headers for f in asked if f.done()]
                assert {h["fm.result"] for h in overload} == {"later"}
                consumer.say(held[0], result="consumed")
                await until(lambda: sum(f.done() for f in asked) == 5)
                text = (await ask(node.mesh.admin_address, "/metrics")).body.decode()
                found = {
                    line.split("{")[0]: 0.0
                    for line in text.splitlines()
                    if line.startswith("fastmesh_group_")
                }
                for line in text.splitlines():
                    if line.startswith("fastmesh_group_") and 'group="g1"' in line:
                        found[line.split("{")[0]] += float(line.rsplit(" ", 1)[1])
                assert found["fastmesh_group_deliveries_total"] == 6
                assert found["fastmesh_group_answered_total"] == 1
                assert found["fastmesh_group_refused_total"] == 4
                assert found["fastmesh_group_in_flight"] == 1
                assert found["fastmesh_group_connections"] == 1
                assert found["fastmesh_group_credit"] == 2
                await consumer.close()
                await until(lambda: all(f.done() for f in asked))

    run(main)


def test_hello_comes_first_on_every_connection_to_a_broker(node: Node) -> None:
    """Whatever clients publish while it connects, and in whatever dialect: a broker refuses for
    good what comes before hello."""

    async def main() -> None:
        async with Broker() as broker:
            node.write(broker)
            async with node:
                await node.register("c1", group("g1"))
                producer = await node.client("c1")
                asked = {"fm.op": "publish", "fm.topic": "orders"}
                for number in range(20):
                    await broker.stop()
                    await broker.start()
                    futures = [
                        producer.ask_soon(asked | {"fm.id": f"{number}.{i}"}) for i in range(20)
                    ]
                    await asyncio.wait(futures, timeout=5)
                    said = [f.result().headers.get("fm.result") for f in futures]
                    assert "reject" not in said
                    await until(lambda: any(not link.closed for link in broker.links))
                other = push.request(7, asked | {"fm.id": "v2"}, dialect=1, timeout_ms=5000)
                producer.write(other)
                await until(lambda: any(f.headers["fm.id"] == "v2" for f in published(broker)))
            assert len(broker.links) > 20
            assert {link.asked[0].headers["fm.op"] for link in broker.links if link.asked} == {
                "hello"
            }

    def published(broker: Broker) -> list[Any]:
        return [frame for link in broker.links for frame in link.of("publish")]

    run(main)
