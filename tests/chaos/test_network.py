"""N: networks and peers that break in the middle of things. Each request has exactly one outcome, a
partial frame is never taken for a whole one, and clients of healthy upstreams do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.load import Load, close_all, connect, connect_many, logged
from tests.chaos.mesh import Mesh, until
from tests.chaos.toxics import ToxicProxy, Toxics
from tests.peers import server as peers
from tests.peers.canary import Canary
from tests.peers.server import BoltServer, ServerProcess, read_log
from tests.peers.sockets import free_port
from tests.reference import bolt
from tests.sim.ledger import Ledger, Operation, encode

pytestmark = pytest.mark.chaos
THREADS = pytest.mark.parametrize("threads", [1, 2])

QUICK_BACKOFF = {"backoff_ms": 10, "backoff_ms_max": 50, "slow_start_ms": 0}
LOST = bolt.STATUS_CONNECTION_CLOSED


@THREADS
async def test_n1_client_resets_at_every_byte(tmp_path: Path, threads: int) -> None:
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}, threads=threads) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        frame = bolt.request(5, "s", encode(Operation(666, 0, 0, os.urandom(16))), crc=True)
        for size in range(1, len(frame)):
            client = await connect(mesh.address)
            client.write(frame[:size])
            if size % 8 == 0:
                await asyncio.sleep(0.002)  # some resets meet bytes that were read, some do not
            client.reset()
        # And with whole requests in flight: their answers find nobody.
        server.behave = peers.hold
        leavers = await connect_many(mesh.address, ledger, 20)
        for client in leavers:
            client.op("s")
        await until(lambda: sum(f.id != 0 for _, f in server.held) >= 20, "they are in flight")
        for client in leavers:
            client.reset()

        async def noticed() -> bool:
            return (await mesh.metrics()).failed("client_gone") == 20

        await until(noticed, "the clients are gone")
        server.behave = peers.echo
        server.release()
        await canary.check()

        async def counted() -> bool:
            return (await mesh.metrics()).dropped("client_gone") == 20

        await until(counted, "their answers are dropped under their own name")
    verdict = ledger.judge().check(sent_min=20)
    assert verdict.gone == 20


@pytest.mark.parametrize("with_reset", [False, True], ids=["fin", "rst"])
async def test_n1_upstream_ends_at_every_byte(tmp_path: Path, with_reset: bool) -> None:
    """A partial answer is never forwarded; its request, and every other in flight there, gets one
    error."""
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as server,
        BoltServer() as other,
        Mesh(
            tmp_path,
            {"s": [server.address], "other": [other.address]},
            limits=QUICK_BACKOFF,
        ) as mesh,
        Canary(mesh.address, "other") as canary,
    ):
        clients = await connect_many(mesh.address, ledger, 3)
        cuts = 0
        for size in range(1, 22):
            server.behave = peers.echo
            await until_served(clients[0])
            server.behave = peers.cut_after(size, with_reset=with_reset)
            answers = await asyncio.gather(*(c.op("s") for c in clients))
            # The first is cut; what comes after it finds the connection gone, or a new one that
            # cuts too.
            assert {a.status for a in answers} <= {LOST, bolt.STATUS_NO_PROCESSOR}
            assert LOST in {a.status for a in answers}
            cuts += 1
        assert cuts == 21
        await canary.check()
        await close_all(clients)
    ledger.judge().check(ambiguous_max=3 * 21, sent_min=63)


async def until_served(client: Any, *, within_s: float = 5.0) -> None:
    async def served() -> bool:
        return bool((await client.op("s")).status == 0)

    await until(served, "the upstream serves again", within_s=within_s)


async def test_n2_upstream_vanishes_without_a_word(tmp_path: Path) -> None:
    """Half-open: packets go nowhere, no FIN. Heartbeats notice within two intervals."""
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as server,
        BoltServer() as other,
        ToxicProxy(server.address) as proxy,
        Mesh(
            tmp_path,
            {"s": [proxy.address], "other": [other.address]},
            limits={"heartbeat_ms": 300, "request_timeout_ms_max": 30_000, **QUICK_BACKOFF},
        ) as mesh,
        Canary(mesh.address, "other") as canary,
    ):
        client = await connect(mesh.address, ledger)
        assert (await client.op("s")).status == 0
        proxy.up.blackhole = True
        began = time.monotonic()
        answers = await asyncio.gather(*(client.op("s", timeout_ms=20_000) for _ in range(5)))
        took = time.monotonic() - began
        assert proxy.up_books.swallowed > 0, "the fault did not happen"
        assert {a.status for a in answers} == {LOST}
        assert took < 0.3 * 2 + 0.4, f"noticed after {took:.2f} s"
        proxy.up.blackhole = False
        await until_served(client)
        await canary.check()
        await client.close()
    ledger.judge().check(ambiguous_max=20)


async def test_n2_clients_vanish_without_a_word(tmp_path: Path) -> None:
    """Their connections, and what half frames they left, are given back after the idle timeout."""
    async with (
        BoltServer() as server,
        Mesh(tmp_path, {"s": [server.address]}, limits={"idle_timeout_ms": 1000}) as mesh,
        ToxicProxy(mesh.address) as proxy,
        Canary(mesh.address, "s") as canary,
    ):
        clients = await connect_many(proxy.address, None, 40)
        await asyncio.gather(*(c.call("s", b"x") for c in clients))
        assert (await mesh.metrics()).sum("connections") >= 40
        proxy.up.blackhole = proxy.down.blackhole = True

        async def reclaimed() -> bool:
            return (await mesh.metrics()).sum("connections") == 1  # the canary's

        took = await until(reclaimed, "their connections are closed", within_s=4, every_s=0.05)
        assert took >= 0.8, "a live connection was closed before its idle timeout"
        await canary.check()
        await close_all(clients)


@THREADS
async def test_n3_half_close_still_gets_its_answer(tmp_path: Path, threads: int) -> None:
    ledger = Ledger()
    async with (
        BoltServer(peers.late(0.2), log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}, threads=threads) as mesh,
    ):
        clients = await connect_many(mesh.address, ledger, 9)
        futures = [c.op("s", 5000) for c in clients for _ in range(3)]
        for client in clients:
            client.shut_write()
        answers = await asyncio.gather(*futures)
        assert {a.status for a in answers} == {0}
        # And the mesh closes once nothing is owed any more.
        await asyncio.wait_for(asyncio.gather(*(c.closed for c in clients)), 5)
    ledger.judge().check(sent_min=27)


@THREADS
@pytest.mark.parametrize("count", [1, 1000])
async def test_n4_upstream_is_killed(tmp_path: Path, threads: int, count: int) -> None:
    """kill -9 with N in flight: N explicit errors within a second, none sent again. (65 536: see
    I6.)"""
    ledger = Ledger()
    logs = [tmp_path / "executed-0", tmp_path / "executed-1"]
    async with (
        ServerProcess("never", log=logs[0]) as service,
        ServerProcess("echo", log=logs[1]) as survivor,
        BoltServer() as other,
        Mesh(
            tmp_path,
            {"s": [service.address, (survivor.address, 1)], "other": [other.address]},
            threads=threads,
            limits={"slow_start_ms": 0},
        ) as mesh,
        Canary(mesh.address, "other") as canary,
    ):
        clients = await connect_many(mesh.address, ledger, 5)
        asked = 0
        futures: list[asyncio.Future[bolt.Frame]] = []
        # The survivor answers its share at once; go on until N wait at the other.
        while (missing := count - sum(not f.done() for f in futures)) > 0:
            for _ in range(missing):
                futures.append(clients[asked % 5].op("s", timeout_ms=30_000))
                asked += 1
            # Heartbeats pass the same connections: what the survivor answered has come back, unless
            # it is slow, and then the next round or the count below tells.
            await asyncio.gather(*(c.heartbeat() for c in clients))
            await asyncio.sleep(0.1)
        await mesh.in_flight(count)
        await service.kill()
        began = time.monotonic()
        answers = await asyncio.gather(*futures)
        assert time.monotonic() - began < 1.0
        failed = [a for a in answers if a.status]
        assert {a.status for a in failed} == {LOST}
        assert len(failed) == count, "void: that many were not in flight"
        await canary.check()
        assert (await mesh.metrics()).failed("upstream_lost") == count
        await close_all(clients)
    for log in logs:
        ledger.read_log(read_log(log))
    assert ledger.judge().check(ambiguous_max=count).counts["ambiguous"] == count


@THREADS
async def test_n5_upstream_accepts_and_never_answers(tmp_path: Path, threads: int) -> None:
    """Each request errors at its own deadline; then the silent endpoint is ejected and the other
    serves."""
    ledger = Ledger()
    async with (
        BoltServer(peers.never, log=logged(ledger)) as silent,
        BoltServer(log=logged(ledger)) as server,
        BoltServer() as other,
        Mesh(
            tmp_path,
            {"s": [silent.address, server.address], "other": [other.address]},
            threads=threads,
            limits={"eject_failures": 5, "eject_ms": 20_000, "slow_start_ms": 0},
        ) as mesh,
        Canary(mesh.address, "other") as canary,
    ):
        clients = await connect_many(mesh.address, ledger, 4)
        late_ms = []

        async def timed(n: int) -> None:
            timeout_ms = 200 + n % 5 * 40
            began = time.monotonic()
            answer = await clients[n % 4].op("s", timeout_ms=timeout_ms)
            if answer.status:
                assert answer.status == bolt.STATUS_TIMEOUT
                late_ms.append((time.monotonic() - began) * 1000 - timeout_ms)

        await asyncio.gather(*(timed(n) for n in range(200)))
        assert len(late_ms) >= 20, "void: hardly anything went to the silent endpoint"
        late_ms.sort()
        assert late_ms[0] > -2, f"{-late_ms[0]:.1f} ms too early"
        assert late_ms[len(late_ms) // 2] < 50, f"median {late_ms[len(late_ms) // 2]:.1f} ms late"
        assert late_ms[-1] < 250, f"{late_ms[-1]:.1f} ms late"

        async def ejected() -> bool:
            answers = await asyncio.gather(
                *(c.op("s", timeout_ms=200) for c in clients for _ in range(5))
            )
            return all(a.status == 0 for a in answers)

        await until(ejected, "the silent endpoint is ejected", within_s=5)
        seen = silent.requests
        answers = await asyncio.gather(*(c.op("s") for c in clients for _ in range(50)))
        assert {a.status for a in answers} == {0}
        assert silent.requests == seen, "an ejected endpoint gets nothing new"
        await canary.check()
        await close_all(clients)
    ledger.judge().check(ambiguous_max=1000, sent_min=200)


TOXICS: dict[str, dict[str, Any]] = {
    "latency": {"latency_s": 0.05},
    "jitter": {"latency_s": 0.02, "jitter_s": 0.02},
    "bandwidth": {"bytes_per_s": 4096},
    "slicer": {"slice_bytes": 1},
    "slow-close": {"slow_close_s": 0.3},
    "limit": {"limit_bytes": 5000},
    "limit-and-reset": {"limit_bytes": 5000, "limit_resets": True},
}


def poison(toxics: Toxics, name: str) -> None:
    for field, value in TOXICS[name].items():
        setattr(toxics, field, value)


@pytest.mark.parametrize("side", ["downstream", "upstream"])
@pytest.mark.parametrize("name", TOXICS)
async def test_n6_toxics(tmp_path: Path, name: str, side: str) -> None:
    """Only the invariants: whatever the line does, one outcome each, nobody else's bytes."""
    ledger = Ledger()
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(BoltServer(log=logged(ledger)))
        other = await stack.enter_async_context(BoltServer())
        upstream = server.address
        if side == "upstream":
            proxy = await stack.enter_async_context(ToxicProxy(server.address))
            upstream = proxy.address
        mesh = await stack.enter_async_context(
            Mesh(
                tmp_path,
                {"s": [upstream], "other": [other.address]},
                limits={"request_timeout_ms": 1000, **QUICK_BACKOFF},
            )
        )
        address = mesh.address
        if side == "downstream":
            proxy = await stack.enter_async_context(ToxicProxy(mesh.address))
            address = proxy.address
        # Downstream, the abused clients share the upstream connection with the canary.
        canary = await stack.enter_async_context(
            Canary(mesh.address, "s" if side == "downstream" else "other")
        )
        poison(proxy.up, name)
        poison(proxy.down, name)
        async with Load(
            address, ledger, clients=4, depth=3, timeout_ms=800, pause_s=0.005, reconnects=True
        ) as load:
            await asyncio.sleep(0.8)
            load.stopping = True
            if side == "downstream":
                # What a slow line holds may take longer than the deadline: leave as clients do.
                await asyncio.sleep(0.3)
                for client in load.clients:
                    if client.is_open:
                        await client.close()
        assert load.asked > 10, "void"
        if "limit" in name:
            assert proxy.up_books.cut + proxy.down_books.cut > 0, "the fault did not happen"
        await canary.check()
        await mesh.settle()
    # A line that cuts a client off takes its answers with it: that is the line's reset, not the
    # mesh's.
    verdict = ledger.judge(reset_is="ambiguous" if side == "downstream" else "lost")
    verdict.check(ambiguous_max=verdict.sent)


