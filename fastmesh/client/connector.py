"""Keeps one connection to the mesh standing: dial, hello, subscribe, and all again when it goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastmesh import limits
from fastmesh._ext.push import Push
from fastmesh.address import Address
from fastmesh.client.backoff import Backoff
from fastmesh.client.errors import RejectedError, VersionError
from fastmesh.client.link import Link, NotSentError, UnansweredError
from fastmesh.client.model import Stats
from fastmesh.protocols import push as words

log = logging.getLogger("fastmesh.client")


@dataclass(frozen=True, slots=True)
class Owner:
    """What a connector asks of its client and tells it."""

    wanted: Callable[[int], Mapping[str, int]]
    """group -> prefetch that connection `index` is to subscribe to."""
    requested: Callable[[Link, Push], None]
    """The mesh asked something."""
    usable: Callable[[Link], None]
    """A connection said hello and may be asked."""
    ended: Callable[[Link], None]
    """It may not any more: it leaves, is lost or is gone."""
    unknown: Callable[[], None]
    """The mesh does not know our registration."""
    settled: Callable[[], None]
    """A connector is subscribed, or has met a failure that will not pass by itself."""


class Connector:
    """`run()` as a task until it is cancelled. Its link then stays for the client to close."""

    def __init__(
        self,
        index: int,
        address: Address,
        owner: Owner,
        *,
        app: str,
        client: str,
        stats: Stats,
        heartbeat_ms: int,
        frame_bytes_max: int,
    ) -> None:
        self._index = index
        self._address = address
        self._hello = words.Hello(app, client).headers()
        self._owner = owner
        self._stats = stats
        self._heartbeat_ms = heartbeat_ms
        self._frame_bytes_max = frame_bytes_max
        self._wake = asyncio.Event()
        self._subscribed: Mapping[str, int] | None = None
        self.ready = False
        """Connected, and subscribed to what was wanted then."""
        self.failure: Exception | None = None
        """Why it is not; the last reason."""

    def look_again(self) -> None:
        """The set of groups changed."""
        self._wake.set()

    def subscribe_again(self) -> None:
        """The mesh forgot what this connection had subscribed to."""
        self._subscribed = None
        self._wake.set()

    async def run(self) -> None:
        backoff = Backoff()
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            reason = ""
            try:
                reason = await self._session()
            except (RejectedError, OSError, NotSentError, UnansweredError) as error:
                self.failure = error
                reason = str(error) or type(error).__name__
                if isinstance(error, RejectedError):
                    if not isinstance(error, VersionError):
                        self._owner.unknown()
                    self._owner.settled()
            if loop.time() - began > limits.CLIENT_BACKOFF_MS_MAX / 1000:
                backoff.reset()
            delay_s = backoff.next_s()
            log.warning("mesh %s: %s; next attempt in %.2f s", self._address, reason, delay_s)
            await asyncio.sleep(delay_s)

    async def _session(self) -> str:
        """From dialling to the end of that connection; says why it ended."""
        link = await Link.open(
            self._address,
            on_request=self._owner.requested,
            on_end=self._link_ends,
            stats=self._stats,
            heartbeat_ms=self._heartbeat_ms,
            frame_bytes_max=self._frame_bytes_max,
        )
        try:
            await self._greet(link)
        except BaseException:
            link.abort("hello failed")
            await link.gone.wait()
            raise
        self._stats.connects += 1
        self._subscribed = {}
        self._owner.usable(link)
        backoff = Backoff()
        retry_s: float | None = None
        while not (link.lost.is_set() or link.leaving):
            self._wake.clear()
            wanted = dict(self._owner.wanted(self._index))
            if wanted == self._subscribed:
                self._settle()
                retry_s = None
            else:
                retry_s = await self._subscribe(link, wanted, backoff)
                if retry_s is None:
                    continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(retry_s):
                    await self._wake.wait()
        self.ready = False
        return link.reason if link.lost.is_set() else "it is leaving"

    def _link_ends(self, link: Link) -> None:
        # At once and not when the task gets round to it: nobody is to pick it in between.
        self._owner.ended(link)
        self._wake.set()

    def _settle(self) -> None:
        if not self.ready:
            self.ready = True
            self.failure = None
            self._owner.settled()

    async def _greet(self, link: Link) -> None:
        while True:
            answer = (await link.ask(self._hello, deadline=_deadline())).headers
            result = answer.get(words.RESULT)
            if result == words.CONSUMED:
                return
            if result == words.LATER:
                await asyncio.sleep(_retry_s(answer))
                continue
            versions = answer.get(words.PROTOCOL, "")
            if versions and words.VERSION not in versions.split(","):
                raise VersionError(words.VERSION, versions)
            raise RejectedError("hello", answer.get(words.REASON) or f"fm.result {result!r}")

    async def _subscribe(
        self, link: Link, wanted: Mapping[str, int], backoff: Backoff
    ) -> float | None:
        """None when it is done, else after how many seconds to try again."""
        headers = words.Subscribe(wanted).headers()
        try:
            answer = (await link.ask(headers, deadline=_deadline())).headers
        except (NotSentError, UnansweredError) as error:
            # The set in force is not known: another connection makes it known.
            link.abort(str(error))
            return None
        result = answer.get(words.RESULT)
        if result == words.CONSUMED:
            self._subscribed = wanted
            backoff.reset()
            return None
        if result == words.LATER:
            return _retry_s(answer)
        reason = answer.get(words.REASON) or f"fm.result {result!r}"
        self.failure = RejectedError(f"subscribe to {', '.join(wanted)}", reason)
        self._owner.unknown()
        self._owner.settled()
        delay_s = backoff.next_s()
        log.error("%s; next attempt in %.2f s", self.failure, delay_s)
        return delay_s


def _deadline() -> float:
    return asyncio.get_running_loop().time() + limits.CLIENT_CONTROL_TIMEOUT_MS / 1000


def _retry_s(answer: Mapping[str, str]) -> float:
    retry_ms = words.retry_ms(answer) or limits.CLIENT_LATER_MS
    return min(max(retry_ms, limits.CLIENT_LATER_MS_MIN), limits.CLIENT_BACKOFF_MS_MAX) / 1000
