"""The bounds of the HTTP server: what is too large, too slow, too many or no HTTP at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop

from fastmesh import limits
from fastmesh.address import Address
from fastmesh.control.listeners import bind
from fastmesh.http.gate import Gate
from fastmesh.http.server import Answer, HttpServer, Request
from fastmesh.observe.log import Log
from tests.admin.http import Reply, ask, connect, raw
from tests.conftest import LogLines

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


# --- hand-over ------------------------------------------------------------------------------------


@dataclass
class Local:
    """Who may ask: everybody on this host."""

    listen: Address
    token: None = None
    hosts: tuple[str, ...] = ()


class Slow:
    """Answers when the gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = 0
        self.tasks: list[asyncio.Task[Any] | None] = []

    async def __call__(self, request: Request) -> Answer:
        self.asked += 1
        self.tasks.append(asyncio.current_task())
        await self.gate.wait()
        return Answer(200, b"done\n")


class Two:
    """A socket that one server after the other accepts on."""

    def __init__(self, kind: str, folder: Path, log: Log) -> None:
        address = Address("127.0.0.1", 0)
        if kind == "unix":
            address = Address(path=str(folder / "a.sock"))
        self.bound = bind(address, "x")
        self.at = self.bound.actual
        self.slow, self.other = Slow(), Slow()
        self.old, self.new = (
            HttpServer("x", Gate(Local(self.at)), handler, log)
            for handler in (self.slow, self.other)
        )

    async def close(self) -> None:
        await self.old.close()
        await self.new.close()
        self.bound.close()


def both(main: Callable[[Two], Coroutine[Any, Any, None]], kind: str, two: Two) -> None:
    async def run() -> None:
        await two.old.start(two.bound.sock)
        try:
            await main(two)
        finally:
            await two.close()

    (uvloop.run if kind.startswith("uv") else asyncio.run)(run())


@pytest.fixture(params=["tcp", "unix", "uv-tcp"])
def held(
    request: pytest.FixtureRequest, tmp_path: Path, log_lines: LogLines
) -> Callable[[Callable[[Two], Coroutine[Any, Any, None]]], None]:
    kind = request.param
    return lambda main: both(main, kind, Two(kind.removeprefix("uv-"), tmp_path, log_lines.log))


Held = Callable[[Callable[[Two], Coroutine[Any, Any, None]]], None]


def test_connects_wait_for_whoever_accepts_in_the_end(held: Held) -> None:
    async def main(two: Two) -> None:
        assert (await ask(two.at, "/")).body == b"done\n"
        assert await two.old.hold(1.0) == 0
        waiting = [asyncio.ensure_future(ask(two.at, f"/{n}")) for n in range(5)]
        await two.new.start(two.bound.sock)
        assert [reply.status for reply in await asyncio.gather(*waiting)] == [200] * 5
        assert (two.slow.asked, two.other.asked) == (1, 5)
        await two.old.close()
        assert (await ask(two.at, "/")).status == 200, "the socket is not the server's"

    held(main)


def test_a_server_that_was_held_goes_on(held: Held) -> None:
    async def main(two: Two) -> None:
        for _ in range(3):
            await two.old.hold(1.0)
            waiting = asyncio.ensure_future(ask(two.at, "/"))
            await two.old.resume()
            await two.old.resume()
            assert (await waiting).status == 200
        assert two.slow.asked == 3

    held(main)


def test_an_answer_under_way_is_given_and_its_connection_closed(held: Held) -> None:
    async def main(two: Two) -> None:
        two.slow.gate.clear()
        reader, writer = await connect(two.at)
        writer.write(GET + b"\r\n")
        await until(lambda: two.slow.asked == 1)
        holding = asyncio.ensure_future(two.old.hold(5.0))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not holding.done()
        two.slow.gate.set()
        reply = Reply(await asyncio.wait_for(reader.read(-1), 5))
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await holding == 0
        writer.close()

    held(main)


def test_what_does_not_end_in_time_goes_on_and_is_counted(held: Held) -> None:
    async def main(two: Two) -> None:
        two.slow.gate.clear()
        waiting = [asyncio.ensure_future(ask(two.at, "/")) for _ in range(2)]
        await until(lambda: two.slow.asked == 2)
        assert await two.old.hold(0.01) == 2
        assert await two.old.hold(0.01, but=two.slow.tasks[:1]) == 1
        assert await two.old.hold(60, but=two.slow.tasks) == 0, "nobody waits for those"
        two.slow.gate.set()
        assert [reply.status for reply in await asyncio.gather(*waiting)] == [200, 200]
        await two.old.resume()

    held(main)


def test_quiet_connections_end_and_new_ones_may_say_what_they_came_for(held: Held) -> None:
    async def main(two: Two) -> None:
        idle, idle_writer = await connect(two.at)
        idle_writer.write(GET + b"\r\n")
        assert b"HTTP/1.1 200" in await idle.readuntil(b"done\n")
        fresh, fresh_writer = await connect(two.at)
        silent, silent_writer = await connect(two.at)
        await until(lambda: len(two.old._tasks) == 3)
        holding = asyncio.ensure_future(two.old.hold(5.0))
        await asyncio.sleep(0)
        fresh_writer.write(GET + b"\r\n")
        assert b"HTTP/1.1 200" in await asyncio.wait_for(fresh.read(-1), 5)
        assert await holding == 0
        for reader in (idle, silent):
            assert await asyncio.wait_for(reader.read(-1), 5) == b""
        await until(lambda: not two.old._tasks)
        for writer in (idle_writer, fresh_writer, silent_writer):
            writer.close()

    held(main)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < end, "not in time"
        await asyncio.sleep(0.002)
