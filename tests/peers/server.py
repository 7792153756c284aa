"""A Bolt service for tests: honest by default, hostile by choice, in process or as a process.

A behaviour is a function of (connection, frame), called for each request and oneway. The log gets
every body before its behaviour runs, as a real service would have begun to execute it.

    python -m tests.peers.server --listen 127.0.0.1:0 --behave echo --log FILE

prints its address on one line and serves until its standard input ends; the log then survives even
a kill -9, because each record is written before the answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import uvloop

from tests.peers.sockets import parse_address, reset
from tests.reference import bolt
from tests.sim.ledger import HEAD, Operation, decode

Behaviour = Callable[["ServerConnection", bolt.Frame], None]
Log = Callable[[bytes], object]


class ServerConnection(asyncio.Protocol):
    """One connection that the service accepted; here that is one upstream connection of the
    mesh."""

    def __init__(self, server: BoltServer) -> None:
        self.server = server
        self.transport: asyncio.Transport
        self.reader = bolt.FrameReader()
        self.heartbeats = 0
        self.requests = 0
        self.closed = False
        self.pushed: dict[int, asyncio.Future[bolt.Frame]] = {}
        self.answered_pushes: list[bolt.Frame] = []
        self._push_ids = itertools.count(1)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.server.connections.add(self)
        self.server.empty.clear()
        self.server.accepted += 1
        if self.server.on_connect is not None:
            self.server.on_connect(self)

    def data_received(self, data: bytes) -> None:
        self.server.bytes_in += len(data)
        try:
            found = self.reader.feed(data)
        except ValueError as error:
            self.server.malformed.append(str(error))
            self.transport.abort()
            return
        for frame in found:
            if self.closed:
                return
            self._received(frame)

    def _received(self, frame: bolt.Frame) -> None:
        if frame.kind == bolt.HEARTBEAT:
            self.heartbeats += 1
            self.server.heartbeats += 1
            if self.server.answer_heartbeats:
                self.write(bolt.mesh_heartbeat_ack(frame))
        elif frame.kind in (bolt.REQUEST, bolt.ONEWAY):
            self.requests += 1
            self.server.requests += 1
            self.server.log(frame.content)
            self.server.behave(self, frame)
        elif frame.kind == bolt.RESPONSE:
            self.answered_pushes.append(frame)
            future = self.pushed.pop(frame.id, None)
            if future is not None and not future.done():
                future.set_result(frame)

    def write(self, data: bytes) -> None:
        if not self.closed:
            self.transport.write(data)

    def push(
        self, content: bytes, *, request_id: int | None = None, timeout_ms: int = 3000
    ) -> asyncio.Future[bolt.Frame]:
        """A request of the service to whoever is at the other end."""
        rid = next(self._push_ids) if request_id is None else request_id
        future: asyncio.Future[bolt.Frame] = asyncio.get_running_loop().create_future()
        self.pushed[rid] = future
        self.write(bolt.request(rid, "push", content, timeout_ms=timeout_ms))
        return future

    def eof_received(self) -> bool:
        self.server.half_closed += 1
        return self.server.answers_after_eof

    def reset(self) -> None:
        self.closed = True
        reset(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.server.connections.discard(self)
        if not self.server.connections:
            self.server.empty.set()
        for future in self.pushed.values():
            if not future.done():
                future.set_exception(ConnectionError("closed"))
                future.exception()


class BoltServer:
    """`address` is what the configuration wants; `held` is what `hold` parked, for `release`."""

    def __init__(self, behave: Behaviour | None = None, *, log: Log | None = None) -> None:
        self.behave: Behaviour = behave or echo
        self.log: Log = log or (lambda _body: None)
        self.connections: set[ServerConnection] = set()
        self.held: list[tuple[ServerConnection, bolt.Frame]] = []
        self.answer_heartbeats = True
        self.on_connect: Callable[[ServerConnection], None] | None = None
        self.accepted = 0
        self.requests = 0
        self.heartbeats = 0
        self.bytes_in = 0
        self.half_closed = 0
        self.answers_after_eof = False
        self.malformed: list[str] = []
        self.address = ""
        self._server: asyncio.Server | None = None
        self.empty = asyncio.Event()
        self.empty.set()

    async def start(self, address: str = "127.0.0.1:0") -> BoltServer:
        loop = asyncio.get_running_loop()
        where = parse_address(address)
        if isinstance(where, str):
            self._server = await loop.create_unix_server(lambda: ServerConnection(self), where)
            self.address = address
        else:
            host, port = where
            # A backlog that holds a thundering herd: SYN cookies and retries would blur the timing.
            self._server = await loop.create_server(
                lambda: ServerConnection(self), host, port, backlog=1024
            )
            bound = self._server.sockets[0].getsockname()[1]
            self.address = f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"
        return self

    async def __aenter__(self) -> BoltServer:
        return self if self._server is not None else await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self, *, with_reset: bool = False) -> None:
        """Stop listening and end every connection. The address can be started again."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            if with_reset:
                connection.reset()
            else:
                connection.transport.abort()
        await self.empty.wait()

    def release(self, behave: Behaviour | None = None) -> int:
        """Answer what is held, oldest first. Returns how many that were."""
        held, self.held = self.held, []
        for connection, frame in held:
            (behave or echo)(connection, frame)
        return len(held)


