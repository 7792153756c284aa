"""A Bolt client that keeps books: every operation goes through a ledger, every answer is
checked."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable
from typing import cast

from tests.peers.sockets import Address, reset
from tests.reference import bolt
from tests.sim.ledger import BODY_BYTES_MIN, Ledger, encode, new_operation

Answered = asyncio.Future[bolt.Frame]
OnRequest = Callable[["BoltClient", bolt.Frame], None]


class ClosedError(ConnectionError):
    """The connection ended before the answer came."""


class BoltClient(asyncio.Protocol):
    """One connection. `call` and `op` write at once and return a future of the answer, whatever its
    status; they wait for room in the kernel only with `drained()`.

    With `ledger`, bodies are operations of client `number`; a reconnect counts `epoch` up. Requests
    of the server go to `on_request`, which echoes unless told otherwise.
    """

    def __init__(
        self,
        number: int = 0,
        ledger: Ledger | None = None,
        *,
        proto: int = 1,
        crc: bool = False,
        on_request: OnRequest | None = None,
    ) -> None:
        self.number = number
        self.epoch = -1
        self.ledger = ledger
        self.proto = proto
        self.crc = crc
        self.on_request = on_request or echo_request
        self.next_id = 1
        self.seq = 0
        self.acks = 0
        self.heartbeats_received = 0
        self.requests_received = 0
        self.malformed = ""
        self.frames: list[bolt.Frame] = []
        self.keep_frames = False
        self.transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[None]
        self._waiting: defaultdict[int, deque[Answered]] = defaultdict(deque)
        self._room: asyncio.Event
        self._by_client = False
        self.eof_received_first = False

    # --- life ------------------------------------------------------------------------------------

    async def connect(self, address: Address) -> BoltClient:
        """Raises OSError when nobody listens there."""
        loop = asyncio.get_running_loop()
        self.epoch += 1
        self.closed = loop.create_future()
        self._room = asyncio.Event()
        self._room.set()
        self._reader = bolt.FrameReader()
        self._by_client = False
        try:
            if isinstance(address, str):
                await loop.create_unix_connection(lambda: self, address)
            else:
                await loop.create_connection(lambda: self, *address)
        except BaseException:
            self.closed.cancel()  # never opened: neither open nor worth waiting for
            raise
        return self

    async def close(self) -> None:
        self._by_client = True
        if self.is_open:
            assert self.transport is not None
            self.transport.close()
            await self.closed

    def reset(self) -> None:
        self._by_client = True
        assert self.transport is not None
        reset(self.transport)

    def shut_write(self) -> None:
        assert self.transport is not None
        self.transport.write_eof()

    def pause_reading(self) -> None:
        assert self.transport is not None
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        assert self.transport is not None
        self.transport.resume_reading()

    @property
    def is_open(self) -> bool:
        return self.transport is not None and not self.closed.done()

    async def ended(self) -> None:
        """Until a connection that is closing has closed: then, and no earlier, it may connect
        anew."""
        if self.transport is not None and self.transport.is_closing() and not self.closed.done():
            await asyncio.wait([self.closed])

    # --- asking ----------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    async def drained(self) -> None:
        """Until the transport's buffer is below its mark (or the connection has ended)."""
        await self._room.wait()

    def take_id(self) -> int:
        taken = self.next_id
        self.next_id = taken % 0x3FFFFFFF + 1  # as sofa-bolt-node wraps
        return taken

    def call(
        self,
        service: str | None,
        content: bytes = b"",
        *,
        request_id: int | None = None,
        timeout_ms: int = 3000,
        headers: dict[str, str | None] | None = None,
    ) -> Answered:
        """A request outside the ledger."""
        rid = self.take_id() if request_id is None else request_id
        future: Answered = asyncio.get_running_loop().create_future()
        self._waiting[rid].append(future)
        self.write(
            bolt.request(
                rid,
                service,
                content,
                headers=headers,
                timeout_ms=timeout_ms,
                proto=self.proto,
                crc=self.crc,
            )
        )
        return future

    def op(
        self,
        service: str | None,
        size: int = BODY_BYTES_MIN,
        *,
        request_id: int | None = None,
        timeout_ms: int = 3000,
    ) -> Answered:
        """A request in the ledger's books."""
        self._check_open()
        rid = self.take_id() if request_id is None else request_id
        return self.call(service, self._body(rid, size), request_id=rid, timeout_ms=timeout_ms)

    def oneway(self, service: str | None, size: int = BODY_BYTES_MIN) -> None:
        """A oneway in the ledger's books."""
        self._check_open()
        rid = self.take_id()
        body = self._body(rid, size, oneway=True)
        self.write(bolt.oneway(rid, service, body, proto=self.proto, crc=self.crc))

    def heartbeat(self) -> Answered:
        rid = self.take_id()
        future: Answered = asyncio.get_running_loop().create_future()
        self._waiting[rid].append(future)
        self.write(bolt.heartbeat(rid, proto=self.proto, crc=self.crc))
        return future

    def _check_open(self) -> None:
        """What is asked of a connection that has ended never entered the books."""
        if self.transport is None or self.transport.is_closing() or self.closed.done():
            raise ClosedError("closed before it was asked")

    def _body(self, rid: int, size: int, *, oneway: bool = False) -> bytes:
        assert self.ledger is not None
        op = new_operation(self.number, self.epoch, self.seq)
        self.seq += 1
        self.ledger.sent(op, rid, oneway=oneway)
        return encode(op, size)

    # --- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            found = self._reader.feed(data)
        except ValueError as error:
            self.malformed = str(error)
            if self.ledger is not None:
                self.ledger.garbage(self.number, self.epoch, self.malformed)
            assert self.transport is not None
            self.transport.abort()
            return
        for frame in found:
            self._received(frame)

    def _received(self, frame: bolt.Frame) -> None:
        if self.keep_frames:
            self.frames.append(frame)
        if frame.kind == bolt.HEARTBEAT:
            self.heartbeats_received += 1
        elif frame.kind in (bolt.REQUEST, bolt.ONEWAY):
            self.requests_received += 1
            self.on_request(self, frame)
        elif frame.kind == bolt.HEARTBEAT_ACK:
            self.acks += 1
            self._settle(frame)
        elif frame.kind == bolt.RESPONSE:
            if self.ledger is not None:
                self.ledger.outcome(self.number, self.epoch, frame.id, frame.status, frame.content)
            self._settle(frame)

    def _settle(self, frame: bolt.Frame) -> None:
        waiting = self._waiting.get(frame.id)
        if waiting:
            future = waiting.popleft()
            if not waiting:
                del self._waiting[frame.id]
            if not future.done():
                future.set_result(frame)

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def eof_received(self) -> bool:
        self.eof_received_first = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ledger is not None:
            self.ledger.ended(self.number, self.epoch, by_client=self._by_client)
        for waiting in self._waiting.values():
            for future in waiting:
                if not future.done():
                    future.set_exception(ClosedError(str(exc or "closed")))
                    future.exception()  # retrieved: not every test awaits every answer
        self._waiting.clear()
        self._room.set()
        if not self.closed.done():
            self.closed.set_result(None)


def echo_request(client: BoltClient, frame: bolt.Frame) -> None:
    """The default of `on_request`: an honest application that answers at once."""
    if frame.kind == bolt.REQUEST:
        client.write(bolt.response_to(frame, frame.content))


def ignore_request(client: BoltClient, frame: bolt.Frame) -> None:
    """An application that never answers."""
