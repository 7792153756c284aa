"""What is measured: one line of load per scenario. Loads are described once and are the same for
every contender.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scenario:
    name: str
    title: str
    load: dict[str, Any] = field(default_factory=dict)
    """Arguments of LoadRun."""
    unix: bool = False
    threads: int = 1
    """Of the proxy."""
    spin_us: int = 0
    """fastmesh only; others run as they are."""
    idle_share: float = 0.0
    """Set where memory and CPU of idle connections are read."""
    busy: bool = False
    """fastmesh only: while it is measured its metrics are scraped ten times a second, its
    configuration is reloaded once a second, and a Python thread in its process burns 20 ms of every
    100 ms.
    """
    beside: str = ""
    """Another scenario that fastmesh runs in each round too, so that the two can be paired."""

    @property
    def connections(self) -> int:
        return int(self.load.get("connections", 64))


RATE = 20000.0

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("c1", "1 connection × 1 in flight, 256 B", {"connections": 1}),
        Scenario("c64", "64 connections × 1 in flight, 256 B", {"connections": 64}),
        Scenario("c1000", "1000 connections × 1 in flight, 256 B", {"connections": 1000}),
        Scenario(
            "c16d32", "16 connections × 32 in flight, 256 B", {"connections": 16, "depth": 32}
        ),
        Scenario(
            "c10000",
            "10 000 connections, 1 % of them active, 256 B",
            {"connections": 10000, "active": 0.01, "connect_timeout_ms": 30000},
            idle_share=0.99,
        ),
        Scenario("body64", "64 × 1, bodies of 64 B", {"sizes": (64,)}),
        Scenario("body16k", "64 × 1, bodies of 16 KiB", {"sizes": (16384,)}),
        Scenario("body256k", "16 × 1, bodies of 256 KiB", {"connections": 16, "sizes": (262144,)}),
        Scenario("crc", "64 × 1, 256 B, v2 with checksums", {"version": 2, "crc": True}),
        Scenario(
            "crc16k",
            "64 × 1, 16 KiB, v2 with checksums",
            {"version": 2, "crc": True, "sizes": (16384,)},
        ),
        Scenario("rate20000", "open loop, 20 000/s over 64 connections, 256 B", {"rate": RATE}),
        Scenario(
            "busy",
            "open loop, 20 000/s; fastmesh scraped, reloaded and with a busy Python thread",
            {"rate": RATE},
            busy=True,
        ),
        Scenario("unix", "64 × 1, 256 B, UNIX sockets on both sides", unix=True, beside="c64"),
        Scenario("threads2", "64 × 1, 256 B, two proxy threads", threads=2, beside="c64"),
        Scenario(
            "mixed",
            "64 × 4, 64 B to 64 KiB mixed",
            {"depth": 4, "sizes": (64, 64, 64, 256, 256, 256, 1024, 1024, 4096, 16384, 65536)},
        ),
        Scenario(
            "spin",
            "open loop, 20 000/s, fastmesh with spin_us: 200",
            {"rate": RATE},
            spin_us=200,
        ),
    )
}
