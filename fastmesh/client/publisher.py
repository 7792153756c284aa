"""Gets one message to a broker, or says precisely what is known of it.

What is tried again: what was not sent; what was answered "later"; and, only for messages that say
that doubling them is harmless, what was sent and not answered. The id never changes between
attempts. Once an attempt may have happened, no later word can make it not have happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NoReturn

from fastmesh import limits
from fastmesh._ext.push import Push
from fastmesh.client.errors import (
    AmbiguousError,
    ClientError,
    ClosedError,
    NotTakenError,
    RejectedError,
)
from fastmesh.client.link import Link, NotSentError, UnansweredError
from fastmesh.client.model import Stats
from fastmesh.protocols import push as words

_STATUS = {7: "it timed out", 16: "the connection to the broker was lost"}


class Links:
    """The connections that may be asked; waits for one when there is none."""

    def __init__(self) -> None:
        self._links: set[Link] = set()
        self._any = asyncio.Event()
        self.closed = asyncio.Event()
        """Nothing is published any more."""

    def add(self, link: Link) -> None:
        self._links.add(link)
        self._any.set()

    def discard(self, link: Link) -> None:
        self._links.discard(link)
        if not self._links:
            self._any.clear()

    def close(self) -> None:
        self.closed.set()
        self._any.set()

    async def pick(self, deadline: float) -> Link:
        """The one with least in flight. Raises ClosedError, NotTakenError."""
        loop = asyncio.get_running_loop()
        while True:
            if self.closed.is_set():
                raise ClosedError("the client is closed")
            if loop.time() >= deadline:
                raise NotTakenError("the deadline passed")
            if self._links:
                return min(self._links, key=lambda link: link.in_flight)
            try:
                async with asyncio.timeout_at(deadline):
                    await self._any.wait()
            except TimeoutError:
                raise NotTakenError("no connection to the mesh within the deadline") from None

    async def pause(self, delay_s: float) -> None:
        """Between two attempts; cut short by close()."""
        try:
            async with asyncio.timeout(delay_s):
                await self.closed.wait()
        except TimeoutError:
            pass


class Publisher:
    def __init__(self, links: Links, stats: Stats) -> None:
        self._links = links
        self._stats = stats
        self._stopped = False
        self._slots = asyncio.Semaphore(limits.CLIENT_IN_FLIGHT_MAX)
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def send(
        self, headers: Mapping[str, str], content: bytes, *, deadline: float, idempotent: bool
    ) -> Mapping[str, str]:
        """The headers of the answer that says "consumed". `deadline` is a time of the loop's clock.

        Raises NotTakenError, AmbiguousError, RejectedError; ValueError when it fits no frame.
        """
        if self._stopped:
            raise ClosedError("the client is closing")
        self._under_way += 1
        self._idle.clear()
        try:
            return await self._send(headers, content, deadline, idempotent)
        except AmbiguousError:
            self._stats.publish_ambiguous += 1
            raise
        except RejectedError:
            self._stats.publish_rejected += 1
            raise
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def stop(self) -> None:
        """Takes nothing new, and returns when nothing is under way any more."""
        self._stopped = True
        await self._idle.wait()

    async def _send(
        self, headers: Mapping[str, str], content: bytes, deadline: float, idempotent: bool
    ) -> Mapping[str, str]:
        id = headers[words.ID]
        doubt = ""  # why an attempt may have happened
        last = ""  # why the last one did not
        while True:
            try:
                frame = await self._attempt(headers, content, deadline)
            except NotTakenError as error:
                told = f"{last}; then {error}" if last else str(error)
                self._fail(id, doubt, type(error)(f"message {id} was not taken: {told}"))
            except NotSentError as error:
                last = str(error)
                self._stats.publish_retries += 1
                continue
            except UnansweredError as error:
                doubt = str(error)
                if not idempotent:
                    raise AmbiguousError(id, doubt) from None
                self._stats.publish_retries += 1
                continue
            answer = frame.headers
            result = answer.get(words.RESULT)
            reason = answer.get(words.REASON, "")
            if result == words.CONSUMED:
                return answer
            if result == words.REJECT:
                self._fail(id, doubt, RejectedError(f"message {id}", reason or "no reason given"))
            if result in (words.LATER, words.NO_CONSUMER):
                last = f"the mesh said {result}" + (f" ({reason})" if reason else "")
                delay_s = _retry_ms(answer) / 1000
                if asyncio.get_running_loop().time() + delay_s >= deadline:
                    late = NotTakenError(f"message {id} was not taken in time: {last}")
                    self._fail(id, doubt, late)
                await self._links.pause(delay_s)
            else:
                doubt = _doubt(frame)
                if not idempotent:
                    raise AmbiguousError(id, doubt)
                await self._links.pause(limits.CLIENT_LATER_MS / 1000)
            self._stats.publish_retries += 1

    async def _attempt(self, headers: Mapping[str, str], content: bytes, deadline: float) -> Push:
        if self._slots.locked():
            try:
                async with asyncio.timeout_at(deadline):
                    await self._slots.acquire()
            except TimeoutError:
                raise NotTakenError("too many publishes are unanswered") from None
        else:
            await self._slots.acquire()
        try:
            link = await self._links.pick(deadline)
            return await link.ask(headers, content, deadline=deadline)
        finally:
            self._slots.release()

    @staticmethod
    def _fail(id: str, doubt: str, error: ClientError) -> NoReturn:
        if doubt:
            raise AmbiguousError(id, f"{doubt}; after that: {error}") from None
        raise error from None


def _retry_ms(answer: Mapping[str, str]) -> int:
    return max(words.retry_ms(answer) or limits.CLIENT_LATER_MS, limits.CLIENT_LATER_MS_MIN)


def _doubt(frame: Push) -> str:
    result = frame.headers.get(words.RESULT)
    if result is not None:
        return f"it was answered with fm.result {result!r}, which is none for a publish"
    return _STATUS.get(frame.status, f"it was answered with status {frame.status} and no fm.result")
