"""The drain by direction under load, with real brokers, nodes and consumers, and the books kept: a
planned stop loses nothing, doubles nothing, and delivers nothing once it is safe to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from tests.chaos.mesh import until
from tests.chaos.push_world import BrokerProcess, Node, PushWorld
from tests.sim.push_ledger import Fault

pytestmark = pytest.mark.chaos

LIMITS = {"stop_timeout_ms": 6000, "drain_suspend_ms": 1000, "drain_answers_ms": 3000}
PATIENT = {**LIMITS, "heartbeat_ms": 10_000}
"""A broker that is frozen for some seconds keeps its connection."""
SLOW_S = (0.6, 0.9)
"""Handlers that are still running when the next thing happens."""


class Ran(NamedTuple):
    code: int
    out: str
    err: str


async def fastmesh(*arguments: str) -> Ran:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fastmesh",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


async def drain(node: Node, *options: str) -> Ran:
    return await fastmesh("drain", "-c", str(node.path), *options)


async def status(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = (await node.get("/v1/status")).json()["drain"]
    return found


async def in_step(node: Node, step: str, *, within_s: float = 5.0) -> dict[str, Any]:
    async def reached() -> bool:
        return bool((await status(node))["step"] == step)

    await until(reached, f"step {step}; log: {node.log_path}", within_s=within_s)
    return await status(node)


def begun_at(world: PushWorld, node: Node, since_ns: int) -> int:
    """Handlers that have begun behind a node since then."""
    return sum(
        1
        for c in world.read()
        if world.ledger.nodes.get(c.client) == node.name and c.begin_ns > since_ns
    )


def running_at(world: PushWorld, node: Node) -> int:
    return sum(
        1 for c in world.read() if not c.end_ns and world.ledger.nodes.get(c.client) == node.name
    )


@contextlib.asynccontextmanager
async def a_client_that_stays(node: Node) -> AsyncIterator[None]:
    """Half a frame: the node waits for the rest of it."""
    host, _, port = node.address.rpartition(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(b"\x01\x01")
        yield


# --- under load -----------------------------------------------------------------------------------


async def test_planned_stops_under_load_cost_nothing(tmp_path: Path) -> None:
    """`fastmesh drain --wait`, stop, start, of one node after the other."""
    async with PushWorld(tmp_path, node_limits=LIMITS) as world:
        one, two = world.nodes.values()
        async with world.producing(nodes=["n1"]):
            for _ in range(3):
                await world.consumed(30, client=f"w1-{two.name}")
                ran = await drain(two, "--wait", "--timeout", "20")
                since_ns = time.monotonic_ns()
                assert ran == (0, "safe to stop\n", ""), two.log()[-2000:]
                assert running_at(world, two) == 0
                found = await status(two)
                assert [s["outcome"] for s in found["steps"]] == ["done"] * 3, found
                await world.consumed(100)
                assert begun_at(world, two, since_ns) == 0, "delivered after it was safe to stop"
                began = time.monotonic()
                assert await two.stop() == 0
                assert time.monotonic() - began < 2, "nothing was left to wait for"
                await two.start()
        verdict = await world.finish()
        assert one.process.returncode is None
    assert verdict.consumed == 2 * verdict.taken, "not one twice"


async def test_a_signal_under_load_costs_nothing(tmp_path: Path) -> None:
    """SIGTERM alone, in the middle of it, with a drain as long as the handlers."""
    async with PushWorld(tmp_path, node_limits=LIMITS) as world:
        two = world.nodes["n2"]
        async with world.producing(nodes=["n1"]):
            for _ in range(4):
                await world.consumed(30, client=f"w1-{two.name}")
                assert await two.stop() == 0
                assert "stopping with requests or connections left" not in two.log()
                await two.start()
        verdict = await world.finish()
    assert verdict.consumed == 2 * verdict.taken, "not one twice"


async def test_drains_that_are_held_and_cancelled_cost_nothing(tmp_path: Path) -> None:
    async with PushWorld(tmp_path, node_limits=LIMITS) as world:
        two = world.nodes["n2"]
        async with world.producing():
            for _ in range(5):
                await world.consumed(20, client=f"w1-{two.name}")
                ran = await drain(two, "--hold", "--wait", "--timeout", "20")
                since_ns = time.monotonic_ns()
                assert ran == (0, "safe to stop\n", ""), two.log()[-2000:]
                await world.consumed(50)
                await world.taken(20)
                assert begun_at(world, two, since_ns) == 0, "delivered after it was safe to stop"
                assert await drain(two, "--cancel") == (0, "serving\n", "")
        verdict = await world.finish()
        for worker in world.workers.values():
            assert worker.stats[-1]["connects"] == 1, "nobody was let go"
    assert verdict.consumed == 2 * verdict.taken, "not one twice"


# --- with handlers that take their time -----------------------------------------------------------


@contextlib.asynccontextmanager
async def slow_world(folder: Path, **options: Any) -> AsyncIterator[PushWorld]:
    """Quick consumers behind n1; behind n2 one that takes its time."""
    async with PushWorld(folder, workers=0, node_limits=PATIENT, **options) as world:
        quick = world.worker("w1-n1", world.nodes["n1"])
        slow = world.worker("w1-n2", world.nodes["n2"], handler_s=SLOW_S, prefetch=1)
        await asyncio.gather(quick.start(), slow.start())
        yield world


async def test_handlers_under_way_are_waited_for(tmp_path: Path) -> None:
    async with slow_world(tmp_path) as world:
        two = world.nodes["n2"]
        async with world.producing(nodes=["n1"]):
            await until(lambda: running_at(world, two) >= 3, "handlers run")
            began = time.monotonic()
            ran = await drain(two, "--wait", "--timeout", "20")
            assert ran == (0, "safe to stop\n", "")
            assert running_at(world, two) == 0
            assert time.monotonic() - began < SLOW_S[1] + 2
            assert await two.stop() == 0
        await two.start()
        verdict = await world.finish(taken_min=20)
    assert verdict.consumed == 2 * verdict.taken, "not one twice"


async def test_what_is_not_answered_in_time_is_named_and_delivered_elsewhere(
    tmp_path: Path,
) -> None:
    """A consumer that never answers: 75 and the groups, and at the stop the messages are free."""
    async with PushWorld(tmp_path, workers=0, node_limits=LIMITS, answer_timeout="60s") as world:
        one, two = world.nodes.values()
        stuck = world.worker("w1-n2", two, ["orders.any"], handler_s=(90, 90), prefetch=3)
        await world.worker("w1-n1", one).start()
        await stuck.start()
        async with world.producing(nodes=["n1"], topics=["orders"]):
            await until(lambda: running_at(world, two) == 3, "three are stuck", within_s=10)
            ran = await drain(two, "--wait", "--timeout", "4.5")
            assert (ran.code, ran.out) == (75, ""), ran
            assert "waits for pushes of orders.any 3" in ran.err
            assert (await status(two))["steps"][1]["left"] == {"groups": {"orders.any": 3}}
            held = {c.id for c in world.read() if c.client == stuck.name}
            assert len(held) == 3
            began = time.monotonic()
            assert await two.stop() == 0
            assert time.monotonic() - began < LIMITS["stop_timeout_ms"] / 1000 + 2
            assert 'stopping with requests or connections left groups="orders.any 3"' in two.log()

            def consumed_elsewhere() -> set[str]:
                return {
                    c.id
                    for c in world.read()
                    if c.client == "w1-n1" and c.group == "orders.any" and c.end_ns
                } & held

            await until(lambda: consumed_elsewhere() == held, "somebody else has them")
        await stuck.kill()
        await world.workers["w1-n1"].stop()
        two.killed = True  # it was stopped above


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """What was under way goes back to its broker: consumed twice, and the ledger says why."""
    async with slow_world(tmp_path) as world:
        two = world.nodes["n2"]
        async with world.producing(nodes=["n1"]):
            await until(lambda: running_at(world, two) >= 3, "handlers run")
            two.signal(signal.SIGTERM)
            await until(lambda: "drain step begins step=answers" in two.log(), "it drains")
            fault = Fault("node", two.name, time.monotonic_ns())
            world.ledger.faults.append(fault)
            began = time.monotonic()
            two.signal(signal.SIGTERM)
            assert await asyncio.wait_for(two.process.wait(), 5) == 0
            assert time.monotonic() - began < 1.5
            assert "outcome=cut" in two.log()
            await two.start()
            await world.consumed(2, client="w1-n2")
        verdict = await world.finish(taken_min=20)
        assert verdict.struck[fault] > 0


# --- brokers that die or freeze meanwhile ---------------------------------------------------------


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("step", ["suspend", "answers", "clients"])
async def test_a_broker_fails_in_each_step(tmp_path: Path, step: str, how: str) -> None:
    """The drain goes on, says whom it did not wait for, and nothing is lost."""
    async with (
        slow_world(tmp_path, answer_timeout="20s") as world,
        contextlib.AsyncExitStack() as more,
    ):
        two, (b1, b2) = world.nodes["n2"], world.brokers.values()
        async with world.producing(nodes=["n1"]):
            await until(lambda: running_at(world, two) >= 3, "handlers run", within_s=10)
            if step == "suspend":
                frozen = await fail(world, b2, "stop")  # it will not answer: the step lasts
            elif step == "clients":
                await more.enter_async_context(a_client_that_stays(two))
            ran = asyncio.ensure_future(drain(two, "--wait", "--timeout", "20"))
            found = await in_step(two, step)
            if step == "suspend":
                assert "b2" in found["waiting_for"]["brokers"], "void"
            elif step == "answers":
                assert running_at(world, two) > 0, "void"
            fault = await fail(world, b1, how)
            if step == "clients":
                await more.aclose()
            if step == "suspend":
                await in_step(two, "answers")
                await recover(world, b2, "stop", frozen)
            assert (await ran).code == 0, two.log()[-2000:]
            found = await status(two)
            if step == "suspend":
                left = found["steps"][0]
                assert left["outcome"] == "passed"
                assert "b2" in left["left"]["brokers"]
                assert how == "stop" or "b1" not in left["left"]["brokers"]
            if how == "stop":
                assert running_at(world, two) == 0
            else:  # whose broker is gone has nobody to answer: nothing waits for it
                await until(lambda: running_at(world, two) == 0, "its handlers end")
            await recover(world, b1, how, fault)
            since_ns = time.monotonic_ns()
            await world.consumed(20, within_s=20)
            assert begun_at(world, two, since_ns) == 0
            assert await two.stop() == 0
        await two.start()
        await world.finish(taken_min=10, void=False, within_s=40)


async def fail(world: PushWorld, broker: BrokerProcess, how: str) -> Fault:
    """A broker that is frozen for longer than heartbeats may be missed is a line that is silent."""
    kind: Literal["broker", "line"] = "broker" if how == "kill" else "line"
    fault = Fault(kind, broker.name, time.monotonic_ns())
    world.ledger.faults.append(fault)
    if how == "kill":
        await broker.kill()
    else:
        broker.signal(signal.SIGSTOP)
    return fault


async def recover(world: PushWorld, broker: BrokerProcess, how: str, fault: Fault) -> None:
    if how == "kill":
        await broker.start()
    else:
        broker.signal(signal.SIGCONT)
        world.lasted(fault)