@THREADS
async def test_n7_flapping_upstream(tmp_path: Path, threads: int) -> None:
    """Up and down ten times a second: one outcome each, bounded connects, and back within two
    seconds."""
    ledger = Ledger()
    async with (
        await BoltServer(peers.late(0.005), log=logged(ledger)).start(
            f"127.0.0.1:{free_port()}"
        ) as server,
        BoltServer() as other,
        Mesh(tmp_path, {"s": [server.address], "other": [other.address]}, threads=threads) as mesh,
        Canary(mesh.address, "other") as canary,
    ):
        async with Load(mesh.address, ledger) as load:
            await load.answered(20)
            for _ in range(15):
                await asyncio.sleep(0.05)
                await server.stop(with_reset=True)
                await asyncio.sleep(0.05)
                await server.start(server.address)
            assert server.accepted > 1, "it never came back in between"
            load.statuses.clear()

            async def recovered() -> bool:
                return load.statuses.get(0, 0) > 50

            took = await until(recovered, "it serves again", within_s=6)
            assert took < 2.5, f"recovery took {took:.1f} s"
        await canary.check()
        assert (await mesh.metrics()).failed("upstream_lost") > 0, "the fault did not happen"
    ledger.judge().check(ambiguous_max=5000, sent_min=100)


async def test_n7_all_down_then_no_thundering(tmp_path: Path) -> None:
    """With every upstream down, requests fail at once and connects back off; later all is well
    again."""
    ledger = Ledger()
    async with (
        await BoltServer(log=logged(ledger)).start(f"127.0.0.1:{free_port()}") as server,
        BoltServer() as other,
        Mesh(tmp_path, {"s": [server.address], "other": [other.address]}) as mesh,
        Canary(mesh.address, "other") as canary,
    ):
        server.on_connect = lambda connection: connection.reset()
        for connection in list(server.connections):
            connection.reset()
        before = server.accepted
        began = time.monotonic()
        async with Load(mesh.address, ledger, timeout_ms=1000) as load:
            await asyncio.sleep(4)
            tried = server.accepted - before
            assert load.statuses.get(0, 0) == 0
            assert sum(load.statuses.values()) > 0
        # 50 ms doubling to 1.5 s, with jitter: about 7 tries in 4 s. Twice that is no storm.
        elapsed = time.monotonic() - began
        assert 2 <= tried <= 16, f"{tried} connects in {elapsed:.1f} s"
        server.on_connect = None
        client = await connect(mesh.address, ledger)
        await until_served(client, within_s=2.5)
        await client.close()
        await canary.check()
    verdict = ledger.judge()
    verdict.check(ambiguous_max=verdict.sent)


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """An address whose SYNs are dropped: a listener whose backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(address)
        probe = stack.enter_context(socket.socket())
        probe.settimeout(0.15)
        with pytest.raises(TimeoutError):
            probe.connect(address)
        yield f"127.0.0.1:{address[1]}"


@THREADS
async def test_n8_refused_and_black_holed_endpoints(tmp_path: Path, threads: int) -> None:
    """The next endpoint serves while no byte was written, and other pools never wait."""
    ledger = Ledger()
    with black_hole() as hole:
        async with (
            BoltServer(log=logged(ledger)) as server,
            BoltServer() as other,
            Mesh(
                tmp_path,
                {
                    "s": [f"127.0.0.1:{free_port()}", hole, server.address],
                    "hole": [hole],
                    "refused": [f"127.0.0.1:{free_port()}"],
                    "name": ["no-such-host.invalid:12200"],
                    "other": [other.address],
                },
                threads=threads,
                limits={"connect_timeout_ms": 300, "retries_max": 3, "request_timeout_ms": 2000},
            ) as mesh,
            Canary(mesh.address, "other") as canary,
        ):
            async with Load(mesh.address, ledger, service="s") as load:
                await load.answered(200)
            assert set(load.statuses) == {0}, f"one endpoint serves: {load.statuses}"
            client = await connect(mesh.address, ledger)
            for service, at_most_s in (("hole", 1.5), ("refused", 1.5), ("name", 1.5)):
                began = time.monotonic()
                answers = await asyncio.gather(*(client.op(service) for _ in range(20)))
                took = time.monotonic() - began
                assert {a.status for a in answers} == {bolt.STATUS_NO_PROCESSOR}, service
                assert took < at_most_s, f"{service} took {took:.2f} s"
            metrics = await mesh.metrics()
            assert metrics.failed("connect") + metrics.failed("no_endpoint") == 60
            await canary.check()
            await client.close()
        ledger.judge().check(sent_min=260)
