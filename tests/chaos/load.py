"""Load with books: some clients that keep a number of operations in flight until told to stop."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tests.peers.client import BoltClient, ClosedError
from tests.peers.server import Log
from tests.peers.sockets import parse_address
from tests.sim.ledger import BODY_BYTES_MIN, Ledger, decode

CANARY = 0
"""The client number of every canary: it keeps its own ledger."""

DIALECTS: list[dict[str, Any]] = [{}, {"proto": 2}, {"proto": 2, "crc": True}]
"""v1; v2; v2 with CRC."""


def logged(ledger: Ledger) -> Log:
    """What a service does with each body: into the books, unless it is the canary's."""

    def log(body: bytes) -> None:
        op = decode(body)
        if op is None or op.client != CANARY:
            ledger.executed(body)

    return log


async def connect(
    address: str, ledger: Ledger | None = None, number: int = 1, **options: Any
) -> BoltClient:
    return await BoltClient(number, ledger, **options).connect(parse_address(address))


async def connect_many(
    address: str,
    ledger: Ledger | None,
    count: int,
    *,
    first: int = 1,
    mixed: bool = True,
    **options: Any,
) -> list[BoltClient]:
    """So many clients, numbered from `first`, of all dialects in turn. Not `mixed` they are v1 and
    share one upstream connection per engine thread: each dialect has one of its own."""
    dialects = DIALECTS if mixed else DIALECTS[:1]
    return [
        await connect(address, ledger, first + n, **{**dialects[n % len(dialects)], **options})
        for n in range(count)
    ]


async def close_all(clients: list[BoltClient]) -> None:
    await asyncio.gather(*(c.close() for c in clients if c.is_open))


class Load:
    """`async with Load(mesh.address, ledger) as load:`; leaving waits for every outstanding answer.

    `statuses` counts what came back. A client whose connection ends asks no more; with `reconnects`
    it comes back at once, as a next epoch.
    """

    def __init__(
        self,
        address: str,
        ledger: Ledger,
        *,
        clients: int = 6,
        depth: int = 4,
        service: str | None = "s",
        size: Callable[[int], int] | int = BODY_BYTES_MIN + 200,
        pause_s: float = 0.001,
        timeout_ms: int = 3000,
        first: int = 100,
        reconnects: bool = False,
    ) -> None:
        self.address = address
        self.ledger = ledger
        self.clients_count = clients
        self.depth = depth
        self.service = service
        self.size = size if callable(size) else lambda _n, fixed=size: fixed
        self.pause_s = pause_s
        self.timeout_ms = timeout_ms
        self.first = first
        self.reconnects = reconnects
        self.clients: list[BoltClient] = []
        self.statuses: dict[int, int] = {}
        self.asked = 0
        self.ended = 0
        self.stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._reconnecting: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def __aenter__(self) -> Load:
        self.clients = await connect_many(
            self.address, self.ledger, self.clients_count, first=self.first
        )
        for client in self.clients:
            self._tasks += [asyncio.create_task(self._ask(client)) for _ in range(self.depth)]
        return self

    async def _ask(self, client: BoltClient) -> None:
        while not self.stopping:
            self.asked += 1
            try:
                frame = await client.op(
                    self.service, self.size(self.asked), timeout_ms=self.timeout_ms
                )
            except ClosedError:
                self.ended += 1
                if not self.reconnects or not await self._again(client):
                    return
                continue
            self.statuses[frame.status] = self.statuses.get(frame.status, 0) + 1
            # Room for the rest of the test, which shares this loop.
            await asyncio.sleep(self.pause_s)

    async def _again(self, client: BoltClient) -> bool:
        # Several tasks ask on one client: one of them reconnects, the others find it done.
        async with self._reconnecting[client.number]:
            await client.ended()
            while not self.stopping and not client.is_open:
                try:
                    await client.connect(parse_address(self.address))
                except OSError:
                    await asyncio.sleep(0.02)
        return not self.stopping

    async def answered(self, count: int, *, within_s: float = 10.0) -> None:
        """Until so many more answers have come."""
        target = sum(self.statuses.values()) + count
        async with asyncio.timeout(within_s):
            while sum(self.statuses.values()) < target:  # noqa: ASYNC110 - a poll with a deadline
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Ask no more, and wait for what was asked."""
        self.stopping = True
        await asyncio.gather(*self._tasks)
        self._tasks = []

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stopping = True
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=kind is not None)
        await close_all(self.clients)
