"""A small HTTP/1.1 server on h11: bounded in head, body, connections and time.

It knows nothing of what it serves: requests go to a handler that returns an answer. Requests on one
connection are served one after the other. A connection that breaks the protocol gets one answer and
is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Awaitable, Callable, Collection
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
    log. The socket stays its owner's, and open: what is closed here is a duplicate.

    `hold()` lets connects wait in the socket's queue, for `resume()` or for another process that
    accepts on the same socket.
    """

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
        self._sock: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._fresh: set[asyncio.Task[None]] = set()
        """Of these, whose connection has not said anything yet ..."""
        self._answering: set[asyncio.Task[None]] = set()
        """... and whose has begun a request that is not answered."""
        self._less = asyncio.Event()
        """Set whenever one of the two has become smaller."""
        self.held = False

    async def start(self, sock: socket.socket) -> None:
        self._sock = sock
        await self._accept()

    async def _accept(self) -> None:
        assert self._sock is not None
        serve: Any = asyncio.start_server
        more: dict[str, Any] = {}
        if self._sock.family == socket.AF_UNIX:
            serve = asyncio.start_unix_server
            if sys.version_info >= (3, 13):
                more["cleanup_socket"] = False  # the path is the socket's owner's
        own = self._sock.dup()
        try:
            self._server = await serve(self._connected, sock=own, limit=READ_BYTES, **more)
        except BaseException:
            own.close()
            raise

    async def hold(self, timeout_s: float, but: Collection[asyncio.Task[Any] | None] = ()) -> int:
        """Accept nothing more. Connections between two requests are closed, those that have said
        nothing yet get a moment to; answers under way are given, and their connections closed, for
        at most `timeout_s`. Returns how many requests were not answered in time, but those of the
        tasks in `but`: they go on."""
        self.held = True
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._tasks - self._answering - self._fresh:
            task.cancel()
        until = asyncio.get_running_loop().time() + timeout_s
        grace = min(until, asyncio.get_running_loop().time() + limits.HTTP_FRESH_GRACE_S)
        await self._until(lambda: not self._fresh, grace)
        for task in self._fresh:
            task.cancel()
        await self._until(lambda: not self._answering.difference(but), until)
        return len(self._answering.difference(but))

    async def _until(self, condition: Callable[[], bool], until: float) -> None:
        """The condition can only come true when something is less. Gives up at `until`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                while not condition():
                    self._less.clear()
                    await self._less.wait()

    async def resume(self) -> None:
        """Accept again."""
        self.held = False
        if self._server is None and self._sock is not None:
            await self._accept()

    def begun(self) -> None:
        """The connection of the task that runs has got the first bytes of a request."""
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        self._fresh.discard(task)
        self._less.set()

    def answered(self) -> None:
        """... and has sent the answer, or will not."""
        task = asyncio.current_task()
        assert task is not None
        self._answering.discard(task)
        self._fresh.discard(task)
        self._less.set()

    async def close(self) -> None:
        self._sock = None
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
        self._fresh.add(task)
        try:
            await _Conversation(self, reader, writer).run()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            # Only close() and hold() cancel, and they wait for the transport to go.
            if not self.held:
                writer.transport.abort()
        except Exception as fault:  # a fault of ours must not end the server
            self._log.limited(
                "error", f"{self._name} fault", f"{self._name} fault", error=repr(fault)
            )
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            self.answered()
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
            self.server.answered()
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
        if begun:
            self.server.begun()
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
                    self.server.begun()
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
        if self.http.their_state is not h11.DONE or self.server.held:
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
