"""The bounds of the HTTP server: what is too large, too slow, too many or no HTTP at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fastmesh import limits
from tests.admin.http import Reply, ask, connect, raw

Running = Callable[..., Any]
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


def talk(running: Running, data: bytes) -> Reply:
    async def main() -> Reply:
        async with running() as mesh:
            reply = await raw(mesh.admin_address, data)
            assert (await ask(mesh.admin_address, "/healthz")).status == 200, "the server goes on"
            return reply

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (GET + b"X: " + b"a" * 20000 + b"\r\n\r\n", 431),
        (b"POST /v1/drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048577\r\n\r\n", 413),
        (
            b"POST /v1/drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
            + b"9" * 20
            + b"\r\n\r\n",
            413,
        ),
        (
            b"POST /v1/drain HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"80000\r\n"
            + b"a" * 0x80000
            + b"\r\n"
            + b"90000\r\n"
            + b"a" * 0x90000
            + b"\r\n0\r\n\r\n",
            413,
        ),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /healthz\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (GET + b"Host: other\r\n\r\n", 400),
        (GET + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (GET + b"Content-Length: -1\r\n\r\n", 400),
        (GET + b"Bad Header: x\r\n\r\n", 400),
        (GET + b"X: a\x00b\r\n\r\n", 400),
        (b"POST /v1/drain HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    ],
)
def test_what_is_refused(running: Running, data: bytes, status: int) -> None:
    reply = talk(running, data)
    assert reply.status == status, reply.raw
    assert reply.headers["connection"] == "close"


def test_many_requests_on_one_connection(running: Running) -> None:
    reply = talk(running, (GET + b"\r\n") * 3 + GET + b"Connection: close\r\n\r\n")
    assert reply.raw.count(b"HTTP/1.1 200") == 4


def test_a_body_is_waited_for_and_100_continue_is_said(running: Running) -> None:
    async def main() -> None:
        async with running() as mesh:
            reader, writer = await connect(mesh.admin_address)
            writer.write(
                b"POST /v1/reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
                b"Expect: 100-continue\r\nConnection: close\r\n\r\n"
            )
            assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(
                b"HTTP/1.1 100"
            )
            writer.write(b"{}")
            assert (await asyncio.wait_for(reader.read(-1), 5)).startswith(b"HTTP/1.1 200")
            writer.close()

    asyncio.run(main())


def test_connections_are_bounded_and_come_free_again(running: Running) -> None:
    async def main() -> None:
        async with running() as mesh:
            held = [await connect(mesh.admin_address) for _ in range(limits.ADMIN_CONNECTIONS_MAX)]
            # One answer on the last one proves that all before it were accepted.
            held[-1][1].write(GET + b"\r\n")
            await asyncio.wait_for(held[-1][0].readuntil(b"ok\n"), 5)
            assert (await raw(mesh.admin_address, GET + b"\r\n")).status == 0
            for _, writer in held:
                writer.close()
            until = asyncio.get_running_loop().time() + 5
            while (await raw(mesh.admin_address, GET + b"Connection: close\r\n\r\n")).status != 200:
                assert asyncio.get_running_loop().time() < until

    asyncio.run(main())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /healthz HT",
        b"POST /v1/drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nab",
    ],
    ids=["silence", "half a head", "half a body"],
)
def test_slowness_ends(running: Running, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(limits, "ADMIN_HEAD_TIMEOUT_S", 0.1)

    async def main() -> None:
        async with running() as mesh:
            reply = await raw(mesh.admin_address, data, timeout_s=3)
            assert reply.status in (0, 408)
            assert mesh.state == "serving", "half a request has no effect"

    asyncio.run(main())


def test_stopping_does_not_wait_for_idle_connections(running: Running) -> None:
    async def main() -> None:
        async with running() as mesh:
            reader, writer = await connect(mesh.admin_address)
            writer.write(GET + b"\r\n")
            await asyncio.wait_for(reader.readuntil(b"ok\n"), 5)
            await asyncio.wait_for(mesh.stop(), 2)
            writer.close()

    asyncio.run(main())
