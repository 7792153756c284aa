"""Runs the handlers of one group: so many at once, one at a time per key, errors into "later".

Invariant: running <= prefetch, running + waiting <= 2 * prefetch; a key has a lane exactly while a
delivery of it is ready or running, and then only one is.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastmesh import limits
from fastmesh._ext.push import Push
from fastmesh.client.link import Link
from fastmesh.client.model import Check, Fate, Group, Handler, Message, Result, Stats
from fastmesh.protocols import push as words

log = logging.getLogger("fastmesh.client")

_CONSUMED = words.answer(words.CONSUMED)


class Delivery:
    """One request of the mesh that is waiting for our answer."""

    __slots__ = ("_answered", "frame", "link", "message")

    def __init__(self, link: Link, frame: Push, group: str) -> None:
        self.link = link
        self.frame = frame
        self.message = read_message(frame, group)
        self._answered = False

    def answer(self, headers: Mapping[str, str]) -> bool:
        """False when nobody hears it. The first answer counts."""
        if self._answered:
            return True
        self._answered = True
        return self.link.answer(self.frame, headers)


def read_message(frame: Push, group: str) -> Message:
    """What a deliver or check carries. Numbers that are none count as absent: they are for
    people, and a message is not lost for one."""
    headers = frame.headers
    get = headers.get
    return Message(
        topic=get(words.TOPIC, ""),
        group=group,
        id=get(words.ID, ""),
        content=frame.content,
        key=get(words.KEY),
        colour=get(words.COLOUR),
        lane=get(words.LANE),
        version=get(words.MESSAGE_VERSION),
        born_ms=_number(get(words.BORN_MS)),
        attempt=_number(get(words.ATTEMPT)) or 1,
        headers={
            key.removeprefix(words.USER): value
            for key, value in headers.items()
            if key.startswith(words.USER)
        },
        trace=get(words.TRACE),
        origin=get(words.ORIGIN),
    )


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


class Worker:
    """`offer()` deliveries; `drain()` at the end. `answer` turns what the handler returned into
    the headers of the answer, and raises TypeError for what it should not have returned."""

    def __init__(
        self,
        group: str,
        handler: Callable[[Message], Any],
        *,
        answer: Callable[[Any], Mapping[str, str]],
        failed: str,
        prefetch: int,
        ordered: bool,
        stats: Stats,
    ) -> None:
        self.group = group
        self.prefetch = prefetch
        self._handler = handler
        self._answer = answer
        self._failed = failed
        self._ordered = ordered
        self._stats = stats
        self._tasks: set[asyncio.Task[Mapping[str, str]]] = set()
        self._waiting = 0
        """Deliveries in `_ready` and `_lanes`."""
        self._ready: deque[Delivery] = deque()
        self._lanes: dict[str, deque[Delivery]] = {}
        """key -> what waits behind the one of that key which is ready or running."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._threads: ThreadPoolExecutor | None = None
        if not _is_async(handler):
            self._threads = ThreadPoolExecutor(
                min(prefetch, limits.CLIENT_THREADS_MAX), f"fastmesh-{group}"
            )

    @property
    def running(self) -> int:
        return len(self._tasks)

    def offer(self, delivery: Delivery) -> None:
        """Begins it when there is room, and after those of the same key in an ordered group."""
        if self._draining:
            self.refuse(delivery, 0)
            return
        # Twice: handlers of a connection that was lost still run while the next one has its credit.
        if len(self._tasks) + self._waiting >= 2 * self.prefetch:
            self.refuse(delivery, limits.CLIENT_LATER_MS)
            return
        self._idle.clear()
        self._waiting += 1
        key = delivery.message.key
        if self._ordered and key:
            lane = self._lanes.get(key)
            if lane is not None:
                lane.append(delivery)
                return
            self._lanes[key] = deque()
        self._ready.append(delivery)
        self._begin()

    def refuse(self, delivery: Delivery, retry_ms: int) -> None:
        """Not begun, and so free to go to anybody else."""
        self._stats.deliveries_refused += 1
        # "overload" is the one reason that brokers read: this attempt does not count as one.
        delivery.answer(words.answer(self._failed, words.OVERLOAD, retry_ms=retry_ms))

    def drop(self, link: Link) -> None:
        """Forgets what came on a connection that is lost and was not begun: nobody would hear the
        answer, and the broker delivers it again."""
        kept = [d for d in self._take_waiting() if d.link is not link]
        self._waiting = 0
        for delivery in kept:
            self.offer(delivery)
        self._begin()

    def _take_waiting(self) -> list[Delivery]:
        """What was not begun, in its order; lanes are left to those that run."""
        waiting = []
        for delivery in self._ready:
            waiting.append(delivery)
            key = delivery.message.key
            if self._ordered and key:
                waiting += self._lanes.pop(key)
        self._ready.clear()
        for lane in self._lanes.values():
            waiting += lane
            lane.clear()
        self._waiting = 0
        return waiting

    def _begin(self) -> None:
        while self._ready and len(self._tasks) < self.prefetch:
            delivery = self._ready.popleft()
            self._waiting -= 1
            task = asyncio.get_running_loop().create_task(self._run(delivery.message))
            self._tasks.add(task)
            # Not a `finally` of the task: one that is cancelled before its first step runs none.
            task.add_done_callback(functools.partial(self._ended, delivery))
        if not self._tasks and not self._ready:
            self._idle.set()

    async def _run(self, message: Message) -> Mapping[str, str]:
        try:
            return self._answer(await self._call(message))
        except Exception as error:
            self._stats.handler_errors += 1
            log.exception(
                "handler of group %s failed on message %s, attempt %d",
                self.group,
                message.id,
                message.attempt,
            )
            # The class only: what an error says may be nobody else's business.
            return words.answer(self._failed, f"handler error: {type(error).__name__}")

    def _ended(self, delivery: Delivery, task: asyncio.Task[Mapping[str, str]]) -> None:
        # Whoever was cancelled has not consumed.
        unfinished = task.cancelled() or task.exception() is not None
        headers = words.answer(self._failed, "handler cancelled") if unfinished else task.result()
        self._count(headers[words.RESULT])
        if not delivery.answer(headers):
            self._stats.answers_lost += 1
        self._tasks.discard(task)
        key = delivery.message.key
        if self._ordered and key:
            lane = self._lanes[key]
            if lane:
                self._ready.append(lane.popleft())
            else:
                del self._lanes[key]
        self._begin()

    async def _call(self, message: Message) -> Any:
        if self._threads is None:
            return await self._handler(message)
        context = contextvars.copy_context()
        call = functools.partial(context.run, self._handler, message)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        return await found if inspect.isawaitable(found) else found

    def _count(self, result: str) -> None:
        if result == words.CONSUMED:
            self._stats.consumed += 1
        elif result == words.LATER:
            self._stats.later += 1
        elif result == words.REJECT:
            self._stats.rejected += 1
        else:
            self._stats.checks += 1

    async def drain(self, deadline: float) -> bool:
        """Begins nothing more, waits for what runs until `deadline` (of the loop's clock), then
        cancels it. True when everything ended by itself.

        A plain handler cannot be cancelled: its message is answered "later", its thread goes on.
        """
        self._draining = True
        for delivery in self._take_waiting():
            self.refuse(delivery, 0)
        self._begin()
        try:
            async with asyncio.timeout_at(deadline):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d handlers of group %s did not finish", self.running, self.group)
            await self.stop()
            return False
        self._end_threads()
        return True

    async def stop(self) -> None:
        """Cancels what runs; each is answered "later"."""
        self._draining = True
        self._take_waiting()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=limits.CLIENT_CANCEL_TIMEOUT_MS / 1000)
        self._end_threads()

    def _end_threads(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def _is_async(handler: Callable[..., Any]) -> bool:
    while isinstance(handler, functools.partial):
        handler = handler.func
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
        getattr(handler, "__call__", None)  # noqa: B004 - an object with an async __call__
    )


def delivered(found: Any) -> Mapping[str, str]:
    """The answer to a deliver for what its handler returned."""
    if found is None:
        return _CONSUMED
    if not isinstance(found, Result):
        raise TypeError(
            f"a handler returns None, consumed(), later() or reject(), not {type(found).__name__}"
        )
    return words.answer(found.kind, found.reason, retry_ms=found.retry_ms)


def checked(found: Any) -> Mapping[str, str]:
    """The answer to a check for what its callback returned."""
    if not isinstance(found, Fate):
        raise TypeError(f"a check returns a Fate, not {type(found).__name__}")
    return words.answer(found.value)


def consumer(group: Group, handler: Handler, stats: Stats) -> Worker:
    return Worker(
        group.name,
        handler,
        answer=delivered,
        failed=words.LATER,
        prefetch=group.prefetch,
        ordered=group.ordered,
        stats=stats,
    )


def checker(group: Group, check: Check, stats: Stats) -> Worker:
    return Worker(
        group.name,
        check,
        answer=checked,
        failed=words.UNKNOWN,
        prefetch=min(group.prefetch, limits.CLIENT_CHECKS_MAX),
        ordered=False,
        stats=stats,
    )
