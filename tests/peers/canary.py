"""The canary: a blameless client beside every fault. It must see no error, and no slowness.

It runs in a process of its own, so that a test that works its own loop hard does not slow it, and
asks one small request after the other. `mark()` begins a new window; `stop()` compares the windows.

    python -m tests.peers.canary ADDRESS SERVICE INTERVAL_MS

reads "mark" lines from standard input and prints, at its end, one JSON list: {errors, latencies_us}
per window.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass

import uvloop

from tests.peers.client import BoltClient
from tests.peers.sockets import parse_address
from tests.sim.ledger import Ledger

P99_FLOOR_US = 250_000
"""Below this the ratio is not judged: a window has some dozens of requests, its p99 is its worst
one, and on two shared cores the scheduler alone costs tens of ms. Being held back costs 1000 ms."""


WINDOW_S = 0.1
"""The last window stays open so much longer than the fault: some faults take a millisecond."""


@dataclass(frozen=True, slots=True)
class Window:
    """What the canary saw between two marks."""

    asked: int
    errors: list[str]
    p50_us: int
    p99_us: int
    max_us: int


class Canary:
    """`async with Canary(address, service) as canary:` ... `canary.mark()` ... `await
    canary.check()`."""

    def __init__(self, address: str, service: str, *, interval_ms: float = 5) -> None:
        self.address = address
        self.service = service
        self.interval_ms = interval_ms
        self.windows: list[Window] = []
        self.process: asyncio.subprocess.Process

    async def __aenter__(self) -> Canary:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.peers.canary",
            self.address,
            self.service,
            str(self.interval_ms),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), 10)
        assert line == b"singing\n", f"the canary did not start: {line!r}"
        # The baseline: long enough for a p99 of a hundred requests.
        await asyncio.sleep(0.4)
        self.mark()
        return self

    def mark(self) -> None:
        """A new window begins: before the fault there is the baseline, after it the recovery."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"mark\n")

    async def stop(self) -> list[Window]:
        if not self.windows and self.process.returncode is None:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.close()
            raw = await asyncio.wait_for(self.process.stdout.read(), 15)
            await self.process.wait()
            self.windows = [_window(w["errors"], w["latencies_us"]) for w in json.loads(raw)]
        return self.windows

    async def check(self, *, asked_min: int = 5) -> list[Window]:
        """No error in any window, and p99 under the fault at most twice the baseline's."""
        await asyncio.sleep(WINDOW_S)
        windows = await self.stop()
        errors = [error for window in windows for error in window.errors]
        assert not errors, f"the canary saw {len(errors)} errors: {errors[:5]}"
        assert len(windows) >= 2, "void: no window under the fault"
        baseline, *faulted = windows
        assert baseline.asked >= 10, f"void: the baseline has {baseline.asked} requests"
        for number, window in enumerate(faulted, 1):
            assert window.asked >= asked_min, f"void: window {number} has {window.asked} requests"
            allowed = max(2 * baseline.p99_us, P99_FLOOR_US)
            assert window.p99_us <= allowed, f"canary p99: {windows}"
        return windows

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


def _window(errors: list[str], latencies_us: list[int]) -> Window:
    ranked = sorted(latencies_us) or [0]
    return Window(
        len(latencies_us),
        errors,
        ranked[len(ranked) // 2],
        ranked[min(len(ranked) - 1, len(ranked) * 99 // 100)],
        ranked[-1],
    )


async def _sing(address: str, service: str, interval_ms: float) -> None:
    windows: list[tuple[list[str], list[int]]] = [([], [])]
    ended = asyncio.Event()

    def readable() -> None:
        data = os.read(0, 4096)
        windows.extend(([], []) for _ in range(data.count(b"mark\n")))
        if not data:
            ended.set()

    ledger = Ledger()
    client = BoltClient(0, ledger)
    await client.connect(parse_address(address))
    await client.op(service)
    print("singing", flush=True)
    asyncio.get_running_loop().add_reader(0, readable)
    while not ended.is_set():
        errors, latencies_us = windows[-1]
        began = time.monotonic_ns()
        try:
            async with asyncio.timeout(5):
                answer = await client.op(service, 64)
            if answer.status:
                errors.append(f"status {answer.status}")
        except TimeoutError:
            errors.append("no answer in 5 s")
        except ConnectionError as error:
            errors.append(f"connection: {error}")
            break
        latencies_us.append((time.monotonic_ns() - began) // 1000)
        await asyncio.sleep(interval_ms / 1000)
    await client.close()
    verdict = ledger.judge()
    broken = {name: n for name, n in verdict.counts.items() if n and name != "ambiguous"}
    if broken:
        windows[-1][0].append(f"ledger: {broken} {verdict.examples}")
    print(json.dumps([{"errors": e, "latencies_us": took} for e, took in windows]))


if __name__ == "__main__":
    uvloop.run(_sing(sys.argv[1], sys.argv[2], float(sys.argv[3])))
