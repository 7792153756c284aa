"""An engine without a data plane: it remembers what it was told and says what a test wants.

Its counters are the real ones, so that whatever reads them is tested against real names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from fastmesh._ext.counters import Reading, ThreadCounters


@dataclass(frozen=True)
class Event:
    """Same fields as the engine's events."""

    kind: str
    thread: int = 0
    a: int = 0
    b: int = 0
    c: int = 0
    data: bytes = b""


class FakeEngine:
    def __init__(self, **options: Any) -> None:
        self.options = options
        self.threads = options.get("threads", 1)
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.counted = ThreadCounters()
        self.calls: list[tuple[Any, ...]] = []
        self.published: list[Any] = []
        self.listening: dict[int, int] = {}
        self.verdicts: list[tuple[int, int | None]] = []
        self.drains_at_once = True
        self.answers = True
        self.takes_snapshots = True
        self.stopped = False
        self._events: list[Event] = []
        self._connections: list[dict[str, object]] = []

    # what a test does
    def say(self, *events: Event) -> None:
        self._events += events
        os.eventfd_write(self.event_fd, 1)

    def show_connections(self, *items: dict[str, object]) -> None:
        self._connections = list(items)

    # what the mesh does
    def start(self, snapshot: Any) -> None:
        self.calls.append(("start",))
        self.published.append(snapshot)

    def publish(self, snapshot: Any) -> None:
        self.calls.append(("publish", snapshot.version))
        self.published.append(snapshot)

    def in_force(self) -> int:
        return int(self.published[-1].version) if self.takes_snapshots else 0

    def listen(self, number: int, fd: int) -> None:
        self.calls.append(("listen", number))
        self.listening[number] = os.dup(fd)

    def unlisten(self, number: int) -> None:
        self.calls.append(("unlisten", number))
        os.close(self.listening.pop(number))

    def drain(self) -> None:
        self.calls.append(("drain",))
        for number in list(self.listening):
            os.close(self.listening.pop(number))
        if self.drains_at_once:
            self.finish_draining()

    def finish_draining(self) -> None:
        self.say(*(Event("drained", thread) for thread in range(self.threads)))

    def abort_in_flight(self) -> None:
        self.calls.append(("abort",))
        self.finish_draining()

    def stop(self, timeout_ms: int = 5000) -> bool:
        self.calls.append(("stop",))
        self.stopped = True
        return True

    def verdict(self, ticket: int, cluster_id: int | None) -> None:
        self.verdicts.append((ticket, cluster_id))

    def events(self, most: int = 4096) -> list[Event]:
        try:
            os.eventfd_read(self.event_fd)
        except BlockingIOError:
            return []
        found, self._events = self._events, []
        return found

    def ask_counters(self) -> int:
        ticket = self.counted.ask()
        if self.answers:
            self.counted.copy()
        return int(ticket)

    def counters_ready(self, ticket: int) -> bool:
        return bool(self.answers)

    def counters(self) -> Reading:
        reading = Reading()
        self.counted.read_into(reading)
        return reading

    def ask_connections(self) -> int:
        return 1

    def connections_ready(self, ticket: int) -> bool:
        return bool(self.answers)

    def connections(self) -> list[dict[str, object]]:
        return self._connections
