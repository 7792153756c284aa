"""The drain by direction over the real engine: what clients, brokers and operators see of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fastmesh import config as configuration
from fastmesh._ext.engine import Engine
from fastmesh._ext.push import Push
from fastmesh.app import Mesh
from fastmesh.errors import StateError
from tests.admin.http import Reply, ask
from tests.chaos.mesh import Metrics
from tests.conftest import LogLines
from tests.mesh.scripted import Broker, until
from tests.mesh.test_with_engine import CONFIG, Node, group, run

SLOW = CONFIG.replace("stop_timeout_ms: 1000", "stop_timeout_ms: {stop}, {limits}")


@pytest.fixture
def node(tmp_path: Path, log_lines: LogLines) -> Node:
    return Node(tmp_path, log_lines)


async def drain(node: Node, more: str = "") -> Reply:
    return await ask(node.mesh.admin_address, f"/v1/drain{more}", "POST")


async def status(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = (await node.get("/v1/status"))["drain"]
    return found


async def in_step(node: Node, step: str) -> dict[str, Any]:
    async def reached() -> bool:
        return (await status(node))["step"] == step

    await until(reached)
    return await status(node)


async def metrics(node: Node) -> Metrics:
    return Metrics((await ask(node.mesh.admin_address, "/metrics")).body.decode())


def write(node: Node, *brokers: Broker, stop: int = 10_000, limits: str = "") -> None:
    default = "drain_suspend_ms: 2000, drain_answers_ms: 6000"
    node.write(*brokers, text=SLOW, stop=str(stop), limits=limits or default)


class Deaf(Broker):
    """Does not answer suspend until it is told to."""

    def __init__(self, name: str = "b1") -> None:
        super().__init__(name)
        self.answer = self.listen
        self.unanswered: list[Push] = []

    def listen(self, asked: Push) -> Mapping[str, str] | None:
        if asked.headers.get("fm.op") == "suspend":
            self.unanswered.append(asked)
            return None
        return self.take(asked)

    def agree(self) -> None:
        self.link.say(self.unanswered.pop(), result="consumed")


def test_every_step_can_be_seen_and_goes_on_when_it_is_over(node: Node) -> None:
    async def main() -> None:
        async with Deaf() as broker:
            write(node, broker)
            async with node:
                held: list[Push] = []
                await node.register("c1", group("g1"))
                consumer = await node.client("c1", "g1", answer=held.append)
                await until(lambda: broker.groups() == {"g1": 32})
                under_way = asyncio.ensure_future(broker.deliver("g1"))
                await until(lambda: len(held) == 1)
                assert (await status(node)) == {"step": "none"}
                assert (await drain(node)).status == 202

                await until(lambda: bool(broker.unanswered))
                found = await status(node)
                assert (found["step"], found["waiting_for"]) == ("suspend", {"brokers": ["b1"]})
                assert 0 < found["deadline_ms"] <= 2000
                scraped = await metrics(node)
                assert scraped.sum("drain_step", step="suspend") == 1
                assert scraped.sum("drain_waiting_for", what="brokers") == 1
                assert not (await node.get("/v1/status"))["mesh"]["brokers"][0]["suspended"]
                broker.agree()

                found = await in_step(node, "answers")
                await asyncio.sleep(0.05)
                found = await status(node)
                assert found["waiting_for"] == {"groups": {"g1": 1}}
                assert found["steps"][0]["outcome"] == "done"
                assert (await node.get("/v1/status"))["mesh"]["brokers"][0]["suspended"]
                assert not consumer.of("goaway")
                assert (await metrics(node)).sum("drain_waiting_for", what="groups") == 1
                consumer.say(held[0], result="consumed")
                assert (await under_way).headers["fm.result"] == "consumed"

                found = await in_step(node, "done")
                assert found["safe_to_stop"]
                assert consumer.closed
                assert len(consumer.of("goaway")) == 1
                assert (await node.get("/v1/status"))["drained"]
                scraped = await metrics(node)
                assert scraped.sum("safe_to_stop") == 1
                for step in ("suspend", "answers", "clients"):
                    assert scraped.sum("drain_steps_total", step=step, outcome="done") == 1
                    assert scraped.sum("drain_step_seconds", step=step) > 0
                assert (await drain(node, "/cancel")).status == 409
                assert (await drain(node, "?hold")).status == 409
                assert (await drain(node, "?what")).status == 400
                text = node.log.text()
                assert "drain step begins step=answers" in text
                assert "drain step step=clients outcome=done" in text

    run(main)


def test_a_broker_that_keeps_pushing_is_served_and_then_refused(node: Node) -> None:
    """It takes no notice of suspend. Nothing it pushes is lost, and nobody gets a delivery who has
    been told to leave."""

    async def main() -> None:
        async with Deaf() as broker:
            limits = "drain_suspend_ms: 100, drain_answers_ms: 1000"
            write(node, broker, stop=2000, limits=limits)
            async with node:
                await node.register("c1", group("g1"))
                consumer = await node.client("c1", "g1")
                await until(lambda: broker.groups() == {"g1": 32})
                results: list[tuple[str, str]] = []

                async def push() -> None:
                    for number in range(10_000):
                        step = node.mesh.drain_status()["step"]
                        answer = await broker.deliver("g1", number)
                        results.append((step, answer.headers["fm.result"]))
                        if step == "done":
                            return
                        await asyncio.sleep(0.01)

                pushing = asyncio.ensure_future(push())
                await until(lambda: len(results) > 5)
                assert (await drain(node)).status == 202
                await in_step(node, "done")
                await pushing
                found = await status(node)
                assert [s["outcome"] for s in found["steps"]] == ["passed", "passed", "done"]
                assert found["steps"][0]["left"] == {"brokers": {"b1": "no answer yet"}}
                served = [step for step, result in results if result == "consumed"]
                assert served.count("answers") > 20, results
                assert {result for step, result in results if step == "done"} == {"no_consumer"}
                # One may have been on its way when the step was over.
                early = [r for step, r in results if step in ("none", "suspend", "answers")]
                assert set(early[:-1]) == {"consumed"}
                assert {result for _, result in results} == {"consumed", "no_consumer"}
                # Every delivery was answered before its client was let go.
                assert len(consumer.of("deliver")) == len(served)
                after = consumer.asked[consumer.asked.index(consumer.of("goaway")[0]) :]
                assert not [x for x in after if x.headers["fm.op"] == "deliver"]

    run(main)


def test_hold_and_cancel_lose_nobody(node: Node) -> None:
    async def main() -> None:
        async with Broker() as broker:
            write(node, broker)
            async with node:
                await node.register("c1", group("g1", prefetch=4), group("p1", "publish"))
                consumer = await node.client("c1", "g1,p1")
                await until(lambda: broker.groups().get("g1") == 4)
                for round_ in range(3):
                    told = len(broker.link.of("announce"))
                    assert (await drain(node, "?hold")).status == 202

                    async def safe() -> bool:
                        return bool((await status(node))["safe_to_stop"])

                    await until(safe)
                    found = await status(node)
                    assert (found["step"], found["hold"]) == ("answers", True)
                    assert (await ask(node.mesh.admin_address, "/readyz")).status == 503
                    # Nothing is delivered once it is safe; what clients ask goes on.
                    delivered = len(consumer.of("deliver"))
                    assert (await broker.deliver("g1")).headers["fm.result"] == "no_consumer"
                    sent = await consumer.ask(b"x", op="publish", topic="orders", id=f"p{round_}")
                    assert sent.headers["fm.result"] == "consumed"
                    assert len(consumer.of("deliver")) == delivered
                    assert len(broker.link.of("announce")) == told

                    reply = await drain(node, "/cancel")
                    assert (reply.status, reply.json()) == (200, {"state": "serving"})
                    assert (await ask(node.mesh.admin_address, "/readyz")).status == 200
                    await until(lambda n=round_: len(broker.link.of("resume")) == n + 1)

                    async def served() -> bool:
                        answer = await broker.deliver("g1")
                        return answer.headers["fm.result"] == "consumed"

                    await until(served)
                    assert broker.groups() == {"g1": 4, "p1": 32}
                    assert not consumer.of("goaway")
                reply = await drain(node, "/cancel")
                assert (reply.status, reply.json()["error"]) == (409, "no drain is under way")
                scraped = await metrics(node)
                assert scraped.sum("drain_steps_total", outcome="cancelled") == 3
                # And the last one in earnest.
                assert (await drain(node, "?hold")).status == 202
                assert (await drain(node)).status == 202
                await in_step(node, "done")
                assert consumer.closed

    run(main)


def test_until_clients_are_let_go_the_mesh_goes_on_with_brokers_suspended(
    node: Node, tmp_path: Path
) -> None:
    """Registrations, new groups, new connections, a broker that is new and one that comes back."""
    file = tmp_path / "brokers.yaml"

    def listed(*brokers: Broker) -> None:
        found = [{"name": b.name, "address": f"127.0.0.1:{b.port}"} for b in brokers]
        file.write_text(json.dumps({"brokers": found}))

    async def main() -> None:
        async with Broker("b1") as one, Broker("b2") as two:
            listed(one)
            node.write(brokers="{file: brokers.yaml}")
            async with node:
                await node.register("c1", group("g1"))
                await node.client("c1", "g1")
                await until(lambda: one.groups() == {"g1": 32})
                assert (await drain(node, "?hold")).status == 202
                await until(lambda: len(one.link.of("suspend")) == 1)

                assert (await ask(node.mesh.admin_address, "/v1/reload", "POST")).status == 409
                assert (await node.register("c2", group("g2"))).status == 201
                late = await node.client("c2", "g2")
                listed(one, two)
                await until(lambda: bool(two.links) and len(two.link.of("suspend")) == 1)
                await one.link.close()
                await until(lambda: len(one.links) == 2 and len(one.link.of("suspend")) == 1)
                assert not two.link.of("announce")
                assert not one.link.of("announce")
                assert not late.of("deliver")

                assert (await drain(node, "/cancel")).status == 200
                both = {"g1": 32, "g2": 32}
                await until(lambda: one.groups() == both and two.groups() == both)
                assert len(one.link.of("resume")) == len(two.link.of("resume")) == 1
                assert (await two.deliver("g2")).headers["fm.result"] == "consumed"

    run(main)


def test_what_nobody_answered_goes_back_to_its_broker(node: Node) -> None:
    """At the end of a stop: "later", so that it is delivered again, to somebody else."""

    async def main() -> None:
        async with Broker() as broker:
            write(node, broker, stop=500, limits="drain_answers_ms: 200")
            async with node:
                held: list[Push] = []
                await node.register("c1", group("g1"), group("g2"))
                consumer = await node.client("c1", "g1,g2", answer=held.append)
                await until(lambda: broker.groups() == {"g1": 32, "g2": 32})
                asked = [
                    asyncio.ensure_future(broker.deliver(name, number))
                    for name, number in (("g1", 1), ("g1", 2), ("g2", 3))
                ]
                await until(lambda: len(held) == 3)
                began = time.monotonic()
                node.mesh.ask_stop()
                await node.mesh.run_until_stopped()
                assert 0.45 < time.monotonic() - began < 2
                for answer in await asyncio.gather(*asked):
                    assert answer.headers["fm.result"] == "later"
                assert consumer.closed
                text = node.log.text()
                left = 'groups="g1 2, g2 1"'
                assert "step=answers outcome=passed took_ms=2" in text
                assert text.count(left) == 3, "in two steps, and when it was cut off"
                assert "stopping with requests or connections left" in text

    run(main)


def test_a_late_answer_still_counts_while_the_last_clients_go(node: Node) -> None:
    async def main() -> None:
        async with Broker() as broker:
            write(node, broker, limits="drain_answers_ms: 200")
            async with node:
                held: list[Push] = []
                await node.register("c1", group("g1"))
                consumer = await node.client("c1", "g1", answer=held.append)
                await until(lambda: broker.groups() == {"g1": 32})
                asked = asyncio.ensure_future(broker.deliver("g1"))
                await until(lambda: len(held) == 1)
                assert (await drain(node)).status == 202
                found = await in_step(node, "clients")
                assert found["steps"][1]["left"] == {"groups": {"g1": 1}}
                await until(lambda: len(consumer.of("goaway")) == 1)
                # It would subscribe again: not here.
                reply = await consumer.ask(op="subscribe", group="g1")
                assert reply.headers["fm.result"] == "later"
                assert not (await status(node))["safe_to_stop"]
                consumer.say(held[0], result="consumed")
                assert (await asked).headers["fm.result"] == "consumed"
                assert (await in_step(node, "done"))["safe_to_stop"]

    run(main)


@pytest.mark.parametrize("step", ["suspend", "answers", "clients"])
def test_two_signals_stop_at_once_in_every_step(node: Node, step: str) -> None:
    async def main() -> None:
        async with Deaf() if step == "suspend" else Broker() as broker:
            answers_ms = 100 if step == "clients" else 20_000
            limits = f"drain_suspend_ms: 20000, drain_answers_ms: {answers_ms}"
            write(node, broker, stop=60_000, limits=limits)
            async with node:
                held: list[Push] = []
                await node.register("c1", group("g1"))
                await node.client("c1", "g1", answer=held.append)
                await until(lambda: broker.groups() == {"g1": 32})
                asked = asyncio.ensure_future(broker.deliver("g1"))
                await until(lambda: len(held) == 1)
                stopping = asyncio.ensure_future(node.mesh.run_until_stopped())
                node.mesh.ask_stop()
                await in_step(node, step)
                assert (await drain(node, "/cancel")).status == 409
                began = time.monotonic()
                node.mesh.ask_stop()
                await stopping
                assert time.monotonic() - began < 2
                assert (await asked).headers["fm.result"] == "later"
                assert f"step={step} outcome=cut" in node.log.text()

    run(main)


def test_peers_forward_nothing_to_a_node_that_drains(tmp_path: Path) -> None:
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
                nodes = [
                    {"name": "n1", "address": one.forward, "weight": 0},
                    {"name": "n2", "address": two.forward, "weight": 100},
                ]
                body = json.dumps({"apps": {"shop": {"nodes": nodes}}}).encode()
                for node in (one, two):
                    reply = await ask(node.mesh.admin_address, "/v1/schedule", "PUT", body)
                    assert reply.status == 200

                async def takes(who: int) -> bool:
                    before = len(consumers[who].of("deliver"))
                    assert (await broker.deliver("g1")).headers["fm.result"] == "consumed"
                    return len(consumers[who].of("deliver")) > before

                await until(lambda: takes(1))
                assert (await drain(two, "?hold")).status == 202
                await until(lambda: takes(0))
                delivered = len(consumers[1].of("deliver"))
                for _ in range(20):
                    assert await takes(0)
                assert len(consumers[1].of("deliver")) == delivered
                assert (await drain(two, "/cancel")).status == 200
                await until(lambda: takes(1))

    run(main)


# --- a hand-over ----------------------------------------------------------------------------------


def on_a_path(node: Node, broker: Broker, path: Path) -> None:
    text = CONFIG.replace('name: msg, listen: "127.0.0.1:0"', f'name: msg, listen: "unix:{path}"')
    node.write(broker, text=text)


def test_giving_way_leaves_the_listeners_to_their_new_owner(node: Node, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "msg.sock"
        async with Broker() as broker:
            on_a_path(node, broker, path)
            async with node:
                await node.register("c1", group("g1"))
                inode = path.stat().st_ino
                seen: list[str] = []

                async def may_go() -> None:
                    seen.append(node.mesh.drain_status()["step"])
                    assert len(broker.link.of("suspend")) == 1
                    assert not node.mesh.leaving.is_letting_go
                    assert (await drain(node, "/cancel")).status == 409

                assert await node.mesh.give_way(may_go) == "done"
                assert seen == ["answers"]
                assert path.stat().st_ino == inode
                assert not node.mesh.addresses()
                await node.mesh.stop()
                assert path.stat().st_ino == inode

    run(main)


def test_giving_way_to_nobody_goes_on_serving(node: Node, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "msg.sock"
        async with Broker() as broker:
            on_a_path(node, broker, path)
            async with node:

                async def gone() -> None:
                    raise ConnectionResetError("the new process has died")

                with pytest.raises(ConnectionResetError):
                    await node.mesh.give_way(gone)
                assert node.mesh.state == "serving"
                await until(lambda: len(broker.link.of("resume")) == 1)
                assert (await ask(node.mesh.admin_address, "/readyz")).status == 200
                assert path.exists()
                assert node.mesh.addresses()["msg"]
                node.mesh.drain(hold=True)
                with pytest.raises(StateError, match="draining"):
                    await node.mesh.give_way(gone)
            assert not path.exists(), "it is ours to remove again"

    run(main)


def test_a_hand_over_that_is_given_up_goes_on_serving(node: Node) -> None:
    async def main() -> None:
        async with Broker() as broker:
            node.write(broker)
            async with node:
                await node.register("c1", group("g1"))
                consumer = await node.client("c1", "g1")
                await until(lambda: broker.groups() == {"g1": 32})
                asked = asyncio.Event()

                async def never() -> None:
                    asked.set()
                    await asyncio.get_running_loop().create_future()

                way = asyncio.ensure_future(node.mesh.give_way(never))
                await asked.wait()
                assert (await broker.deliver("g1")).headers["fm.result"] == "no_consumer"
                way.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await way
                assert node.mesh.state == "serving"
                await until(lambda: len(broker.link.of("resume")) == 1)

                async def served() -> bool:
                    return (await broker.deliver("g1")).headers["fm.result"] == "consumed"

                await until(served)
                assert not consumer.of("goaway")

    run(main)


def test_more_is_to_be_said_than_the_command_ring_holds(node: Node) -> None:
    """Twice as much as it holds, at once: groups are closed, and everybody hears goaway
    before the engine is told to let them go."""

    def small(**options: Any) -> Engine:
        return Engine(ring_bytes=65536, **options)

    async def main() -> None:
        async with Broker() as broker:
            text = CONFIG.replace("connections_max: 100", "connections_max: 900")
            node.write(broker, text=text.replace("stop_timeout_ms: 1000", "stop_timeout_ms: 9000"))
            node.mesh = Mesh(configuration.load(node.path), node.log.log, engine_factory=small)
            await node.mesh.start()
            flush, full = node.mesh.plane.wire.flush, []

            def counted() -> bool:
                done: bool = flush()
                if not done:
                    full.append(node.mesh.drain_status()["step"])
                return done

            node.mesh.plane.wire.flush = counted
            try:
                for number in range(2):
                    groups = [group(f"g{number}-{n}" + "x" * 80) for n in range(20)]
                    assert (await node.register(f"c{number}", *groups)).status == 201
                clients = []
                for number in range(800):
                    names = ",".join(f"g{number % 2}-{n}" + "x" * 80 for n in range(20))
                    clients.append(await node.client(f"c{number % 2}", names))
                await until(lambda: len(broker.groups()) == 40)
                assert (await drain(node, "?hold")).status == 202

                async def safe() -> bool:
                    return bool((await status(node))["safe_to_stop"])

                await until(safe)
                for number in range(2):
                    answer = await broker.deliver(f"g{number}-3" + "x" * 80)
                    assert answer.headers["fm.result"] == "no_consumer"
                assert (await drain(node, "/cancel")).status == 200
                await until(lambda: len(broker.link.of("resume")) == 1)

                async def served() -> bool:
                    answer = await broker.deliver("g1-19" + "x" * 80)
                    return answer.headers["fm.result"] == "consumed"

                await until(served)
                assert (await drain(node, "?hold")).status == 202
                await until(safe)
                node.mesh.engine._stall(200)  # it takes no command meanwhile
                assert (await drain(node)).status == 202
                await in_step(node, "done")
                assert all(len(c.of("goaway")) == 1 for c in clients)
                assert all(c.closed for c in clients)
                assert "clients" in full, "void: everything fitted"
            finally:
                await node.stop()

    run(main)
