"""One connection to the mesh: frames out, frames in, answers matched to what was asked.

It knows requests, answers and heartbeats, and nothing of groups, topics or reconnecting. Whatever
breaks the protocol, and silence, end the connection; everything asked and unanswered then fails,
told apart by whether its bytes had been handed to the socket.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import cast

from fastmesh import limits
from fastmesh._ext import bolt, push
from fastmesh._ext.push import Push
from fastmesh.address import Address
from fastmesh.client.address import connect
from fastmesh.client.model import Stats

log = logging.getLogger("fastmesh.client")

_ID_MAX = 2**30
"""Ids wrap here: SOFABolt and sofa-bolt-node read them as signed numbers."""


class NotSentError(Exception):
    """The connection went before a byte of the request was handed to the socket."""


class UnansweredError(Exception):
    """The request was sent and its answer did not come: in time, or before the connection went."""


class _Asked:
    __slots__ = ("answer", "sent", "timer")

    def __init__(self, answer: asyncio.Future[Push]) -> None:
        self.answer = answer
        self.sent = False
        self.timer: asyncio.TimerHandle | None = None


class Link(asyncio.Protocol):
    """Made by `Link.open()`.

    `on_request(link, frame)` gets each request of the mesh; it must not block, and answers by
    `link.answer()`, now or later. `on_end(link)` is called when the link leaves, when it is lost
    and when it is gone: from the first on, nothing may be asked here.
    """

    def __init__(
        self,
        *,
        on_request: Callable[[Link, Push], None],
        on_end: Callable[[Link], None],
        stats: Stats,
        heartbeat_ms: int,
        frame_bytes_max: int,
    ) -> None:
        self._stats = stats
        self._on_request = on_request
        self._on_end = on_end
        self._heartbeat_s = heartbeat_ms / 1000
        self._frame_bytes_max = frame_bytes_max
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._out: list[tuple[bytes, _Asked | None]] = []
        self._out_bytes = 0
        self._flushing = False
        self._asked: dict[int, _Asked] = {}
        self._owed = 0
        self._last_id = 0
        self._heard = True
        self._beating = False
        self._beat_timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self.lost = asyncio.Event()
        """Set when the connection is of no use any more; `reason` says why."""
        self.gone = asyncio.Event()
        """Set when its socket is closed as well."""
        self.reason = "not connected"
        self.leaving = False
        """The mesh said goaway, or we did: nothing new is asked here."""
        self._close_when_idle = False

    @classmethod
    async def open(
        cls,
        address: Address,
        *,
        on_request: Callable[[Link, Push], None],
        on_end: Callable[[Link], None],
        stats: Stats,
        heartbeat_ms: int,
        frame_bytes_max: int,
    ) -> Link:
        """Raises OSError, TimeoutError included."""
        async with asyncio.timeout(limits.CLIENT_CONNECT_TIMEOUT_MS / 1000):
            return await connect(
                address,
                lambda: cls(
                    on_request=on_request,
                    on_end=on_end,
                    stats=stats,
                    heartbeat_ms=heartbeat_ms,
                    frame_bytes_max=frame_bytes_max,
                ),
            )

    # --- asking -----------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests of ours that are not answered."""
        return len(self._asked)

    async def ask(
        self, headers: Mapping[str, str], content: bytes = b"", *, deadline: float
    ) -> Push:
        """The answer, whatever it says. `deadline` is a time of the loop's clock.

        Raises NotSentError, UnansweredError; ValueError when the headers do not fit a frame.
        """
        # Again after each wait: of many that were woken, the first may fill the buffer anew.
        while not self._writable.is_set() and not self.lost.is_set():
            await self._wait_writable(deadline)
        if self.lost.is_set() or self.leaving:
            raise NotSentError(self.reason if self.lost.is_set() else "the connection is closing")
        id = self._new_id()
        timeout_ms = max(1, int((deadline - self._loop.time()) * 1000))
        frame = push.request(id, headers, content, timeout_ms=timeout_ms)
        asked = _Asked(self._loop.create_future())
        asked.timer = self._loop.call_at(deadline, self._expire, asked)
        self._asked[id] = asked
        self._send(frame, asked)
        try:
            return await asked.answer
        finally:
            asked.timer.cancel()
            if self._asked.get(id) is asked:
                del self._asked[id]
            self._close_if_idle()

    async def _wait_writable(self, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._writable.wait()
        except TimeoutError:
            raise NotSentError("the mesh did not read in time") from None

    def _new_id(self) -> int:
        id = self._last_id % _ID_MAX + 1
        while id in self._asked:
            id = id % _ID_MAX + 1
        self._last_id = id
        return id

    @staticmethod
    def _expire(asked: _Asked) -> None:
        if not asked.answer.done():
            asked.answer.set_exception(
                UnansweredError("no answer within the deadline")
                if asked.sent
                else NotSentError("the deadline came before it was sent")
            )

    def tell(self, headers: Mapping[str, str]) -> None:
        """A one-way request; into the void when the connection is gone."""
        self._send(push.request(self._new_id(), headers, oneway=True))

    def answer(self, frame: Push, headers: Mapping[str, str]) -> bool:
        """Once for each frame of kind "request". False when the connection is lost, and so nobody
        hears it."""
        if self.lost.is_set():
            return False
        self._send(push.response(frame.id, frame.hint, headers))
        self._owed -= 1
        self._close_if_idle()
        return True

    # --- writing: what is said in one turn of the loop leaves in one system call ------------------

    def _send(self, data: bytes, asked: _Asked | None = None) -> None:
        if self.lost.is_set():
            return
        self._out.append((data, asked))
        self._out_bytes += len(data)
        if self._out_bytes >= limits.CLIENT_WRITE_BYTES_MAX:
            self._flush()  # now, so that what follows in this turn feels the mesh's pace
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._transport is None or not self._out or self.lost.is_set():
            return
        out = []
        for data, asked in self._out:
            if asked is not None:
                if asked.answer.done():
                    continue  # cancelled or expired meanwhile: never sent, and that is certain
                asked.sent = True
            out.append(data)
        self._out.clear()
        self._out_bytes = 0
        if out:
            self._transport.write(b"".join(out))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # --- reading ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are of no class of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=limits.CLIENT_WRITE_BYTES_MAX)
        self.reason = ""
        self._writable.set()
        self._beat_timer = self._loop.call_later(self._heartbeat_s, self._beat)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        if self.lost.is_set():
            return
        try:
            if self._buffer:
                self._buffer += data
                frames, consumed = push.split(self._buffer, self._frame_bytes_max)
                del self._buffer[:consumed]
            else:
                frames, consumed = push.split(data, self._frame_bytes_max)
                self._buffer += data[consumed:]
            for frame in frames:
                self._frame(frame)
        except ValueError as error:
            log.error("what came from the mesh is no frame of the protocol: %s", error)
            self.abort(f"malformed: {error}")

    def _frame(self, data: bytes) -> None:
        frame = push.parse(data)
        if frame.kind == "response":
            asked = self._asked.pop(frame.id, None)
            if asked is None or asked.answer.done():
                self._stats.answers_late += 1
            else:
                asked.answer.set_result(frame)
        elif frame.kind in ("request", "oneway"):
            if frame.kind == "request":
                self._owed += 1
            self._on_request(self, frame)
        elif frame.kind == "heartbeat":
            self._send(bolt.heartbeat_ack(data))
        # A heartbeat's answer has done its work by being heard, and go-away frames of other
        # meshes are not for clients.

    def _beat(self) -> None:
        if self.lost.is_set():
            return
        if not self._heard and self._beating:
            self.abort("the mesh is silent")
            return
        # One interval in silence is asked about; the next one ends it.
        self._beating = not self._heard
        if self._beating:
            self._send(bolt.heartbeat(self._new_id()))
        self._heard = False
        self._beat_timer = self._loop.call_later(self._heartbeat_s, self._beat)

    # --- ending -----------------------------------------------------------------------------------

    def connection_lost(self, error: Exception | None) -> None:
        self._end(str(error) if error else "closed by the mesh")
        self.gone.set()
        self._on_end(self)

    def _end(self, reason: str) -> None:
        if self.lost.is_set():
            return
        self.reason = reason
        self.lost.set()
        self._on_end(self)
        self._writable.set()
        if self._beat_timer is not None:
            self._beat_timer.cancel()
        for asked in self._asked.values():
            if not asked.answer.done():
                asked.answer.set_exception(
                    UnansweredError(f"the connection was lost: {reason}")
                    if asked.sent
                    else NotSentError(f"the connection was lost: {reason}")
                )
        self._out.clear()
        self._buffer.clear()

    def leave(self) -> None:
        """Asks nothing more; closes by itself when nothing is owed on either side."""
        if not self.leaving:
            self.leaving = self._close_when_idle = True
            self._on_end(self)
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._close_when_idle and not self._asked and not self._owed and not self.lost.is_set():
            self._flush()
            if self._transport is not None:
                self._transport.close()

    async def close(self, timeout_s: float) -> None:
        """Says what is still to be said, then closes; aborts when the mesh does not take it."""
        self._flush()
        self.leaving = True
        if self._transport is None:
            return
        self._transport.close()
        try:
            async with asyncio.timeout(timeout_s):
                await self.gone.wait()
        except TimeoutError:
            self.abort("closed")
            await self.gone.wait()
        except asyncio.CancelledError:
            self.abort("closed")
            raise

    def abort(self, reason: str) -> None:
        """At once; `gone` is set a turn of the loop later."""
        self._end(reason)
        if self._transport is not None:
            self._transport.abort()