# --- behaviours ---------------------------------------------------------------------------------


def echo(connection: ServerConnection, frame: bolt.Frame) -> None:
    """The honest one: the body goes back as it came."""
    if frame.kind == bolt.REQUEST:
        connection.write(bolt.response_to(frame, frame.content))


def never(connection: ServerConnection, frame: bolt.Frame) -> None:
    """Accepts and never answers."""


def hold(connection: ServerConnection, frame: bolt.Frame) -> None:
    """Keeps the request until the test says `release`."""
    connection.server.held.append((connection, frame))


def late(delay_s: float) -> Behaviour:
    def behave(connection: ServerConnection, frame: bolt.Frame) -> None:
        asyncio.get_running_loop().call_later(delay_s, echo, connection, frame)

    return behave


def twice(connection: ServerConnection, frame: bolt.Frame) -> None:
    echo(connection, frame)
    echo(connection, frame)


def with_id(change: Callable[[int], int], *, then_echo: bool) -> Behaviour:
    """Answers under an id that nobody asked with, then (perhaps) honestly."""

    def behave(connection: ServerConnection, frame: bolt.Frame) -> None:
        connection.write(
            bolt.patch_id(bolt.response_to(frame, frame.content), change(frame.id) & 0xFFFFFFFF)
        )
        if then_echo:
            echo(connection, frame)

    return behave


def as_request(connection: ServerConnection, frame: bolt.Frame) -> None:
    """Answers with the request bit set: the mesh must take it for a request of the server."""
    connection.write(bolt.request(frame.id, "push", frame.content))
    echo(connection, frame)


def with_status(status: int) -> Behaviour:
    def behave(connection: ServerConnection, frame: bolt.Frame) -> None:
        connection.write(bolt.response_to(frame, frame.content, status=status))

    return behave


def cut_after(size: int, *, with_reset: bool) -> Behaviour:
    """Sends the first `size` bytes of an answer and ends the connection."""

    def behave(connection: ServerConnection, frame: bolt.Frame) -> None:
        connection.write(bolt.response_to(frame, frame.content)[:size])
        if with_reset:
            connection.closed = True
            # RST overtakes bytes that are still queued here, so it waits for the buffer to empty.
            _when_flushed(connection, lambda: reset(connection.transport))
        else:
            connection.closed = True
            connection.transport.close()

    return behave


def _when_flushed(connection: ServerConnection, action: Callable[[], None]) -> None:
    if connection.transport.get_write_buffer_size() == 0:
        action()
    else:
        asyncio.get_running_loop().call_later(0.001, _when_flushed, connection, action)


def slow_reader(connection: ServerConnection, frame: bolt.Frame) -> None:
    """Stops reading with the first request; what it has read it holds."""
    hold(connection, frame)
    with contextlib.suppress(RuntimeError):
        connection.transport.pause_reading()


BEHAVIOURS: dict[str, Behaviour] = {
    "echo": echo,
    "never": never,
    "hold": hold,
    "twice": twice,
    "slow_reader": slow_reader,
}

# --- as a process -------------------------------------------------------------------------------


class FileLog:
    """Operations as fixed records. Unbuffered, so that a kill -9 loses none that was answered."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("ab", buffering=0)

    def __call__(self, body: bytes) -> None:
        if decode(body) is not None:
            self._file.write(body[: HEAD.size])


def read_log(path: Path) -> Iterator[Operation]:
    for fields in HEAD.iter_unpack(path.read_bytes()):
        yield Operation(*fields[1:])


class ServerProcess:
    """The service in its own process: `kill()` it, or leave the block to end it."""

    def __init__(
        self, behave: str = "echo", *, listen: str = "127.0.0.1:0", log: Path | None = None
    ) -> None:
        self.behave = behave
        self.listen = listen
        self.log = log
        self.address = ""
        self.process: asyncio.subprocess.Process

    async def __aenter__(self) -> ServerProcess:
        await self.start()
        return self

    async def start(self) -> None:
        arguments = ["--listen", self.listen, "--behave", self.behave]
        if self.log is not None:
            arguments += ["--log", str(self.log)]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.peers.server",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), 10)
        assert line, "the test service did not start"
        self.address = line.decode().strip()
        self.listen = self.address  # a second start takes the same place

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            await self.kill()


def _when_stdin_ends() -> Awaitable[None]:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def readable() -> None:
        if not os.read(0, 4096) and not ended.done():
            ended.set_result(None)

    loop.add_reader(0, readable)
    return ended


async def _serve(listen: str, behave: str, log: Path | None) -> None:
    server = BoltServer(BEHAVIOURS[behave], log=FileLog(log) if log else None)
    await server.start(listen)
    print(server.address, flush=True)
    await _when_stdin_ends()
    await server.stop()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--behave", choices=sorted(BEHAVIOURS), default="echo")
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    uvloop.run(_serve(options.listen, options.behave, options.log))


if __name__ == "__main__":
    main()
