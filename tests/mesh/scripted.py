"""Push clients and brokers that do what a test says, over real sockets and frames of _ext.push."""

from __future__ import annotations

import asyncio
import itertools
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastmesh._ext import push
from fastmesh._ext.push import Push

FRAME_BYTES_MAX = 1 << 20
HEARTBEAT_ACK = struct.Struct(">BBHBIBHHHI")
Answer = Callable[[Push], Mapping[str, str] | None]


async def until(condition: Callable[[], bool | Awaitable[bool]], timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while True:
        found = condition()
        if not isinstance(found, bool):
            found = await found
        if found:
            return
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.005)


def consume(asked: Push) -> Mapping[str, str]:
    return {"fm.result": "consumed"}


class Conversation:
    """One end of a connection: asks, and answers what it is asked with `answer` (None = not)."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answer
    ) -> None:
        self.answer = answer
        self.asked: list[Push] = []
        self.closed = False
        self._reader, self._writer = reader, writer
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Push]] = {}
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        rest = b""
        try:
            while data := await self._reader.read(65536):
                frames, used = push.split(rest + data, FRAME_BYTES_MAX)
                rest = (rest + data)[used:]
                for frame in frames:
                    self._take(push.parse(frame))
        except OSError:
            pass
        finally:
            self.closed = True
            self._writer.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ConnectionResetError("closed"))
                    future.exception()

    def _take(self, frame: Push) -> None:
        if frame.kind == "response":
            waiting = self._waiting.pop(frame.id, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(frame)
        elif frame.kind == "heartbeat":
            self._writer.write(HEARTBEAT_ACK.pack(1, 0, 0, 1, frame.id, 1, 0, 0, 0, 0))
        elif frame.kind in ("request", "oneway"):
            self.asked.append(frame)
            said = self.answer(frame)
            if said is not None and frame.kind == "request":
                self._writer.write(push.response(frame.id, frame.hint, said))

    def say(self, asked: Push, **fields: str) -> None:
        """Answer late what was not answered at once."""
        said = {f"fm.{k}": v for k, v in fields.items()}
        self._writer.write(push.response(asked.id, asked.hint, said))

    def ask_soon(
        self, headers: Mapping[str, str], content: bytes = b"", *, timeout_ms: int = 5000
    ) -> asyncio.Future[Push]:
        number = next(self._ids)
        future: asyncio.Future[Push] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._writer.write(push.request(number, headers, content, timeout_ms=timeout_ms))
        return future

    async def ask(self, content: bytes = b"", **fields: str) -> Push:
        headers = {f"fm.{k}": v for k, v in fields.items()}
        return await asyncio.wait_for(self.ask_soon(headers, content), 5)

    def expect(self, number: int) -> asyncio.Future[Push]:
        """The answer to something written as bytes."""
        future: asyncio.Future[Push] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        return future

    def write(self, data: bytes) -> None:
        """Bytes as they are."""
        self._writer.write(data)

    def of(self, op: str) -> list[Push]:
        """What it was asked, of one kind."""
        return [frame for frame in self.asked if frame.headers.get("fm.op") == op]

    async def close(self) -> None:
        self._writer.transport.abort()
        await asyncio.wait([self._task], timeout=5)


async def client(
    address: str, name: str, groups: str = "", *, app: str = "shop", answer: Answer = consume
) -> Conversation:
    """A push client that said hello and named its groups."""
    host, _, port = address.rpartition(":")
    found = Conversation(*await asyncio.open_connection(host, int(port)), answer)
    reply = await found.ask(op="hello", protocol="1", app=app, client=name)
    assert reply.headers.get("fm.result") == "consumed", reply
    if groups:
        reply = await found.ask(op="subscribe", group=groups)
        assert reply.headers.get("fm.result") == "consumed", reply
    return found


class Broker:
    """Takes everything, remembers what it was told, and delivers when a test says so."""

    def __init__(self, name: str = "b1") -> None:
        self.name = name
        self.answer: Answer = self.take
        self.links: list[Conversation] = []
        self.port = 0
        self._server: Any = None

    def take(self, asked: Push) -> Mapping[str, str]:
        if asked.headers.get("fm.op") == "publish":
            return {
                "fm.result": "consumed",
                "fm.id": asked.headers.get("fm.id", ""),
                "fm.broker": self.name,
            }
        return {"fm.result": "consumed", "fm.protocol": "1"}

    async def __aenter__(self) -> Broker:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        for link in self.links:
            await link.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.links.append(Conversation(reader, writer, self._answer))

    def _answer(self, asked: Push) -> Mapping[str, str] | None:
        return self.answer(asked)  # as it is by then

    @property
    def link(self) -> Conversation:
        return next(link for link in reversed(self.links) if not link.closed)

    def told(self) -> dict[str, str]:
        """The last announce on the connection that is open."""
        found = [] if not self.links else self.links[-1].of("announce")
        return found[-1].headers if found else {}

    def groups(self) -> dict[str, int]:
        """Announced groups -> credit."""
        told = self.told()
        names = [n for n in told.get("fm.group", "").split(",") if n]
        credits = [int(n) for n in told.get("fm.prefetch", "").split(",") if n]
        return dict(zip(names, credits, strict=True))

    async def deliver(self, group: str, number: int = 1, **fields: str) -> Push:
        headers = {
            "fm.op": "deliver",
            "fm.topic": "orders",
            "fm.group": group,
            "fm.id": f"m{number}",
            "fm.attempt": "1",
        } | {f"fm.{k}": v for k, v in fields.items()}
        return await asyncio.wait_for(self.link.ask_soon(headers, b"body"), 10)
