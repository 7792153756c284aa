"""The hands of a drain: what it asks and moves, over the engine and the message mesh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fastmesh.control.snapshot import RowLabel
from fastmesh.handover.drain import Left
from fastmesh.limits import OTHER_NAME, ROW_OTHER
from fastmesh.observe.readings import Readings, poll


class Plane(Protocol):
    """The part of the message mesh that is moved from here (fastmesh.mesh.plane)."""

    def suspend_pushes(self) -> None: ...
    def resume_pushes(self) -> None: ...
    def suspending(self) -> Sequence[str]: ...
    def pushing(self) -> Mapping[str, str]: ...
    def close_groups(self) -> None: ...
    def goaway(self) -> None: ...
    def is_said(self) -> bool: ...


class EngineHands:
    """`drain.Hands` of a running mesh. `stop_accepting(keep_paths)` closes the listening sockets of
    this process; `gone` tells whether every engine thread is without clients."""

    def __init__(
        self,
        engine: Any,
        plane: Plane | None,
        readings: Readings,
        *,
        rows: Callable[[], Mapping[RowLabel, int]],
        stop_accepting: Callable[[bool], None],
        gone: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._plane = plane
        self._readings = readings
        self._rows = rows
        self._stop_accepting = stop_accepting
        self._gone = gone
        self._told = False

    @property
    def has_mesh(self) -> bool:
        return self._plane is not None

    def suspend(self) -> None:
        if self._plane is not None:
            self._plane.suspend_pushes()

    def resume(self) -> None:
        if self._plane is not None:
            self._plane.resume_pushes()

    def suspending(self) -> Sequence[str]:
        return () if self._plane is None else self._plane.suspending()

    def pushing(self) -> Mapping[str, str]:
        return {} if self._plane is None else self._plane.pushing()

    def close_groups(self) -> None:
        if self._plane is not None:
            self._plane.close_groups()

    async def groups_closed(self) -> None:
        if self._plane is not None:
            await poll(self._plane.is_said, "commands")
        # A copy of the counters that is asked for now may be made in a turn that began before the
        # engine ran these commands; with the copy after that one it has run them.
        await self._readings.counters()
        await self._readings.counters()

    def let_go(self, *, keep_paths: bool) -> bool:
        # Our own duplicates too: a connect must be refused, not wait in a backlog that nobody
        # reads (or be taken by whoever has the listener now).
        self._stop_accepting(keep_paths)
        if self._plane is not None:
            self._plane.goaway()
            if not self._plane.is_said():
                return False
        if not self._told:
            try:
                self._engine.drain()
            except BlockingIOError:
                return False
            self._told = True
        return True

    def gone(self) -> bool:
        return self._gone()

    async def look(self) -> Left:
        reading = await self._readings.counters()
        value = reading.value
        groups: Counter[str] = Counter()
        connections: Counter[str] = Counter()
        pushed = requests = 0
        # What had no row of its own is counted together, whatever it is: taken for pushes.
        other = RowLabel("group", group=OTHER_NAME)
        for label, row in [*self._rows().items(), (other, ROW_OTHER)]:
            if label.kind == "group":
                groups[label.group] += value(row, "pushes.in_flight")
                pushed += value(row, "pushes.accepted") + value(row, "pushes.oneway_accepted")
            elif label.kind == "cluster":
                requests += value(row, "pushes.in_flight")
            elif label.kind in ("listener", "route"):
                requests += value(row, "requests.in_flight")
                if label.kind == "listener":
                    connections[label.listener] += value(row, "connections")
        return Left(+groups, pushed, requests, +connections)
