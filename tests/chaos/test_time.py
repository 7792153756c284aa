"""T: clocks jump, processes are stopped, nobody says anything, timeouts are absurd."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from tests.chaos.load import Load, close_all, connect, connect_many, logged
from tests.chaos.mesh import Mesh, until
from tests.chaos.shim import Shim
from tests.peers import server as peers
from tests.peers.canary import Canary
from tests.peers.server import BoltServer
from tests.reference import bolt
from tests.sim.ledger import Ledger

pytestmark = pytest.mark.chaos
THREADS = pytest.mark.parametrize("threads", [1, 2])
HOUR_S = 3600
YEAR_S = 365 * 24 * HOUR_S


async def test_t1_wall_clock_jumps(tmp_path: Path) -> None:
    """An hour and ten years, forth and back, under load and with deadlines pending: nothing
    happens."""
    shim = Shim(tmp_path)
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as server,
        BoltServer(peers.never, log=logged(ledger)) as silent,
        Mesh(
            tmp_path,
            {"s": [server.address], "silent": [silent.address]},
            environment=shim.environment,
            limits={"idle_timeout_ms": 5000, "heartbeat_ms": 500, "eject_percent_max": 0},
        ) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        client = await connect(mesh.address, ledger)
        quiet = await connect(mesh.address)
        await quiet.heartbeat()
        async with Load(mesh.address, ledger) as load:
            await load.answered(50)
            await client.op("silent", timeout_ms=50)
            accepted = server.accepted + silent.accepted
            for offset_s in (HOUR_S, -HOUR_S, 10 * YEAR_S, -10 * YEAR_S, 0):
                pending = client.op("silent", timeout_ms=400)
                began = time.monotonic()
                reads = shim.wall_reads
                shim.move_wall_clock(offset_s)
                await load.answered(50)
                assert (await pending).status == bolt.STATUS_TIMEOUT
                assert 0.39 < time.monotonic() - began < 0.7
                # A reload logs a line, and a line has a time: the process does see the other clock.
                assert (await mesh.reload()).status == 200
                mesh.signal(signal.SIGHUP)
                await until(lambda reads=reads: shim.wall_reads > reads, "it reads the clock")
        assert set(load.statuses) == {0}
        years = {int(line[:4]) for line in mesh.log().splitlines() if line[:4].isdigit()}
        assert max(years) - min(years) >= 10, f"the fault did not happen: {years}"
        assert quiet.is_open, "no connection was taken for idle"
        assert server.accepted + silent.accepted == accepted, "an upstream connection was lost"
        await canary.check()
        await close_all([client, quiet])
    ledger.judge().check(ambiguous_max=6, sent_min=250)


@THREADS
async def test_t2_stopped_and_resumed(tmp_path: Path, threads: int) -> None:
    """SIGSTOP for three deadlines: each request expires once, no stall is reported, connections
    live."""
    ledger = Ledger()
    async with (
        BoltServer(peers.hold, log=logged(ledger)) as server,
        Mesh(
            tmp_path,
            {"s": [server.address]},
            threads=threads,
            limits={"heartbeat_ms": 2500, "eject_percent_max": 0},
        ) as mesh,
    ):
        clients = await connect_many(mesh.address, ledger, 4)
        futures = [c.op("s", timeout_ms=500) for c in clients for _ in range(100)]
        await mesh.in_flight(400)
        mesh.signal(signal.SIGSTOP)
        accepted = server.accepted
        await asyncio.sleep(1.6)
        assert not any(f.done() for f in futures), "void: it was not stopped"
        cpu = mesh.cpu_ns()
        began = time.monotonic()
        mesh.signal(signal.SIGCONT)
        answers = await asyncio.gather(*futures)
        assert {a.status for a in answers} == {bolt.STATUS_TIMEOUT}
        assert time.monotonic() - began < 0.5
        server.behave = peers.echo
        server.release()
        more = await asyncio.gather(*(c.op("s") for c in clients for _ in range(20)))
        assert {a.status for a in more} == {0}
        assert mesh.cpu_ns() - cpu < 400_000_000, "a storm of timers"
        assert server.accepted == accepted, "no connection was lost to the pause"
        assert "stall" not in mesh.log(), "a stopped process is not a stalled one"
        heartbeats = server.heartbeats
        await until(lambda: server.heartbeats > heartbeats, "heartbeats go on", within_s=5)
        await close_all(clients)
    ledger.judge().check(ambiguous_max=400, sent_min=480)


@THREADS
async def test_t3_quiet_connections_live(tmp_path: Path, threads: int) -> None:
    """Ten heartbeat intervals without a request: ours keep the upstream alive, theirs are answered
    by us and never forwarded, and no client ever gets one from us."""
    interval_s = 0.2
    async with (
        BoltServer() as server,
        Mesh(
            tmp_path,
            {"s": [server.address]},
            threads=threads,
            limits={"heartbeat_ms": int(interval_s * 1000), "idle_timeout_ms": 3 * 2000},
        ) as mesh,
    ):
        clients = await connect_many(mesh.address, None, 6)
        await asyncio.gather(*(c.call("s", b"x") for c in clients))
        upstream, accepted = set(server.connections), server.accepted
        before = {c: c.heartbeats for c in upstream}
        for _ in range(10):
            acks = await asyncio.gather(*(c.heartbeat() for c in clients[:3]))
            assert {a.kind for a in acks} == {bolt.HEARTBEAT_ACK}
            assert {a.status for a in acks} == {0}
            await asyncio.sleep(interval_s)
        assert set(server.connections) == upstream, "a quiet upstream connection was lost"
        assert server.accepted == accepted
        for connection in upstream:
            beats = connection.heartbeats - before[connection]
            # At most one per interval: forwarded heartbeats of clients would be thirty more.
            assert 6 <= beats <= 12, f"{beats} heartbeats in ten intervals"
        assert sum(c.heartbeats_received for c in clients) == 0
        assert all(c.is_open for c in clients)
        answers = await asyncio.gather(*(c.call("s", b"x") for c in clients))
        assert {a.status for a in answers} == {0}
        await close_all(clients)


async def test_t3_upstream_that_ignores_heartbeats_is_left(tmp_path: Path) -> None:
    async with (
        BoltServer() as server,
        Mesh(
            tmp_path,
            {"s": [server.address]},
            limits={"heartbeat_ms": 200, "backoff_ms": 10, "backoff_ms_max": 50},
        ) as mesh,
    ):
        client = await connect(mesh.address)
        await client.call("s", b"x")
        server.answer_heartbeats = False
        accepted = server.accepted
        took = await until(
            lambda: server.accepted > accepted, "another connection is made", within_s=3
        )
        assert took < 0.2 * 2 + 0.5
        await client.close()


@THREADS
async def test_t4_absurd_timeouts(tmp_path: Path, threads: int) -> None:
    """0, -1 and every negative number mean the configured one; huge ones are clamped; 1 ms is 1
    ms."""
    ledger = Ledger()
    async with (
        BoltServer(peers.never, log=logged(ledger)) as server,
        Mesh(
            tmp_path,
            {"s": [server.address]},
            threads=threads,
            limits={
                "request_timeout_ms": 300,
                "request_timeout_ms_max": 900,
                "eject_percent_max": 0,
            },
        ) as mesh,
    ):
        client = await connect(mesh.address, ledger)
        expected_s = {
            0: 0.3,
            -1: 0.3,
            -2: 0.3,
            -(2**31): 0.3,
            2**31 - 1: 0.9,
            2**30: 0.9,
            901: 0.9,
            1: 0.001,
            500: 0.5,
        }
        began = time.monotonic()

        async def timed(timeout_ms: int) -> tuple[int, float]:
            answer = await client.op("s", timeout_ms=timeout_ms)
            assert answer.status == bolt.STATUS_TIMEOUT
            return timeout_ms, time.monotonic() - began

        for timeout_ms, took in await asyncio.gather(*(timed(t) for t in expected_s)):
            wanted = expected_s[timeout_ms]
            assert wanted - 0.003 <= took < wanted + 0.15, f"{timeout_ms} ms: {took:.3f} s"
        metrics = await mesh.metrics()
        assert metrics.sum("requests_expired_total", direction="request") == len(expected_s)
        await client.close()
    ledger.judge().check(ambiguous_max=9)
