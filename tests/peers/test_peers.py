"""The peers are tested against each other first: a fault test is worth what its tools are worth."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.chaos.toxics import ToxicProxy
from tests.peers import server as peers
from tests.peers.canary import Canary
from tests.peers.client import BoltClient, ClosedError
from tests.peers.server import BoltServer, ServerProcess, read_log
from tests.peers.sockets import parse_address
from tests.reference import bolt
from tests.sim.ledger import Ledger


async def connected(
    address: str, ledger: Ledger | None = None, number: int = 1, **options: bool | int
) -> BoltClient:
    client = BoltClient(number, ledger, **options)  # type: ignore[arg-type]
    return await client.connect(parse_address(address))


@pytest.mark.parametrize(("proto", "crc"), [(1, False), (2, False), (2, True)])
async def test_honest_pair_leaves_clean_books(proto: int, crc: bool) -> None:
    ledger = Ledger(ordered=True)
    async with BoltServer(log=ledger.executed) as server:
        client = await connected(server.address, ledger, proto=proto, crc=crc)
        client.oneway("s")
        answers = await asyncio.gather(*(client.op("s", 40 + n * 97) for n in range(200)))
        assert {a.status for a in answers} == {0}
        assert (await client.heartbeat()).kind == bolt.HEARTBEAT_ACK
        await client.close()
    verdict = ledger.judge().check()
    assert (verdict.sent, verdict.answered, verdict.oneway_executed) == (200, 200, 1)


async def test_unix_socket(tmp_path: Path) -> None:
    async with await BoltServer().start(f"unix:{tmp_path}/s") as server:
        client = await connected(server.address)
        assert (await client.call("s", b"x")).content == b"x"
        await client.close()


async def test_pushes_go_both_ways() -> None:
    async with BoltServer() as server:
        client = await connected(server.address)
        await client.heartbeat()
        (connection,) = server.connections
        assert (await connection.push(b"hello")).content == b"hello"
        assert client.requests_received == 1
        await client.close()


@pytest.mark.parametrize(
    ("behave", "name"),
    [
        (peers.twice, "duplicated"),
        (peers.with_id(lambda i: i + 1000, then_echo=True), "misrouted"),
        (peers.with_id(lambda i: i + 1000, then_echo=False), "misrouted"),
        (peers.never, "lost"),
        (peers.with_status(16), "ambiguous"),
    ],
)
async def test_hostile_service_is_caught_without_a_mesh(behave: peers.Behaviour, name: str) -> None:
    """Whatever the mesh is to hide from clients must be visible when there is none."""
    ledger = Ledger()
    async with BoltServer(behave, log=ledger.executed) as server:
        client = await connected(server.address, ledger)
        client.op("s")
        await client.heartbeat()  # answers are in order: the op's came before
        assert ledger.judge().counts[name] == 1
        await client.close()


async def test_request_bit_reaches_the_client_as_a_request() -> None:
    async with BoltServer(peers.as_request) as server:
        client = await connected(server.address)
        await client.call("s", b"x")
        assert client.requests_received == 1
        await client.close()


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("size", [1, 19, 25])
async def test_cut_answers_end_the_connection(size: int, with_reset: bool) -> None:
    ledger = Ledger()
    async with BoltServer(peers.cut_after(size, with_reset=with_reset)) as server:
        client = await connected(server.address, ledger)
        with pytest.raises(ClosedError):
            await client.op("s")
    assert ledger.judge().counts["lost"] == 1
    assert ledger.judge(reset_is="ambiguous").counts["ambiguous"] == 1


async def test_held_requests_are_released_in_order() -> None:
    ledger = Ledger()
    async with BoltServer(peers.hold, log=ledger.executed) as server:
        client = await connected(server.address, ledger)
        futures = [client.op("s") for _ in range(3)]
        await client.heartbeat()
        assert ledger.unsettled() == 3
        assert server.release() == 3
        await asyncio.gather(*futures)
        await client.close()
    ledger.judge().check()


async def test_killed_service_leaves_its_log(tmp_path: Path) -> None:
    log = tmp_path / "executed"
    ledger = Ledger()
    async with ServerProcess("never", log=log) as service:
        client = await connected(service.address, ledger)
        futures = [client.op("s") for _ in range(10)]
        await client.heartbeat()
        await service.kill()
        done = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(d, ClosedError) for d in done)
    assert len(list(read_log(log))) == 10
    ledger.read_log(read_log(log))
    assert ledger.judge(reset_is="ambiguous").check(ambiguous_max=10).counts["ambiguous"] == 10


async def test_canary_sings_and_hears_errors() -> None:
    async with BoltServer() as server, Canary(server.address, "s") as canary:
        await asyncio.sleep(0.3)
        windows = await canary.check()
        assert len(windows) == 2
        assert sum(w.asked for w in windows) > 20
    async with BoltServer() as server, Canary(server.address, "s") as canary:
        server.behave = peers.with_status(4)
        await asyncio.sleep(0.1)
        with pytest.raises(AssertionError, match="status 4"):
            await canary.check()
    async with BoltServer() as server, Canary(server.address, "s") as canary:
        server.behave = peers.late(0.4)
        await asyncio.sleep(1.0)
        with pytest.raises(AssertionError, match="p99"):
            await canary.check(asked_min=1)


# --- toxics -------------------------------------------------------------------------------------


async def test_proxy_without_toxics_changes_nothing() -> None:
    ledger = Ledger()
    async with BoltServer(log=ledger.executed) as server, ToxicProxy(server.address) as proxy:
        client = await connected(proxy.address, ledger)
        await asyncio.gather(*(client.op("s", 10_000) for _ in range(50)))
        await client.close()
    ledger.judge().check(sent_min=50)
    assert proxy.up_books.passed > 500_000


async def test_latency_and_slicer() -> None:
    async with BoltServer() as server, ToxicProxy(server.address) as proxy:
        proxy.up.latency_s = 0.05
        proxy.down.slice_bytes = 1
        client = await connected(proxy.address)
        began = time.monotonic()
        assert (await client.call("s", b"x" * 100)).content == b"x" * 100
        assert time.monotonic() - began >= 0.05
        assert proxy.down_books.pieces > 100
        await client.close()


async def test_bandwidth() -> None:
    async with BoltServer() as server, ToxicProxy(server.address) as proxy:
        proxy.up.bytes_per_s = 20_000
        client = await connected(proxy.address)
        began = time.monotonic()
        await client.call("s", b"x" * 4_000)
        assert time.monotonic() - began >= 0.15
        await client.close()


@pytest.mark.parametrize("resets", [False, True])
async def test_limit_cuts_at_the_byte(resets: bool) -> None:
    async with BoltServer() as server, ToxicProxy(server.address) as proxy:
        proxy.up.limit_bytes = 10
        proxy.up.limit_resets = resets
        client = await connected(proxy.address)
        with pytest.raises(ClosedError):
            await client.call("s", b"x")
        assert (proxy.up_books.passed, proxy.up_books.cut, server.requests) == (10, 1, 0)


async def test_blackhole_keeps_the_connection() -> None:
    async with BoltServer() as server, ToxicProxy(server.address) as proxy:
        client = await connected(proxy.address)
        await client.call("s", b"x")
        proxy.up.blackhole = True
        lost = client.call("s", b"y")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(lost), 0.1)
        assert client.is_open
        assert proxy.up_books.swallowed > 0
        assert proxy.reset_all() == 1
        with pytest.raises(ClosedError):
            await lost


async def test_half_close_passes() -> None:
    """The end of what the client sends reaches the service, and its answer still comes back."""
    async with BoltServer(peers.late(0.05)) as server, ToxicProxy(server.address) as proxy:
        client = await connected(proxy.address)
        server.answers_after_eof = True
        future = client.call("s", b"x")
        client.shut_write()
        assert (await future).content == b"x"
        assert server.half_closed == 1
        await client.close()


async def test_refusing_and_accepting_again() -> None:
    async with BoltServer() as server, ToxicProxy(server.address) as proxy:
        await proxy.refuse()
        with pytest.raises(OSError, match="onnect"):
            await connected(proxy.address)
        await proxy.accept_again()
        client = await connected(proxy.address)
        await client.call("s")
        await client.close()
