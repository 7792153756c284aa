"""I: nobody gets another's answer, whatever ids the two sides choose and whatever the upstream
does."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from tests.chaos.load import Load, close_all, connect, connect_many, logged
from tests.chaos.mesh import Mesh, until
from tests.peers import server as peers
from tests.peers.canary import Canary
from tests.peers.client import BoltClient, echo_request
from tests.peers.server import BoltServer, ServerProcess, read_log
from tests.reference import bolt
from tests.sim.ledger import HEAD, Ledger, encode, new_operation

pytestmark = pytest.mark.chaos
THREADS = pytest.mark.parametrize("threads", [1, 2])


@THREADS
async def test_i2_equal_ids_of_many_and_of_one(tmp_path: Path, threads: int) -> None:
    """Eight clients use the same ids, each of them every id twice, all in flight at once; the
    upstream answers in random order. Every request is forwarded and gets its own answer."""
    rng = random.Random(2)
    ledger = Ledger()
    async with (
        BoltServer(peers.hold, log=logged(ledger)) as server,
        BoltServer() as other,
        Mesh(tmp_path, {"s": [server.address], "other": [other.address]}, threads=threads) as mesh,
        Canary(mesh.address, "other") as canary,
    ):
        clients = await connect_many(mesh.address, ledger, 8)
        futures = [
            client.op("s", 60 + n, request_id=rid)
            for client in clients
            for rid in range(1, 21)
            for n in range(2)
        ]
        await mesh.in_flight(len(futures))
        assert len(server.held) == 320, "each one is forwarded"
        wire_ids = {(id(connection), frame.id) for connection, frame in server.held}
        assert len(wire_ids) == 320, "and each has an id of its own upstream"
        rng.shuffle(server.held)
        server.release()
        await asyncio.gather(*futures)
        await canary.check()
        await close_all(clients)
    assert ledger.judge().check().answered == 320


@THREADS
async def test_i3_late_answers_meet_reused_slots(tmp_path: Path, threads: int) -> None:
    """The upstream answers after the deadline. While a late answer may come its slot rests, and
    when all rest there is overload, at once; after it the slot serves another, and misrouted stays
    zero."""
    ledger = Ledger()
    clients_count = 4
    async with (
        BoltServer(peers.hold, log=logged(ledger)) as server,
        BoltServer() as other,
        Mesh(
            tmp_path,
            {"s": [server.address], "other": [other.address]},
            threads=threads,
            limits={"in_flight_max": 16, "eject_percent_max": 0},
        ) as mesh,
        Canary(mesh.address, "other") as canary,
    ):
        clients = await connect_many(mesh.address, ledger, clients_count, mixed=False)
        for _ in range(3):
            before = await mesh.metrics()
            # More than the slots of all threads: the surplus is refused, the rest expires.
            answers = await asyncio.gather(
                *(c.op("s", timeout_ms=150) for c in clients for _ in range(16 * threads))
            )
            expired = sum(1 for a in answers if a.status == bolt.STATUS_TIMEOUT)
            refused = sum(1 for a in answers if a.status == bolt.STATUS_BUSY)
            assert expired + refused == len(answers)
            assert 16 <= expired <= 16 * threads
            assert len(server.held) == expired
            began = time.monotonic()
            full = await clients[0].op("s")
            assert full.status == bolt.STATUS_BUSY, "all slots rest"
            assert time.monotonic() - began < 0.1
            assert server.release() == expired
            server.behave = peers.echo
            # The late answers free the slots, in the order of the connection: new requests pass.
            await until_ok(clients[0])
            fresh = await asyncio.gather(*(c.op("s") for c in clients for _ in range(3)))
            assert {a.status for a in fresh} == {0}
            after = await mesh.metrics()
            assert after.dropped("late") - before.dropped("late") == expired
            server.behave = peers.hold
        await canary.check()
        await close_all(clients)
    ledger.judge().check(ambiguous_max=3 * 16 * threads)


async def until_ok(client: BoltClient) -> None:
    async with asyncio.timeout(5):
        while (await client.op("s")).status != 0:  # noqa: ASYNC110 - a poll with a deadline
            await asyncio.sleep(0.01)


@THREADS
@pytest.mark.parametrize(
    ("behave", "cause"),
    [
        (peers.twice, "duplicate"),
        (peers.with_id(lambda i: (i + 0x10000) & 0x7FFFFFFF, then_echo=True), "unknown"),
        (peers.with_id(lambda i: i ^ 0x7FFF, then_echo=True), "unknown"),
        (peers.with_id(lambda i: i | 0x80000000, then_echo=True), "unknown"),
        (peers.with_id(lambda _i: 0, then_echo=True), "unknown"),
    ],
    ids=["twice", "generation", "index", "bit-31", "zero"],
)
async def test_i4_answers_to_nobody_are_counted_and_dropped(
    tmp_path: Path, threads: int, behave: peers.Behaviour, cause: str
) -> None:
    ledger = Ledger()
    async with (
        BoltServer(behave, log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}, threads=threads) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        async with Load(mesh.address, ledger) as load:
            await load.answered(300)
        assert set(load.statuses) == {0}
        await canary.check()
        assert (await mesh.metrics()).dropped(cause) >= 300, "the fault did not happen"
    ledger.judge().check(sent_min=300)


async def test_i4_request_bit_makes_it_a_request(tmp_path: Path) -> None:
    """An upstream that answers with the request bit set asks: the client's answer goes back to
    it."""
    ledger = Ledger()
    async with (
        BoltServer(peers.as_request, log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        async with Load(mesh.address, ledger) as load:
            await load.answered(200)
            assert sum(c.requests_received for c in load.clients) > 0, "the fault did not happen"
        assert set(load.statuses) == {0}
        await canary.check()
        final = await mesh.settle()
        final.check_ledger()
        assert final.ledger("push")["answered"] >= 200
        assert all(f.kind == bolt.RESPONSE for c in server.connections for f in c.answered_pushes)
    ledger.judge().check(sent_min=200)


async def test_i4_garbage_from_an_upstream_fails_its_requests(tmp_path: Path) -> None:
    """A stream that is no frame: that connection is closed, what it carried fails explicitly,
    once."""
    ledger = Ledger()

    def garbage(connection: peers.ServerConnection, frame: bolt.Frame) -> None:
        if connection.requests == 50:
            connection.write(b"\x09" * 30)

    async with (
        BoltServer(garbage, log=logged(ledger)) as server,
        BoltServer() as other,
        Mesh(tmp_path, {"s": [server.address], "other": [other.address]}) as mesh,
        Canary(mesh.address, "other") as canary,
    ):
        clients = await connect_many(mesh.address, ledger, 5, mixed=False)
        answers = await asyncio.gather(*(c.op("s") for c in clients for _ in range(10)))
        assert {a.status for a in answers} == {bolt.STATUS_CONNECTION_CLOSED}
        server.behave = peers.echo
        await until_ok(clients[0])
        await canary.check()
        await close_all(clients)
    ledger.judge().check(ambiguous_max=50)


async def test_i6_and_n4_all_slots_taken_then_the_upstream_is_killed(tmp_path: Path) -> None:
    """65 536 in flight on one connection: the next request is refused at once and others do not
    notice. Then kill -9: exactly as many explicit errors, within a second, and no request sent
    again."""
    slots = 65536
    ledger = Ledger()
    log = tmp_path / "executed"
    async with (
        ServerProcess("never", log=log) as service,
        ServerProcess("echo") as other,
        Mesh(
            tmp_path,
            {"s": [service.address], "other": [other.address]},
            limits={"in_flight_max": slots, "request_timeout_ms_max": 60_000},
        ) as mesh,
        Canary(mesh.address, "other") as canary,
    ):
        clients = await connect_many(mesh.address, ledger, 17, mixed=False)
        futures = []
        for n in range(slots):
            futures.append(clients[n % 16].op("s", timeout_ms=45_000))
            if n % 512 == 0:
                await asyncio.sleep(0)
        await mesh.in_flight(slots, within_s=20)
        canary.mark()
        took = []
        for _ in range(50):
            began = time.monotonic_ns()
            refused = await clients[16].op("s", timeout_ms=45_000)
            took.append(time.monotonic_ns() - began)
            assert refused.status == bolt.STATUS_BUSY
        # 1 ms at the mesh; the clock here includes two Python processes' worth of scheduling.
        assert sorted(took)[25] < 5_000_000, f"median {sorted(took)[25]} ns"
        (await mesh.metrics()).check_ledger()
        await until(
            lambda: log.stat().st_size == slots * HEAD.size,
            "the service has read them all",
            within_s=20,
        )
        before = (await mesh.metrics()).failed("upstream_lost")
        assert (await mesh.metrics()).in_flight >= slots, "void: nothing in flight at the kill"
        # 20 bytes each wait in the kernel meanwhile: what is timed is the mesh, not this process.
        for client in clients:
            client.pause_reading()
        await service.kill()

        async def all_failed() -> bool:
            return (await mesh.metrics()).failed("upstream_lost") - before == slots

        took_s = await until(all_failed, "each fails explicitly", within_s=3, every_s=0.02)
        assert took_s < 1.0, f"it took {took_s:.2f} s"
        for client in clients:
            client.resume_reading()
        answers = await asyncio.gather(*futures)
        assert {a.status for a in answers} == {bolt.STATUS_CONNECTION_CLOSED}
        await canary.check()
        await close_all(clients)
    ledger.read_log(read_log(log))
    verdict = ledger.judge().check(ambiguous_max=slots, sent_min=slots)
    assert verdict.counts["ambiguous"] == slots
    assert verdict.errors == {bolt.STATUS_BUSY: 50, bolt.STATUS_CONNECTION_CLOSED: slots}


@THREADS
async def test_i7_both_directions_use_the_same_numbers(tmp_path: Path, threads: int) -> None:
    """The upstream asks under exactly the id of a request that it has not answered yet, and both
    answers are late and out of order: two id spaces, nothing crosses."""
    rng = random.Random(7)
    asked, pushed = Ledger(), Ledger()
    held_pushes: list[tuple[BoltClient, bolt.Frame]] = []

    def hold_push(client: BoltClient, frame: bolt.Frame) -> None:
        pushed.executed(frame.content)
        held_pushes.append((client, frame))

    async with (
        BoltServer(peers.hold, log=logged(asked)) as server,
        Mesh(tmp_path, {"s": [server.address]}, threads=threads) as mesh,
    ):
        clients = await connect_many(mesh.address, asked, 6, on_request=hold_push)
        futures = [c.op("s") for c in clients for _ in range(50)]
        await mesh.in_flight(300)
        numbers = {connection: n for n, connection in enumerate(server.connections)}
        pushes = []
        for seq, (connection, frame) in enumerate(server.held):
            op = new_operation(numbers[connection], 0, seq)
            pushed.sent(op, frame.id)
            pushes.append((connection, connection.push(encode(op), request_id=frame.id)))
        await until(lambda: len(held_pushes) == 300, "every push reached a client")
        await mesh.in_flight(600)
        rng.shuffle(held_pushes)
        rng.shuffle(server.held)
        for client, frame in held_pushes[:150]:
            echo_request(client, frame)
        server.release()
        for client, frame in held_pushes[150:]:
            echo_request(client, frame)
        answers = await asyncio.gather(*futures)
        assert {a.status for a in answers} == {0}
        for connection, future in pushes:
            frame = await future
            pushed.outcome(numbers[connection], 0, frame.id, frame.status, frame.content)
        await close_all(clients)
        final = await mesh.settle()
        assert final.ledger("push")["answered"] == 300
    asked.judge().check(sent_min=300)
    assert pushed.judge().check(sent_min=300).answered == 300


async def test_refused_server_requests_are_answered_at_once(tmp_path: Path) -> None:
    """`server_requests: refuse`, and nobody there at all: an explicit answer, never a guess."""
    async with BoltServer() as server:
        options = {"endpoints": [server.address], "server_requests": "refuse"}
        async with Mesh(tmp_path, {"s": options}) as mesh:
            client = await connect(mesh.address)
            await client.call("s", b"x")
            (connection,) = server.connections
            answer = await asyncio.wait_for(connection.push(b"hello"), 1)
            assert answer.status != 0
            assert client.requests_received == 0
            final = await mesh.metrics()
            assert final.ledger("push")["failed"] == 1
            await client.close()
