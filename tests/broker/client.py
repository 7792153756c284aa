"""A connection to a broker as a mesh would have it; a test says what it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastmesh._ext.push import Push, parse, request, response, split

FRAME_BYTES_MAX = 8 << 20
WAIT_S = 10.0


class Client:
    """`requests` holds what the broker asks; answers are matched by id."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self._waiting: dict[int, asyncio.Future[Push]] = {}
        self._id = 0
        self._epoch = 0
        self.requests: asyncio.Queue[Push] = asyncio.Queue()
        self.goaway = asyncio.Event()
        self.closed = asyncio.Event()
        self._task = asyncio.ensure_future(self._read())

    @classmethod
    async def open(cls, address: Any, name: str = "n1") -> Client:
        client = cls(*await asyncio.open_connection(address.host, address.port))
        try:
            said = await client.ask({"fm.op": "hello", "fm.protocol": "1", "fm.client": name})
        except BaseException:
            await client.close()
            raise
        assert said["fm.result"] == "consumed", said
        return client

    async def _read(self) -> None:
        rest = b""
        try:
            while data := await self._reader.read(1 << 16):
                frames, used = split(rest + data, FRAME_BYTES_MAX)
                rest = (rest + data)[used:]
                for frame in frames:
                    self._take(parse(frame))
        except OSError:
            pass
        self.closed.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionError("closed"))
                future.exception()  # whoever waits is told; where nobody does, nobody is

    def _take(self, push: Push) -> None:
        if push.kind == "response":
            future = self._waiting.pop(push.id, None)
            if future is not None and not future.done():
                future.set_result(push)
        elif push.headers.get("fm.op") == "goaway":
            self.goaway.set()
        elif push.kind == "request":
            self.requests.put_nowait(push)

    def send(self, headers: Mapping[str, str], content: bytes = b"") -> asyncio.Future[Push]:
        self._id += 1
        future = asyncio.get_running_loop().create_future()
        self._waiting[self._id] = future
        self._write(request(self._id, headers, content))
        return future

    async def ask(self, headers: Mapping[str, str], content: bytes = b"") -> dict[str, str]:
        async with asyncio.timeout(WAIT_S):
            return (await self.send(headers, content)).headers

    def _write(self, data: bytes) -> None:
        """Raises ConnectionError on a connection that has ended."""
        if self.closed.is_set() or self.writer.is_closing():
            raise ConnectionError("closed")
        self.writer.write(data)

    def send_publish(self, id: str, content: bytes = b"x", **more: str) -> asyncio.Future[Push]:
        said = {"fm.op": "publish", "fm.topic": "orders", "fm.id": id}
        return self.send(said | {f"fm.{key}": text for key, text in more.items()}, content)

    async def publish(self, id: str, content: bytes = b"x", **more: str) -> dict[str, str]:
        async with asyncio.timeout(WAIT_S):
            return (await self.send_publish(id, content, **more)).headers

    async def announce(
        self,
        group: str = "g",
        *,
        topic: str = "orders",
        prefetch: int = 100,
        role: str = "subscribe",
    ) -> None:
        self._epoch += 1
        said = await self.ask(
            {
                "fm.op": "announce",
                "fm.epoch": str(self._epoch),
                "fm.group": group,
                "fm.topic": topic,
                "fm.role": role,
                "fm.prefetch": str(prefetch),
                "fm.mode": "cluster",
                "fm.ordered": "0",
            }
        )
        assert said["fm.result"] == "consumed", said

    async def request(self) -> Push:
        async with asyncio.timeout(WAIT_S):
            return await self.requests.get()

    def answer(self, push: Push, result: str = "consumed", **more: str) -> None:
        said = {"fm.result": result} | {f"fm.{key}": text for key, text in more.items()}
        self._write(response(push.id, push.hint, said))

    async def consume(self, count: int) -> list[str]:
        """The ids of the next so many deliveries, each answered with consumed."""
        found = []
        for _ in range(count):
            push = await self.request()
            found.append(push.headers["fm.id"])
            self.answer(push)
        return found

    def abort(self) -> None:
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        self._task.cancel()
        await asyncio.wait([self._task])
