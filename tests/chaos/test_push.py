"""The message mesh: whatever dies, changes or lies, nothing that was acknowledged is lost, nothing
goes to whom it does not belong, and a message is consumed twice only where a fault ate its answer.

Each test prints how many messages, consumptions and faults its verdict stands on; a fault that met
nothing in flight makes a run void."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path

import pytest

from fastmesh._ext import push
from fastmesh._ext.push import Push
from fastmesh.address import parse_address
from fastmesh.mesh.registration_http import PATH
from tests.admin.http import ask
from tests.chaos.mesh import until
from tests.chaos.push_world import APP, Node, PushWorld
from tests.chaos.toxics import ToxicProxy
from tests.mesh import scripted
from tests.peers.canary import P99_FLOOR_US
from tests.sim.push_ledger import MS

pytestmark = pytest.mark.chaos

CUT = "cut_bytes"


async def test_clients_are_killed(tmp_path: Path) -> None:
    async with PushWorld(tmp_path) as world:
        async with world.producing():
            for worker in list(world.workers.values()):
                await world.consumed(20, client=worker.name)
                await world.kill_client(worker)
            await world.taken(100)
        verdict = await world.finish()
    assert len(verdict.struck) == 4


async def test_nodes_are_killed(tmp_path: Path) -> None:
    """Their consumers come back by themselves, and find their groups: nobody registers again."""
    async with PushWorld(tmp_path) as world:
        async with world.producing():
            for node in world.nodes.values():
                await world.consumed(50)
                await world.kill_node(node)
                for worker in world.workers.values():
                    await world.consumed(10, client=worker.name)
        await world.finish()
        for worker in world.workers.values():
            counted = worker.stats[-1]
            assert counted["connects"] == 2, "void: the node was not away"
            assert (counted["registrations"], counted["forgotten"]) == (1, 0), counted


async def test_brokers_are_killed(tmp_path: Path) -> None:
    async with PushWorld(tmp_path) as world:
        async with world.producing():
            for broker in [*world.brokers.values()] * 2:
                await world.consumed(50)
                await world.kill_broker(broker)
            await world.taken(100)
        verdict = await world.finish()
    assert len(verdict.struck) == 4


async def test_the_schedule_changes_all_the_time(tmp_path: Path) -> None:
    """Every 100 ms. Nobody dies, so nothing at all is consumed twice; and traffic follows."""
    async with PushWorld(tmp_path, schedule_file=False) as world:
        names = list(world.nodes)
        async with world.producing():
            for _ in range(50):
                weights = dict.fromkeys(names, 100)
                weights[world.random.choice(names)] = world.random.choice((0, 1, 20, 50, 99, 100))
                await world.put_schedule(weights)
                await asyncio.sleep(0.1)
            for away in names:
                await world.put_schedule(dict.fromkeys(names, 100) | {away: 0})
                since_ns = time.monotonic_ns()
                await asyncio.sleep(2)
                begun = Counter(
                    world.ledger.nodes[c.client]
                    for c in world.read()
                    if c.begin_ns > since_ns + 1000 * MS
                )
                assert begun[away] == 0, begun
                assert begun.total() > 100, "void"
        verdict = await world.finish()
        scraped = [await node.metrics() for node in world.nodes.values()]
        forwarded = sum(metrics.sum("group_forwarded_total") for metrics in scraped)
        print(f"{forwarded:.0f} forwarded")
        assert forwarded > 200, "void"
    assert verdict.consumed == 2 * verdict.taken, "not one twice"


async def test_registrations_change_under_load(tmp_path: Path) -> None:
    """Others come and go and contradict, and a group of these topics leaves and is registered
    again: what came meanwhile waits for it."""
    topics = {
        "orders": {"orders.any": False, "orders.keyed": True, "orders.guest": False},
        "events": {"events.any": False, "events.keyed": True},
    }
    async with PushWorld(tmp_path, topics=topics, workers=1) as world:
        stopping = asyncio.Event()
        churning = asyncio.ensure_future(world.churn(stopping))
        guests = [
            world.worker(f"guest-{n.name}", n, ["orders.guest"]) for n in world.nodes.values()
        ]
        async with world.producing():
            for guest in itertools.islice(itertools.cycle(guests), 4):
                await guest.start()
                await world.consumed(5, client=guest.name)
                await guest.stop()
                await world.taken(30)
        stopping.set()
        statuses = await churning
        assert min(statuses[201], statuses[200], statuses[409]) > 10, f"void: {statuses}"
        await guests[0].start()
        verdict = await world.finish()
        print(dict(statuses))
    assert not verdict.explained, "nobody died"


async def test_everything_at_once(tmp_path: Path) -> None:
    seed = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1 << 32)
    print(f"SEED={seed}")
    chance = random.Random(seed)
    async with PushWorld(tmp_path) as world:
        world.random = random.Random(seed)
        stopping = asyncio.Event()
        churning = asyncio.ensure_future(world.churn(stopping))

        async def reschedule() -> int:
            for count in itertools.count():
                weights = {name: chance.choice((0, 20, 100, 100)) for name in world.nodes}
                world.schedule(weights)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await stopping.wait()
                        return count
            raise AssertionError

        scheduling = asyncio.ensure_future(reschedule())
        end = time.monotonic() + 20
        try:
            async with world.producing():
                while time.monotonic() < end:
                    await world.consumed(30)
                    kind = chance.choice(("client", "client", "node", "broker"))
                    if kind == "client":
                        await world.kill_client(chance.choice(list(world.workers.values())))
                    elif kind == "node":
                        await world.kill_node(chance.choice(list(world.nodes.values())))
                    else:
                        await world.kill_broker(chance.choice(list(world.brokers.values())))
        finally:
            stopping.set()
            statuses, changes = await asyncio.gather(churning, scheduling)
        verdict = await world.finish()
        print(f"{changes} schedules, registrations {dict(statuses)}")
    assert len(verdict.struck) >= 5


# --- the line to a broker -------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def behind_a_line(folder: Path) -> AsyncIterator[tuple[PushWorld, ToxicProxy]]:
    """Both nodes meet broker b1 over one bad line; b2 is met directly."""
    world = PushWorld(folder, workers=1, answer_timeout="3s")
    async with ToxicProxy(world.brokers["b1"].address) as proxy:
        world.lines["b1"] = proxy.address
        async with world:
            yield world, proxy


async def test_n1_the_line_is_reset_in_the_middle_of_frames(tmp_path: Path) -> None:
    async with behind_a_line(tmp_path) as (world, proxy):
        directions = ((proxy.up, proxy.up_books), (proxy.down, proxy.down_books))
        async with world.producing():
            for size, (toxics, books) in itertools.product((1, 4, 21, 22, 60, 200), directions):
                await world.taken(12)
                before = books.cut
                toxics.limit_resets = True
                # Of what comes next so many bytes pass, and RST.
                fault = await world.strike("line", "b1", partial(setattr, toxics, CUT, size))
                await until(lambda b=books, n=before: b.cut > n, "a frame is cut")
                toxics.cut_bytes = -1
                world.lasted(fault)
        verdict = await world.finish(taken_min=150)
    assert len(verdict.struck) == 12


async def test_n2_the_line_falls_silent(tmp_path: Path) -> None:
    """No FIN, packets vanish: heartbeats notice, and what was in flight comes again."""
    async with behind_a_line(tmp_path) as (world, proxy):

        def silence() -> None:
            proxy.up.blackhole = proxy.down.blackhole = True

        async with world.producing():
            for _ in range(2):
                await world.consumed(50)
                accepted = proxy.accepted

                fault = await world.strike("line", "b1", silence)
                took_s = await until(
                    lambda accepted=accepted: proxy.accepted >= accepted + 2,
                    "both nodes connect again",
                )
                assert took_s < 2 * 0.3 + 0.6, f"noticed after {took_s:.2f} s"
                await world.taken(20)  # b2 goes on
                proxy.reset_all()  # a stream never goes on behind a hole
                proxy.up.blackhole = proxy.down.blackhole = False
                world.lasted(fault)
            await world.taken(50)
        await world.finish()
        assert proxy.up_books.swallowed > 1000, "the fault did not happen"


async def test_n3_the_line_is_half_closed(tmp_path: Path) -> None:
    """FIN to the broker, or from it, while the other direction stays open: the connection is given
    up as a whole, and what was in flight on it comes again."""
    async with behind_a_line(tmp_path) as (world, proxy):
        async with world.producing():
            for up in (True, False, True, False):
                await world.taken(50)
                await until(lambda: len(proxy.links) >= 2, "both nodes are connected")
                accepted = proxy.accepted
                await world.strike("line", "b1", partial(proxy.half_close_all, up=up))
                await until(
                    lambda n=accepted: proxy.accepted >= n + 2,
                    "both nodes connect again",
                )
            await world.taken(50)
        await world.finish()


# --- greedy and stuck consumers -------------------------------------------------------------------


async def test_r1_r9_a_stuck_consumer_and_a_tenant_at_ten_times_the_load(tmp_path: Path) -> None:
    """A group on the same broker connection notices neither."""
    topics = {
        "canary": {"canary.g": False},
        "bulk": {"bulk.g": False},
        "noisy": {"noisy.g": False},
    }
    async with PushWorld(
        tmp_path, brokers=1, nodes=1, workers=0, topics=topics, answer_timeout="1500ms"
    ) as world:
        node = world.nodes["n1"]
        stuck = world.worker("stuck", node, ["bulk.g"])
        for worker in (
            stuck,
            world.worker("bulk", node, ["bulk.g"]),
            world.worker("canary", node, ["canary.g"], handler_s=(0, 0)),
            world.worker("noisy", node, ["noisy.g"], handler_s=(0, 0)),
        ):
            await worker.start()

        def p99_us(since_ns: int) -> int:
            published = world.ledger.published
            waits = sorted(
                (c.begin_ns - published[c.id].sent_ns) // 1000
                for c in world.read()
                if c.group == "canary.g" and published[c.id].sent_ns > since_ns
            )
            assert len(waits) > 60, f"void: {len(waits)}"
            return waits[len(waits) * 99 // 100]

        async with contextlib.AsyncExitStack() as load:
            began_ns = time.monotonic_ns()
            await load.enter_async_context(world.producing(keys=2, topics=["canary"]))
            await world.consumed(100, client="canary")
            baseline_us = p99_us(began_ns)
            await load.enter_async_context(world.producing(keys=2, topics=["bulk"]))
            await load.enter_async_context(world.producing(keys=20, topics=["noisy"]))
            await world.consumed(20, client="stuck")
            fault = await world.strike("stop", "stuck", lambda: stuck.signal(signal.SIGSTOP))
            since_ns = time.monotonic_ns()
            try:
                await asyncio.sleep(3.5)
                held = (await world.brokers["b1"].groups())["bulk.g"]
                abused_us = p99_us(since_ns)
            finally:
                stuck.signal(signal.SIGCONT)
                world.lasted(fault)
        busy = Counter(c.group for c in world.read() if c.begin_ns > since_ns)
        assert held["redelivered"] > 0, f"void: it held nothing up {held}"
        assert busy["noisy.g"] > 5 * busy["canary.g"], f"void: {busy}"
        print(f"canary p99 {baseline_us} us, then {abused_us} us; {dict(busy)}")
        assert abused_us <= max(2 * baseline_us, P99_FLOOR_US)
        await world.finish()


# --- a disk that is full --------------------------------------------------------------------------


async def test_c4_state_dir_is_full_while_deliveries_go_on(tmp_path: Path) -> None:
    async with PushWorld(tmp_path, nodes=1, workers=1) as world:
        node = world.nodes["n1"]
        at = parse_address(node.registration)

        def big(client: str) -> bytes:
            groups = [
                {"name": f"{client}.{n}-{'x' * 80}", "topic": "orders", "role": "subscribe"}
                for n in range(250)
            ]
            return json.dumps({"app": APP, "client": client, "groups": groups}).encode()

        async with world.producing():
            assert (await ask(at, PATH, "POST", body=big("other"))).status == 201
            # No file may grow beyond what the log needs, and the state is longer than that.
            limit = node.log_path.stat().st_size + 16384
            resource.prlimit(node.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            refused = [(await ask(at, PATH, "POST", body=big(f"x{n}"))).status for n in range(5)]
            assert refused == [507] * 5, "void: the disk is not full"
            await world.taken(100)
            await world.consumed(200)
            worker = world.workers["w1-n1"]
            await world.kill_client(worker)  # and what is registered already may come back
            await world.taken(50)
            infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(node.pid, resource.RLIMIT_FSIZE, infinite)
            assert (await ask(at, PATH, "POST", body=big("x0"))).status == 201
            await world.kill_node(node)
            await world.consumed(50)
        await world.finish()
        listed = (await ask(at, PATH)).json()["registrations"]
        assert {"other", "x0"} <= {r["client"] for r in listed}
        assert not {"x1", "x2", "x3", "x4"} & {r["client"] for r in listed}


# --- a broker that lies ---------------------------------------------------------------------------


async def test_i4_i7_a_hostile_broker(tmp_path: Path) -> None:
    """It answers ids that nobody asked, answers twice, asks with the very numbers that it is asked
    with, and answers its own questions. Each publish gets its own answer, each delivery of its own
    is answered to it, and the honest broker beside it notices nothing."""
    async with scripted.Broker("bad") as bad, scripted.Broker("good") as good:
        node = Node(
            tmp_path / "n1",
            "n1",
            {b.name: f"127.0.0.1:{b.port}" for b in (bad, good)},
            None,
        )
        for listed, topic in zip(node.config["push"]["brokers"], ("bad.*", "good.*"), strict=True):
            listed["topics"] = [topic]
        async with node:
            groups = [{"name": "g", "topic": "bad.t", "role": "subscribe", "prefetch": 1000}]
            body = {"app": APP, "client": "c1", "groups": groups, "topics": [{"name": "good.t"}]}
            at = parse_address(node.registration)
            assert (await ask(at, PATH, "POST", body=json.dumps(body).encode())).status == 201

            consumed: list[str] = []

            def consume(asked: Push) -> Mapping[str, str]:
                consumed.append(asked.headers["fm.id"])
                return {"fm.result": "consumed", "fm.reason": asked.headers["fm.id"]}

            client = await scripted.client(node.address, "c1", "g", app=APP, answer=consume)
            await until(lambda: bad.groups() == {"g": 1000}, "the group is announced")
            deliveries: list[asyncio.Future[Push]] = []
            lies: Counter[str] = Counter()

            def hostile(asked: Push) -> Mapping[str, str] | None:
                if asked.headers.get("fm.op") != "publish":
                    return bad.take(asked)
                link, number = bad.link, len(deliveries)
                truth = push.response(asked.id, asked.hint, bad.take(asked))
                lie = {"fm.result": "reject", "fm.id": "a lie", "fm.reason": "a lie"}
                # An id that was never given out, and one of the other direction.
                link.write(push.response(asked.id ^ 0x40000000, asked.hint, lie))
                lies["unknown"] += 1
                # A delivery with the number of the publish that it is asked with.
                headers = {"fm.op": "deliver", "fm.topic": "bad.t", "fm.group": "g"}
                headers |= {"fm.id": f"d{number}", "fm.attempt": "1"}
                link.write(push.request(asked.id, headers, b"x", timeout_ms=5000))
                deliveries.append(link.expect(asked.id))
                lies["collision"] += 1
                link.write(truth + push.response(asked.id, asked.hint, lie))
                lies["twice"] += 1
                return None

            bad.answer = hostile
            beside = await scripted.client(node.address, "c1", app=APP)
            for batch in range(20):
                names = [f"{batch}.{n}" for n in range(20)]
                asked = [
                    client.ask_soon({"fm.op": "publish", "fm.topic": "bad.t", "fm.id": name})
                    for name in names
                ]
                honest = [
                    beside.ask_soon({"fm.op": "publish", "fm.topic": "good.t", "fm.id": name})
                    for name in names
                ]
                answers = await asyncio.wait_for(asyncio.gather(*asked, *honest), 10)
                said = [(a.headers.get("fm.result"), a.headers.get("fm.id")) for a in answers]
                assert said == [("consumed", name) for name in names * 2]
            results = await asyncio.wait_for(asyncio.gather(*deliveries), 10)
            assert [r.headers["fm.result"] for r in results] == ["consumed"] * 400
            assert [r.headers["fm.reason"] for r in results] == [f"d{n}" for n in range(400)]
            assert sorted(consumed) == sorted(f"d{n}" for n in range(400)), "each once"
            assert min(lies.values()) == 400, "void"
            metrics = await node.metrics()
            dropped = {cause: metrics.dropped(cause) for cause in ("unknown", "duplicate")}
            print(f"lies {dict(lies)}, frames dropped {dropped}")
            assert sum(dropped.values()) == 800
            assert len([link for link in bad.links if not link.closed]) == 1
            await client.close()
            await beside.close()
