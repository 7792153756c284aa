"""A consistent copy of the engine's counters, without stopping anyone.

The engine is asked by ticket and polled: an engine thread copies at the end of a turn, and one that
sleeps is woken.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastmesh import limits
from fastmesh.errors import EngineError

if TYPE_CHECKING:
    from fastmesh._ext.counters import Reading

FIRST_WAIT_S = 0.0005
LONGEST_WAIT_S = 0.02


class Readings:
    """One question at a time: whoever comes while one is under way waits for the next."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._lock = asyncio.Lock()

    async def counters(self) -> Reading:
        """Raises EngineError when a thread does not answer within COUNTERS_TIMEOUT_S."""
        async with self._lock:
            ticket = self._engine.ask_counters()
            await poll(lambda: self._engine.counters_ready(ticket), "counters")
            reading: Reading = self._engine.counters()
            return reading

    async def connections(self) -> list[dict[str, object]]:
        """Raises EngineError when a thread does not answer within COUNTERS_TIMEOUT_S."""
        async with self._lock:
            ticket = self._engine.ask_connections()
            await poll(lambda: self._engine.connections_ready(ticket), "connections")
            found: list[dict[str, object]] = self._engine.connections()
            return found


async def poll(
    ready: Callable[[], bool], what: str, timeout_s: float = limits.COUNTERS_TIMEOUT_S
) -> None:
    """Wait until `ready()`, looking more and more seldom. Raises EngineError."""
    until = time.monotonic() + timeout_s
    wait_s = FIRST_WAIT_S
    while not ready():
        if time.monotonic() >= until:
            raise EngineError(f"the engine did not answer in {timeout_s:g} s: {what}")
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 2, LONGEST_WAIT_S)
