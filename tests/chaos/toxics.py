"""A TCP proxy that harms what passes: latency, jitter, bandwidth, slicer, slow close, limit, reset,
blackhole.

Toxics are fields of `Toxics` and may change while connections live; each direction has its own. The
proxy keeps books of bytes and connections, so that a test can prove that its fault happened.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from tests.peers.sockets import reset, tcp_address

CHUNK_BYTES = 65536


@dataclass(slots=True)
class Toxics:
    """What happens to one direction. Zero and False mean: nothing."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0
    slice_bytes: int = 0
    """Each piece is at most so long, and leaves on its own."""
    slice_pause_s: float = 0.0
    slow_close_s: float = 0.0
    limit_bytes: int = -1
    """After so many bytes of a connection it is closed; with `limit_resets`, reset."""
    limit_resets: bool = False
    cut_bytes: int = -1
    """Of what comes next so many bytes pass, and the connection is closed (reset) as above."""
    blackhole: bool = False
    """Bytes vanish, the connection stays: a peer that disappeared without a FIN."""


@dataclass(slots=True)
class Books:
    """What happened to one direction, over all connections."""

    passed: int = 0
    swallowed: int = 0
    pieces: int = 0
    cut: int = 0


class _Pipe:
    """One direction of one connection."""

    def __init__(
        self,
        proxy: ToxicProxy,
        toxics: Toxics,
        books: Books,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.proxy = proxy
        self.toxics = toxics
        self.books = books
        self.reader = reader
        self.writer = writer
        self.sent = 0

    async def run(self) -> bool:
        """Until end of stream (True), or until a toxic ended the connection (False)."""
        while data := await self.reader.read(CHUNK_BYTES):
            toxics = self.toxics
            if toxics.latency_s or toxics.jitter_s:
                jitter = self.proxy.random.uniform(-toxics.jitter_s, toxics.jitter_s)
                await asyncio.sleep(max(0.0, toxics.latency_s + jitter))
            if toxics.blackhole:
                self.books.swallowed += len(data)
                continue
            if not await self._send(data):
                return False
        if self.toxics.slow_close_s:
            await asyncio.sleep(self.toxics.slow_close_s)
        return True

    async def _send(self, data: bytes) -> bool:
        toxics = self.toxics
        if toxics.cut_bytes >= 0:
            await self._write(data[: toxics.cut_bytes])
            self.books.cut += 1
            return False
        piece_bytes = toxics.slice_bytes or len(data)
        if toxics.bytes_per_s:
            # A tenth of a second's worth at a time, or a slow line would move in bursts.
            piece_bytes = max(1, min(piece_bytes, int(toxics.bytes_per_s / 10)))
        for at in range(0, len(data), piece_bytes):
            piece = data[at : at + piece_bytes]
            if 0 <= toxics.limit_bytes < self.sent + len(piece):
                piece = piece[: toxics.limit_bytes - self.sent]
                await self._write(piece)
                self.books.cut += 1
                return False
            await self._write(piece)
            if toxics.bytes_per_s:
                await asyncio.sleep(len(piece) / toxics.bytes_per_s)
            if toxics.slice_pause_s:
                await asyncio.sleep(toxics.slice_pause_s)
        return True

    async def _write(self, piece: bytes) -> None:
        if piece:
            self.writer.write(piece)
            self.sent += len(piece)
            self.books.passed += len(piece)
            self.books.pieces += 1
            await self.writer.drain()


@dataclass(eq=False)
class _Link:
    down: asyncio.StreamWriter
    up: asyncio.StreamWriter
    half_closed: bool = False


class ToxicProxy:
    """`async with ToxicProxy(target) as proxy:` then `proxy.up.latency_s = 0.1` (client to target)
    or `proxy.down` (target to client)."""

    def __init__(self, target: str, *, seed: int = 0) -> None:
        self.target = target
        self.up = Toxics()
        self.down = Toxics()
        self.up_books = Books()
        self.down_books = Books()
        self.random = random.Random(seed)
        self.accepted = 0
        self.address = ""
        self.links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, address: str = "127.0.0.1:0") -> ToxicProxy:
        where = tcp_address(address)
        self._server = await asyncio.start_server(self._accepted, *where, backlog=1024)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aenter__(self) -> ToxicProxy:
        return await self.start()

    async def refuse(self) -> None:
        """Down: new connections are refused by the kernel, those that live go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def accept_again(self) -> None:
        await self.start(self.address)

    def reset_all(self) -> int:
        """RST to both sides of every connection. Returns how many that were."""
        links, self.links = self.links, set()
        for link in links:
            reset(link.down.transport)
            reset(link.up.transport)
        return len(links)

    def half_close_all(self, *, up: bool) -> int:
        """FIN to the target (`up`) or to the client of every connection; the other direction goes
        on. Returns how many that were."""
        open_links = [link for link in self.links if not link.half_closed]
        for link in open_links:
            link.half_closed = True
            (link.up if up else link.down).write_eof()
        return len(open_links)

    async def _accepted(
        self, down_reader: asyncio.StreamReader, down: asyncio.StreamWriter
    ) -> None:
        self.accepted += 1
        where = tcp_address(self.target)
        try:
            up_reader, up = await asyncio.open_connection(*where)
        except OSError:
            down.transport.abort()
            return
        link = _Link(down, up)
        self.links.add(link)
        for task in (
            asyncio.create_task(
                self._run(_Pipe(self, self.up, self.up_books, down_reader, up), link)
            ),
            asyncio.create_task(
                self._run(_Pipe(self, self.down, self.down_books, up_reader, down), link)
            ),
        ):
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, pipe: _Pipe, link: _Link) -> None:
        try:
            ended = await pipe.run()
        except (ConnectionError, OSError, RuntimeError):
            ended = False  # (RuntimeError: what the loop says of bytes after our own FIN)
        if link not in self.links:
            return
        if not ended:
            self._end(link, resets=pipe.toxics.limit_resets)
        elif link.half_closed:
            self._end(link, resets=False)
        else:
            # The other direction goes on: a half-close passes as a half-close.
            link.half_closed = True
            try:
                pipe.writer.write_eof()
            except OSError:
                self._end(link, resets=False)

    def _end(self, link: _Link, *, resets: bool) -> None:
        self.links.discard(link)
        for writer in (link.down, link.up):
            if resets:
                reset(writer.transport)
            else:
                writer.close()

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        for link in list(self.links):
            link.down.transport.abort()
            link.up.transport.abort()
        self.links.clear()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
