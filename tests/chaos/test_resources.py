"""R: memory, descriptors, time and patience run out, and only those who caused it pay.

The blameless canary shares the upstream connection and the engine thread in each of these.
"""

from __future__ import annotations

import asyncio
import math
import resource
import time
from pathlib import Path

import pytest

from tests.chaos.load import Load, close_all, connect, connect_many, logged
from tests.chaos.mesh import Mesh, until
from tests.chaos.shim import Shim
from tests.peers import server as peers
from tests.peers.canary import Canary
from tests.peers.client import BoltClient, ClosedError, echo_request
from tests.peers.server import BoltServer, ServerConnection
from tests.reference import bolt
from tests.sim.ledger import Ledger, encode, new_operation

pytestmark = pytest.mark.chaos
THREADS = pytest.mark.parametrize("threads", [1, 2])
MIB = 1 << 20


@THREADS
async def test_r1_client_that_never_reads_its_answers(tmp_path: Path, threads: int) -> None:
    """It asks for 24 MiB in small requests and reads none of it: closed at its cap, and nobody
    else waits for it."""

    def swollen(connection: ServerConnection, frame: bolt.Frame) -> None:
        if frame.content.startswith(b"big"):
            connection.write(bolt.response_to(frame, b"x" * (256 << 10)))
        else:
            peers.echo(connection, frame)

    async with (
        BoltServer(swollen) as server,
        Mesh(
            tmp_path,
            {"s": [server.address]},
            threads=threads,
            limits={"queue_bytes_max": 2 * MIB, "memory_bytes_max": 48 * MIB},
        ) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        deaf = await connect(mesh.address)
        deaf.pause_reading()
        for _ in range(96):
            deaf.call("s", b"big", timeout_ms=30_000)

        async def closed() -> bool:
            metrics = await mesh.metrics()
            assert metrics.sum("buffer_bytes") <= 48 * MIB
            return metrics.sum("slow_consumers_total") == 1

        await until(closed, "the client that does not read is closed", within_s=10)
        # What it gets to see of that is a connection that ended.
        deaf.resume_reading()
        await asyncio.wait_for(deaf.closed, 5)
        await canary.check()
        final = await mesh.settle()
        assert final.sum("connections_closed_total", reason="slow_consumer") == 1
        assert final.failed("client_gone") > 0
        assert final.sum("buffer_bytes_highest") <= 48 * MIB


async def test_r1_client_that_never_reads_pushes(tmp_path: Path) -> None:
    """The service pushes at a client that does not read. The shared connection is never paused for
    it: pushes over the quota are refused at once, or the client is closed; each push has one
    outcome."""
    pushed = Ledger()
    async with (
        BoltServer() as server,
        Mesh(
            tmp_path,
            {"s": [server.address]},
            limits={"queue_bytes_max": MIB, "memory_bytes_max": 48 * MIB},
        ) as mesh,
        Canary(mesh.address, "s", interval_ms=2) as canary,
    ):
        deaf = await connect(mesh.address)
        (connection,) = server.connections
        server.behave = lambda c, f: None if f.content == b"wait" else peers.echo(c, f)
        deaf.call("s", b"wait", timeout_ms=25_000)
        await mesh.in_flight(1)
        deaf.pause_reading()
        futures = []
        # Each push goes to whoever has a request in flight: the deaf one, or sometimes the canary.
        for seq in range(1000):
            op = new_operation(9, 0, seq)
            pushed.sent(op, seq + 1)
            futures.append(
                connection.push(encode(op, 64 << 10), request_id=seq + 1, timeout_ms=4000)
            )
            # The canary is answered in between, else it would be the one with a request in flight.
            full = connection.transport.get_write_buffer_size() > 4 * MIB
            await asyncio.sleep(0.01 if full else 0)
        answers = await asyncio.wait_for(asyncio.gather(*futures), 20)
        for frame in answers:
            pushed.outcome(9, 0, frame.id, frame.status, frame.content)
        assert any(f.status for f in answers), "void: the quota was never reached"
        metrics = await mesh.metrics()
        assert metrics.sum("buffer_bytes_highest") <= 48 * MIB
        await canary.check()
        deaf.reset()  # closed with nothing unread, it would be half-closed and owed its answer
    verdict = pushed.judge()
    verdict.check(ambiguous_max=verdict.sent)
    assert not server.malformed


@THREADS
async def test_r2_slow_upstream_and_many_fast_clients(tmp_path: Path, threads: int) -> None:
    """The upstream stops reading. Clients are paused, then told "overload"; memory stays under the
    cap; when it reads again everything moves. Nothing is lost on the way."""
    ledger = Ledger()
    cap = 32 * MIB
    async with (
        BoltServer(peers.slow_reader, log=logged(ledger)) as server,
        BoltServer() as other,
        Mesh(
            tmp_path,
            {"s": [server.address], "other": [other.address]},
            threads=threads,
            limits={
                "queue_bytes_max": 65536,
                "memory_bytes_max": cap,
                "heartbeat_ms": 20_000,
                "eject_percent_max": 0,
            },
        ) as mesh,
        Canary(mesh.address, "other") as canary,
    ):
        clients = await connect_many(mesh.address, ledger, 100)
        futures = []

        async def flood(client: BoltClient) -> None:
            for _ in range(30):
                futures.append(client.op("s", 16 << 10, timeout_ms=6000))
                await client.drained()
                assert client.is_open, "an honest client was closed"

        floods = [asyncio.create_task(flood(c)) for c in clients]
        await asyncio.sleep(1.5)
        under = await mesh.metrics()
        under.check_ledger()
        assert under.sum("pauses_total") > 0, "void: nobody was paused"
        assert under.sum("buffer_bytes") <= cap
        await asyncio.wait_for(asyncio.gather(*floods), 15)
        server.behave = peers.echo
        for connection in server.connections:
            connection.transport.resume_reading()
        server.release()
        answers = await asyncio.wait_for(asyncio.gather(*futures), 20)
        statuses = {a.status for a in answers}
        assert statuses <= {0, bolt.STATUS_BUSY, bolt.STATUS_TIMEOUT}, statuses
        assert 0 in statuses
        await canary.check()
        final = await mesh.metrics()
        assert final.sum("buffer_bytes_highest") <= cap
        await close_all(clients)
    ledger.judge().check(ambiguous_max=3000, sent_min=3000)


@THREADS
async def test_both_sides_full_of_requests_do_not_deadlock(tmp_path: Path, threads: int) -> None:
    """The client writes all its requests before it reads anything, the service writes all its
    pushes before it reads anything, both far over every buffer. Every answer and every heartbeat
    arrives."""
    asked, pushed = Ledger(), Ledger()
    count, size = 300, 32 << 10

    async with (
        BoltServer(log=logged(asked)) as server,
        Mesh(
            tmp_path,
            {"s": [server.address]},
            threads=threads,
            limits={"queue_bytes_max": 4 * MIB, "in_flight_per_connection_max": 65536},
        ) as mesh,
    ):

        def receive_push(client: BoltClient, frame: bolt.Frame) -> None:
            pushed.executed(frame.content)
            echo_request(client, frame)

        client = await connect(mesh.address, asked, on_request=receive_push)
        await client.op("s")
        (connection,) = (c for c in server.connections if c.requests)
        client.pause_reading()
        connection.transport.pause_reading()

        async def ask_all() -> list[asyncio.Future[bolt.Frame]]:
            futures = []
            for n in range(count):
                futures.append(client.op("s", size, timeout_ms=20_000))
                if n % 50 == 0:
                    futures.append(client.heartbeat())
                await client.drained()
            client.resume_reading()
            return futures

        async def push_all() -> list[asyncio.Future[bolt.Frame]]:
            futures = []
            for seq in range(count):
                op = new_operation(9, 0, seq)
                pushed.sent(op, seq + 1)
                futures.append(
                    connection.push(encode(op, size), request_id=seq + 1, timeout_ms=20_000)
                )
                while connection.transport.get_write_buffer_size() > 65536:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
            connection.transport.resume_reading()
            return futures

        asking, pushing = await asyncio.wait_for(asyncio.gather(ask_all(), push_all()), 20)
        answers = await asyncio.wait_for(asyncio.gather(*asking), 20)
        assert sum(a.kind == bolt.HEARTBEAT_ACK for a in answers) == 6
        assert {a.status for a in answers} <= {0, bolt.STATUS_BUSY}
        for frame in await asyncio.wait_for(asyncio.gather(*pushing), 20):
            pushed.outcome(9, 0, frame.id, frame.status, frame.content)
        again = await client.op("s")
        assert again.status == 0, "and afterwards everything is as before"
        assert client.is_open
        await client.close()
    asked.judge().check(ambiguous_max=0, sent_min=count)
    verdict = pushed.judge()
    verdict.check(ambiguous_max=verdict.sent, sent_min=count)


async def test_r3_descriptors_run_out(tmp_path: Path) -> None:
    """More clients than descriptors: those inside go on, nobody spins, the admin interface answers,
    and when some leave others come in."""
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}, fds_max=230) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        assert "connections_max" in mesh.log(), "the clamp is said"
        most = (await mesh.get("/v1/status")).json()["connections_max"]
        assert 1 < most < 230
        clients = []
        for number in range(most + 60):
            client = await connect(mesh.address, ledger, number + 1)
            clients.append(client)
        await asyncio.sleep(0.3)
        inside = [c for c in clients if c.is_open]
        assert len(clients) > len(inside) >= most - 2, f"{len(inside)} of {most}"
        answers = await asyncio.gather(*(c.op("s") for c in inside))
        assert {a.status for a in answers} == {0}
        assert mesh.fds() <= 230
        cpu, began = mesh.cpu_ns(), time.monotonic_ns()
        await asyncio.sleep(0.5)
        share = (mesh.cpu_ns() - cpu) / (time.monotonic_ns() - began)
        assert share < 0.25, (
            f"{share:.2f} of a core while full"
        )  # the canary's own traffic included
        # Churn: as many leave as come, some hundred times.
        for _ in range(5):
            await asyncio.gather(*(c.close() for c in inside[:40]))
            await asyncio.sleep(0.05)
            fresh = await connect_many(mesh.address, ledger, 40, first=1000)
            came = await asyncio.gather(*(c.op("s") for c in fresh), return_exceptions=True)
            good = [a for a in came if not isinstance(a, BaseException) and a.status == 0]
            assert len(good) >= 35
            inside = [c for c in [*inside[40:], *fresh] if c.is_open]
        await canary.check()
        await close_all(inside)
    verdict = ledger.judge(reset_is="ambiguous")  # a refused connection may meet its first request
    assert {n for n, c in verdict.counts.items() if c} <= {"ambiguous"}, str(verdict)


