"""W: wire abuse at the process level. Broken bytes cost their sender its connection, and nobody
else anything: the canary shares the upstream connection of every abuser."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
from pathlib import Path

import pytest

from tests.chaos.load import close_all, connect, connect_many, logged
from tests.chaos.mesh import Mesh, until
from tests.peers.canary import Canary
from tests.peers.server import BoltServer
from tests.peers.sockets import tcp_address
from tests.reference import bolt
from tests.sim.ledger import Ledger, Operation, encode

pytestmark = pytest.mark.chaos
THREADS = pytest.mark.parametrize("threads", [1, 2])

ABUSER = 666
"""Client number inside frames that must never reach the upstream."""


def abuse(seq: int = 0) -> bytes:
    return encode(Operation(ABUSER, 0, seq, os.urandom(16)))


async def send_and_wait_for_end(
    address: str, data: bytes, *, eof: bool, within_s: float = 5.0
) -> bytes:
    """Everything that came back until the mesh closed the connection."""
    reader, writer = await asyncio.open_connection(*tcp_address(address))
    try:
        writer.write(data)
        if eof:
            writer.write_eof()
        async with asyncio.timeout(within_s):
            try:
                return await reader.read()
            except ConnectionError:
                return b""
    finally:
        writer.close()


FRAMES = {
    "v1": bolt.request(5, "s", abuse()),
    "v2": bolt.request(5, "s", abuse(), proto=2),
    "v2-crc": bolt.request(5, "s", abuse(), crc=True),
    "oneway": bolt.oneway(5, "s", abuse()),
    "response": bolt.response(5, abuse(), crc=True),
    "heartbeat": bolt.heartbeat(5, proto=2),
}


@THREADS
async def test_w1_truncated_at_every_byte_then_end(tmp_path: Path, threads: int) -> None:
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}, threads=threads) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        cuts = 0
        for name, frame in FRAMES.items():
            answers = await asyncio.gather(
                *(
                    send_and_wait_for_end(mesh.address, frame[:size], eof=True)
                    for size in range(1, len(frame))
                )
            )
            assert set(answers) == {b""}, f"{name}: a truncated frame was answered"
            cuts += len(answers)
        assert cuts > 500, "void"
        metrics = await mesh.metrics()
        assert metrics.ledger("push")["accepted"] == 0
        await canary.check()
        # Any abuser's body at the upstream would be an execution of what was never sent.
        assert ledger.judge().counts["unexpected"] == 0


@THREADS
async def test_w2_any_split_carries_the_same_frames(tmp_path: Path, threads: int) -> None:
    rng = random.Random(7)
    # Frames of one dialect keep their order, but the dialects of a connection overtake each other:
    # each has its own upstream connection, and Bolt promises no order.
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}, threads=threads) as mesh,
        Canary(mesh.address, "s") as canary,
    ):

        async def fed(number: int, sizes: list[int]) -> None:
            """One connection whose bytes leave in pieces of these sizes, v1, v2 and CRC mixed."""
            client = await connect(mesh.address, ledger, number)
            assert client.transport is not None
            pieces = bytearray()
            real_write = client.write
            client.write = pieces.extend  # type: ignore[assignment, method-assign]
            futures = []
            for n in range(24):
                client.proto, client.crc = 1 + n % 2, n % 3 == 0
                futures.append(client.op("s", rng.randrange(40, 400)))
            at = 0
            while at < len(pieces):
                size = sizes[at % len(sizes)]
                real_write(bytes(pieces[at : at + size]))
                at += size
                await asyncio.sleep(0)
            answers = await asyncio.gather(*futures)
            assert {a.status for a in answers} == {0}
            await client.close()

        await asyncio.gather(
            fed(1, [1]),
            fed(2, [rng.randrange(1, 60) for _ in range(97)]),
            fed(3, [1 << 20]),
            fed(4, [3, 1, 7]),
        )
        await canary.check()
    ledger.judge().check(sent_min=96)
    assert not server.malformed


ILLEGAL = {
    "content 0x7fffffff": {"content_len": 0x7FFFFFFF},
    "content 0x80000000": {"content_len": 0x80000000},
    "content 0xffffffff": {"content_len": 0xFFFFFFFF},
    "content limit": {"content_len": 1 << 20},
    "all at their most": {"class_len": 0x7FFF, "header_len": 0x7FFF, "content_len": 0x7FFFFFFF},
    "class 0x8000": {"class_len": 0x8000},
    "class 0xffff": {"class_len": 0xFFFF},
    "header 0x8000": {"header_len": 0x8000},
    "header 0xffff": {"header_len": 0xFFFF},
}


@pytest.mark.parametrize("proto", [1, 2])
async def test_w3_illegal_lengths_are_refused_before_anything_is_kept(
    tmp_path: Path, proto: int
) -> None:
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}, limits={"frame_bytes_max": 1 << 20}) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        before = (await mesh.metrics()).dropped("malformed")
        for name, lengths in ILLEGAL.items():
            head = bolt.frame(proto=proto, id=77, **lengths)  # type: ignore[arg-type]
            raw = await send_and_wait_for_end(mesh.address, head, eof=False)
            answer = bolt.decode(raw)
            assert isinstance(answer, bolt.Frame), f"{name}: answered {raw!r}"
            assert (answer.id, answer.status) == (77, bolt.STATUS_CODEC_EXCEPTION), name
            assert len(raw) == len(answer.data), name
        assert (await mesh.metrics()).dropped("malformed") - before == len(ILLEGAL)
        # A response cannot be answered, whatever is wrong with it.
        broken = bolt.frame(proto=proto, type=0, cmd=2, id=77, class_len=0x8000)
        assert await send_and_wait_for_end(mesh.address, broken, eof=False) == b""
        await canary.check()


async def test_w3_announced_bytes_cost_nothing(tmp_path: Path) -> None:
    """400 clients announce 3 MiB each and send 100 bytes: memory follows what came, not what was
    said."""
    async with (
        BoltServer() as server,
        Mesh(tmp_path, {"s": [server.address]}) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        before = mesh.rss_bytes()
        clients = await connect_many(mesh.address, None, 400)
        for client in clients:
            client.write(bolt.frame(id=1, content_len=3 << 20, content=b"x" * 78))

        async def all_read() -> bool:
            rows = (await mesh.get("/v1/connections")).json()
            rows = rows["connections"] if isinstance(rows, dict) else rows
            return sum(1 for r in rows if r.get("partial_bytes", 0) == 100) == 400

        await until(all_read, "all half frames are held", every_s=0.05)
        grown = mesh.rss_bytes() - before
        # 40 000 bytes came. A connection itself costs about 1 KiB; four times the bytes is the bar.
        assert grown < 4 * 400 * 100 + 400 * 4096 + (2 << 20), f"RSS grew by {grown >> 10} KiB"
        await canary.check()
        await close_all(clients)


@pytest.mark.parametrize("field", ["class_len", "header_len"])
@pytest.mark.parametrize("proto", [1, 2])
async def test_w4_signed_and_unsigned_readers_cannot_be_played_off(
    tmp_path: Path, proto: int, field: str
) -> None:
    """Read as unsigned the frame is 0x8000 bytes longer than read as signed: what one reader takes
    for payload the other takes for a next frame. It must reach nobody."""
    ledger = Ledger()
    smuggled = bolt.request(9, "s", abuse(), proto=proto)
    async with (
        BoltServer(log=logged(ledger)) as server,
        Mesh(tmp_path, {"s": [server.address]}) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        for length in (0x8000, 0x8001, 0xFFFF, 0x10000 - len(smuggled)):
            head = bolt.frame(proto=proto, id=8, **{field: length})  # type: ignore[arg-type]
            data = head + smuggled * (length // len(smuggled) + 2)
            raw = await send_and_wait_for_end(mesh.address, data, eof=False)
            answer = bolt.decode(raw) if raw else None
            assert answer is None or isinstance(answer, bolt.Frame)
            if answer is not None:  # a reset may overtake the answer when bytes were left unread
                assert (answer.id, answer.status) == (8, bolt.STATUS_CODEC_EXCEPTION)
                assert len(raw) == len(answer.data), "the smuggled frame was answered"
        await canary.check()
        assert ledger.judge().counts["unexpected"] == 0


WRONG = {
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.2\r\n",
    "amqp": b"AMQP\x00\x00\x09\x01",
    "zeros": bytes(100),
    "bolt v3": b"\x03" + bytes(40),
    "random": random.Random(3).randbytes(1000).replace(b"\x01", b"\x07").replace(b"\x02", b"\x07"),
}


async def test_w8_wrong_protocol_is_closed_at_once(tmp_path: Path) -> None:
    async with (
        BoltServer() as server,
        Mesh(tmp_path, {"s": [server.address]}) as mesh,
        Canary(mesh.address, "s") as canary,
    ):
        for name, data in WRONG.items():
            before = (await mesh.metrics()).dropped("malformed")
            lines = len(mesh.log().splitlines())
            assert await send_and_wait_for_end(mesh.address, data, eof=False, within_s=1) == b""
            assert (await mesh.metrics()).dropped("malformed") - before == 1, name
            await until(
                lambda lines=lines: len(mesh.log().splitlines()) > lines,
                f"a log line about {name}",
            )
            assert len(mesh.log().splitlines()) == lines + 1, name
            assert "\x16" not in mesh.log()
        # A port scan: connect and leave, with FIN and with RST.
        for _ in range(50):
            with socket.create_connection(tcp_address(mesh.address)) as scan:
                scan.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.create_connection(tcp_address(mesh.address)).close()
        await canary.check()


async def test_bad_checksum_is_closed_without_an_answer(tmp_path: Path) -> None:
    """From a client: its connection only. From an upstream: its requests in flight fail
    explicitly."""
    ledger = Ledger()
    async with (
        BoltServer(log=logged(ledger)) as server,
        BoltServer() as other,
        Mesh(tmp_path, {"s": [server.address], "other": [other.address]}) as mesh,
        Canary(mesh.address, "other") as canary,
    ):
        good = bolt.request(5, "s", abuse(), crc=True)
        for at in (7, 30, len(good) - 1):
            damaged = bytearray(good)
            damaged[at] ^= 1
            assert await send_and_wait_for_end(mesh.address, bytes(damaged), eof=False) == b""
        assert ledger.judge().counts["unexpected"] == 0

        def damage(connection: object, frame: bolt.Frame) -> None:
            answer = bytearray(bolt.response_to(frame, frame.content))
            answer[-1] ^= 1
            connection.write(bytes(answer))  # type: ignore[attr-defined]

        server.behave = damage
        client = await connect(mesh.address, ledger, crc=True, proto=2)
        answer = await client.op("s")
        assert (answer.status, answer.content) == (bolt.STATUS_CONNECTION_CLOSED, b"")
        await until(lambda: server.accepted >= 2, "the upstream connection is made anew")
        assert (await mesh.metrics()).failed("upstream_lost") == 1
        await canary.check()
        await client.close()
    ledger.judge().check(ambiguous_max=1)
