"""MeshClient: registers an application with its mesh, publishes, and is called with deliveries."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Coroutine, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal

from fastmesh import limits
from fastmesh._ext.push import CLASS, Push
from fastmesh.client import address, worker
from fastmesh.client.backoff import Backoff
from fastmesh.client.connector import Connector, Owner
from fastmesh.client.errors import (
    ClosedError,
    NotTakenError,
    RejectedError,
)
from fastmesh.client.link import Link, NotSentError, UnansweredError
from fastmesh.client.model import Check, Group, Handler, Receipt, Role, Stats, check_name
from fastmesh.client.publisher import Links, Publisher
from fastmesh.client.registrar import Registrar
from fastmesh.client.transaction import Fates, Transaction
from fastmesh.client.worker import Delivery, Worker
from fastmesh.protocols import push as words

log = logging.getLogger("fastmesh.client")

State = Literal["new", "starting", "running", "closing", "closed"]


class MeshClient:
    """One application's client of the mesh beside it; for one event loop, used as `async with`.

    Entering registers, connects and subscribes; it raises RegistrationError or another
    RejectedError when the mesh refuses, and NotTakenError when that did not succeed within
    `start_timeout_ms`. From then on the client reconnects, registers and subscribes again by
    itself. Leaving is graceful, see `close()`.

    `app` and `client` name this process to the mesh; `client` must be unique within the app and
    defaults to host, process and a random part. `topics` are those published to; the topics of
    `groups` need no mention. `mesh` is `host:port` or `unix:/path`; `registration` an
    `http://host:port` or `unix:/path`, with its token where it has one, or None when somebody else
    registers this client. A registration has at least one group or topic.
    `frame_bytes_max` is the mesh's own limit. All arguments are checked here: ValueError.
    """

    def __init__(
        self,
        *,
        app: str,
        client: str | None = None,
        groups: Iterable[Group] = (),
        topics: Iterable[str] = (),
        mesh: str = "127.0.0.1:12300",
        registration: str | None = "http://127.0.0.1:7071",
        registration_token: str | None = None,
        connections: int = 1,
        lease_ms: int = limits.LEASE_MS,
        heartbeat_ms: int = limits.CLIENT_HEARTBEAT_MS,
        publish_timeout_ms: int = limits.CLIENT_PUBLISH_TIMEOUT_MS,
        start_timeout_ms: int = limits.CLIENT_START_TIMEOUT_MS,
        close_timeout_ms: int = limits.CLIENT_CLOSE_TIMEOUT_MS,
        frame_bytes_max: int = limits.CONFIGURABLE["frame_bytes_max"].default,
    ) -> None:
        self.app = app
        self.client = client if client is not None else _own_name()
        check_name("app", self.app)
        check_name("client", self.client)
        self.groups = tuple(groups)
        self._by_name = {(group.name, group.role): group for group in self.groups}
        if len(self._by_name) != len(self.groups):
            raise ValueError("groups: a name may stand there once for each role")
        self.topics = tuple(dict.fromkeys([*topics, *(group.topic for group in self.groups)]))
        for topic in self.topics:
            check_name("topic", topic)
        if registration is not None and not self.topics:
            raise ValueError("groups and topics: at least one group or topic must be registered")
        self._mesh = address.parse("mesh", mesh)
        self._registration = (
            None if registration is None else address.parse_url("registration", registration)
        )
        for what, value, low, high in (
            ("connections", connections, 1, limits.CLIENT_CONNECTIONS_MAX),
            ("lease_ms", lease_ms, limits.LEASE_MS_MIN, limits.LEASE_MS_MAX),
            ("heartbeat_ms", heartbeat_ms, 10, limits.HOUR_MS),
            ("publish_timeout_ms", publish_timeout_ms, 1, limits.DAY_MS),
            ("start_timeout_ms", start_timeout_ms, 1, limits.DAY_MS),
            ("close_timeout_ms", close_timeout_ms, 0, limits.DAY_MS),
            ("frame_bytes_max", frame_bytes_max, 1024, limits.GIB),
        ):
            if not low <= value <= high:
                raise ValueError(f"{what} {value}: {low}..{high}")
        self._token = registration_token
        self._connections = connections
        self._lease_ms = lease_ms
        self._heartbeat_ms = heartbeat_ms
        self._publish_timeout_s = publish_timeout_ms / 1000
        self._start_timeout_s = start_timeout_ms / 1000
        self._close_timeout_s = close_timeout_ms / 1000
        self._frame_bytes_max = frame_bytes_max

        self.stats = Stats()
        self._state: State = "new"
        self._ended = asyncio.Event()
        self._consumers: dict[str, Worker] = {}
        self._checkers: dict[str, Worker] = {}
        self._workers: set[Worker] = set()
        """Those two, and what was unsubscribed and still works."""
        self._fates = Fates()
        self._links = Links()
        self._open_links: set[Link] = set()
        self._publisher = Publisher(self._links, self.stats)
        self._connectors: list[Connector] = []
        self._registrar: Registrar | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._settled = asyncio.Event()
        # Unique without coordination: 80 random bits for this client, a number for the message.
        self._id_prefix = secrets.token_hex(10)
        self._id_numbers = itertools.count(1)

    # --- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> MeshClient:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """What entering does, for those who cannot use `async with`."""
        if self._state != "new":
            raise RuntimeError(f"the client is {self._state}; each is started once")
        self._state = "starting"
        try:
            await self._start()
        except BaseException:
            await self._abort()
            raise
        self._state = "running"

    async def _start(self) -> None:
        last: Exception | None = None
        try:
            async with asyncio.timeout(self._start_timeout_s):
                if self._registration is not None:
                    self._registrar = Registrar(
                        self._registration,
                        app=self.app,
                        client=self.client,
                        topics=self.topics,
                        groups=self.groups,
                        token=self._token,
                        lease_ms=self._lease_ms,
                        stats=self.stats,
                        on_forgotten=self._forgotten,
                    )
                    backoff = Backoff()
                    while True:
                        try:
                            await self._registrar.register()
                            break
                        except NotTakenError as error:
                            last = error
                            await asyncio.sleep(backoff.next_s())
                    self._spawn(self._registrar.run(), "registration")
                last = None
                owner = Owner(
                    wanted=self._wanted,
                    requested=self._requested,
                    usable=self._usable,
                    ended=self._link_ended,
                    unknown=self._unknown,
                    settled=self._settled.set,
                )
                for index in range(self._connections):
                    connector = Connector(
                        index,
                        self._mesh,
                        owner,
                        app=self.app,
                        client=self.client,
                        stats=self.stats,
                        heartbeat_ms=self._heartbeat_ms,
                        frame_bytes_max=self._frame_bytes_max,
                    )
                    self._connectors.append(connector)
                    self._spawn(connector.run(), f"connection {index}")
                await self._all_settled()
        except TimeoutError:
            failures = [last, *(c.failure for c in self._connectors if not c.ready)]
            told = "; ".join({str(f) or type(f).__name__ for f in failures if f is not None})
            raise NotTakenError(
                f"no connection to the mesh at {self._mesh} within"
                f" {self._start_timeout_s * 1000:.0f} ms: {told or 'it does not answer'}"
            ) from None

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(work, name=f"fastmesh {name}"))

    async def _all_settled(self) -> None:
        while not all(connector.ready for connector in self._connectors):
            for connector in self._connectors:
                if isinstance(connector.failure, RejectedError):
                    raise connector.failure
            self._settled.clear()
            await self._settled.wait()

    async def close(self, timeout_ms: int | None = None) -> None:
        """Takes nothing more, lets handlers finish and answer, then says goodbye.

        1. The mesh is told to deliver nothing more to this client (suspend).
        2. Handlers finish; they may still publish. What was not begun is answered "later".
        3. Publishes under way finish; new ones raise ClosedError.
        4. goaway, the connections close, the registration is removed.

        Steps 2 and 3 have `timeout_ms` (default: close_timeout_ms) together. What has not ended by
        then is cancelled and answered "later"; a plain handler's thread cannot be stopped and goes
        on by itself. Cancelling close() ends everything at once. Closing twice is closing once.
        """
        if self._state in ("closing", "closed"):
            await self._ended.wait()
            return
        if self._state == "new":
            self._state = "closed"
            self._ended.set()
            return
        self._state = "closing"
        timeout_s = self._close_timeout_s if timeout_ms is None else timeout_ms / 1000
        try:
            await self._leave(asyncio.get_running_loop().time() + timeout_s)
        finally:
            await self._abort()

    async def _leave(self, deadline: float) -> None:
        await self._end_tasks()
        links = [link for link in self._open_links if not link.leaving]
        await self._tell(links, words.SUSPEND)
        await asyncio.gather(*(found.drain(deadline) for found in self._workers))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._publisher.stop()
        self._links.close()
        await self._tell(links, words.GOAWAY)
        timeout_s = limits.CLIENT_CONTROL_TIMEOUT_MS / 1000
        await asyncio.gather(*(link.close(timeout_s) for link in list(self._open_links)))
        if self._registrar is not None:
            await self._registrar.remove(timeout_s)

    async def _tell(self, links: Iterable[Link], op: str) -> None:
        """Asked and not only told: the answer says that nothing comes any more. Whoever does not
        answer has lost the connection, or will."""
        deadline = asyncio.get_running_loop().time() + limits.CLIENT_CONTROL_TIMEOUT_MS / 1000
        asked = [link.ask({words.OP: op}, deadline=deadline) for link in links]
        for found in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(found, (NotSentError, UnansweredError)):
                log.info("%s was not answered: %s", op, found)
            elif isinstance(found, BaseException):
                raise found

    async def _abort(self) -> None:
        """What is left, at once. Also the last step of a graceful close, when nothing is."""
        self._state = "closing"
        try:
            self._links.close()
            await self._end_tasks()
            for found in self._workers:
                await found.stop()
            for link in list(self._open_links):
                link.abort("closed")
                await link.gone.wait()
        finally:
            self._state = "closed"
            self._ended.set()

    async def _end_tasks(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(found, Exception):
                log.error("a task of the client had failed", exc_info=found)

    # --- consuming --------------------------------------------------------------------------------

    def subscribe(self, group: str | Group, handler: Handler) -> None:
        """Has `handler` called with each message of the group: from the start on, or, once
        started, from when the mesh has heard of it.

        At most the group's `prefetch` handlers run at once, in an ordered group one per key. None
        or `consumed()` is success, `later()` and `reject()` are what they say, and an exception is
        logged and answered "later". A coroutine function runs on this loop and must not block it;
        a plain function runs in a thread. Raises ValueError for a group that is not this client's,
        publishes, or has a handler.
        """
        found = self._group(group, "subscribe")
        self._check_open()
        if found.name in self._consumers:
            raise ValueError(f"group {found.name!r} has a handler; unsubscribe it first")
        made = self._consumers[found.name] = worker.consumer(found, handler, self.stats)
        self._workers.add(made)
        self._look_again()

    async def unsubscribe(self, group: str | Group, timeout_ms: int | None = None) -> None:
        """Takes no more messages of the group, and lets handlers finish as close() does."""
        found = self._group(group, "subscribe")
        ending = self._consumers.pop(found.name, None)
        if ending is None:
            raise ValueError(f"group {found.name!r} has no handler")
        self._look_again()
        timeout_s = self._close_timeout_s if timeout_ms is None else timeout_ms / 1000
        try:
            await ending.drain(asyncio.get_running_loop().time() + timeout_s)
        except asyncio.CancelledError:
            await ending.stop()
            raise
        finally:
            self._workers.discard(ending)

    def check(self, group: str | Group, callback: Check) -> None:
        """Has `callback` answer the broker's question after a prepared message of this publish
        group: Fate.COMMIT when the local transaction was made, Fate.ROLLBACK when it surely never
        will be, Fate.UNKNOWN to be asked again. It must look into the application's data: the
        message may come from another process of the application, or from one that died. An
        exception counts as UNKNOWN. Plain functions run in a thread.
        """
        found = self._group(group, "publish")
        self._check_open()
        if found.name in self._checkers:
            raise ValueError(f"group {found.name!r} has a check callback")
        made = self._checkers[found.name] = worker.checker(found, callback, self.stats)
        self._workers.add(made)
        self._look_again()

    def _group(self, group: str | Group, role: Role) -> Group:
        name = group.name if isinstance(group, Group) else group
        found = self._by_name.get((name, role))
        if found is None:
            known = ", ".join(name for name, its in self._by_name if its == role) or "none"
            raise ValueError(f"group {name!r} is not one of this client's {role} groups: {known}")
        return found

    def _check_open(self) -> None:
        if self._state in ("closing", "closed"):
            raise ClosedError(f"the client is {self._state}")

    def _look_again(self) -> None:
        for connector in self._connectors:
            connector.look_again()

    # --- publishing -------------------------------------------------------------------------------

    async def publish(
        self,
        topic: str,
        content: bytes,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        colour: str | None = None,
        lane: str | None = None,
        version: str | None = None,
        trace: str | None = None,
        delay_ms: int | None = None,
        idempotent: bool = False,
        id: str | None = None,
        timeout_ms: int | None = None,
    ) -> Receipt:
        """Returns when a broker took responsibility for the message.

        Messages with the same `key` stay in order for ordered groups. `delay_ms` holds it back
        that long. `idempotent` says that consumers bear the message twice: what was sent and not
        answered is then sent again, with the same id, instead of raising AmbiguousError. `id` must
        be unique; one is made when there is none. Within `timeout_ms` (default:
        publish_timeout_ms) whatever did not happen is tried again.

        Raises NotTakenError (nothing happened), AmbiguousError (it may have), RejectedError (it
        never will); ValueError for what fits no frame. Cancelling it leaves it ambiguous.
        """
        made = self._headers(
            topic,
            content,
            key=key,
            headers=headers,
            colour=colour,
            lane=lane,
            version=version,
            trace=trace,
            id=id,
        )
        if delay_ms is not None:
            made[words.DELAY_MS] = str(delay_ms)
        if idempotent:
            made[words.IDEMPOTENT] = "1"
        words.Publish.parse(made)
        answer = await self._send(made, content, idempotent=idempotent, timeout_ms=timeout_ms)
        self.stats.published += 1
        return Receipt(made[words.ID], answer.get(words.BROKER, ""))

    def transaction(
        self,
        topic: str,
        content: bytes,
        *,
        group: str | Group | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        colour: str | None = None,
        lane: str | None = None,
        version: str | None = None,
        trace: str | None = None,
        idempotent: bool = False,
        id: str | None = None,
    ) -> Transaction:
        """A message that is delivered only if the block of its `async with` succeeds; see there.

        `group` is a publish group of this client with a check callback; None is the only one of the
        topic. Without a callback nobody could decide the message after a crash: ValueError.
        """
        if group is None:
            fitting = [g for g in self.groups if g.role == "publish" and g.topic == topic]
            if len(fitting) != 1:
                raise ValueError(
                    f"{len(fitting)} publish groups have the topic {topic!r}: name one as `group`"
                )
            group = fitting[0]
        found = self._group(group, "publish")
        if found.topic != topic:
            raise ValueError(f"group {found.name!r} publishes to {found.topic!r}, not {topic!r}")
        if found.name not in self._checkers:
            raise ValueError(f"group {found.name!r} has no check callback: call check() first")
        made = self._headers(
            topic,
            content,
            key=key,
            headers=headers,
            colour=colour,
            lane=lane,
            version=version,
            trace=trace,
            id=id,
        )
        made[words.GROUP] = found.name
        if idempotent:
            made[words.IDEMPOTENT] = "1"
        words.Publish.parse(made)
        return Transaction(
            self._send, self._fates, made, content, idempotent=idempotent, stats=self.stats
        )

    def _headers(
        self,
        topic: str,
        content: bytes,
        *,
        key: str | None,
        headers: Mapping[str, str] | None,
        colour: str | None,
        lane: str | None,
        version: str | None,
        trace: str | None,
        id: str | None,
    ) -> dict[str, str]:
        if not isinstance(content, (bytes, bytearray, memoryview)):
            raise TypeError(f"content must be bytes, not {type(content).__name__}")
        most = self._frame_bytes_max - limits.CLIENT_FRAME_OVERHEAD_BYTES
        if len(content) > most:
            raise ValueError(f"content of {len(content)} bytes: the mesh takes at most {most}")
        made = {
            words.OP: words.PUBLISH,
            words.TOPIC: topic,
            words.ID: id if id is not None else f"{self._id_prefix}-{next(self._id_numbers):x}",
            words.BORN_MS: str(time.time_ns() // 1_000_000),
        }
        for name, value in (
            (words.KEY, key),
            (words.COLOUR, colour),
            (words.LANE, lane),
            (words.MESSAGE_VERSION, version),
            (words.TRACE, trace),
        ):
            if value is not None:
                made[name] = value
        if headers:
            made |= {f"{words.USER}{name}": value for name, value in headers.items()}
        return made

    async def _send(
        self,
        headers: Mapping[str, str],
        content: bytes,
        *,
        idempotent: bool,
        timeout_ms: int | None = None,
    ) -> Mapping[str, str]:
        if self._state in ("new", "starting"):
            raise ClosedError("the client is not started: `async with client`")
        timeout_s = self._publish_timeout_s if timeout_ms is None else timeout_ms / 1000
        deadline = asyncio.get_running_loop().time() + timeout_s
        return await self._publisher.send(
            headers, content, deadline=deadline, idempotent=idempotent
        )

    # --- what connectors and the registrar report -------------------------------------------------

    def _wanted(self, index: int) -> Mapping[str, int]:
        """The prefetch of each group is shared out over the connections; a connection whose share
        is nothing leaves the group out."""
        shares = {}
        # Of a name in both roles the deliveries count: checks are few.
        for name, found in (self._checkers | self._consumers).items():
            each, rest = divmod(found.prefetch, self._connections)
            if share := each + (index < rest):
                shares[name] = share
        return shares

    def _usable(self, link: Link) -> None:
        self._open_links.add(link)
        self._links.add(link)

    def _link_ended(self, link: Link) -> None:
        self._links.discard(link)
        if link.gone.is_set():
            self._open_links.discard(link)
        elif link.lost.is_set():
            for found in self._workers:
                found.drop(link)

    def _unknown(self) -> None:
        if self._registrar is not None:
            self._registrar.renew_soon()

    def _forgotten(self) -> None:
        for connector in self._connectors:
            connector.subscribe_again()

    def _requested(self, link: Link, frame: Push) -> None:
        # What is of another class is none of ours, whatever its headers say.
        op = frame.headers.get(words.OP, "") if frame.class_name == CLASS else ""
        if op == words.GOAWAY:
            log.info("the mesh is going away; this connection takes nothing new")
            if frame.kind == "request":
                link.answer(frame, words.answer(words.CONSUMED))
            link.leave()
            return
        if frame.kind != "request":
            return  # nobody waits for an answer, and a delivery without one cannot be consumed
        if op == words.DELIVER:
            self._deliver(link, frame)
        elif op == words.CHECK:
            self._answer_check(link, frame)
        else:
            reason = f"fm.op {op!r}: a client answers deliver, check and goaway of this protocol"
            link.answer(frame, words.answer(words.REJECT, reason))

    def _deliver(self, link: Link, frame: Push) -> None:
        name = frame.headers.get(words.GROUP, "")
        found = self._consumers.get(name)
        if found is None:
            self.stats.deliveries_refused += 1
            link.answer(frame, words.answer(words.NO_CONSUMER))
        else:
            found.offer(Delivery(link, frame, name))

    def _answer_check(self, link: Link, frame: Push) -> None:
        known = self._fates.get(frame.headers.get(words.ID, ""))
        name = frame.headers.get(words.GROUP, "")
        found = self._checkers.get(name)
        if known is not None:
            self.stats.checks += 1
            link.answer(frame, words.answer(known.value))
        elif found is None:
            link.answer(frame, words.answer(words.NO_CONSUMER))
        else:
            found.offer(Delivery(link, frame, name))


def _own_name() -> str:
    host = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in _host())
    return f"{host[:32] or 'host'}-{os.getpid()}-{secrets.token_hex(4)}"


def _host() -> str:
    return socket.gethostname()
