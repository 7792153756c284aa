"""Which application produces and consumes which topic through which group, at what rate, and
through which node and broker: as this node sees it.

Rates are differences of counters over a sliding window that begins when somebody looks. Nothing is
sampled while nobody does.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from fastmesh import limits
from fastmesh.control.snapshot import BROKERS, PEERS, Compiled
from fastmesh.limits import ROW_OTHER
from fastmesh.mesh.push import PushControl, Registry

if TYPE_CHECKING:
    from fastmesh._ext.counters import Reading


class Rates:
    """Counter readings of the last RATE_WINDOW_S."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._readings: deque[tuple[float, Reading]] = deque(maxlen=limits.RATE_SAMPLES_MAX)
        self._lock = asyncio.Lock()

    async def look(self, counters: Callable[[], Awaitable[Reading]]) -> float:
        """Read the counters, unless somebody just has; the first look takes two readings. Returns
        the seconds that the rates are taken over. Raises EngineError."""
        async with self._lock:
            while True:
                now = self._clock()
                while self._readings and now - self._readings[0][0] > limits.RATE_WINDOW_S:
                    self._readings.popleft()
                if not self._readings or now - self._readings[-1][0] >= limits.RATE_GAP_S:
                    self._readings.append((now, await counters()))
                if len(self._readings) > 1:
                    return self._readings[-1][0] - self._readings[0][0]
                await asyncio.sleep(limits.RATE_GAP_S)

    def per_s(self, row: int, names: Iterable[str]) -> float | None:
        """Of these counters of a row together; None for the row of everything else."""
        if row == ROW_OTHER or len(self._readings) < 2:
            return None
        (began, first), (ended, last) = self._readings[0], self._readings[-1]
        by = sum(last.value(row, name) - first.value(row, name) for name in names)
        return round(by / max(ended - began, 1e-3), 2)

    def value(self, row: int, name: str) -> int:
        return self._readings[-1][1].value(row, name)


class Look(Protocol):
    """What of Rates is needed to draw the picture."""

    def per_s(self, row: int, names: Iterable[str]) -> float | None: ...
    def value(self, row: int, name: str) -> int: ...


def topology(
    compiled: Compiled,
    registry: Registry,
    control: PushControl,
    *,
    rates: Look,
    window_s: float,
    node: str,
) -> dict[str, Any]:
    """The JSON of /v1/topology; see docs/admin.md for its fields."""
    groups = registry.groups()
    published: dict[str, list[Any]] = {}
    for info in compiled.publishes:
        published.setdefault(info.topic, []).append(info)
    topics = []
    for topic, apps in sorted(registry.topics().items()):
        rules = published.get(topic, [])
        brokers = rules[0].brokers if rules else ()
        named = {info.group for info in rules if info.group}
        produce = [
            {
                "app": groups[name].app,
                "group": name,
                "rate_per_s": _sum(
                    rates.per_s(i.row, ("requests.answered",)) for i in rules if i.group == name
                ),
                "clients": sorted(groups[name].publishers),
            }
            for name in sorted(named)
            if name in groups
        ]
        anonymous = [info for info in rules if not info.group]
        if anonymous:
            produce.append(
                {
                    "app": None,
                    "group": None,
                    "rate_per_s": _sum(
                        rates.per_s(i.row, ("requests.answered",)) for i in anonymous
                    ),
                    "clients": [],
                }
            )
        consume = []
        for name, group in sorted(groups.items()):
            row = compiled.group_rows.get(name)
            if group.topic == topic and group.prefetch and row is not None:
                consume.append(_consumer(name, group, row, control, rates))
        topics.append(
            {
                "topic": topic,
                "apps": sorted(apps),
                "brokers": list(brokers),
                "produced_by": produce,
                "consumed_by": consume,
            }
        )
    return {
        "node": node,
        "window_s": round(window_s, 3),
        "topics": topics,
        "brokers": _endpoints(compiled, BROKERS, rates),
        "peers": _endpoints(compiled, PEERS, rates),
    }


def _consumer(name: str, group: Any, row: int, control: PushControl, rates: Look) -> dict[str, Any]:
    connections, credit = control.live.get(name, (0, 0))
    # A delivery that another node forwarded to us and one of a broker are both accepted here; one
    # that we forwarded is accepted here too, and answered by the peer.
    return {
        "app": group.app,
        "group": name,
        "mode": group.mode,
        "ordered": group.ordered,
        "filter": group.filter,
        "connections": connections,
        "credit": credit,
        "in_flight": rates.value(row, "pushes.in_flight"),
        "rate_per_s": rates.per_s(row, ("pushes.answered",)),
        "forwarded_per_s": rates.per_s(row, ("forwarded",)),
        "peers": control.peers.serving(name),
        "clients": sorted(group.prefetch),
    }


def _endpoints(compiled: Compiled, cluster: str, rates: Look) -> list[dict[str, Any]]:
    return [
        {
            "name": e.name,
            "address": str(e.address) if e.address else None,
            "up": bool(rates.value(e.row, "up")) if e.row != ROW_OTHER else None,
            "sent_per_s": rates.per_s(e.row, ("sent",)),
        }
        for e in compiled.endpoints
        if e.cluster == cluster
    ]


def _sum(rates: Iterable[float | None]) -> float | None:
    """None when one of them is counted with others."""
    found = list(rates)
    return None if any(r is None for r in found) else round(sum(r or 0.0 for r in found), 2)