async def test_r3_descriptors_run_out_below_the_limit(tmp_path: Path) -> None:
    """Somebody lowers the limit under the running process: accepting pauses instead of spinning."""
    async with (
        BoltServer() as server,
        Mesh(tmp_path, {"s": [server.address]}) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        before = resource.prlimit(mesh.pid, resource.RLIMIT_NOFILE)
        # Room for a few connections and for the admin's own.
        resource.prlimit(mesh.pid, resource.RLIMIT_NOFILE, (mesh.fds() + 6, before[1]))
        clients = await connect_many(mesh.address, None, 40)

        async def paused() -> bool:
            return "accept" in mesh.log()

        await until(paused, "the pause is said", within_s=5)
        cpu, began = mesh.cpu_ns(), time.monotonic_ns()
        await asyncio.sleep(0.5)
        share = (mesh.cpu_ns() - cpu) / (time.monotonic_ns() - began)
        assert share < 0.25, f"{share:.2f} of a core while out of descriptors"
        resource.prlimit(mesh.pid, resource.RLIMIT_NOFILE, before)
        # One at a time was shown out, on the descriptor that is kept for that; the others waited in
        # the backlog and are served now.
        inside = [c for c in clients if c.is_open]
        answers = await asyncio.wait_for(asyncio.gather(*(c.call("s", b"x") for c in inside)), 5)
        assert {a.status for a in answers} == {0}
        assert len(inside) >= 20
        fresh = await connect_many(mesh.address, None, 10)
        answers = await asyncio.wait_for(asyncio.gather(*(c.call("s", b"x") for c in fresh)), 5)
        assert {a.status for a in answers} == {0}
        clients += fresh
        await canary.check()
        await close_all(clients)


@THREADS
async def test_r4_slow_and_silent_clients(tmp_path: Path, threads: int) -> None:
    """600 connections that dribble a frame byte by byte, half of one, or nothing at all."""
    async with (
        BoltServer() as server,
        Mesh(
            tmp_path,
            {"s": [server.address]},
            threads=threads,
            limits={"frame_timeout_ms": 1000, "first_byte_timeout_ms": 2500},
        ) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        frame = bolt.request(1, "s", b"x" * 64)
        began = time.monotonic()
        silent = await connect_many(mesh.address, None, 200)
        half = await connect_many(mesh.address, None, 200)
        dribble = await connect_many(mesh.address, None, 200)
        for client in half:
            client.write(frame[:30])

        async def dribbling() -> None:
            for byte in frame:
                for client in dribble:
                    if client.is_open:
                        client.write(bytes([byte]))
                await asyncio.sleep(0.1)

        dribbler = asyncio.create_task(dribbling())
        await asyncio.wait_for(asyncio.gather(*(c.closed for c in half)), 4)
        assert time.monotonic() - began >= 0.9, "closed before the frame timeout"
        await asyncio.wait_for(asyncio.gather(*(c.closed for c in dribble)), 3)
        assert sum(c.is_open for c in silent) == 200, "silence is allowed for longer"
        connecting = time.monotonic()
        honest = await connect(mesh.address)
        assert (await honest.call("s", b"x")).status == 0
        assert time.monotonic() - connecting < 0.1
        await asyncio.wait_for(asyncio.gather(*(c.closed for c in silent)), 5)
        assert time.monotonic() - began >= 2.4
        dribbler.cancel()
        assert honest.is_open, "who has spoken is not silent"
        await canary.check()
        await honest.close()


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Slope of log(cost) over log(size), least squares: 1 is linear."""
    xs, ys = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum(
        (x - mx) ** 2 for x in xs
    )


async def test_r5_many_tiny_headers_cost_linearly(tmp_path: Path) -> None:
    """The route key after up to 3 600 empty pairs, against rules that ask for headers too."""
    async with (
        BoltServer() as server,
        Mesh(
            tmp_path,
            {"s": [server.address]},
            routes=[
                {"match": {"service": "s", "header": {f"k{n}": "v"}}, "cluster": "s"}
                for n in range(4)
            ]
            + [{"match": {"service": "s"}, "cluster": "s"}, {"cluster": "s"}],
        ) as mesh,
    ):
        client = await connect(mesh.address)
        sizes, costs = [450, 900, 1800, 3600], []
        for pairs in sizes:
            section = bolt.encode_headers([("", "")] * pairs + [("service", "s")])
            frames = bolt.request(1, headers=section) * 50
            before = mesh.cpu_ns()
            seen = server.requests
            for _ in range(8):
                client.write(frames)
            await until(lambda seen=seen: server.requests == seen + 400, "all are through")
            costs.append(float(mesh.cpu_ns() - before))
        assert exponent(sizes, costs) < 1.2, costs
        assert costs[-1] / 400 < 10_000_000, "no frame may take a turn of 10 ms"
        client.reset()


async def test_r5_resets_cost_linearly(tmp_path: Path) -> None:
    async with (
        BoltServer() as server,
        Mesh(tmp_path, {"s": [server.address]}) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        sizes, costs = [250, 500, 1000, 2000], []
        frame = bolt.request(1, "s", b"x")
        for count in sizes:
            before = mesh.cpu_ns()
            for _ in range(count):
                client = await connect(mesh.address)
                client.write(frame)
                client.reset()

            async def gone() -> bool:
                return (await mesh.metrics()).sum("connections") == 1

            await until(gone, "they are gone")
            costs.append(float(mesh.cpu_ns() - before))
        assert exponent(sizes, costs) < 1.2, costs
        await canary.check()


async def test_r6_stalled_turn_is_reported(tmp_path: Path) -> None:
    """An engine thread hangs in one turn for 0.6 s: said while it is small, and then life goes
    on."""
    shim = Shim(tmp_path)
    async with (
        BoltServer() as server,
        Mesh(tmp_path, {"s": [server.address]}, environment=shim.environment) as mesh,
    ):
        client = await connect(mesh.address)
        assert (await client.call("s", b"x")).status == 0
        assert (await mesh.metrics()).sum("stalls_total") == 0
        shim.stall(600)
        newcomer = await connect(mesh.address)
        assert (await newcomer.call("s", b"x")).status == 0
        assert (await client.call("s", b"x")).status == 0
        assert shim.stalls == 1, "the fault did not happen"
        await until(lambda: "stall" in mesh.log(), "the stall is reported")
        assert (await mesh.metrics()).sum("stalls_total") >= 1
        await close_all([client, newcomer])


async def test_r6_hung_thread_aborts_with_a_backtrace(tmp_path: Path) -> None:
    """A turn of more than five seconds will not end: the process says where it hangs and goes."""
    shim = Shim(tmp_path)
    async with (
        BoltServer() as server,
        Mesh(tmp_path, {"s": [server.address]}, environment=shim.environment) as mesh,
    ):
        client = await connect(mesh.address)
        await client.call("s", b"x")
        shim.stall(20_000)
        began = time.monotonic()
        newcomer = await connect(mesh.address)
        lost = client.call("s", b"x")
        code = await asyncio.wait_for(mesh.process.wait(), 15)
        took = time.monotonic() - began
        assert code == -6, f"ended with {code}"
        assert 4 < took < 8, f"after {took:.1f} s"
        assert "stall" in mesh.log()
        assert shim.stalls == 1
        with pytest.raises(ClosedError):
            await lost
        await newcomer.ended()


async def test_memory_cap_holds_under_everything(tmp_path: Path) -> None:
    """A small memory_bytes_max against half frames, slow readers and load at once: refused, not
    killed."""
    ledger = Ledger()
    cap = 16 * MIB
    async with (
        BoltServer(peers.late(0.02), log=logged(ledger)) as server,
        Mesh(
            tmp_path,
            {"s": [server.address]},
            limits={
                "memory_bytes_max": cap,
                "queue_bytes_max": 4 * MIB,
                "frame_timeout_ms": 2000,
                "frame_bytes_max": 2 * MIB,
            },
        ) as mesh,
    ):
        hoarders = await connect_many(mesh.address, None, 40)
        half = bolt.frame(content_len=1 << 20, content=b"x" * (1 << 20))[:-100]
        for client in hoarders:
            client.write(half)
        async with Load(mesh.address, ledger, clients=4, reconnects=True, size=2000) as load:
            await asyncio.sleep(1.0)
            metrics = await mesh.metrics()
            assert metrics.sum("buffer_bytes") <= cap
            load.stopping = True
        assert metrics.sum("buffer_bytes_highest") > cap / 2, "void: memory was never short"
        await close_all(hoarders)
        client = await connect(mesh.address, ledger, 9)
        assert (await client.op("s")).status == 0, "afterwards it serves"
        await client.close()
        final = await mesh.settle()
        assert final.sum("buffer_bytes_highest") <= cap
    verdict = ledger.judge(reset_is="ambiguous")
    verdict.check(ambiguous_max=verdict.sent)
