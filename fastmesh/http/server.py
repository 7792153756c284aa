"""A small HTTP/1.1 server on h11: bounded in head, body, connections and time.

It knows nothing of what it serves: requests go to a handler that returns an answer. Requests on one
connection are served one after the other. A connection that breaks the protocol gets one answer and
is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import h11
import msgspec

from fastmesh import limits
from fastmesh._version import __version__
from fastmesh.config import Secret
from fastmesh.http.gate import Gate, Refused
from fastmesh.observe.log import Log, escape_remote

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
READ_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    """Without the query, exactly as sent: nothing is decoded, so nothing can be hidden in it."""
    query: str
    headers: dict[bytes, bytes]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = field(default=())


Handler = Callable[[Request], Awaitable[Answer]]


def to_json(value: Any) -> bytes:
    """One line; secrets redact themselves."""
    return msgspec.json.encode(value, enc_hook=_hook) + b"\n"


def _hook(value: Any) -> Any:
    if isinstance(value, Secret):
        return repr(value)
    raise NotImplementedError(type(value).__name__)


def error(status: int, reason: str, **more: Any) -> Answer:
    """`{error: reason}` and more."""
    headers = (("www-authenticate", "Bearer"),) if status == 401 else ()
    return Answer(status, to_json({"error": reason, **more}), headers=headers)


def wrong_method(*allowed: str) -> Answer:
    words = ", ".join(allowed)
    return Answer(405, error(405, f"use {words}").body, headers=(("allow", words),))


class HttpServer:
    """Serves on one listening socket from `start()` to `close()`; `name` tells it apart in the
    log."""

    def __init__(
        self,
        name: str,
        gate: Gate,
        handler: Handler,
        log: Log,
        *,
        body_bytes_max: int = limits.ADMIN_BODY_BYTES_MAX,
    ) -> None:
        self.body_bytes_max = body_bytes_max
        self._name = name
        self._gate = gate
        self._handler = handler
        self._log = log
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, sock: socket.socket) -> None:
        serve = asyncio.start_unix_server if sock.family == socket.AF_UNIX else asyncio.start_server
        self._server = await serve(self._connected, sock=sock, limit=READ_BYTES)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        sock = writer.get_extra_info("socket")
        if len(self._tasks) >= limits.ADMIN_CONNECTIONS_MAX or not self._gate.check_peer(sock):
            writer.transport.abort()
            return
        self._tasks.add(task)
        try:
            await _Conversation(self, reader, writer).run()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            # Only close() cancels, and it waits for the transport to go.
            writer.transport.abort()
        except Exception as fault:  # a fault of ours must not end the server
            self._log.limited(
                "error", f"{self._name} fault", f"{self._name} fault", error=repr(fault)
            )
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            with contextlib.suppress(OSError, RuntimeError):
                writer.close()

    async def answer(self, request: Request) -> Answer:
        try:
            self._gate.check(request.headers)
        except Refused as refused:
            self._log.limited(
                "warning",
                f"{self._name} {refused.status}",
                f"{self._name} request refused",
                status=refused.status,
                reason=refused.reason,
                path=escape_remote(request.path.encode("latin-1")),
            )
            if refused.delay_s:
                await asyncio.sleep(refused.delay_s)
            return error(refused.status, refused.reason)
        return await self._handler(request)


class _TooLarge(Exception):
    def __init__(self, status: int, most: int) -> None:
        self.status = status
        self.reason = f"at most {most} bytes"
        super().__init__(self.reason)


class _Conversation:
    """One connection."""

    def __init__(
        self, server: HttpServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.server = server
        self.reader = reader
        self.writer = writer
        self.http = h11.Connection(
            h11.SERVER, max_incomplete_event_size=limits.ADMIN_HEAD_BYTES_MAX
        )

    async def run(self) -> None:
        first_wait = limits.ADMIN_HEAD_TIMEOUT_S
        while True:
            answer = None
            try:
                request = await self.read(first_wait)
                if request is None:
                    return
                answer = await self.server.answer(request)
            except h11.RemoteProtocolError as wrong:
                answer = error(wrong.error_status_hint, "not a request we understand")
            except _TooLarge as large:
                answer = error(large.status, large.reason)
            except TimeoutError:
                if self.http.their_state is not h11.SEND_BODY:
                    return  # nothing was begun, or only a head dribbled in
                answer = error(408, "too slow")
            await self.write(answer)
            if self.http.our_state is not h11.DONE or self.http.their_state is not h11.DONE:
                # MUST_CLOSE, or a request that was refused before it was whole.
                await self.linger()
                return
            self.http.start_next_cycle()
            first_wait = limits.ADMIN_IDLE_TIMEOUT_S

    async def read(self, first_wait: float) -> Request | None:
        """The next request; None at the end of the connection."""
        head: h11.Request | None = None
        body = bytearray()
        loop = asyncio.get_running_loop()
        begun = bool(self.http.trailing_data[0])
        until = loop.time() + (limits.ADMIN_HEAD_TIMEOUT_S if begun else first_wait)
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                if self.http.they_are_waiting_for_100_continue:
                    self.send(h11.InformationalResponse(status_code=100, headers=[]))
                async with asyncio.timeout_at(until):
                    data = await self.reader.read(READ_BYTES)
                if not begun and data:
                    begun = True
                    until = min(until, loop.time() + limits.ADMIN_HEAD_TIMEOUT_S)
                self.http.receive_data(data)
            elif isinstance(event, h11.Request):
                head = event
                # h11 bounds a head that is not whole; one that came in a single read is bounded
                # here.
                if _head_bytes(event) > limits.ADMIN_HEAD_BYTES_MAX:
                    raise _TooLarge(431, limits.ADMIN_HEAD_BYTES_MAX)
                if _length(event) > self.server.body_bytes_max:
                    # Before a byte of it is read.
                    raise _TooLarge(413, self.server.body_bytes_max)
                until = loop.time() + limits.ADMIN_HEAD_TIMEOUT_S
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self.server.body_bytes_max:
                    raise _TooLarge(413, self.server.body_bytes_max)
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                return _request(head, bytes(body))
            else:  # ConnectionClosed, PAUSED
                return None

    async def write(self, answer: Answer) -> None:
        headers = [
            ("server", f"fastmesh/{__version__}"),
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            *answer.headers,
        ]
        if answer.status != 204:  # which has neither (RFC 9110, 8.6)
            headers.append(("content-type", answer.content_type))
            headers.append(("content-length", str(len(answer.body))))
        if self.http.their_state is not h11.DONE:
            headers.append(("connection", "close"))
        if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        self.send(h11.Response(status_code=answer.status, headers=headers))
        self.send(h11.Data(data=answer.body))
        self.send(h11.EndOfMessage())
        async with asyncio.timeout(limits.ADMIN_WRITE_TIMEOUT_S):
            await self.writer.drain()

    async def linger(self) -> None:
        """Give the peer a moment to read the answer: closing on unread bytes would reset it
        away."""
        if self.writer.can_write_eof():
            with contextlib.suppress(OSError):
                self.writer.write_eof()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                while await self.reader.read(READ_BYTES):
                    pass

    def send(self, event: Any) -> None:
        data = self.http.send(event)
        if data:
            self.writer.write(data)


def _head_bytes(head: h11.Request) -> int:
    return len(head.target) + sum(len(key) + len(value) + 4 for key, value in head.headers)


def _length(head: h11.Request) -> int:
    return next((int(v) for k, v in head.headers if k == b"content-length" and v.isdigit()), 0)


def _request(head: h11.Request, body: bytes) -> Request:
    path, _, query = head.target.decode("latin-1").partition("?")
    headers: dict[bytes, bytes] = {}
    for key, value in head.headers:
        # Of doubled headers the first counts; h11 has already refused a doubled Host.
        headers.setdefault(bytes(key), bytes(value))
    return Request(head.method.decode("latin-1"), path, query, headers, body)
