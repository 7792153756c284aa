"""An engine without a data plane: it remembers what it was told and says what a test wants.

Its counters are the real ones, so that whatever reads them is tested against real names.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmesh._ext.counters import Reading, ThreadCounters
from fastmesh._ext.push import parse


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
        self.close_events = weakref.finalize(self, os.close, self.event_fd)
        """Once, by whoever comes first."""
        self.counted = ThreadCounters()
        self.calls: list[tuple[Any, ...]] = []
        self.published: list[Any] = []
        self.listening: dict[int, int] = {}
        self.verdicts: list[tuple[int, int | None]] = []
        self.drains_at_once = True
        self.answers = True
        self.takes_snapshots = True
        self.stopped = False
        self.ring_full = False
        self._events: list[Event] = []
        self._connections: list[dict[str, object]] = []

    # what a test does
    def say(self, *events: Event) -> None:
        self._events += events
        os.eventfd_write(self.event_fd, 1)

    def show_connections(self, *items: dict[str, object]) -> None:
        self._connections = list(items)

    # the message mesh: what it was told, as ("reply", handle, frame or None, greet) and so on
    def said(self, kind: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == kind]

    def reply(self, handle: int, data: bytes, greet: bool = False) -> None:
        self._room()
        self.calls.append(("reply", handle, parse(data) if data else None, greet))

    def send_many(self, frames: Sequence[tuple[int, bytes]]) -> int:
        if self.ring_full:
            return 0
        self.calls += [("send", handle, parse(data)) for handle, data in frames]
        return len(frames)

    def call_many(self, calls: Sequence[tuple[int, int, bytes, int]]) -> int:
        if self.ring_full:
            return 0
        self.calls += [("call", handle, parse(data), ticket) for handle, ticket, data, _ in calls]
        return len(calls)

    def subscribe(self, handle: int, groups: Sequence[tuple[int, int]]) -> None:
        self._room()
        self.calls.append(("subscribe", handle, tuple(groups)))

    def peer_groups(self, endpoint_id: int, group_ids: Sequence[int]) -> None:
        self._room()
        self.calls.append(("peer_groups", endpoint_id, tuple(group_ids)))

    def close(self, handle: int) -> None:
        self._room()
        self.calls.append(("close", handle))

    def _room(self) -> None:
        if self.ring_full:
            raise BlockingIOError

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


class FakeSnapshot:
    """Takes what the real one takes, checks what it refers to, and remembers it."""

    def __init__(self, version: int, limits: Mapping[str, int]) -> None:
        self.version = version
        self.limits = limits
        self.clusters: dict[int, dict[str, Any]] = {}
        self.endpoints: dict[int, dict[str, Any]] = {}
        self.listeners: dict[int, dict[str, Any]] = {}
        self.rules: list[dict[str, Any]] = []
        self.groups: dict[int, dict[str, Any]] = {}
        self.schedules: dict[int, Any] = {}
        self.node = b""
        self.sealed = False

    def add_cluster(self, number: int, **what: Any) -> None:
        assert number not in self.clusters
        self.clusters[number] = what

    def add_endpoint(self, cluster_id: int, number: int, **what: Any) -> None:
        assert cluster_id in self.clusters
        assert number not in self.endpoints
        self.endpoints[number] = {"cluster_id": cluster_id, **what}

    def add_listener(self, number: int, **what: Any) -> None:
        assert number not in self.listeners
        self.listeners[number] = what

    def add_rule(self, listener_id: int, **what: Any) -> None:
        assert listener_id in self.listeners
        assert what["cluster_id"] in self.clusters
        for number in what.get("endpoints", ()):
            assert self.endpoints[number]["cluster_id"] == what["cluster_id"]
        self.rules.append({"listener_id": listener_id, **what})

    def add_schedule(self, number: int, native: Any) -> None:
        assert number not in self.schedules
        self.schedules[number] = native

    def add_group(self, number: int, **what: Any) -> None:
        assert 1 <= number <= 65535
        assert number not in self.groups
        assert what["name"] not in [g["name"] for g in self.groups.values()]
        assert what["schedule_id"] is None or what["schedule_id"] in self.schedules
        self.groups[number] = what

    def set_node(self, name: bytes) -> None:
        self.node = name

    def seal(self) -> None:
        assert not self.sealed
        self.sealed = True

    def brokers_of(self, topic: str, **headers: str) -> list[str]:
        """Addresses that a publish may go to, by the first rule that takes it."""
        for rule in self.rules:
            if rule["service"] not in (None, topic.encode()):
                continue
            if all(headers.get(k.decode()) == v.decode() for k, v in rule["headers"]):
                numbers = rule["endpoints"] or self.endpoints
                return sorted(str(self.endpoints[n]["address"]) for n in numbers)
        return []
