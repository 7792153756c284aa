"""The embedded broker, killed (-9) at any moment under load: what it acknowledged is delivered."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastmesh.address import Address
from tests.broker.client import Client
from tests.peers.sockets import free_port

pytestmark = pytest.mark.chaos

KILLS = 6
IN_FLIGHT = 64
SETTLE_S = 20.0


class Process:
    """`fastmesh broker` on the same address and directory, again and again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.address = Address("127.0.0.1", free_port())
        self._options = options
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fastmesh", "broker",
            "--listen", str(self.address), "--admin", "127.0.0.1:0",
            "--data", str(self.folder), "--redeliver", "50ms,200ms", *self._options,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stderr is not None
        line = (await asyncio.wait_for(self._process.stderr.readline(), 10)).decode()
        assert re.search(r" ready ", line), line

    async def end(self, with_signal: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(with_signal)
        return await asyncio.wait_for(self._process.wait(), 15)


class Ledger:
    def __init__(self) -> None:
        self.tried: set[str] = set()
        self.acknowledged: set[str] = set()
        self.consumed: Counter[str] = Counter()
        self.by_key: dict[str, list[int]] = {}
        self.unsure: set[str] = set()
        """Consumed, and the answer may have been on its way when the broker was killed."""


async def publish(address: Address, ledger: Ledger, name: str, over: asyncio.Event) -> None:
    """Keeps some publishes in flight, and says the same again until it is told that it counts."""
    number = 0
    open_: list[str] = []
    while not (over.is_set() and not open_):
        try:
            client = await Client.open(address, name)
        except (OSError, ConnectionError, TimeoutError):
            await asyncio.sleep(0.01)
            continue
        with contextlib.suppress(ConnectionError, TimeoutError, OSError):
            while not (over.is_set() and not open_):
                while len(open_) < IN_FLIGHT and not over.is_set():
                    open_.append(f"{name}-{number}")
                    number += 1
                ledger.tried.update(open_)
                said = {id: client.send_publish(id, b"x" * 200) for id in open_}
                for id, answer in said.items():
                    result = (await asyncio.wait_for(answer, 5)).headers["fm.result"]
                    if result == "consumed":
                        ledger.acknowledged.add(id)
                        open_.remove(id)
        await client.close()


async def consume(address: Address, ledger: Ledger, name: str, draw: random.Random) -> None:
    """Consumes for ever; now and then it wants to see a message again."""
    while True:
        try:
            client = await Client.open(address, name)
            await client.announce(prefetch=100)
        except (OSError, ConnectionError, TimeoutError):
            await asyncio.sleep(0.01)
            continue
        try:
            while not client.closed.is_set():
                try:
                    push = await asyncio.wait_for(client.requests.get(), 0.2)
                except TimeoutError:
                    continue
                id = push.headers["fm.id"]
                if draw.random() < 0.02:
                    client.answer(push, "later", retry_ms="20")
                    continue
                ledger.consumed[id] += 1
                ledger.unsure.add(id)
                client.answer(push)
        except ConnectionError:
            pass
        finally:
            await client.close()


@pytest.mark.parametrize("sync", ["sync", "async"])
async def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path, sync: str) -> None:
    seed = int(os.environ.get("SEED", "7"))
    draw = random.Random(seed)
    broker = Process(tmp_path / "data", "--sync", sync)
    ledger = Ledger()
    over = asyncio.Event()
    await broker.start()
    publishers = [
        asyncio.ensure_future(publish(broker.address, ledger, f"p{n}", over)) for n in range(2)
    ]
    consumers = [
        asyncio.ensure_future(consume(broker.address, ledger, f"c{n}", random.Random(seed + n)))
        for n in range(2)
    ]
    allowed: set[str] = set()
    try:
        for _ in range(KILLS):
            before = len(ledger.acknowledged)
            await asyncio.sleep(draw.uniform(0.2, 0.8))  # under load, at a random moment
            assert len(ledger.acknowledged) > before, "no load was on it"
            assert await broker.end(signal.SIGKILL) == -signal.SIGKILL
            # What was delivered and not known to be settled may come a second time.
            allowed |= ledger.unsure
            ledger.unsure.clear()
            await broker.start()
        over.set()
        await asyncio.wait_for(asyncio.gather(*publishers), SETTLE_S)
        async with asyncio.timeout(SETTLE_S):
            for task in consumers:
                if task.done():
                    task.result()  # a fault of the test's own, not of the broker
            while ledger.acknowledged - ledger.consumed.keys():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        for task in (*publishers, *consumers):
            task.cancel()
        await asyncio.wait((*publishers, *consumers))
        code = await broker.end(signal.SIGTERM)
    assert code == 0
    assert not ledger.acknowledged - ledger.consumed.keys(), "lost"
    assert not ledger.consumed.keys() - ledger.tried, "invented"
    twice = {id for id, count in ledger.consumed.items() if count > 1}
    assert twice <= allowed, "doubled without a kill"
    # Answers of the last batch can be lost with the process, and no more than that.
    assert len(twice) < KILLS * 500, f"{len(twice)} of {len(ledger.consumed)} came twice"
